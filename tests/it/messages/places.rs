//! Files and directories that are missing, damaged or of another kind.

use expect_test::expect;

use super::{RUN, check};
use crate::folder::{CRASH_RECIPE, Folder, golden};

#[test]
fn files_that_are_not_there() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    check(
        &folder,
        &["run", "recpie.toml"],
        expect![[r#"
        error: there is no recipe recpie.toml

        hint: in . there is recipe.toml
        (exit code 2)
    "#]],
    );
    check(
        &folder,
        &["run", "recipe.toml", "--set", "model.path=models/none"],
        expect![[r#"
        error: there is no directory models/none, and models/none is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids to fetch it

        hint: with a network, `HF_HUB_OFFLINE=0 finetune download models/none` fetches it
        (exit code 2)
    "#]],
    );
    check(
        &folder,
        &["run", "recipe.toml", "--set", "data.train=none.jsonl"],
        expect![[r#"
        reading rows
        error: there is no none.jsonl

        hint: paths in a recipe are relative to the recipe file
        (exit code 2)
    "#]],
    );
    check(
        &folder,
        &["run", "recipe.toml", "--resume", "run/checkpoints/step-000100"],
        expect![[r#"
            reading rows
            error: run/checkpoints/step-000100: there is no such checkpoint

            hint: `--resume` alone takes the newest of run/checkpoints, which has none yet
            (exit code 2)
        "#]],
    );
}

#[test]
fn a_model_without_one_of_its_tensors() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let mut bytes = std::fs::read(golden("qwen3/model.safetensors")).expect("a golden model");
    let name = b"model.norm.weight";
    let place = bytes.windows(name.len()).position(|window| window == name).expect("its name is in the header");
    bytes[place + name.len() - 1] = b'x';
    folder.write("model/model.safetensors", &bytes);
    check(
        &folder,
        &RUN,
        expect![[r#"
        reading rows
        error: ./model: the model has no tensor `model.norm.weight`, which Qwen3ForCausalLM with this config.json needs

        hint: config.json and the weights do not belong together, or a download is not complete
        (exit code 2)
    "#]],
    );
}

#[test]
fn exports_of_the_wrong_directory() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    std::fs::create_dir_all(folder.path("empty/checkpoints")).expect("a new directory");
    check(
        &folder,
        &["export", "empty", "--format", "merged", "--output", "out"],
        expect![[r#"
        error: empty/checkpoints has no checkpoint that verifies

        hint: train first, or name a checkpoint
        (exit code 2)
    "#]],
    );
    check(
        &folder,
        &["export", "model", "--format", "merged", "--output", "out"],
        expect![[r#"
            error: model is a model directory, with no adapter to export

            hint: to merge an adapter into it, add --adapter ADAPTER; a run or a checkpoint is exported by its own name
            (exit code 2)
        "#]],
    );
    check(
        &folder,
        &["export", "none", "--format", "peft", "--output", "out"],
        expect![[r#"
            error: there is no none

            hint: the path is relative to the current directory; a model of the hub is called OWNER/NAME
            (exit code 2)
        "#]],
    );
    check(
        &folder,
        &["export", "empty", "--format", "gguf", "--output", "out"],
        expect![[r#"
            error: empty/checkpoints has no checkpoint that verifies

            hint: train first, or name a checkpoint
            (exit code 2)
        "#]],
    );
}

#[test]
fn commands_on_the_wrong_directory() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    std::fs::create_dir_all(folder.path("empty/checkpoints")).expect("a new directory");
    check(
        &folder,
        &["generate", "model", "--prompt", "Hi"],
        expect![[r#"
            error: model has no tokenizer.json, without which there is no text

            hint: copy the tokenizer files of the model there, or name another model directory
            (exit code 2)
        "#]],
    );
    check(
        &folder,
        &["eval", "model", "--data", "none.jsonl"],
        expect![[r#"
            error: --data none.jsonl: there is no such file

            hint: the path is relative to the current directory
            (exit code 2)
        "#]],
    );
    check(
        &folder,
        &["eval", "empty", "--data", "train.jsonl"],
        expect![[r#"
            error: empty is a run of finetune that has no result and no checkpoint that verifies

            hint: train first: `finetune run empty --resume` goes on with it
            (exit code 2)
        "#]],
    );
    check(
        &folder,
        &["inspect", "recipe.toml", "--row", "13"],
        expect![[r#"
        error: --row 13: there is no such row

        hint: the training data has rows 1 to 12
        (exit code 2)
    "#]],
    );
}
