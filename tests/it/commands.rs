//! The other commands, and what each promises to programs: `--json`, `--quiet`, `--help`.

use expect_test::expect;
use finetune_dataset::ChatTokenizer;
use serde_json::{Value, json};

use crate::folder::{CRASH_RECIPE, Folder, golden, tree};
use crate::program::{BINARY, Ended, finetune, run};

fn in_folder(folder: &Folder, arguments: &[&str]) -> Ended {
    run(finetune(arguments).current_dir(folder.path("")))
}

fn json_of(folder: &Folder, arguments: &[&str]) -> Value {
    let ended = in_folder(folder, arguments).expect(0);
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
fn chat_model() -> Folder {
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
fn validate_counts_what_the_files_hold() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let text = std::fs::read_to_string(folder.path("train.jsonl")).expect("rows");
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("a row")).collect();
    let numbers = |key: &str| -> Vec<Vec<i64>> {
        rows.iter().map(|row| serde_json::from_value(row[key].clone()).expect("numbers")).collect()
    };
    let mut lengths: Vec<usize> = numbers("input_ids").iter().map(Vec::len).collect();
    lengths.sort_unstable();
    // The first token has nothing before it to be predicted from.
    let trained: usize = numbers("labels").iter().map(|row| row.iter().skip(1).filter(|id| **id != -100).count()).sum();

    let found = json_of(&folder, &["validate", "recipe.toml", "--json"]);
    let train = &found["train"];
    assert_eq!(train["rows"], rows.len());
    assert_eq!(train["tokens"], lengths.iter().sum::<usize>());
    assert_eq!(train["trained_tokens"], trained);
    assert_eq!(train["longest"], *lengths.last().expect("a row"));
    assert_eq!(train["truncated"], 0);
    assert_eq!(train["dropped"], 0);
    assert_eq!(found["eval"]["rows"], 12);
    assert_eq!(found["architecture"], "Qwen3ForCausalLM");
    assert_eq!((&found["steps"], &found["steps_per_epoch"]), (&json!(10), &json!(3)));
    assert!(!folder.path("run").exists(), "validate writes nothing");

    // Rows longer than 20 tokens, left out or cut.
    let longer = lengths.iter().filter(|length| **length > 20).count();
    assert!(longer > 0);
    let short = ["validate", "recipe.toml", "--json", "--set", "data.max_seq_len=20", "--set"];
    let dropped = json_of(&folder, &[&short[..], &["data.overlong=drop", "--set", "data.eval=train.jsonl"]].concat());
    assert_eq!(dropped["train"]["dropped"], longer);
    assert_eq!(dropped["train"]["rows"], rows.len() - longer);
    let cut = json_of(&folder, &[&short[..], &["data.overlong=truncate", "--set", "data.eval=train.jsonl"]].concat());
    assert_eq!(cut["train"]["truncated"], longer);
    assert_eq!(cut["train"]["tokens"], lengths.iter().map(|length| (*length).min(20)).sum::<usize>());

    let text = in_folder(&folder, &["validate", "recipe.toml", "--quiet"]).expect(0);
    assert_eq!(text.stderr, "");
    let line = format!("train       {} rows, {} tokens, {trained} trained", rows.len(), train["tokens"]);
    assert!(text.stdout.contains(&line), "{}", text.stdout);
}

/// validate foretells what run says: the same counts of parameters, rows and steps.
#[test]
fn validate_and_run_agree() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let found = json_of(&folder, &["validate", "recipe.toml", "--json"]);
    let ended = folder.run("run", &[]).expect(0);
    let trained = found["trained_parameters"].as_u64().expect("a number");
    let thousands = format!("training steps 1 to 10, {},{:03} parameters", trained / 1000, trained % 1000);
    ended.says(&thousands).says(&format!("{} rows, {} tokens", found["train"]["rows"], found["train"]["tokens"]));
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

    let shown = in_folder(&folder, &["inspect", "recipe.toml"]).expect(0);
    assert!(shown.stdout.contains("Hello there."), "{}", shown.stdout);
}

