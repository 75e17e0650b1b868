//! Muse Glimmer: what its config.json says of layers and factors, and how mlx-lm writes it.

mod made;

use std::path::Path;

use finetune_advice::Advice;
use finetune_model::adapter::Adapter;
use finetune_model::{Adaptation, Model, ModelConfig, Placement, choose, linear_modules};
use finetune_recipe::Recipe;
use finetune_store::TensorFile;
use serde_json::{Value, json};

use crate::made::{golden, model, read_json};

const FAMILY: &str = "muse_glimmer";

fn bits(directory: &Path) -> Vec<u32> {
    let model = Model::load(directory, &Placement::cpu(None)).expect("the model loads");
    model.logits(&[5, 17, 42, 9, 33, 8, 61]).expect("tokens").into_iter().map(f32::to_bits).collect()
}

/// The golden's config, its text part changed.
fn parse(change: impl FnOnce(&mut Value)) -> Result<ModelConfig, String> {
    let mut config = read_json(&golden(FAMILY).join("config.json"));
    change(&mut config["text_config"]);
    let parsed = ModelConfig::parse(&config.to_string(), Path::new("config.json"));
    parsed.map_err(|error| format!("{error} {:?}", error.hints()))
}

fn without(keys: &'static [&str]) -> impl FnOnce(&mut Value) {
    move |config| {
        for key in keys {
            config.as_object_mut().expect("an object").remove(*key);
        }
    }
}

/// Layers without positions, and those with a window.
fn layers(config: &ModelConfig) -> (Vec<usize>, Vec<usize>) {
    let chosen = |is: &dyn Fn(usize) -> bool| (0..config.layers.len()).filter(|&n| is(n)).collect();
    (chosen(&|n| config.layers[n].rope.is_none()), chosen(&|n| config.layers[n].window.is_some()))
}

/// Left out, kinds of layers are counted from the last one.
#[test]
fn kinds_of_layers() {
    let want = (vec![0, 4], vec![1, 2, 3]);
    assert_eq!(layers(&parse(|_| {}).expect("a config")), want);
    let counted = parse(without(&["layer_types", "layer_rope_theta"])).expect("a config");
    assert_eq!(layers(&counted), want);
    let six = parse(|config| {
        without(&["layer_types", "layer_rope_theta"])(config);
        config["num_hidden_layers"] = json!(6);
    });
    assert_eq!(layers(&six.expect("a config")), (vec![1, 5], vec![0, 2, 3, 4]));
    // Each of the two keys says its part alone.
    let other = parse(|config| {
        config["layer_types"] = json!(["sliding_attention"; 5].map(Value::from));
        config["layer_rope_theta"] = json!([10_000, 0, 0, 10_000.0, 10_000]);
    });
    assert_eq!(layers(&other.expect("a config")), (vec![1, 2], vec![0, 1, 2, 3, 4]));
}

/// Left out, factors are those of the class.
#[test]
fn factors() {
    let stated = parse(|_| {}).expect("a config");
    assert_eq!((stated.score_scale, stated.logits_divisor, stated.logits_cap), (1.5 / 4.0, Some(2.0), Some(3.0)));
    assert_eq!((stated.rms_norm_eps, stated.post_norm_eps), (1e-2, Some(3e-2)));
    let keys = &["qk_scale_factor", "output_multiplier", "final_logit_softcapping", "post_norm_eps", "rms_norm_eps"];
    let class = parse(without(keys)).expect("a config");
    let root = 26f32.sqrt();
    assert_eq!((class.score_scale, class.logits_divisor, class.logits_cap), (3.87 / 4.0, Some(root), Some(20.0)));
    assert_eq!((class.rms_norm_eps, class.post_norm_eps), (1e-5, Some(1e-8)));
}

