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
    assert!(shown.stdout.contains("⟦Hello there.<|end|>⟧"), "what is trained on is marked: {}", shown.stdout);
    assert!(!shown.stdout.contains("underlined") && !shown.stdout.contains('Ġ'), "{}", shown.stdout);
    let longest = json_of(&folder, &["inspect", "recipe.toml", "--longest", "--json"]);
    let length = |row: &Value| row["token_ids"].as_array().expect("ids").len();
    let first = json_of(&folder, &["inspect", "recipe.toml", "--json"]);
    assert_eq!(length(&longest), length(&row).max(length(&first)));
    in_folder(&folder, &["inspect", "recipe.toml", "--eval"]).expect(2).says("names no rows to evaluate on");
    let eval = ["inspect", "recipe.toml", "--eval", "--json", "--set", "data.eval=train.jsonl", "--row", "2"];
    assert_eq!(json_of(&folder, &eval)["text"], text);
}

/// A file's loss, against transformers and PEFT.
#[test]
fn eval_equals_transformers() {
    for family in ["llama", "llama3", "mistral", "qwen2", "qwen3", "smollm3"] {
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
        assert!(ended.stdout.starts_with("merged and adapter agree: "), "{}", ended.stdout);
        assert!(ended.stdout.contains("largest difference of logits"), "{}", ended.stdout);
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

/// A run, its adapter and a checkpoint are used as they are named: each knows its base.
#[test]
fn a_run_is_evaluated_by_its_name() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &["--set", "checkpoint.keep_last=9"]).expect(0);
    let want = loss(&folder, &["model", "--adapter", "run/adapter"]);
    for source in [&["run"][..], &["run/adapter"], &["model", "--adapter", "run"]] {
        assert_eq!(loss(&folder, source), want, "{source:?}");
    }
    let checkpoint = loss(&folder, &["model", "--adapter", "run/checkpoints/step-000002"]);
    assert_eq!(loss(&folder, &["run/checkpoints/step-000002"]), checkpoint);
    // A run that has not come to its end: its newest checkpoint, which is said.
    std::fs::remove_dir_all(folder.path("run/adapter")).expect("it is there");
    let ended = in_folder(&folder, &["eval", "run", "--data", "eval.jsonl", "--json"]).expect(0);
    ended.says("has not come to its end");
}

/// A model and an adapter of the hub that another program has fetched.
#[test]
fn hub_ids_are_found_in_the_cache() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    let want = loss(&folder, &["model", "--adapter", "run/adapter"]);
    for (id, from) in [("models--acme--tiny", "model"), ("models--acme--tiny-lora", "run/adapter")] {
        let snapshot = folder.path(&format!("cache/{id}/snapshots/abc123"));
        std::fs::create_dir_all(&snapshot).expect("a new directory");
        for (name, bytes) in tree(&folder.path(from)) {
            std::fs::write(snapshot.join(name), bytes).expect("a file");
        }
    }
    for variable in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
        let arguments = ["eval", "acme/tiny", "--adapter", "acme/tiny-lora", "--data", "eval.jsonl", "--json"];
        let mut command = finetune(arguments);
        for other in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"] {
            command.env_remove(other);
        }
        let ended = run(command.env(variable, folder.path("cache")).current_dir(folder.path(""))).expect(0);
        assert_eq!(ended.json()["loss"].as_f64(), Some(want), "{variable}");
    }
    let mut command = finetune(["eval", "acme/other", "--data", "eval.jsonl"]);
    let ended = run(command.env("HF_HUB_CACHE", folder.path("cache")).current_dir(folder.path(""))).expect(2);
    ended.says("hf download acme/other");
}

