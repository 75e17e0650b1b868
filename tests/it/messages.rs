//! What a user sees after a mistake: everything on stderr, nothing on stdout, and the exit code.

use expect_test::{Expect, expect};

use crate::folder::{CRASH_RECIPE, Folder, golden, metrics, repository};
use crate::program::{finetune, run};

/// Runs `finetune ARGUMENTS` in the folder and compares what it says. Paths of this machine become `<folder>` and
/// `<repository>`.
#[track_caller]
fn check(folder: &Folder, arguments: &[&str], want: Expect) {
    let ended = run(finetune(arguments).current_dir(folder.path("")));
    assert_eq!(ended.stdout, "", "errors go to stderr");
    let code = ended.code.unwrap_or_else(|| panic!("{ended:?}"));
    let temporary = folder.path("");
    let text = ended
        .stderr
        .replace(temporary.to_str().expect("UTF-8").trim_end_matches('/'), "<folder>")
        .replace(repository().to_str().expect("UTF-8"), "<repository>");
    want.assert_eq(&format!("{text}(exit code {code})\n"));
}

const RUN: [&str; 2] = ["run", "recipe.toml"];

/// Full fine-tuning of the chat model, which needs no weights.
const CHAT_RECIPE: &str = r#"output_dir = "run"
[model]
path = "model"
[data]
train = "train.jsonl"
max_seq_len = 64
[train]
method = "full"
"#;

