//! Curves of twenty steps over packed bases against torch (`scripts/make_packed_goldens.py` made the
//! files).

use std::path::{Path, PathBuf};

use finetune_recipe::Recipe;
use serde_json::Value;

mod curve;

use curve::{json, run, variant_sets};

const CASES: [&str; 22] = [
    "nf4",
    "nf4_double",
    "fp4",
    "int8",
    "mlx4",
    "mlx8",
    "mlx3",
    "mlx_mixed",
    "mlx_experts",
    "mxfp4",
    "fp8_blocks",
    "fp8_channels",
    "fp8_deepseek_v3",
    "compressed_int4",
    "int4_kimi_k2",
    "mlx_lfm2_moe",
    "mlx_gemma4_moe",
    "gptq",
    "gptq_act_order",
    "awq",
    "gguf_q4_1",
    "gguf_k",
];

fn goldens() -> PathBuf {
    // The variable is read at run time, because the tests also travel to other machines.
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_owned());
    Path::new(&here).join("../../tests/goldens/packed")
}

/// A recipe on a base, with the golden adapter to begin with and the settings of a curve.
fn recipe(base: &Path, adapter_and_rows: &Path, curve: &Value, output: &Path, sets: &[&str]) -> Recipe {
    let device = std::env::var("FINETUNE_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    let adapter = adapter_and_rows.join("adapter");
    let config = json(&adapter.join("adapter_config.json"));
    let text = format!(
        "[model]\npath = {base:?}\ndevice = {device:?}\n[data]\ntrain = {:?}\nformat = \"tokens\"\nshuffle = false\n",
        adapter_and_rows.join("rows.jsonl"),
    );
    let mut all = vec![
        format!("lora.rank={}", config["r"]),
        format!("lora.alpha={}", config["lora_alpha"]),
        format!("lora.target_modules={}", config["target_modules"]),
        format!("lora.init_from={adapter:?}"),
    ];
    all.extend(variant_sets(curve, curve));
    all.extend(sets.iter().map(|set| (*set).to_owned()));
    Recipe::parse(&text, Path::new("golden.toml"), &all, Some(output)).unwrap_or_else(|error| panic!("{error}"))
}

/// The base, the folder of its adapter and rows, and the curve.
fn case(name: &str) -> (PathBuf, PathBuf, Value) {
    let directory = goldens().join(name);
    let golden = json(&directory.join("golden.json"));
    let base = goldens().join("bases").join(golden["base"].as_str().expect("a base"));
    let path = if name.starts_with("gguf") { directory.join("model.gguf") } else { directory };
    (path, base, golden["curve"].clone())
}

/// Bounds: 1e-5 relative for losses, or ten times the noise of the reference if that is more.
#[test]
fn curves_over_packed_bases_equal_torch() {
    for name in CASES {
        let (path, base, curve) = case(name);
        let output = tempfile::tempdir().expect("a directory");
        let (rows, _) = run(recipe(&path, &base, &curve, output.path(), &[]));
        let bound = 1e-5f64.max(10.0 * curve["noise"]["loss_relative"].as_f64().expect("a noise figure"));
        let steps = curve["curve"].as_array().expect("a curve");
        assert_eq!(rows.len(), steps.len(), "{name}");
        for (row, want) in rows.iter().zip(steps) {
            let loss = want["loss"].as_f64().expect("a loss");
            assert_eq!(Some(row.trained_tokens), want["trained_tokens"].as_u64(), "{name}, step {}", row.step);
            assert!((row.loss - loss).abs() <= bound * loss, "{name}, step {}: {} against {loss}", row.step, row.loss);
        }
    }
}

/// `model.quantization` trains over what the reference's own file has: the same losses and adapters.
#[test]
fn quantized_while_loading_trains_as_over_the_references_file() {
    if std::env::var("FINETUNE_TEST_DEVICE").is_ok() {
        return;
    }
    for name in ["nf4", "int8", "mlx4", "mlx8", "mxfp4"] {
        let (path, base, curve) = case(name);
        let trained = |path: &Path, sets: &[&str]| {
            let output = tempfile::tempdir().expect("a directory");
            let sets = [&["train.max_steps=5"], sets].concat();
            let (rows, _) = run(recipe(path, &base, &curve, output.path(), &sets));
            let losses: Vec<u64> = rows.iter().map(|row| row.loss.to_bits()).collect();
            (losses, std::fs::read(output.path().join("adapter/adapter_model.safetensors")).expect("an adapter"))
        };
        let (ours, theirs) = (trained(&base, &[&format!("model.quantization={name}")]), trained(&path, &[]));
        assert_eq!(ours.0, theirs.0, "{name}: losses");
        assert!(ours.1 == theirs.1, "{name}: adapters");
    }
}
