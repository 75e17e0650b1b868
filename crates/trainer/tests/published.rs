//! `validate` on the `config.json` of published models, without their weights: parameters and bytes of weights are
//! those that transformers, mlx-lm and bitsandbytes count of the same shapes (`scripts/make_published_golden.py`).

use std::collections::BTreeSet;
use std::path::Path;

use finetune_recipe::Recipe;
use finetune_store::{RealDisk, replace_file};
use finetune_trainer::{ThisHost, Validation, validate};
use serde_json::Value;

/// Each matrix of these forms has a table besides, which the other programs have once: at most one byte in 5,000.
const WITH_TABLE: [&str; 2] = ["nf4", "mxfp4"];

fn published() -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/published.json");
    let text = std::fs::read_to_string(path).expect("the golden file");
    let mut models: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    // Several versions of a model have one shape.
    models.dedup_by(|one, other| one["config"] == other["config"]);
    models
}

fn put(path: &Path, text: &str) {
    replace_file(&RealDisk, path, text.as_bytes()).expect("a file");
}

/// What `validate` says of a directory that has this config.json and nothing else.
fn validated(config: &Value, keys: &str) -> Validation {
    let folder = tempfile::tempdir().expect("a directory");
    let base = folder.path().join("base");
    std::fs::create_dir(&base).expect("a new directory");
    put(&base.join("config.json"), &config.to_string());
    put(&folder.path().join("rows.jsonl"), "{\"input_ids\": [1, 2, 3], \"labels\": [1, 2, 3]}\n");
    let text = format!(
        "output_dir = {:?}\n[model]\npath = {base:?}\ndevice = \"cpu\"\nresidency = \"memory\"\n{keys}\
         [data]\ntrain = {:?}\nformat = \"tokens\"\n",
        folder.path().join("run"),
        folder.path().join("rows.jsonl"),
    );
    let recipe = Recipe::parse(&text, Path::new("r.toml"), &[], None).unwrap_or_else(|error| panic!("{error}"));
    // Nothing is said of this machine's memory, so none is too little.
    validate(&recipe, &ThisHost::default(), &|_| {})
}

/// Bytes of weights, of which a table that is read by row is no part.
fn weights(model: &Value, keys: &str) -> u64 {
    let found = validated(&model["config"], keys);
    let problems: Vec<&str> = found.problems.iter().map(|problem| problem.message.as_str()).collect();
    assert!(problems.iter().all(|problem| problem.contains("model.safetensors")), "{}: {problems:?}", model["model"]);
    assert_eq!(found.parameters, model["parameters"].as_u64(), "{}", model["model"]);
    found.estimate.unwrap_or_else(|| panic!("{}: no estimate", model["model"])).weights
}

#[test]
fn every_published_size_in_16_bits() {
    for model in published() {
        let kept = model["parameters"].as_u64().expect("a number") - model["by_row"].as_u64().unwrap_or(0);
        assert_eq!(weights(&model, ""), 2 * kept, "{}", model["model"]);
    }
}

/// The smallest model of each family, in f32 and packed in each form.
#[test]
fn one_size_of_each_family_in_every_form() {
    let mut models = published();
    models.sort_by_key(|model| model["parameters"].as_u64());
    // But for Kimi K2, whose family is DeepSeek's.
    models.retain(|model| model["config"]["model_type"] != "kimi_k2");
    let mut families = BTreeSet::new();
    models.retain(|model| families.insert(model["config"]["model_type"].to_string()));
    assert!(models.len() > 20, "{} families", models.len());
    for model in models {
        let kept = model["parameters"].as_u64().expect("a number") - model["by_row"].as_u64().unwrap_or(0);
        assert_eq!(weights(&model, "dtype = \"f32\"\n"), 4 * kept, "{} in f32", model["model"]);
        for form in ["mlx4", "mlx8", "mxfp4", "nf4", "int8"] {
            let found = weights(&model, &format!("quantization = \"{form}\"\n"));
            let want = model["bytes"][form].as_u64().expect("a number");
            let tables = if WITH_TABLE.contains(&form) { want / 5000 } else { 0 };
            assert!((want..=want + tables).contains(&found), "{} as {form}: {found}, and {want}", model["model"]);
        }
    }
}
