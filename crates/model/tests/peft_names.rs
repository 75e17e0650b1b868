//! Layers whose names PEFT 0.21 takes for those of experts: dense layers, shared experts and routers beside
//! experts that it puts together. An adapter names their weights in `target_parameters`, as PEFT finds them there.

mod checkpoint;
mod made;

use std::path::Path;

use finetune_model::adapter::{Adapter, BaseName};
use finetune_model::{Adaptation, Model, ModelConfig, Placement, choose};
use finetune_recipe::Recipe;
use serde_json::{Value, json};

use crate::made::{golden, read_json, write};

/// What `[lora]` with these lines trains.
fn chosen(lines: &str, config: &ModelConfig) -> Adaptation {
    let text = format!("[model]\npath = \"m\"\n[data]\ntrain = \"d.jsonl\"\n[lora]\nrank = 4\nalpha = 8\n{lines}\n");
    let recipe = Recipe::parse(&text, Path::new("recipe.toml"), &[], None).expect("a recipe");
    choose(&recipe.lora, config).expect("targets")
}

/// A directory with these files.
fn directory(files: Vec<(String, Vec<u8>)>) -> tempfile::TempDir {
    let made = tempfile::tempdir().expect("a directory");
    files.into_iter().for_each(|(name, bytes)| write(&made.path().join(name), bytes));
    made
}

/// The settings of a fresh adapter, and the notices of its recipe. The adapter is read again: as it was written by
/// a checkpoint, and by an export in PEFT's format.
fn settings(family: &str, lines: &str) -> ([Value; 2], Vec<String>) {
    let mut model = Model::load(&golden(family), &Placement::cpu(None)).expect("the model loads");
    let adaptation = chosen(lines, &model.config);
    let notices = adaptation.peft_notices(&model.config);
    model.add_adapter(adaptation.clone(), 7).expect("an adapter");
    let values = model.parameters().expect("values");
    let checkpoint = directory(checkpoint::files(&model, &values, &BaseName::default()));
    let adapter = Adapter::read(checkpoint.path(), &model.config).expect("an adapter");
    let export = directory(adapter.peft_files(adaptation.dropout, &model.config).expect("files"));
    for made in [&checkpoint, &export] {
        let again = Adapter::read(made.path(), &model.config).expect("an adapter");
        assert!(again.notices.is_empty(), "{family} {lines}: {:?}", again.notices);
        assert_eq!((&again.targets, &again.values), (&adaptation.targets, &values), "{family} {lines}");
    }
    ([checkpoint, export].map(|made| read_json(&made.path().join("adapter_config.json"))), notices)
}

/// `LAYER.PART.weight` of parts of layers, in model order.
fn weights(parts: &[(usize, &str)]) -> Vec<String> {
    let each = |&(layer, part): &(usize, &str)| {
        ["gate_proj", "up_proj", "down_proj"].map(|end| format!("model.layers.{layer}.{part}.{end}.weight"))
    };
    parts.iter().flat_map(each).collect()
}

