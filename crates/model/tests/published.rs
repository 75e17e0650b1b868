//! Published models by the shapes that their `config.json` says (`scripts/published_shapes.py` has them, and where they
//! are from): parameters and bytes against what transformers, mlx-lm and bitsandbytes count of the same shapes
//! (`scripts/make_published_golden.py`), and against what their makers or the hub state, within one in a hundred.
//!
//! Layers that predict further tokens do not count, nor do vision towers.

use std::path::{Path, PathBuf};

use finetune_model::{BaseForm, FloatType, ModelConfig, PackedConfig, expected_tensors, scheme_named};
use serde_json::{Value, json};

/// Each matrix of these forms has a table of 16 numbers in f32 besides. Programs that pack have one for all.
const WITH_TABLE: [&str; 2] = ["nf4", "mxfp4"];
const TABLE: u64 = 16 * 4;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn published() -> Vec<Value> {
    let text = std::fs::read_to_string(repository().join("tests/goldens/published.json")).expect("the golden file");
    serde_json::from_str(&text).expect("JSON")
}

fn config(shape: &Value) -> ModelConfig {
    ModelConfig::parse(&shape.to_string(), Path::new("config.json")).unwrap_or_else(|error| panic!("{error}"))
}

fn parameters(config: &ModelConfig) -> u64 {
    expected_tensors(config).iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum()
}

/// A number that only some models have is 0 for the others.
fn number(model: &Value, key: &str) -> u64 {
    model[key].as_u64().unwrap_or(0)
}

/// Bytes of the weights, packed while they are loaded if `form` says how, and how many matrices that are.
fn bytes(config: &ModelConfig, form: Option<&str>) -> (u64, u64) {
    let form = BaseForm::of_config(config, &PackedConfig::default(), form.and_then(scheme_named), FloatType::BF16);
    let dense = parameters(config) - form.packed.elements - form.by_row;
    // "nf4 while it is loaded; 212 of 272 matrices packed"
    let words = form.words.unwrap_or_default();
    let matrices = words.split("; ").nth(1).and_then(|words| words.split(' ').next()?.parse().ok());
    (2 * dense + form.packed.bytes, matrices.unwrap_or(0))
}

#[test]
fn parameters_of_published_shapes() {
    for model in published() {
        let name = &model["model"];
        let found = parameters(&config(&model["config"]));
        assert_eq!(found, number(&model, "parameters"), "{name}: ours, and transformers'");
        let stated = model["billions"].as_f64().expect("a number");
        let all = (found + number(&model, "encoders")) as f64 / 1e9;
        assert!((all / stated - 1.0).abs() < 0.01, "{name}: {all:.3} billion, stated {stated}");
    }
}

#[test]
fn bytes_of_published_shapes_in_each_form() {
    let mut models = published();
    // Several versions of a model have one shape.
    models.dedup_by(|one, other| one["config"] == other["config"]);
    for model in models {
        let config = config(&model["config"]);
        for form in ["mlx4", "mlx8", "mxfp4", "nf4", "int8"] {
            let (found, matrices) = bytes(&config, Some(form));
            let tables = if WITH_TABLE.contains(&form) { TABLE * matrices } else { 0 };
            let want = model["bytes"][form].as_u64().expect("a number");
            assert_eq!(found - tables, want, "{} as {form}: ours, and the program's that packs so", model["model"]);
        }
    }
}

/// What makers publish packed, from its config alone, against the size of their repositories in billions of bytes.
#[test]
fn bytes_of_models_that_are_published_packed() {
    let mxfp4 = json!({"quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]});
    let fp8 =
        json!({"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]});
    let weights = json!({"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": true, "type": "int"});
    let int4 = json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]});
    let published = published();
    for (name, quantization, stated) in [
        ("gpt-oss-20b", &mxfp4, 13.8),
        ("gpt-oss-120b", &mxfp4, 65.2),
        ("DeepSeek-V3", &fp8, 688.6),
        ("Kimi-K2.5", &int4, 595.0),
    ] {
        let model = published.iter().find(|model| model["model"] == name).expect("a model");
        let keys = json!({"quantization_config": quantization});
        let packing = PackedConfig::parse(keys.as_object().expect("keys"), Path::new("config.json"));
        let packing = packing.unwrap_or_else(|error| panic!("{error}"));
        let config = config(&model["config"]);
        let form = BaseForm::of_config(&config, &packing, None, FloatType::BF16);
        let mut found = 2 * (parameters(&config) - form.packed.elements) + form.packed.bytes;
        if name == "DeepSeek-V3" {
            // The layer that predicts a further token: one more layer, both ends again, and a matrix of two widths.
            let layer = form.layers.last().expect("layers").bytes(FloatType::BF16);
            let ends: u64 = form.ends.iter().map(|end| end.bytes(FloatType::BF16)).sum();
            found += layer + ends + 2 * (config.hidden_size * config.hidden_size) as u64;
        }
        let found = found as f64 / 1e9;
        assert!(
            (found / stated - 1.0).abs() < 0.01,
            "{name}: {found:.1} billion bytes, stated {stated}: {:?}",
            form.words
        );
    }
}

/// Models as the hub has them, the text model in a wrapper, have the parameters of the text model.
#[test]
fn parameters_of_text_models_in_their_wrappers() {
    let published = published();
    for (name, wrapper) in [
        ("Qwen3.5-4B", "qwen3_5"),
        ("Qwen3.5-35B-A3B", "qwen3_5_moe"),
        ("Qwen3.6-27B", "qwen3_5"),
        ("Qwen3.6-35B-A3B", "qwen3_5_moe"),
        ("Qwen3.8-27B", "qwen3_5"),
        ("gemma-3-4b", "gemma3"),
        ("gemma-4-E2B", "gemma4"),
        ("gemma-4-E4B", "gemma4"),
        ("gemma-4-12B", "gemma4_unified"),
        ("gemma-4-26B-A4B", "gemma4"),
        ("Ministral-3-3B", "mistral3"),
        ("Ministral-3-8B", "mistral3"),
        ("Mistral-Small-3.2-24B", "mistral3"),
        ("Muse-Glimmer-30B", "muse_glimmer"),
        ("Kimi-K2.5", "kimi_k25"),
        ("Kimi-K2.6", "kimi_k25"),
        ("Kimi-K2.7-Code", "kimi_k25"),
    ] {
        let model = published.iter().find(|model| model["model"] == name).expect("a model");
        let whole =
            json!({"model_type": wrapper, "text_config": model["config"], "vision_config": {"hidden_size": 1024}});
        assert_eq!(parameters(&config(&whole)), number(model, "parameters"), "{name} in {wrapper}");
    }
}

/// The table of docs/models.md. Prints it if it is another one.
#[test]
fn the_page_of_models_has_these_sizes() {
    let gibibytes = |bytes: u64| {
        let value = bytes as f64 / f64::from(1 << 30);
        if value < 10.0 { format!("{value:.2}") } else { format!("{value:.1}") }
    };
    let mut table = String::new();
    for model in published() {
        let config = config(&model["config"]);
        let forms = [None, Some("mlx8"), Some("mlx4"), Some("nf4")];
        let cells = forms.map(|form| gibibytes(bytes(&config, form).0));
        let billions = number(&model, "parameters") as f64 / 1e9;
        let name = model["model"].as_str().expect("a name");
        table += &format!("| {name} | {billions:.2} | {} |\n", cells.join(" | "));
    }
    let page = std::fs::read_to_string(repository().join("docs/models.md")).expect("docs/models.md");
    assert!(page.contains(&table), "docs/models.md should have:\n{table}");
}
