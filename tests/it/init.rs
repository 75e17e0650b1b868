//! `finetune init`, and runs without a recipe.

use std::path::Path;

use crate::folder::{CRASH_RECIPE, Folder, repository};

/// A folder above which the model of the quickstart lies, as in an installation.
fn folder() -> Folder {
    let folder = Folder::empty();
    let base = folder.path("share/finetune/quickstart");
    std::fs::create_dir_all(&base).expect("a folder");
    std::os::unix::fs::symlink(repository().join("datasets/quickstart/base"), base.join("base")).expect("a link");
    folder
}

/// The losses on the held-back rows of a run.
fn losses(run: &Path) -> Vec<f64> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    let rows = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
    rows.filter_map(|row| row["eval_loss"].as_f64()).collect()
}

#[test]
fn what_init_writes_runs_as_it_is_and_learns() {
    let folder = folder();
    folder.finetune(&["init", "demo"]).expect(0).says("finetune run demo/recipe.toml");
    folder.finetune(&["validate", "demo/recipe.toml"]).expect(0);
    folder.finetune(&["run", "demo/recipe.toml"]).expect(0);
    assert!(folder.path("demo/run/adapter/adapter_model.safetensors").is_file());
    let losses = losses(&folder.path("demo/run"));
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(last < first, "{losses:?}");
}

#[test]
fn init_writes_nothing_over() {
    let folder = folder();
    folder.write("recipe.toml", b"mine");
    folder.finetune(&["init"]).expect(2).says("recipe.toml is there already, and nothing is written over");
    assert!(!folder.path("data").exists(), "it is refused before anything is written");
    assert_eq!(std::fs::read(folder.path("recipe.toml")).expect("the file"), b"mine");
}

/// (arguments, exit code, part of what is said or written)
#[test]
fn init_takes_a_model_and_rows() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.finetune(&["init", "a", "--model", "model", "--data", "train.jsonl"]).expect(0);
    let recipe = std::fs::read_to_string(folder.path("a/recipe.toml")).expect("a recipe");
    let model = folder.path("model").canonicalize().expect("the model");
    assert!(recipe.contains(&model.display().to_string()), "{recipe}");
    assert!(!folder.path("a/data").exists());
    folder.finetune(&["validate", "a/recipe.toml"]).expect(0);
    folder.finetune(&["init", "b", "--model", "acme/tiny"]).expect(0).says("finetune download acme/tiny");
    folder.finetune(&["init", "c", "--model", "train.jsonl"]).expect(2).says("a model is meant");
    folder.finetune(&["init", "c", "--model", "./nope"]).expect(2).says("there is no such directory");
    folder.finetune(&["init", "c", "--data", "nope.jsonl"]).expect(2).says("there is no such file");
    folder.write("rows.zip", b"PK\x03\x04");
    folder.finetune(&["init", "c", "--data", "rows.zip"]).expect(2).says("is a zip file");
    assert!(!folder.path("c").exists());
    folder.finetune(&["init", "d", "--model", "model", "--data", "tr*.jsonl"]).expect(0);
    folder.finetune(&["validate", "d/recipe.toml"]).expect(0);
    folder.finetune(&["init", "e", "--model", "model", "--data", "hf://acme/rows/train"]).expect(0);
    let recipe = std::fs::read_to_string(folder.path("e/recipe.toml")).expect("a recipe");
    assert!(recipe.contains("train = \"hf://acme/rows/train\""), "{recipe}");
}

#[test]
fn flags_train_without_a_recipe_and_leave_one_in_the_run() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let flags = ["--model", "model", "--data", "train.jsonl", "--eval", "eval.jsonl", "--set", "train.max_steps=2"];
    folder.finetune(&[&["validate"], &flags[..]].concat()).expect(0);
    folder.finetune(&["inspect", "--model", "model", "--data", "train.jsonl", "--json"]).expect(0);
    folder.finetune(&[&["run"], &flags[..]].concat()).expect(0);
    let recipe = std::fs::read_to_string(folder.path("runs/model-train/recipe.toml")).expect("the resolved recipe");
    assert!(recipe.contains("max_steps = 2") && !recipe.contains("epochs ="), "{recipe}");
    assert!(folder.path("runs/model-train/adapter").is_dir());
    // The run goes on by its recipe, as any other.
    folder.finetune(&["run", "runs/model-train", "--resume", "--set", "train.max_steps=3"]).expect(0);
}

/// The same flags for each of several ranks.
#[test]
fn a_launch_takes_flags_in_place_of_a_recipe() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let flags = ["--model", "model", "--data", "train.jsonl", "--set", "train.max_steps=2", "--output-dir", "run"];
    folder.finetune(&[&["launch", "-n", "2", "--"], &flags[..]].concat()).expect(0);
    assert!(folder.path("run/adapter").is_dir());
}

/// (arguments, part of the error)
#[test]
fn flags_that_make_no_recipe() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    for (arguments, says) in [
        (&["run", "--model", "model"][..], "--data"),
        (&["run", "recipe.toml", "--model", "other"], "write --set model.path=other"),
        (&["run", "--model", "model", "--data", "nope.jsonl"], "nope.jsonl"),
        (
            &["run", "--model", "model", "--data", "train.jsonl", "--set", "lora.rank=0"],
            "`lora.rank` must be at least 1",
        ),
        (&["run", "--model", " ", "--data", "train.jsonl"], "(command line):"),
        (&["launch", "-n", "2", "--model", "model"], "finetune launch -n N -- --model M --data FILE"),
    ] {
        folder.finetune(arguments).expect(2).says(says);
    }
}