#[test]
fn generate_takes_prompts_in_every_form() {
    let folder = chat_model();
    let prompt_of = |arguments: &[&str]| {
        let arguments = [&["generate", "run", "--max-new-tokens", "4", "--json"], arguments].concat();
        let answer = json_of(&folder, &arguments);
        let tokenizer = ChatTokenizer::load(&folder.path("model"), None).expect("a tokenizer");
        let ids: Vec<u32> = serde_json::from_value(answer["prompt_token_ids"].clone()).expect("ids");
        tokenizer.decode(&ids, false).expect("text")
    };
    let hi = "<|user|>\nHi<|end|><|assistant|>\n";
    assert_eq!(prompt_of(&["-p", "Hi"]), hi);
    folder.write("list.json", br#"[{"role": "user", "content": "Hi"}]"#);
    folder.write("row.json", br#"{"messages": [{"role": "user", "content": "Hi"}]}"#);
    assert_eq!(prompt_of(&["--messages", "list.json"]), hi);
    assert_eq!(prompt_of(&["--messages", "row.json"]), hi);
    let line = format!("printf 'Hi\\n' | {} generate run --prompt - --max-new-tokens 4 --json", crate::program::BINARY);
    let mut shell = std::process::Command::new("bash");
    let ended = run(shell.args(["-c", &line]).current_dir(folder.path(""))).expect(0);
    assert_eq!(
        ended.json()["prompt_token_ids"],
        json_of(&folder, &["generate", "run", "-p", "Hi", "--max-new-tokens", "4", "--json"])["prompt_token_ids"]
    );
    // A template of one's own.
    folder.write("own.jinja", b"{% for message in messages %}[{{ message.content }}]{% endfor %}");
    assert_eq!(prompt_of(&["-p", "Hi", "--chat-template", "own.jinja"]), "[Hi]");
}

/// An answer ends before a stop text, and says that it was stopped.
#[test]
fn generate_stops_at_a_text() {
    let folder = chat_model();
    // The model is hardly trained: some of its answers are long enough.
    let drawn = (0..50).map(|seed| {
        let seed = seed.to_string();
        let words =
            ["generate", "run", "-p", "Hi", "--max-new-tokens", "24", "--json", "--temperature", "1.5", "--seed"];
        let arguments: Vec<String> = words.into_iter().map(str::to_owned).chain([seed]).collect();
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let whole = json_of(&folder, &words)["text"].as_str().expect("text").to_owned();
        (arguments, whole)
    });
    let (arguments, whole) = drawn.into_iter().find(|(_, whole)| whole.chars().count() > 8).expect("a longer answer");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let middle = whole.char_indices().nth(whole.chars().count() / 2).expect("a character").0;
    let stop: String = whole[middle..].chars().take(2).collect();
    let cut = json_of(&folder, &[&arguments[..], &["--stop", &stop]].concat());
    assert_eq!(cut["text"], whole[..whole.find(&stop).expect("it is there")], "{stop:?}");
    assert_eq!(cut["finish_reason"], "stop");
}

#[test]
fn generate_answers_the_rows_of_a_file() {
    let folder = chat_model();
    let arguments = ["generate", "run", "--data", "train.jsonl", "--max-new-tokens", "8"];
    let ended = in_folder(&folder, &arguments).expect(0);
    for part in ["train.jsonl:1", "expected  Hello there.", "train.jsonl:2", "answered word for word: "] {
        assert!(ended.stdout.contains(part), "{part}: {}", ended.stdout);
    }
    let ended = in_folder(&folder, &[&arguments[..], &["--json"]].concat()).expect(0);
    let rows: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[1]["expected"], "See you.");
}

/// The tiny model was made for 512 positions.
#[test]
fn text_beyond_the_context_is_said() {
    let folder = chat_model();
    let words = "word ".repeat(400);
    let arguments = ["generate", "run", "--raw", "--prompt", words.as_str(), "--max-new-tokens", "2"];
    in_folder(&folder, &arguments).expect(0).says("beyond the 512 positions");
    folder.write("long.jsonl", format!("{{\"text\": \"{words}\"}}\n").as_bytes());
    let ended = in_folder(&folder, &["eval", "run", "--data", "long.jsonl", "--json"]).expect(0);
    assert_eq!(ended.json()["rows_beyond_context"], 1);
    ended.says("longer than the 512 positions");
}

/// Its weights without what only the run needs; there is no adapter to export.
#[test]
fn export_of_a_run_that_trained_all_weights() {
    let folder = chat_model();
    in_folder(&folder, &["export", "run", "--format", "merged", "--output", "out"]).expect(0);
    let names: Vec<String> = tree(&folder.path("out")).into_keys().collect();
    assert!(names.contains(&"model.safetensors".to_owned()), "{names:?}");
    assert!(!names.iter().any(|name| name.starts_with("optimizer") || name.starts_with("trainer_state")), "{names:?}");
    let answer =
        |model: &str| json_of(&folder, &["generate", model, "--prompt", "Hi", "--max-new-tokens", "8", "--json"]);
    assert_eq!(answer("out")["text"], answer("run")["text"]);
    in_folder(&folder, &["export", "run", "--format", "peft", "--output", "p"])
        .expect(2)
        .says("all weights were trained");
}

/// The run's best evaluation is not its last (`CRASH_RECIPE`).
#[test]
fn export_of_the_best_checkpoint() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    let state =
        std::fs::read_to_string(folder.path("run/checkpoints/step-000010/trainer_state.json")).expect("a state");
    let best = serde_json::from_str::<Value>(&state).expect("JSON")["best"]["step"].as_u64().expect("a step");
    let export = |more: &[&str], output: &str| {
        in_folder(&folder, &[&["export", "run", "--format", "peft", "--output", output], more].concat()).expect(0)
    };
    export(&[], "last").says(&format!("step {best} had the best evaluation")).says("--best");
    export(&["--best"], "best").says("the best evaluation");
    let tensors = |path: &str| std::fs::read(folder.path(path).join("adapter_model.safetensors")).expect("tensors");
    assert!(tensors("best") == tensors(&format!("run/checkpoints/step-{best:06}")));
    assert!(tensors("last") == tensors("run/checkpoints/step-000010"));
}

