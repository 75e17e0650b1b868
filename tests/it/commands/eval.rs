//! `finetune eval`: losses of models, adapters, runs, checkpoints and hub ids.

use serde_json::Value;

use super::{json_of, loss};
use crate::folder::{CRASH_RECIPE, Folder, golden, golden_models, metrics, tree};
use crate::program::{finetune, run};

/// The loss of a file is that of transformers and PEFT.
#[test]
fn eval_equals_transformers() {
    let models = golden_models();
    assert!(models.len() > 30, "{models:?}");
    for family in &models {
        let directory = golden(family);
        let text = std::fs::read_to_string(directory.join("golden.json")).expect("goldens");
        let golden: Value = serde_json::from_str(&text).expect("JSON");
        let folder = Folder::empty();
        let [model, rows, adapter] = [directory.clone(), directory.join("rows.jsonl"), directory.join("adapter")]
            .map(|path| path.to_str().expect("UTF-8").to_owned());
        for (arguments, key) in [(vec![], "base_loss"), (vec!["--adapter", adapter.as_str()], "adapter_loss")] {
            let found =
                json_of(&folder, &[&["eval", &model, "--data", &rows, "--json", "--quiet"], &arguments[..]].concat());
            let want = golden["rows_jsonl"][key].as_f64().expect("a loss");
            let loss = found["loss"].as_f64().expect("a loss");
            assert!((loss - want).abs() <= 1e-6 * want, "{family} {key}: {loss} against {want}");
            assert!((found["perplexity"].as_f64().expect("a number") - loss.exp()).abs() < 1e-9 * loss.exp());
            assert_eq!(found["tokens"], golden["rows_jsonl"]["trained_tokens"]);
            assert_eq!(found["rows"], 12);
        }
    }
}

/// The evaluation loss of a run is what `eval` says of its checkpoint.
#[test]
fn eval_of_a_checkpoint_is_the_evaluation_of_the_run() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &["--set", "checkpoint.keep_last=9"]).expect(0);
    let rows = metrics(&folder.path("run"));
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

/// A run, its adapter and a checkpoint can be evaluated by name, because each knows its base.
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
    // A run without a result is evaluated by its newest checkpoint, and the output says so.
    std::fs::remove_dir_all(folder.path("run/adapter")).expect("it is there");
    let ended = folder.finetune(&["eval", "run", "--data", "eval.jsonl", "--json"]).expect(0);
    ended.says("has not come to its end");
}

/// A model and an adapter of the hub are found where another program has put them.
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
    ended.says("finetune download acme/other");
}