/// A file's loss, against transformers and PEFT.
#[test]
fn eval_equals_transformers() {
    for family in ["llama", "llama3", "mistral", "qwen2", "qwen3"] {
        let directory = golden(family);
        let text = std::fs::read_to_string(directory.join("golden.json")).expect("goldens");
        let golden: Value = serde_json::from_str(&text).expect("JSON");
        let folder = Folder::empty();
        let [model, rows, adapter] = [directory.clone(), directory.join("rows.jsonl"), directory.join("adapter")]
            .map(|path| path.to_str().expect("UTF-8").to_owned());
        for (arguments, key) in [(vec![], "base_loss"), (vec!["--adapter", adapter.as_str()], "adapter_loss")] {
            let found = json_of(&folder, &[&["eval", &model, "--data", &rows, "--json"], &arguments[..]].concat());
            let want = golden["rows_jsonl"][key].as_f64().expect("a loss");
            let loss = found["loss"].as_f64().expect("a loss");
            assert!((loss - want).abs() <= 1e-6 * want, "{family} {key}: {loss} against {want}");
            assert!((found["perplexity"].as_f64().expect("a number") - loss.exp()).abs() < 1e-9 * loss.exp());
            assert_eq!(found["tokens"], golden["rows_jsonl"]["trained_tokens"]);
            assert_eq!(found["rows"], 12);
        }
    }
}

#[test]
fn generate_is_repeatable() {
    let folder = chat_model();
    let generate = |more: &[&str]| {
        let arguments = ["generate", "run/model", "--prompt", "Hi", "--max-new-tokens", "24", "--json"];
        json_of(&folder, &[&arguments[..], more].concat())
    };
    let greedy = generate(&[]);
    assert_eq!(greedy, generate(&["--seed", "9"]), "greedy text does not depend on the seed");
    let drawn = |seed: &str| generate(&["--temperature", "1.5", "--top-p", "0.9", "--seed", seed]);
    assert_eq!(drawn("1"), drawn("1"), "the same seed gives the same text");
    assert_ne!(drawn("1"), drawn("2"));

    let tokenizer = ChatTokenizer::load(&folder.path("model"), None).expect("a tokenizer");
    for answer in [greedy, drawn("1"), generate(&["--raw"])] {
        let ids = |key: &str| -> Vec<u32> { serde_json::from_value(answer[key].clone()).expect("ids") };
        let tokens = ids("token_ids");
        assert!(!tokens.is_empty() && tokens.len() <= 24);
        assert_eq!(answer["text"], tokenizer.decode(&tokens, true).expect("text"));
        let ended = tokenizer.eos_ids().contains(tokens.last().expect("a token"));
        assert!(ended || tokens.len() == 24, "{answer} {:?}", tokenizer.eos_ids());
        assert_eq!(answer["finish_reason"], if ended { "stop" } else { "length" });
    }
    let prompt =
        |answer: Value| -> Vec<u32> { serde_json::from_value(answer["prompt_token_ids"].clone()).expect("ids") };
    let decoded = |ids: Vec<u32>| tokenizer.decode(&ids, false).expect("text");
    assert_eq!(decoded(prompt(generate(&[]))), "<|user|>\nHi<|end|><|assistant|>\n");
    assert_eq!(decoded(prompt(generate(&["--raw"]))), "Hi", "--raw leaves the template out");

    // Without --json, the text alone.
    let text = in_folder(&folder, &["generate", "run/model", "--prompt", "Hi", "--max-new-tokens", "24"]).expect(0);
    assert_eq!(text.stdout, format!("{}\n", generate(&[])["text"].as_str().expect("text")));
    assert_eq!(text.stderr, "");
}

fn loss(folder: &Folder, arguments: &[&str]) -> f64 {
    let arguments = [&["eval"], arguments, &["--data", "eval.jsonl", "--json"]].concat();
    json_of(folder, &arguments)["loss"].as_f64().expect("a loss")
}