#[test]
fn all_linear_names_dense_layers_and_shared_experts_as_parameters() {
    let shared = "mlp.shared_experts";
    for (family, modules, parts) in [
        (
            "deepseek_v3",
            json!(["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]),
            vec![(0, "mlp"), (1, shared), (2, shared)],
        ),
        ("glm4_moe", json!(["k_proj", "o_proj", "q_proj", "v_proj"]), vec![(0, "mlp"), (1, shared)]),
        ("qwen3_moe", json!(["k_proj", "o_proj", "q_proj", "v_proj"]), vec![(1, "mlp")]),
    ] {
        let (settings, notices) = settings(family, "target_modules = \"all-linear\"");
        assert!(notices.is_empty(), "{family}: {notices:?}");
        for settings in settings {
            assert_eq!(settings["target_modules"], modules, "{family}");
            assert_eq!(settings["target_parameters"], json!(weights(&parts)), "{family}");
        }
    }
    // Their names mean what they say where PEFT goes by them.
    for family in ["qwen3_5_moe", "lfm2_moe", "qwen3"] {
        for settings in settings(family, "target_modules = \"all-linear\"").0 {
            assert_eq!(settings["target_parameters"], Value::Null, "{family}");
        }
    }
}

/// PEFT looks in the patterns for the name that it has chosen a branch by.
#[test]
fn patterns_have_the_names_of_parameters() {
    let lines = "target_modules = [\"q_proj\", \"mlp.shared_expert.up_proj\", \"gate\"]\nlayers_to_transform = [1]\n\
                 rank_pattern = { up_proj = 2 }\nalpha_pattern = { gate = 3 }";
    let (up, gate) = ("model.layers.1.mlp.shared_expert.up_proj.weight", "model.layers.1.mlp.gate.weight");
    for settings in settings("qwen3_next", lines).0 {
        assert_eq!(settings["target_modules"], json!(["q_proj"]));
        let mut named: Vec<&str> =
            settings["target_parameters"].as_array().expect("names").iter().filter_map(Value::as_str).collect();
        named.sort_unstable();
        assert_eq!(named, [gate, up]);
        assert_eq!(settings["rank_pattern"], json!({ up: 2 }));
        assert_eq!(settings["alpha_pattern"], json!({ gate: 3 }));
    }
}

/// Branches of single experts keep their names in `target_modules`, by which PEFT puts them together; in an export
/// they are stacks.
#[test]
fn experts_beside_dense_layers() {
    let ([checkpoint, export], _) = settings("glm4_moe", "target_modules = \"all-linear\"\nexperts = true");
    let named = weights(&[(0, "mlp"), (1, "mlp.shared_experts")]);
    let of_experts = ["down_proj", "gate_proj", "up_proj"];
    let attention = ["k_proj", "o_proj", "q_proj", "v_proj"];
    let mut all: Vec<&str> = attention.into_iter().chain(of_experts).collect();
    all.sort_unstable();
    assert_eq!((&checkpoint["target_modules"], &checkpoint["target_parameters"]), (&json!(all), &json!(named)));
    let stacks = ["gate_up_proj", "down_proj"].map(|part| format!("model.layers.1.mlp.experts.{part}"));
    let with_stacks: Vec<String> = named.into_iter().chain(stacks).collect();
    assert_eq!((&export["target_modules"], &export["target_parameters"]), (&json!(attention), &json!(with_stacks)));
}

/// Families whose experts PEFT holds in stacks and does not put together: an export has the stacks, under the names
/// that transformers has for them.
#[test]
fn stacks_of_other_families() {
    for (family, experts) in [
        ("qwen3_5_moe", "model.layers.1.mlp.experts"),
        ("lfm2_moe", "model.layers.1.feed_forward.experts"),
        ("gemma4_moe", "model.layers.1.experts"),
    ] {
        let ([_, export], _) = settings(family, "target_modules = [\"q_proj\"]\nexperts = true");
        let parameters = export["target_parameters"].as_array().expect("names");
        for part in ["gate_up_proj", "down_proj"] {
            assert!(parameters.contains(&json!(format!("{experts}.{part}"))), "{family}: {parameters:?}");
        }
        assert_eq!(export["target_modules"], json!(["q_proj"]), "{family}");
    }
}

/// (lines, the dropout in the settings, what is said)
#[test]
fn dropout_and_dora_are_said() {
    for (lines, dropout, said) in [
        ("target_modules = \"all-linear\"", 0.0, None),
        ("target_modules = \"all-linear\"\ndropout = 0.25", 0.0, Some("lora_dropout = 0, training uses 0.25")),
        ("target_modules = [\"q_proj\"]\ndropout = 0.25", 0.25, None),
        ("target_modules = [\"q_proj\"]\nuse_dora = true", 0.0, None),
        ("target_modules = \"all-linear\"\nuse_dora = true", 0.0, Some("PEFT 0.21 does not load this adapter")),
    ] {
        let ([checkpoint, export], notices) = settings("glm4_moe", lines);
        assert_eq!(
            (&checkpoint["lora_dropout"], &export["lora_dropout"]),
            (&json!(dropout), &json!(dropout)),
            "{lines}"
        );
        match said {
            None => assert!(notices.is_empty(), "{lines}: {notices:?}"),
            Some(part) => assert!(notices.len() == 1 && notices[0].contains(part), "{lines}: {notices:?}"),
        }
    }
}
