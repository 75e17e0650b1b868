//! One model in several spellings: config.json as transformers 5 writes it and as the hub has it, text models alone
//! and inside of multimodal ones, with older and newer names of tensors, and adapters with names of each kind.

#[macro_use]
#[path = "golden/each_family.rs"]
mod each_family;
mod made;

use std::collections::BTreeSet;
use std::path::Path;

use finetune_model::adapter::Adapter;
use finetune_model::{Model, ModelConfig, Placement};
use serde_json::Value;

use crate::made::{ADAPTER, MODEL, Tensor, golden, read_json};

/// What `model.` of a text model is called inside of a multimodal one: by transformers, and by older files and mlx-lm.
const INSIDE: [&str; 2] = ["model.language_model.", "language_model.model."];

/// transformers 5's spelling, and the hub's.
const CONFIGS: [&str; 2] = ["config.json", "config.hub.json"];

fn configurations_are_the_same(family: &'static str) {
    let [newer, hub] = CONFIGS.map(|name| {
        let path = golden(family).join(name);
        ModelConfig::parse(&std::fs::read_to_string(&path).expect("a golden file"), &path).expect("a config")
    });
    // The hub has some text models inside of a multimodal one only.
    if newer.wrapper.is_some() {
        assert_eq!(newer.wrapper, hub.wrapper, "{family}");
    }
    assert_eq!(ModelConfig { wrapper: None, ..hub }, ModelConfig { wrapper: None, ..newer }, "{family}");
}

of_each_family!(configurations_are_the_same);

/// The name that a text model alone has for a tensor or module. Those of vision towers stay as they are.
fn in_text(name: &str) -> String {
    match INSIDE.iter().find_map(|start| name.strip_prefix(start)) {
        Some(rest) => format!("model.{rest}"),
        None => name.strip_prefix("language_model.").unwrap_or(name).to_owned(),
    }
}

/// The same name where `model.` is called `start`.
fn spelt(name: &str, start: &str) -> String {
    let name = in_text(name);
    let is_other = ["model.vision", "model.multi_modal"].iter().any(|other| name.starts_with(other));
    match name.strip_prefix("model.") {
        Some(rest) if !is_other => format!("{start}{rest}"),
        None if start == INSIDE[1] && name.starts_with("lm_head.") => format!("language_model.{name}"),
        _ => name,
    }
}

/// A golden model with this one of its configs, and tensors in a spelling.
fn model(family: &str, config: &str, start: &str) -> tempfile::TempDir {
    made::changed(&golden(family), MODEL, |written, tensors| {
        *written = read_json(&golden(family).join(config));
        rename(tensors, |name| spelt(name, start));
    })
}

fn rename(tensors: &mut [Tensor], new: impl Fn(&str) -> String) {
    for tensor in tensors {
        tensor.0 = new(&tensor.0);
    }
}

/// Bits of logits of a base with an adapter.
fn bits(base: &Path, adapter: &Path) -> Vec<u32> {
    let mut model = Model::load(base, &Placement::cpu(None)).expect("the model loads");
    let adapter = Adapter::read(adapter, &model.config).expect("the adapter loads");
    model.attach(&adapter).expect("an adapter of this model");
    model.logits(&[5, 17, 42, 9, 33, 8, 61]).expect("tokens").into_iter().map(f32::to_bits).collect()
}

/// Of each config with tensors in each spelling that goes with it.
fn logits_have_the_same_bits(family: &'static str) {
    let adapter = golden(family).join("adapter");
    let want = bits(&golden(family), &adapter);
    for config in CONFIGS {
        let is_wrapper = read_json(&golden(family).join(config)).get("text_config").is_some();
        let starts: &[&str] = if is_wrapper { &INSIDE } else { &["model."] };
        for start in starts {
            let made = model(family, config, start);
            assert!(bits(made.path(), &adapter) == want, "{family}: {config} with tensors `{start}`");
        }
    }
}

of_each_family!(logits_have_the_same_bits);

/// What names of parameters begin with in PEFT's files.
const PREFIX: &str = "base_model.model.";

/// The adapter of a golden model with names in a spelling. Its settings name each module in full.
fn adapter(family: &str, start: &str) -> tempfile::TempDir {
    let source = golden(family).join("adapter");
    made::changed(&source, ADAPTER, |settings, tensors| {
        rename(tensors, |name| {
            let name = name.strip_prefix(PREFIX).expect("a name of PEFT's");
            format!("{PREFIX}{}", spelt(name, start))
        });
        let parts = tensors.iter().map(|tensor| tensor.0.trim_start_matches(PREFIX));
        let modules: BTreeSet<&str> = parts.filter_map(|name| name.split(".lora_").next()).collect();
        settings["target_modules"] = modules.into_iter().map(Value::from).collect();
    })
}

/// Multimodal models that transformers loads whole, and one of which it loads the text model alone.
#[test]
fn adapters_in_each_spelling_are_the_same() {
    for family in ["gemma3_multimodal", "gemma4_k_eq_v", "qwen3_5", "muse_glimmer"] {
        let base = model(family, "config.hub.json", INSIDE[0]);
        let want = bits(base.path(), &golden(family).join("adapter"));
        for start in ["model.", INSIDE[0], INSIDE[1]] {
            let made = adapter(family, start);
            let modules = &read_json(&made.path().join(ADAPTER[0]))["target_modules"];
            let first = modules[0].as_str().expect("a name");
            assert!(first.starts_with(start), "{family}: {first}");
            assert!(bits(base.path(), made.path()) == want, "{family}: an adapter with `{start}`");
        }
    }
}