#[test]
fn an_unknown_key() {
    let folder = Folder::with_recipe(&CRASH_RECIPE.replace("dropout = 0.1", "dropuot = 0.1"));
    check(
        &folder,
        &RUN,
        expect![[r#"
        error: unknown key `dropuot` in [lora]
         --> recipe.toml:9:1
          |
        9 | dropuot = 0.1
          | ^^^^^^^
          |
          = hint: did you mean `dropout`?
        (exit code 2)
    "#]],
    );
}

#[test]
fn a_key_of_another_program() {
    let recipe = CRASH_RECIPE.replace("rank = 4", "lora_r = 4").replace("max_steps = 10", "iters = 10");
    check(
        &Folder::with_recipe(&recipe),
        &RUN,
        expect![[r#"
        error: unknown key `lora_r` in [lora]
         --> recipe.toml:7:1
          |
        7 | lora_r = 4
          | ^^^^^^
          |
          = hint: ours is `rank`

        error: unknown key `iters` in [train]
          --> recipe.toml:14:1
           |
        14 | iters = 10
           | ^^^^^
           |
           = hint: ours is `max_steps`; mlx-lm counts micro-batches, ours are optimizer steps: divide by its grad_accumulation_steps
        (exit code 2)
    "#]],
    );
}

#[test]
fn a_value_of_the_wrong_type() {
    let folder = Folder::with_recipe(&CRASH_RECIPE.replace("learning_rate = 5e-2", "learning_rate = \"5e-2\""));
    check(
        &folder,
        &RUN,
        expect![[r#"
        error: expected a number, found a string
          --> recipe.toml:18:17
           |
        18 | learning_rate = "5e-2"
           |                 ^^^^^^
           |
           = hint: write it without quotes: 5e-2
        (exit code 2)
    "#]],
    );
}

#[test]
fn no_toml_at_all() {
    check(
        &Folder::with_recipe("[model\npath = 1\n"),
        &RUN,
        expect![[r#"
        error: not TOML: unclosed table, expected `]`
         --> recipe.toml:1:7
          |
        1 | [model
          |       ^
        (exit code 2)
    "#]],
    );
}

#[test]
fn an_unknown_key_on_the_command_line() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    check(
        &folder,
        &["run", "recipe.toml", "--set", "lora.rnak=8", "--set", "lora.rank=many"],
        expect![[r#"
        error: --set lora.rnak=8: unknown key `rnak` in [lora]

        hint: did you mean `rank`?

        error: --set lora.rank=many: expected an integer, found a string
        (exit code 2)
    "#]],
    );
}

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
        reading rows
        error: model.path: `models/none` is neither a directory nor a model in the Hugging Face cache

        hint: a directory needs config.json, tokenizer.json and model.safetensors; paths are relative to the recipe
        hint: models of the hub are found in the cache (HF_HOME), where `hf download OWNER/NAME` puts them
        (exit code 2)
    "#]],
    );
    check(
        &folder,
        &["run", "recipe.toml", "--set", "data.train=none.jsonl"],
        expect![[r#"
        reading rows
        error: cannot read none.jsonl: No such file or directory (os error 2)

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
            (exit code 2)
        "#]],
    );
}

#[test]
fn settings_that_are_not_available() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    for (set, want) in [
        (
            "lora.use_dora=true",
            expect![[r#"
            reading rows
            error: lora.use_dora = true is not available yet; plain LoRA and rsLoRA are
            (exit code 2)
        "#]],
        ),
        (
            "model.quantization=nf4",
            expect![[r#"
            reading rows
            error: model.quantization = nf4 is not available yet; leave it out
            (exit code 2)
        "#]],
        ),
    ] {
        check(&folder, &["run", "recipe.toml", "--set", set], want);
    }
}

#[test]
fn a_target_that_no_layer_has() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    check(
        &folder,
        &["run", "recipe.toml", "--set", "lora.target_modules=[\"c_attn\"]"],
        expect![[r#"
        reading rows
        error: target_modules: `c_attn` matches no linear layer of the model

        hint: linear layers of this model are called `q_proj`, `k_proj`, `v_proj`, `o_proj` and 3 more
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
fn rows_that_cannot_be_read() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    folder.write(
        "train.jsonl",
        br#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
{"messages": [{"role": "user", "content": "Hi"}
{"messages": [{"role": "user"}, {"role": "assistant", "content": "Hello"}]}

{"messages": "Hi"}
{"conversation": []}
"#,
    );
    check(
        &folder,
        &RUN,
        expect![[r#"
        reading rows
        error: 4 rows cannot be used
          train.jsonl:2:47: not JSON: EOF while parsing a list; expected one JSON object on each line, not one over several
            {"messages": [{"role": "user", "content": "Hi"}
          train.jsonl:3: the key messages[0].content is missing; expected "messages": a list of {"role", "content"}
            {"messages": [{"role": "user"}, {"role": "assistant", "content": "Hello"}]}
          train.jsonl:5: messages is a string; expected a list
            {"messages": "Hi"}
          train.jsonl:6: no key that tells the format; its keys are conversation; expected one of the keys messages, prompt, text, instruction, conversations, input_ids
            {"conversation": []}
        (exit code 2)
    "#]],
    );
}

#[test]
fn a_row_that_is_too_long() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    let text = "word ".repeat(200);
    folder.write("train.jsonl", format!("{{\"text\": \"short\"}}\n{{\"text\": \"{text}\"}}\n").as_bytes());
    check(
        &folder,
        &RUN,
        expect![[r#"
        reading rows
        error: 1 row cannot be used
          train.jsonl:2: the row has 602 tokens, more than data.max_seq_len = 64
            {"text": "word word word word word word word word word word word word word word …

        hint: raise data.max_seq_len, or set data.overlong to "truncate" or "drop"
        (exit code 2)
    "#]],
    );
}

#[test]
fn a_row_without_a_token_to_train_on() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    folder.write("train.jsonl", b"{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}\n");
    check(
        &folder,
        &RUN,
        expect![[r#"
        reading rows
        error: 1 row cannot be used
          train.jsonl:1: no assistant message to train on; the roles are user
            {"messages": [{"role": "user", "content": "Hi"}]}
        (exit code 2)
    "#]],
    );
}

#[test]
fn rows_of_two_formats() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    folder.write("train.jsonl", b"{\"text\": \"Hi\"}\n{\"prompt\": \"Hi\", \"completion\": \"Hello\"}\n");
    check(
        &folder,
        &RUN,
        expect![[r#"
        reading rows
        error: 1 row cannot be used
          train.jsonl:2: this is a row of format prompt_completion, and the first row (train.jsonl:1) is text; expected format text in every row
            {"prompt": "Hi", "completion": "Hello"}

        hint: one dataset has one format: convert the rows, or name the format with data.format
        (exit code 2)
    "#]],
    );
}

#[test]
fn no_rows() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    folder.write("train.jsonl", b"\n");
    check(
        &folder,
        &RUN,
        expect![[r#"
        reading rows
        error: no rows in train.jsonl

        hint: each line of a dataset is one JSON object, as {"messages": [...]}
        (exit code 2)
    "#]],
    );
}

/// The rows to look at are named, no weight was changed, and what was saved before is still there.
#[test]
fn numbers_that_are_not_finite() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    check(
        &folder,
        &["run", "recipe.toml", "--quiet", "--set", "optimizer.learning_rate=1e30", "--set", "train.max_grad_norm=0"],
        expect![[r#"
            error: the loss is not finite in step 2; no weight was changed by it

            hint: rows of the step: train.jsonl:6, train.jsonl:10, train.jsonl:5, train.jsonl:1, train.jsonl:2
            hint: no checkpoint is known to be from before that; from the beginning with a lower rate: finetune run run/recipe.toml --output-dir run-2 --set optimizer.learning_rate=2e-4 --set train.max_grad_norm=1.0
            (exit code 4)
        "#]],
    );
    let steps = metrics(&folder.path("run")).iter().filter(|row| row.get("loss").is_some()).count();
    assert_eq!(steps, 1, "step 2 is not among the steps done");
    assert!(!folder.path("run/adapter").exists());
}

#[test]
fn commands_on_the_wrong_directory() {
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
            (exit code 2)
        "#]],
    );
    check(
        &folder,
        &["export", "empty", "--format", "gguf", "--output", "out"],
        expect![[r#"
            error: this version exports merged and peft

            hint: export merged: llama.cpp's and mlx-lm's own converters read that directory
            (exit code 2)
        "#]],
    );
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
        error: the following required arguments were not provided:
          <RECIPE>

        Usage: finetune run <RECIPE>

        For more information, try '--help'.
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

/// What other programs call an option is answered with ours.
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
        (vec!["generate", "tiny.gguf"], "tiny.gguf is a GGUF model"),
        (
            vec!["generate", "model/model.safetensors"],
            "is one file of model, a model directory: the directory is meant",
        ),
        (vec!["generate", "runs/nope"], "there is no runs/nope here"),
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
        let ended = run(finetune(&arguments).current_dir(folder.path(""))).expect(2).says(says);
        let errors = ended.stderr.lines().filter(|line| line.starts_with("error:")).count();
        assert_eq!(errors, 1, "{arguments:?}: {}", ended.stderr);
    }
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    folder.write("model/model.safetensors", pointer);
    let ended = run(finetune(["eval", "model", "--data", "train.jsonl"]).current_dir(folder.path(""))).expect(2);
    ended.says("model/model.safetensors is a git-lfs pointer in place of the file").says("git lfs pull");
}