/// (key, value, what is said)
#[test]
fn what_is_refused() {
    for (key, value, said) in [
        ("layer_rope_theta", json!([0, 10_000.0, 10_000.0]), "a number for each of 5 layers"),
        ("layer_rope_theta", json!([0, "a", 1, 1, 0]), "a number for each of 5 layers"),
        ("layer_rope_theta", json!([0, 500.0, 10_000.0, 10_000.0, 0]), "layer_rope_theta"),
        ("output_multiplier", json!(0), "output_multiplier"),
        ("qk_scale_factor", json!(-1), "qk_scale_factor"),
        ("post_norm_eps", json!(0), "post_norm_eps"),
        ("hidden_activation", json!("gelu"), "hidden_activation"),
    ] {
        let error = parse(|config| config[key] = value.clone()).expect_err(key);
        assert!(error.contains("config.json") && error.contains(said), "{key} {value}: {error}");
    }
}

fn chosen(modules: &str) -> Result<Adaptation, String> {
    let config = parse(|_| {}).expect("a config");
    let text = format!("[model]\npath = \"m\"\n[data]\ntrain = \"d.jsonl\"\n[lora]\ntarget_modules = [{modules:?}]\n");
    let recipe = Recipe::parse(&text, Path::new("recipe.toml"), &[], None).expect("a recipe");
    choose(&recipe.lora, &config).map_err(|error| error.to_string())
}

/// The name of the gate in a feed-forward part is that of attention's gate too, as in PEFT.
#[test]
fn targets() {
    let targets = chosen("gate_proj").expect("targets").targets;
    let modules: Vec<&str> = targets.iter().map(|target| target.module.as_str()).collect();
    assert_eq!(modules.len(), 10);
    assert_eq!(modules[..2], ["model.layers.0.self_attn.gate_proj", "model.layers.0.mlp.gate_proj"]);
    assert_eq!(linear_modules(&parse(|_| {}).expect("a config")).len(), 5 * 8);
    let error = chosen("embed_tokens").expect_err("a norm behind it");
    assert!(error.contains("goes through a norm") && error.contains("modules_to_save"), "{error}");
}

/// mlx-lm writes the text model alone, under its own names; the config stays, or is the text part with the
/// wrapper's name.
#[test]
fn files_of_mlx_lm() {
    let want = bits(&golden(FAMILY));
    for is_flat in [false, true] {
        let made = model(FAMILY, |config, tensors| {
            if is_flat {
                let mut text = config["text_config"].clone();
                text["model_type"] = json!("muse_glimmer");
                text["architectures"] = config["architectures"].clone();
                *config = text;
            }
            tensors.retain(|tensor| tensor.0.starts_with("model.language_model.") || tensor.0 == "lm_head.weight");
            for tensor in tensors {
                tensor.0 = tensor.0.replacen("model.language_model.", "model.", 1);
            }
        });
        assert_eq!(ModelConfig::load(made.path()).expect("a config").wrapper.is_none(), is_flat);
        assert!(bits(made.path()) == want, "flat: {is_flat}");
    }
}

/// The names are those of `named_modules()` of mlx-lm's model.
#[test]
fn an_adapter_for_mlx_lm() {
    let config = ModelConfig::load(&golden(FAMILY)).expect("a config");
    let adapter = Adapter::read(&golden(FAMILY).join("adapter"), &config).expect("an adapter");
    let (files, notices) = adapter.mlx_files(0.0, &config).expect("files");
    assert!(notices.is_empty(), "{notices:?}");
    let written = tempfile::tempdir().expect("a directory");
    for (name, bytes) in &files {
        made::write(&written.path().join(name), bytes);
    }
    let tensors = TensorFile::open(&written.path().join("adapters.safetensors")).expect("tensors");
    let names: Vec<&str> = tensors.names().collect();
    assert!(names.contains(&"model.layers.4.self_attn.gate_proj.lora_a"), "{names:?}");
    assert!(names.iter().all(|name| name.starts_with("model.layers.")), "{names:?}");
    let again = Adapter::read(written.path(), &config).expect("an adapter");
    assert_eq!(again.targets, adapter.targets);
}