/// Three ways to the same model: base and adapter, the run merged, base and adapter merged.
#[test]
fn a_merged_model_is_base_and_adapter() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    let with_adapter = loss(&folder, &["model", "--adapter", "run/adapter"]);
    let base = loss(&folder, &["model"]);
    assert!((with_adapter - base).abs() > 1e-2, "the adapter does something: {base} and {with_adapter}");
    let ways: [(&str, &[&str]); 3] = [
        ("from-run", &["run"]),
        ("from-checkpoint", &["run/checkpoints/step-000010"]),
        ("from-model", &["model", "--adapter", "run/adapter"]),
    ];
    for (output, source) in ways {
        let arguments = [&["export"], source, &["--format", "merged", "--output", output]].concat();
        let ended = in_folder(&folder, &arguments).expect(0);
        assert!(ended.stdout.starts_with("largest difference of merged and adapter logits"), "{}", ended.stdout);
        let merged = loss(&folder, &[output]);
        assert!((merged - with_adapter).abs() < 1e-5, "{output}: {merged} against {with_adapter}");
    }
    let names: Vec<String> = tree(&folder.path("from-run")).into_keys().collect();
    assert_eq!(names, ["config.json", "manifest.json", "model.safetensors"]);
}

/// The evaluation of a run is what `eval` says of its checkpoint.
#[test]
fn eval_of_a_checkpoint_is_the_evaluation_of_the_run() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &["--set", "checkpoint.keep_last=9"]).expect(0);
    let rows = crate::folder::metrics(&folder.path("run"));
    let evaluations: Vec<&Value> = rows.iter().filter(|row| row.get("eval_loss").is_some()).collect();
    assert_eq!(evaluations.iter().map(|row| row["step"].as_u64()).collect::<Vec<_>>(), [0, 2, 4, 6, 8, 10].map(Some));
    for row in evaluations {
        let checkpoint = format!("run/checkpoints/step-{:06}", row["step"].as_u64().expect("a step"));
        // Before the first step the model is the base.
        let adapter: &[&str] = if row["step"] == 0 { &[] } else { &["--adapter", &checkpoint] };
        let (found, want) = (loss(&folder, &[&["model"], adapter].concat()), row["eval_loss"].as_f64());
        let want = want.expect("a loss");
        assert!((found - want).abs() < 1e-6 * want, "{checkpoint}: {found} against {want}");
    }
}

#[test]
fn export_of_the_adapter_alone() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    in_folder(&folder, &["export", "run", "--format", "peft", "--output", "out"]).expect(0);
    let (run, out) = (tree(&folder.path("run/adapter")), tree(&folder.path("out")));
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        assert!(run[name] == out[name], "{name}");
    }
    // Written again over what it wrote itself.
    in_folder(&folder, &["export", "run", "--format", "peft", "--output", "out"]).expect(0);
    assert!(out == tree(&folder.path("out")));
}

#[test]
fn export_never_replaces_what_it_did_not_write() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    for format in ["merged", "peft"] {
        let export = ["export", "run", "--format", format, "--output", "out"];
        in_folder(&folder, &export).expect(0);
        folder.write("out/thesis.txt", b"ten years of work");
        let before = tree(&folder.path("out"));
        in_folder(&folder, &export).expect(2).says("thesis.txt");
        assert!(before == tree(&folder.path("out")), "{format}");
        std::fs::remove_dir_all(folder.path("out")).expect("it is there");
    }
    // The base model's own directory least of all.
    let before = tree(&folder.path("model"));
    in_folder(&folder, &["export", "run", "--format", "merged", "--output", "model"]).expect(2);
    assert!(before == tree(&folder.path("model")));
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
        let ended = in_folder(&folder, arguments).expect(0);
        assert_eq!(ended.stderr, "", "{arguments:?}");
        match arguments[0] {
            "run" => assert_eq!(ended.stdout, "quiet/model\n", "the result of a run is where it is"),
            _ => assert!(!ended.stdout.is_empty(), "{arguments:?}: results are printed all the same"),
        }
    }
}