/// Only an earlier export makes way: not a checkpoint, not a run's result, not what the export reads.
#[test]
fn export_never_takes_the_place_of_a_run() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    let before = tree(&folder.path("run"));
    for output in ["run", "run/adapter", "run/checkpoints", "run/checkpoints/step-000010"] {
        for format in ["peft", "merged"] {
            in_folder(&folder, &["export", "run", "--format", format, "--output", output]).expect(2);
            assert!(before == tree(&folder.path("run")), "{format} {output}");
        }
    }
    in_folder(&folder, &["export", "run", "--format", "merged", "--output", "out"]).expect(0);
    in_folder(&folder, &["export", "run", "--format", "peft", "--output", "out"])
        .expect(2)
        .says("a merged model of finetune");
    let onto_itself = ["export", "out", "--adapter", "run", "--format", "merged", "--output", "out", "--force"];
    in_folder(&folder, &onto_itself).expect(2).says("which the export reads");
}

/// A link in a model that came from elsewhere may lead to any file of this machine.
#[test]
fn export_follows_no_link_out_of_the_model() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    folder.write("id_rsa", b"secret");
    std::os::unix::fs::symlink(folder.path("id_rsa"), folder.path("model/chat_template.jinja")).expect("a link");
    in_folder(&folder, &["export", "run", "--format", "merged", "--output", "out"])
        .expect(2)
        .says("chat_template.jinja");
    assert!(!folder.path("out").exists());
}

/// Whenever it comes, a signal leaves the export or nothing.
#[test]
fn an_interrupted_export_leaves_nothing() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    std::fs::create_dir(folder.path("exports")).expect("a new directory");
    for (n, signal) in ["INT", "TERM", "HUP"].iter().cycle().take(30).enumerate() {
        let arguments = ["export", "run", "--format", "merged", "--output", "exports/out", "--quiet"];
        let mut running = crate::program::start(finetune(arguments).current_dir(folder.path("")));
        if !running.ends_within(std::time::Duration::from_millis(2 * n as u64)) {
            running.signal(signal);
        }
        let ended = running.wait();
        let names: Vec<_> = std::fs::read_dir(folder.path("exports"))
            .expect("a directory")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        assert!(names.iter().all(|name| name == "out"), "{signal} after {} ms: {names:?} {ended:?}", 2 * n);
    }
    in_folder(&folder, &["export", "run", "--format", "merged", "--output", "exports/out"]).expect(0);
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
        ("schema", "for editors"),
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
          finetune generate RUN --prompt "Hello"
          finetune export RUN --format merged --output DIR

        RUN is the recipe's output_dir.
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
          schema    Print the JSON schema of recipes, for editors
          cluster   Several machines: find, set up, examine and measure them
          help      Print this message or the help of the given subcommand(s)

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
