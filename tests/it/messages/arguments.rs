//! Arguments that no command takes, and paths at which something else lies.

use expect_test::expect;

use super::check;
use crate::folder::{CRASH_RECIPE, Folder};

#[test]
fn arguments_that_are_none() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    check(
        &folder,
        &["train", "recipe.toml"],
        expect![[r#"
        error: there is no command `train`

        hint: `finetune run RECIPE.toml` trains
        (exit code 2)
    "#]],
    );
    check(
        &folder,
        &["run"],
        expect![[r#"
        error: `finetune run` needs a recipe, a TOML file

        hint: `finetune init DIR` writes one, with rows to begin with
        hint: without one: --model MODEL --data FILE
        (exit code 2)
    "#]],
    );
    check(
        &folder,
        &["generate", "model", "--prompt", "Hi", "--temperature", "-1"],
        expect![[r#"
            error: --temperature must be 0 or more

            hint: 0 takes the most likely token each time
            (exit code 2)
        "#]],
    );
}

/// Another program's name of an option is answered with ours.
#[test]
fn options_of_other_programs() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    for (arguments, want) in [
        (
            &["run", "recipe.toml", "--lr", "1e-4"][..],
            expect![[r#"
                error: `finetune run` has no option --lr

                hint: write --set optimizer.learning_rate=1e-4, or `learning_rate` in [optimizer] of the recipe
                (exit code 2)
            "#]],
        ),
        (
            &["run", "recipe.toml", "train.epochs=3"],
            expect![[r#"
                error: `finetune run` has no place for `train.epochs=3`

                hint: write --set train.epochs=3
                (exit code 2)
            "#]],
        ),
        (
            &["generate", "model", "--adapter-path", "x", "--prompt", "Hi"],
            expect![[r#"
                error: `finetune generate` has no option --adapter-path

                hint: ours is --adapter
                (exit code 2)
            "#]],
        ),
        (
            &["run", "--resume", "recipe.toml"],
            expect![[r#"
                error: --resume takes recipe.toml for a checkpoint, and then the recipe is missing

                hint: write the recipe first: finetune run recipe.toml --resume
                (exit code 2)
            "#]],
        ),
    ] {
        check(&folder, arguments, want);
    }
}

/// (what lies at the path, how a command takes it, what is said)
#[test]
fn things_that_are_something_else() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.write("axolotl.yml", b"base_model: acme/tiny\nsequence_len: 512\n");
    folder.write("tiny.gguf", b"GGUF\x03\0\0\0");
    let asked = ["--prompt", "Hi"];
    for (arguments, says) in [
        (vec!["run", "axolotl.yml"], "axolotl.yml is a YAML file, as axolotl has them; recipes are TOML here"),
        (vec!["validate", "train.jsonl"], "rows are named by `train` in [data] of a recipe"),
        (vec!["inspect", "model"], "model is a model directory: it is named by `path` in [model] of a recipe"),
        (vec!["generate", "tiny.gguf"], "tiny.gguf"),
        (
            vec!["generate", "model/model.safetensors"],
            "is one file of model, a model directory: the directory is meant",
        ),
        (vec!["generate", "runs/nope"], "there is no directory runs/nope"),
        (vec!["generate", "https://huggingface.co/acme/tiny"], "the model is called acme/tiny here"),
        (vec!["generate", "model", "--adapter", "train.jsonl"], "train.jsonl is a file of rows"),
        (vec!["generate", "model", "--adapter", "model"], "model is a model directory, not an adapter"),
        (vec!["eval", "train.jsonl", "--data", "train.jsonl"], "rows are named with --data"),
        (vec!["eval", "model", "--data", "model"], "one file of rows is meant"),
        (
            vec!["export", "recipe.toml", "--format", "merged", "--output", "out"],
            "a model, a run or an adapter is meant",
        ),
    ] {
        let arguments = if arguments[0] == "generate" { [&arguments[..], &asked].concat() } else { arguments };
        let ended = folder.finetune(&arguments).expect(2).says(says);
        let errors = ended.stderr.lines().filter(|line| line.starts_with("error:")).count();
        assert_eq!(errors, 1, "{arguments:?}: {}", ended.stderr);
    }
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    folder.write("model/model.safetensors", pointer);
    let ended = folder.finetune(&["eval", "model", "--data", "train.jsonl"]).expect(2);
    ended.says("model/model.safetensors is a git-lfs pointer in place of the file").says("git lfs pull");
}