/// From before the first step to the commands to type next, which do what they say.
#[test]
fn a_run_says_what_it_trains_and_what_came_of_it() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let ended = folder.run("my runs/a", &[]).expect(0);
    let said = &ended.stderr;
    let rows = crate::folder::metrics(&folder.path("my runs/a"));
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
    for part in ["<title>step 0: ", "model, LoRA, on train.jsonl, held back eval.jsonl", "loss on held-back rows"] {
        assert!(report.contains(part), "lacks {part:?}");
    }
    assert!(!report.contains("http-equiv"), "a run that is done is not looked at again");
}

/// The few rows of a first try, on the recipe of the README.
#[test]
fn a_run_that_will_hardly_learn_is_told_so() {
    let folder = Folder::with_chat_model(&CHAT_RECIPE.replace("max_steps = 3\n", "").replace("1e-3", "2e-4"));
    let row = |n: usize| format!("{{\"prompt\": \"Say {n}\", \"completion\": \"It is {n}.\"}}\n");
    let rows: String = (0..32).map(row).collect();
    folder.write("train.jsonl", rows.as_bytes());
    folder.write("again.jsonl", (rows + &row(3)).as_bytes());
    let cases: [(&[&str], &str); 4] = [
        (
            &[],
            "only 2 steps: the model will hardly change; with 32 rows try train.epochs = 5 and train.global_batch_size = 4",
        ),
        (&["data.eval=train.jsonl"], "32 of 32 held-back rows are training rows too"),
        (&["data.train=again.jsonl"], "1 of 33 training rows are repeated ("),
        (&["schedule.warmup_steps=500"], "the warm-up of 500 steps does not end within the 2 steps of the run"),
    ];
    for (sets, want) in cases {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
        let found = in_folder(&folder, &[&["validate", "recipe.toml"], &sets[..]].concat()).expect(0);
        assert!(found.stdout.contains(want), "{}", found.stdout);
        folder.run("run", &sets).expect(0).says(want);
        std::fs::remove_dir_all(folder.path("run")).expect("it is there");
    }
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
        ("export", "newest checkpoint that verifies"),
    ] {
        let long = in_folder(&folder, &[command, "--help"]).expect(0).stdout;
        assert!(long.contains(says), "{command} --help lacks {says:?}:\n{long}");
        assert!(long.contains(&format!("Usage: finetune {command}")), "{long}");
    }
    let top = in_folder(&folder, &["--help"]).expect(0);
    expect![[r#"
        Fine-tunes language models with LoRA on the machine you have.

        A run is described by a recipe, one TOML file:

          finetune validate recipe.toml     find everything that can go wrong, without training
          finetune run recipe.toml          train; `--resume` goes on after an interruption
          finetune generate MODEL_DIR --adapter RUN/adapter --prompt "Hello"
          finetune export RUN --format merged --output DIR

        recipes/quickstart.toml is a small one that runs anywhere; recipes/README.md explains every key.

        Usage: finetune [OPTIONS] <COMMAND>

        Commands:
          run       Train as a recipe says
          validate  Check a recipe, its model and every row of its data, without training
          inspect   Show the tokens of a row, and which of them are trained on
          eval      Loss and perplexity of a model on a file of rows
          generate  Continue a prompt with a model
          export    Write a trained adapter in another form
          launch    Train with several processes, here or on several machines
          devices   The devices that this build can train on, with memory and number types
          cluster   Several machines: find, set up, examine and measure them
          help      Print this message or the help of the given subcommand(s)

        Options:
          -q, --quiet
                  Print errors and results only

          -v, --verbose
                  Print more about what is going on

          -h, --help
                  Print help (see a summary with '-h')

          -V, --version
                  Print version
    "#]]
    .assert_eq(&top.stdout);
}
