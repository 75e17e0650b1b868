//! What each command promises: its results, and to programs `--json`, `--quiet` and `--help`.

use expect_test::expect;
use finetune_dataset::ChatTokenizer;
use serde_json::Value;

use crate::folder::{CRASH_RECIPE, Folder, metrics};
use crate::program::BINARY;

mod chat;
mod data;
mod eval;
mod export;
mod generate;
mod plan;
pub(crate) mod serve;
mod validate;

/// What a command prints with `--json`: one object, and nothing on stderr.
fn json_of(folder: &Folder, arguments: &[&str]) -> Value {
    let ended = folder.finetune(arguments).expect(0);
    assert_eq!(ended.stderr, "", "{arguments:?}: with --json nothing but the object is said");
    ended.json()
}

const CHAT_RECIPE: &str = r#"output_dir = "run"
[model]
path = "model"
[data]
train = "train.jsonl"
[train]
method = "full"
max_steps = 3
[optimizer]
learning_rate = 1e-3
"#;

/// The chat model with weights of its own in `run/model`.
pub(crate) fn chat_model() -> Folder {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    folder.write(
        "train.jsonl",
        br#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]}
{"messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you."}]}
"#,
    );
    folder.run("run", &[]).expect(0);
    folder
}

#[test]
fn inspect_shows_tokens_and_mask() {
    let folder = chat_model();
    let row = json_of(&folder, &["inspect", "recipe.toml", "--row", "2", "--json"]);
    assert!(row["origin"].as_str().expect("text").ends_with("train.jsonl:2"));
    let text = "<|user|>\nBye<|end|><|assistant|>\nSee you.<|end|>";
    assert_eq!(row["text"], text);
    let ids: Vec<u32> = serde_json::from_value(row["token_ids"].clone()).expect("ids");
    let trained: Vec<bool> = serde_json::from_value(row["trained"].clone()).expect("a mask");
    assert_eq!(ids.len(), trained.len());
    let kept: Vec<u32> = ids.iter().zip(&trained).filter(|(_, trained)| **trained).map(|(id, _)| *id).collect();
    let tokenizer = ChatTokenizer::load(&folder.path("model"), None).expect("a tokenizer");
    assert_eq!(tokenizer.decode(&kept, false).expect("text"), "See you.<|end|>", "the answer and its end, no more");

    let shown = folder.finetune(&["inspect", "recipe.toml"]).expect(0);
    assert!(shown.stdout.contains("⟦Hello there.<|end|>⟧"), "what is trained on is marked: {}", shown.stdout);
    assert!(!shown.stdout.contains("underlined") && !shown.stdout.contains('Ġ'), "{}", shown.stdout);
    let longest = json_of(&folder, &["inspect", "recipe.toml", "--longest", "--json"]);
    let length = |row: &Value| row["token_ids"].as_array().expect("ids").len();
    let first = json_of(&folder, &["inspect", "recipe.toml", "--json"]);
    assert_eq!(length(&longest), length(&row).max(length(&first)));
    folder.finetune(&["inspect", "recipe.toml", "--eval"]).expect(2).says("names no rows to evaluate on");
    let eval = ["inspect", "recipe.toml", "--eval", "--json", "--set", "data.eval=train.jsonl", "--row", "2"];
    assert_eq!(json_of(&folder, &eval)["text"], text);
}

fn loss(folder: &Folder, arguments: &[&str]) -> f64 {
    let arguments = [&["eval"], arguments, &["--data", "eval.jsonl", "--json"]].concat();
    json_of(folder, &arguments)["loss"].as_f64().expect("a loss")
}

#[test]
fn quiet_says_nothing_on_success() {
    let folder = chat_model();
    for arguments in [
        ["run", "recipe.toml", "--output-dir", "quiet", "--quiet"].as_slice(),
        &["run", "recipe.toml", "--output-dir", "quiet", "--quiet", "--resume"],
        &["validate", "recipe.toml", "--quiet"],
        &["inspect", "recipe.toml", "--quiet"],
        &["eval", "run/model", "--data", "train.jsonl", "--quiet"],
        &["generate", "run/model", "--prompt", "Hi", "--max-new-tokens", "2", "--quiet"],
    ] {
        let ended = folder.finetune(arguments).expect(0);
        assert_eq!(ended.stderr, "", "{arguments:?}");
        match arguments[0] {
            "run" => assert_eq!(ended.stdout, "quiet/model\n", "the result of a run is where it is"),
            _ => assert!(!ended.stdout.is_empty(), "{arguments:?}: results are printed all the same"),
        }
    }
}

