//! Types of tensors; and models that llama.cpp has no file of, for what they have in common with those that it has.

use std::path::PathBuf;

use finetune_gguf::{File, Value};
use finetune_store::{RealDisk, TensorFile};
use serde_json::Value as Json;

use super::*;
use crate::gguf::architecture::written_as;
use crate::model::Model;
use crate::placement::Placement;

/// Golden models that llama.cpp's converter makes a file of and its loader does not read: they are too small for
/// what it takes for granted. Their tensors lie in the file as those of published ones.
const SMALL: [&str; 4] = ["gemma4", "qwen3_5", "qwen3_5_moe", "qwen3_next"];

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens")
}

fn written(family: &str, with_adapter: bool, directory: &Path) -> PathBuf {
    let (base, path) = (goldens().join("models").join(family), directory.join("written.gguf"));
    let config = ModelConfig::load(&base).expect("a config");
    let adapter = with_adapter.then(|| Adapter::read(&base.join("adapter"), &config).expect("an adapter of the model"));
    let file = ModelFile {
        base: &base,
        adapter: adapter.as_ref(),
        kind: TensorType::F32,
        name: family,
        tokenizer: Metadata::new(),
    };
    let of = |config: &ModelConfig| Ok(written_as(config.family).expect("an architecture"));
    write_as(&RealDisk, &file, &path, &|_, _| {}, of).unwrap_or_else(|error| panic!("{family}: {error}"));
    path
}

#[test]
fn small_models_have_the_tensors_and_keys_of_llama_cpps_converter() {
    for family in SMALL {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let ours = File::open(&written(family, false, directory.path())).expect("a file");
        let theirs = File::open(&goldens().join(format!("gguf/models/{family}.gguf"))).expect("a golden file");
        let shapes = |file: &File| -> BTreeMap<String, Vec<usize>> {
            file.tensors().iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect()
        };
        assert_eq!(shapes(&ours), shapes(&theirs), "{family}");
        for name in shapes(&theirs).keys() {
            let (own, other) = (ours.bytes(name).expect("numbers"), theirs.bytes(name).expect("numbers"));
            if !name.ends_with(".ssm_a") {
                assert!(own == other, "{family}: {name}");
                continue;
            }
            // The exponential function is rounded otherwise.
            let numbers = |bytes: &[u8]| TensorType::F32.decode(bytes).expect("f32");
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * b.abs();
            assert!(numbers(&own).iter().zip(&numbers(&other)).all(near), "{family}: {name}");
        }
        let architecture = ours.get("general.architecture").and_then(Value::as_str).expect("an architecture");
        let of_model = theirs.metadata().iter().filter(|(key, _)| key.starts_with(architecture));
        // The converter takes 4 for granted, whatever the layers are.
        for (key, value) in of_model.filter(|(key, _)| !key.ends_with("full_attention_interval")) {
            assert_eq!(ours.get(key), Some(value), "{family}: {key}");
        }
    }
}

#[test]
fn small_models_with_adapters_compute_what_transformers_does() {
    for family in SMALL {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let model = Model::load(&written(family, true, directory.path()), &Placement::cpu(None)).expect("a model");
        let golden = goldens().join("models").join(family);
        let text = std::fs::read_to_string(golden.join("golden.json")).expect("a golden file");
        let rows: Json = serde_json::from_str(&text).expect("JSON");
        let file = TensorFile::open(&golden.join("golden.safetensors")).expect("golden.safetensors");
        for (n, row) in rows["rows"].as_array().expect("rows").iter().enumerate() {
            let ids = row["input_ids"].as_array().expect("tokens").iter();
            let tokens: Vec<u32> = ids.map(|id| id.as_u64().expect("a token") as u32).collect();
            let bytes = file.get(&format!("merged_logits.{n}")).expect("logits").bytes().expect("numbers");
            let expected = TensorType::F32.decode(&bytes).expect("f32");
            let got = model.logits(&tokens).expect("tokens of the vocabulary");
            let far = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(got.len() == expected.len() && far < 3e-5, "{family}, row {n}: {far:e}");
        }
    }
}

/// As llama.cpp's converter chooses them for files in q8_0.
#[test]
fn types_of_tensors() {
    for (name, shape, kind) in [
        ("blk.0.attn_q.weight", &[4, 64][..], TensorType::Q8_0),
        ("blk.0.ffn_down_exps.weight", &[3, 4, 64], TensorType::Q8_0),
        ("blk.0.ffn_down_exps.weight", &[3, 4, 24], TensorType::F16),
        ("blk.0.ffn_down_exps.bias", &[3, 64], TensorType::F32),
        ("blk.0.ffn_gate_inp.weight", &[8, 64], TensorType::F32),
        ("blk.0.ffn_gate_inp_shexp.weight", &[1, 64], TensorType::F32),
        ("blk.0.ssm_conv1d.weight", &[64, 4], TensorType::F32),
        ("blk.0.shortconv.conv.weight", &[64, 3], TensorType::F32),
        ("blk.0.shortconv.in_proj.weight", &[64, 64], TensorType::Q8_0),
        ("blk.0.attn_norm.weight", &[64], TensorType::F32),
    ] {
        assert_eq!(kind_of(name, TensorType::Q8_0, shape), kind, "{name}");
    }
}
