//! Runs with layers from the disk, whose embedding stays there too: a step reads the rows of its tokens. They have the
//! bits of runs in memory.

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{adapter, goldens, recipe, run, run_altered, state};
use finetune_trainer::{Outcome, Resume};

const DISK: &str = "model.residency=disk";
const MEMORY: &str = "model.residency=memory";

/// The sets of a recipe on a golden model.
fn sets(family: &str, more: &[&str]) -> Vec<String> {
    let rows = goldens(family).join("rows.jsonl");
    let paths = [("model.path", goldens(family)), ("data.train", rows.clone()), ("data.eval", rows)];
    let paths = paths.iter().map(|(key, path)| format!("{key}={path:?}"));
    paths.chain(["model.device=cpu".to_owned()]).chain(more.iter().map(|set| (*set).to_owned())).collect()
}

fn recipe_of(output: &Path, sets: &[String], residency: &str) -> finetune_recipe::Recipe {
    recipe(output, &sets.iter().map(String::as_str).chain([residency]).collect::<Vec<_>>())
}

/// (model, settings): a frozen embedding, one with a branch, one that is trained in full, and one that is the output
/// layer. Losses, norms of gradients, evaluations, checkpoints and adapters; and a run that moves between memory and
/// disk in the middle.
#[test]
fn runs_with_rows_from_the_disk_have_the_bits_of_runs_in_memory() {
    let cases: [(&str, &[&str]); 6] = [
        ("llama3", &[]),
        ("deepseek_v3", &["train.gradient_checkpointing=true"]),
        ("qwen3", &[r#"lora.target_modules=["embed_tokens", "v_proj"]"#]),
        ("qwen3", &[r#"lora.modules_to_save=["embed_tokens"]"#]),
        ("qwen3", &[r#"lora.modules_to_save=["lm_head"]"#]),
        ("llama", &[]),
    ];
    for (family, more) in cases {
        let (folder, sets) = (tempfile::tempdir().expect("a directory"), sets(family, more));
        let output = |name: &str| folder.path().join(name);
        let whole = |residency: &str| {
            let output = output(residency);
            let (told, outcomes) = run(1, None, &Resume::No, |_| recipe_of(&output, &sets, residency), |_, _| 0);
            assert!(outcomes.iter().all(Result::is_ok), "{family} {more:?} {residency}: {outcomes:?}");
            (told.losses(), told.norms(), told.evaluations, adapter(&output), state(&output))
        };
        let expected = whole(MEMORY);
        assert!(whole(DISK) == expected, "{family} {more:?}: other bits");
        for (before, after) in [(DISK, DISK), (MEMORY, DISK), (DISK, MEMORY)] {
            let output = output(&format!("{before} {after}"));
            let stop = |_, step| if step >= 3 { 15 } else { 0 };
            let (first, outcomes) = run(1, None, &Resume::No, |_| recipe_of(&output, &sets, before), stop);
            assert!(matches!(outcomes[..], [Ok(Outcome::Stopped { step: 3, .. })]), "{outcomes:?}");
            let (second, outcomes) = run(1, None, &Resume::Newest, |_| recipe_of(&output, &sets, after), |_, _| 0);
            assert!(outcomes.iter().all(Result::is_ok), "{family} {more:?}: {outcomes:?}");
            let losses = [first.losses(), second.losses()].concat();
            assert_eq!(losses, expected.0, "{family} {more:?}: {before}, then {after}");
            assert!(state(&output) == expected.4, "{family} {more:?}: {before}, then {after}: another state");
        }
    }
}

/// The estimate leaves out what is not in memory: a frozen embedding that is no output layer, with a branch or without.
#[test]
fn an_embedding_counts_where_it_is_in_memory() {
    let weights = |family: &str, more: &[&str], residency: &str| {
        let (folder, sets) = (tempfile::tempdir().expect("a directory"), sets(family, more));
        let (output, counted) = (folder.path().join("run"), AtomicU64::new(0));
        let (_, outcomes) = run_altered(
            1,
            None,
            &Resume::No,
            |_| recipe_of(&output, &sets, residency),
            |_, _| 15,
            |_, run| counted.store(run.estimate.weights, Ordering::SeqCst),
        );
        assert!(outcomes.iter().all(Result::is_ok), "{family} {more:?}: {outcomes:?}");
        counted.load(Ordering::SeqCst)
    };
    let (branch, saved) =
        (r#"lora.target_modules=["embed_tokens", "v_proj"]"#, r#"lora.modules_to_save=["embed_tokens"]"#);
    for family in ["llama3", "qwen3"] {
        let config = std::fs::read_to_string(goldens(family).join("config.json")).expect("a config");
        let config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
        let number = |key: &str| config[key].as_u64().expect("a number");
        // The golden models have f32.
        let embedding = 4 * number("vocab_size") * number("hidden_size");
        let from_disk = weights(family, &[], DISK);
        assert_eq!(weights(family, &[branch], DISK), from_disk, "{family}");
        assert_eq!(weights(family, &[saved], DISK), from_disk + embedding, "{family}");
        assert_eq!(weights(family, &[saved], MEMORY), weights(family, &[], MEMORY), "{family}");
    }
}