/// A run says what it trains before the first step. At its end it prints commands to type next, and
/// they work.
#[test]
fn a_run_says_what_it_trains_and_what_came_of_it() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let ended = folder.run("my runs/a", &[]).expect(0);
    let said = &ended.stderr;
    let rows = metrics(&folder.path("my runs/a"));
    let number = |key: &str, step: u64| {
        let row = rows.iter().find(|row| row["step"] == step && row.get(key).is_some());
        row.and_then(|row| row[key].as_f64()).unwrap_or_else(|| panic!("no {key} of step {step}"))
    };
    let losses = format!(
        "loss {:.4} → {:.4}, held-back rows {:.4} → {:.4}\n",
        number("loss", 1),
        number("loss", 10),
        number("eval_loss", 0),
        number("eval_loss", 10)
    );
    for part in [
        "model: LoRA of rank 4, alpha 8 on all linear layers (",
        "10 steps of 5 rows (2 at a time), 3.3 passes over 12 rows; learning rate 5.0e-2, constant\n",
        &format!("before training  evaluation loss {:.4}\n", number("eval_loss", 0)),
        "optimizer.learning_rate = 0.05 is far above",
        &losses,
        "adapter/ is step 10, the last; the best on held-back rows was step ",
        "result and checkpoints in my runs/a; open report.html there\n",
    ] {
        assert!(said.contains(part), "lacks {part:?}:\n{said}");
    }
    assert!(!said.contains("try it"), "a model without a tokenizer answers nothing:\n{said}");
    let pasted: Vec<&str> = said.lines().filter_map(|line| line.split_once(BINARY)).map(|(_, words)| words).collect();
    assert_eq!(pasted.len(), 2, "{said}");
    for words in pasted {
        let script = format!("{BINARY} {words}");
        let status = std::process::Command::new("sh").args(["-c", &script]).current_dir(folder.path("")).output();
        let output = status.expect("a shell");
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    }
    assert!(folder.path("my runs/a-merged/model.safetensors").is_file());
    let report = std::fs::read_to_string(folder.path("my runs/a/report.html")).expect("a report");
    for part in
        ["<title>step 0: ", "model, LoRA, on train.jsonl (12 rows), held back eval.jsonl (", "loss on held-back rows"]
    {
        assert!(report.contains(part), "lacks {part:?}");
    }
    assert!(!report.contains("http-equiv"), "a run that is done is not looked at again");
}

#[test]
fn help_of_every_command() {
    let folder = Folder::empty();
    for (command, says) in [
        ("run", "checkpoints, metrics.jsonl, report.html"),
        ("validate", "without training"),
        ("inspect", "which of them are trained on"),
        ("eval", "Loss and perplexity"),
        ("generate", "chat template"),
        ("chat", "/help lists them"),
        ("serve", "each adapter is a model id"),
        ("export", "newest checkpoint that verifies"),
        ("quantize", "bitsandbytes"),
        ("schema", "for editors"),
        ("completions", "fpath"),
        ("man", "man -l"),
        ("watch", "over ssh"),
        ("compare", "settings that differ"),
    ] {
        let long = folder.finetune(&[command, "--help"]).expect(0).stdout;
        assert!(long.contains(says), "{command} --help lacks {says:?}:\n{long}");
        assert!(long.contains(&format!("Usage: finetune {command}")), "{long}");
    }
}

#[test]
fn help_lists_every_command() {
    let top = Folder::empty().finetune(&["--help"]).expect(0);
    expect![[r#"
        Fine-tunes language models with LoRA on the machine you have.

        A run is described by a recipe, one TOML file:

          finetune validate recipe.toml     find everything that can go wrong, without training
          finetune run recipe.toml          train; `--resume` goes on after an interruption
          finetune generate RUN --prompt "Hello"
          finetune export RUN --format merged --output DIR

        RUN is the recipe's output_dir. `finetune init` writes a recipe and rows to begin with.
        recipes/quickstart.toml is a small one that runs anywhere; recipes/README.md explains every key.

        Usage: finetune [OPTIONS] <COMMAND>

        Commands:
          run          Train as a recipe says
          validate     Check a recipe, its model and every row of its data, without training
          plan         Say what a recipe takes on given machines: memory, seconds a step, what to choose
          inspect      Show the tokens of a row, and which of them are trained on
          init         Write a recipe and a small data set to begin with, which run as they are
          import       Turn a configuration of axolotl, LLaMA-Factory, torchtune or mlx-lm into a recipe
          eval         Loss and perplexity of a model on a file of rows
          generate     Continue a prompt with a model
          chat         Talk with a model in the terminal
          serve        Answer requests of OpenAI's interface over HTTP
          export       Write a trained adapter in another form
          quantize     Pack a model in 4 or 8 bits a weight, as its reference program does
          watch        Follow runs as they go on, here or at other hosts
          compare      Compare runs: settings that differ, scores, curves
          launch       Train with several processes, here or on several machines
          devices      The devices that this build can train on, with memory and number types
          download     Fetch a model, an adapter or a dataset from the Hugging Face hub
          upload       Put an adapter or a model on the Hugging Face hub, with its card
          schema       Print the JSON schema of recipes, for editors
          completions  Print the completions of a shell
          man          Print the manual page of a command, or write all of them
          cluster      Several machines: find, set up, examine and measure them
          help         Print this message or the help of the given subcommand(s)

        Options:
          -h, --help
                  Print help (see a summary with '-h')

          -V, --version
                  Print version

        Global options:
          -q, --quiet
                  Print errors and results only

          -v, --verbose
                  Print more about what is going on
    "#]]
    .assert_eq(&top.stdout);
}
