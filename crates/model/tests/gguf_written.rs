//! Models as GGUF files, against those that llama.cpp's own converter makes of the same directories
//! (`scripts/make_gguf_models_golden.py`): the same tensors to the bit, the same keys. What is read of them
//! computes what transformers computes. Models with delta nets are in `src/gguf/write/tests.rs`: the golden ones are
//! too small for llama.cpp.

use std::path::{Path, PathBuf};

use finetune_gguf::{File, TensorInfo, TensorType, Value};
use finetune_model::adapter::Adapter;
use finetune_model::gguf::{AdapterFile, ModelFile, write_adapter, write_model};
use finetune_model::{Model, ModelConfig};
use finetune_store::{RealDisk, TensorFile};
use serde_json::{Value as Json, json};

mod golden;

use golden::{LOGITS, directory, floats, goldens, json as read_json, largest_difference, placement, rows};

/// Golden models, the file that the converter makes of each, and keys of config.json that have other values
/// there: what a GGUF file cannot say.
fn cases() -> Vec<(&'static str, &'static str, Json)> {
    vec![
        ("deepseek_v3", "deepseek_v3", json!({"rope_parameters": {"mscale": 0.8, "mscale_all_dim": 0.8}})),
        ("gemma2", "gemma2", json!({"query_pre_attn_scalar": 16})),
        ("gemma3", "gemma3", json!({"query_pre_attn_scalar": 16, "layer_types": vec!["sliding_attention"; 3]})),
        ("gemma4_k_eq_v", "gemma4_k_eq_v", json!({})),
        ("gemma4_moe", "gemma4_moe", json!({})),
        ("glm4", "glm4", json!({})),
        ("glm4_moe", "glm4_moe", json!({})),
        ("glm4_moe_lite", "glm4_moe_lite", json!({"first_k_dense_replace": 1})),
        ("gpt_oss", "gpt_oss", json!({})),
        ("gpt_oss_mxfp4", "gpt_oss_mxfp4", json!({})),
        ("granite", "granite", json!({})),
        ("lfm2_moe", "lfm2_moe", json!({"routed_scaling_factor": 1.0})),
        ("llama3", "llama3", json!({})),
        ("ministral3", "ministral3", json!({})),
        ("olmo3", "olmo3", json!({})),
        ("phi3", "phi3", json!({})),
        ("qwen3_moe_experts", "qwen3_moe", json!({"norm_topk_prob": true})),
    ]
}

fn converted(name: &str) -> PathBuf {
    goldens().join(format!("gguf/models/{name}.gguf"))
}

/// Writes a file of a base in f32.
fn written(base: &Path, adapter: Option<&Adapter>, directory: &Path) -> Result<PathBuf, String> {
    let path = directory.join("written.gguf");
    let file = ModelFile { base, adapter, kind: TensorType::F32, name: "golden", tokenizer: Vec::new() };
    write_model(&RealDisk, &file, &path, &|_, _| {}).map_err(|error| error.to_string())?;
    Ok(path)
}

/// A golden model whose config.json has other values for some keys.
#[expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]
fn changed(family: &str, changes: &Json, to: &Path) -> PathBuf {
    fn change(config: &mut Json, changes: &Json) {
        for (key, value) in changes.as_object().expect("an object") {
            match value.is_object() {
                true => change(&mut config[key], value),
                false => config[key] = value.clone(),
            }
        }
    }
    let (from, to) = (directory(family), to.join("model"));
    std::fs::create_dir(&to).expect("a new directory");
    std::fs::copy(from.join("model.safetensors"), to.join("model.safetensors")).expect("the weights");
    let mut config = read_json(&from.join("config.json"));
    change(&mut config, changes);
    std::fs::write(to.join("config.json"), config.to_string()).expect("a config.json");
    to
}

/// Layers of the file that take part: the others predict further tokens.
fn layers(file: &File) -> u64 {
    let architecture = file.get("general.architecture").and_then(Value::as_str).expect("an architecture");
    let number = |key: &str| file.get(&format!("{architecture}.{key}")).and_then(Value::as_u64);
    number("block_count").expect("layers") - number("nextn_predict_layers").unwrap_or(0)
}

fn is_idle(name: &str, layers: u64) -> bool {
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).and_then(|(n, _)| n.parse().ok());
    layer.is_some_and(|layer: u64| layer >= layers)
}

/// What differs between the tensors of two files. `theirs` may have layers that predict further tokens.
fn other_tensors(ours: &File, theirs: &File) -> Vec<String> {
    let mut wrong = Vec::new();
    let layers = layers(theirs);
    let find = |file: &File, name: &str| file.tensors().iter().find(|tensor| tensor.name == name).cloned();
    for tensor in theirs.tensors().iter().filter(|tensor| !is_idle(&tensor.name, layers)) {
        let name = &tensor.name;
        let Some(TensorInfo { shape, kind, .. }) = find(ours, name) else {
            wrong.push(format!("no `{name}`"));
            continue;
        };
        if (&shape, kind) != (&tensor.shape, tensor.kind) {
            wrong.push(format!("`{name}` {shape:?} {}, theirs {:?} {}", kind.name(), tensor.shape, tensor.kind.name()));
            continue;
        }
        let bytes = |file: &File| file.bytes(name).expect("numbers");
        // Llama 3's factors of frequencies are rounded elsewhere.
        if name == "rope_freqs.weight" {
            let numbers = |file: &File| TensorType::F32.decode(&bytes(file)).expect("f32");
            let near = |(ours, theirs): (&f32, &f32)| (ours - theirs).abs() <= 1e-5 * theirs.abs();
            if !numbers(ours).iter().zip(&numbers(theirs)).all(near) {
                wrong.push(format!("numbers of `{name}`"));
            }
        } else if bytes(ours) != bytes(theirs) {
            wrong.push(format!("bytes of `{name}`"));
        }
    }
    let more = ours.tensors().iter().filter(|tensor| find(theirs, &tensor.name).is_none());
    wrong.extend(more.map(|tensor| format!("`{}`, which theirs has not", tensor.name)));
    wrong
}

/// What differs between the keys of two files: each of theirs is in ours. Ours says more of what their loader
/// takes for granted, such as the width of heads.
fn other_keys(ours: &File, theirs: &File) -> Vec<String> {
    let mut wrong = Vec::new();
    for (key, value) in theirs.metadata() {
        let own = ["general.size_label", "general.name", "general.file_type", "general.quantization_version"];
        // Layers that are not written count there.
        let of_layers = key.ends_with("nextn_predict_layers");
        if own.contains(&key.as_str()) || of_layers || (key.ends_with(".block_count") && layers(ours) == layers(theirs))
        {
            continue;
        }
        if ours.get(key) != Some(value) {
            wrong.push(format!("{key}: {:?}, theirs {value:?}", ours.get(key)));
        }
    }
    wrong
}

/// The largest difference between the logits of a file and expected ones.
fn difference(path: &Path, family: &str, expected: &TensorFile, logits: &str) -> f32 {
    let model = Model::load(path, &placement()).expect("the written model loads");
    let golden = rows(&read_json(&directory(family).join("golden.json")));
    let of_row = |(n, (tokens, _)): (usize, &(Vec<u32>, Vec<bool>))| {
        let got = model.logits(tokens).expect("tokens of the vocabulary");
        largest_difference(&got, &floats(expected, &format!("{logits}.{n}")))
    };
    golden.iter().enumerate().map(of_row).fold(0.0_f32, |max, row| if max.is_nan() || row <= max { max } else { row })
}

#[test]
fn files_are_those_of_llama_cpps_converter() {
    let mut wrong = Vec::new();
    for (family, name, changes) in cases() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let base = changed(family, &changes, folder.path());
        let path = match written(&base, None, folder.path()) {
            Ok(path) => path,
            Err(error) => {
                wrong.push(format!("{family}: {error}"));
                continue;
            }
        };
        let (ours, theirs) = (File::open(&path).expect("a file"), File::open(&converted(name)).expect("a golden file"));
        let differences = other_tensors(&ours, &theirs).into_iter().chain(other_keys(&ours, &theirs));
        wrong.extend(differences.map(|what| format!("{family}: {what}")));
        let expected = TensorFile::open(&converted(name).with_extension("safetensors")).expect("logits");
        let difference = difference(&path, family, &expected, "base_logits");
        if difference.is_nan() || difference >= LOGITS {
            wrong.push(format!("{family}: logits differ by {difference:e}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A file of a file. LFM2's has no directory here that llama.cpp could have been given.
#[test]
fn a_file_that_is_read_is_written_again() {
    let names = cases().into_iter().map(|(_, name, _)| name).chain(["lfm2"]);
    let mut wrong = Vec::new();
    for name in names {
        let folder = tempfile::tempdir().expect("a temporary directory");
        match written(&converted(name), None, folder.path()) {
            Err(error) => wrong.push(format!("{name}: {error}")),
            Ok(path) => {
                let (ours, theirs) =
                    (File::open(&path).expect("a file"), File::open(&converted(name)).expect("a file"));
                let differences = other_tensors(&ours, &theirs).into_iter().chain(other_keys(&ours, &theirs));
                wrong.extend(differences.map(|what| format!("{name}: {what}")));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Granite 4 without Mamba layers is Granite, with a key if it has no positions, and DeepSeek-V3 without short queries
/// says so.
#[test]
fn models_that_have_another_form_in_the_file() {
    for (family, architecture) in [
        ("deepseek_v3_plain", "deepseek2"),
        ("granitemoehybrid", "granite"),
        ("granitemoehybrid_rope", "granite"),
        ("mistral", "llama"),
        ("qwen2", "qwen2"),
    ] {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let path = written(&directory(family), None, folder.path()).unwrap_or_else(|error| panic!("{family}: {error}"));
        let file = File::open(&path).expect("a file");
        assert_eq!(file.get("general.architecture").and_then(Value::as_str), Some(architecture), "{family}");
        assert!(file.tensors().iter().all(|tensor| tensor.kind == TensorType::F32), "{family}");
        // llama.cpp loads no file of such a model without the key.
        let rank = file.get("deepseek2.attention.q_lora_rank").and_then(Value::as_u64);
        assert_eq!(rank, (family == "deepseek_v3_plain").then_some(0), "{family}");
        // llama.cpp takes its absence for positions.
        let positions = file.get("granite.rope.scaling.finetuned");
        assert_eq!(positions, (family == "granitemoehybrid").then_some(&Value::Bool(false)), "{family}");
        if family == "mistral" {
            // Its window is the longest text of the file; the golden rows are longer.
            continue;
        }
        let expected = TensorFile::open(&directory(family).join("golden.safetensors")).expect("golden.safetensors");
        let difference = difference(&path, family, &expected, "base_logits");
        assert!(difference < LOGITS, "{family}: {difference:e}");
    }
}

/// Experts in MXFP4 stay so whatever the other matrices are in, as with llama.cpp's converter, and with an adapter
/// on other parts. If one changes experts, all are in plain numbers.
#[test]
fn experts_in_mxfp4() {
    let of = |family: &str, kind: TensorType| {
        let base = directory(family);
        let config = ModelConfig::load(&base).expect("a config");
        let adapter = Adapter::read(&base.join("adapter"), &config).expect("an adapter of the model");
        let folder = tempfile::tempdir().expect("a temporary directory");
        let path = folder.path().join("written.gguf");
        let file = ModelFile { base: &base, adapter: Some(&adapter), kind, name: family, tokenizer: Vec::new() };
        let notices = write_model(&RealDisk, &file, &path, &|_, _| {}).expect("a file").join("\n");
        let file = File::open(&path).expect("a file");
        let is_stack = |tensor: &&TensorInfo| tensor.name.ends_with("_exps.weight");
        let stacks: Vec<&str> = file.tensors().iter().filter(is_stack).map(|tensor| tensor.kind.name()).collect();
        (stacks, file.get("general.file_type").and_then(Value::as_u64), notices)
    };
    for kind in [TensorType::F32, TensorType::BF16, TensorType::Q8_0] {
        let (stacks, file_type, notices) = of("gpt_oss_mxfp4", kind);
        assert_eq!((stacks, file_type), (vec!["mxfp4"; 6], Some(38)), "{kind:?}");
        assert!(notices.contains("stay in MXFP4") && !notices.contains("decoded"), "{notices}");
    }
    let (stacks, file_type, notices) = of("gpt_oss_mxfp4_experts", TensorType::BF16);
    assert_eq!((stacks, file_type), (vec!["bf16"; 6], Some(32)));
    assert!(notices.contains("(MXFP4; ") && notices.contains("are decoded, and rounded once to bf16"), "{notices}");
}

/// The adapters are on every kind of matrix of their families: experts, stacks of them, matrices of several.
#[test]
fn adapters_are_merged_in() {
    for family in [
        "gemma4_moe",
        "glm4_moe",
        "gpt_oss",
        "gpt_oss_experts",
        "gpt_oss_mxfp4",
        "gpt_oss_mxfp4_experts",
        "granite",
        "llama3",
        "ministral3",
        "olmo3",
        "phi3",
    ] {
        let base = directory(family);
        let config = ModelConfig::load(&base).expect("a config");
        let adapter = Adapter::read(&base.join("adapter"), &config).expect("an adapter of the model");
        let folder = tempfile::tempdir().expect("a temporary directory");
        let path = written(&base, Some(&adapter), folder.path()).unwrap_or_else(|error| panic!("{family}: {error}"));
        let expected = TensorFile::open(&base.join("golden.safetensors")).expect("golden.safetensors");
        let difference = difference(&path, family, &expected, "merged_logits");
        assert!(difference < LOGITS, "{family}: {difference:e}");
    }
}

/// In q8_0 small matrices stay as the converter leaves them.
#[test]
fn types_are_those_of_llama_cpps_converter() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    for (base, name) in
        [(converted("qwen3_moe"), "qwen3_moe_q8_0"), (directory("deepseek_v3_plain"), "deepseek_v3_q8_0")]
    {
        let path = folder.path().join(format!("{name}.gguf"));
        let file = ModelFile { base: &base, adapter: None, kind: TensorType::Q8_0, name, tokenizer: Vec::new() };
        write_model(&RealDisk, &file, &path, &|_, _| {}).expect("a file");
        let kinds = |path: &Path| {
            let file = File::open(path).expect("a file");
            let mut kinds: Vec<(String, &str)> =
                file.tensors().iter().map(|tensor| (tensor.name.clone(), tensor.kind.name())).collect();
            kinds.sort();
            kinds
        };
        assert_eq!(kinds(&path), kinds(&converted(name)), "{name}");
    }
}

/// (golden model, keys of its config.json, part of the refusal)
#[test]
fn what_llama_cpp_would_compute_otherwise_is_refused_by_name() {
    for (family, changes, part) in [
        ("qwen3_moe_experts", json!({"norm_topk_prob": false}), "divided by their sum false"),
        ("gemma2", json!({"query_pre_attn_scalar": 24}), "the factor of attention's scores: "),
        ("gemma3", json!({"query_pre_attn_scalar": 16}), "layer 1: "),
        ("gemma4", json!({}), "has keys and values of layer 2, here of layer 3"),
        ("lfm2", json!({}), "its `lfm2` has no biases of convolutions"),
        ("qwen3_5_moe", json!({}), "heads of values as wide as those of keys"),
        ("lfm2_moe", json!({"routed_scaling_factor": 1.5}), "experts: "),
        ("smollm3", json!({}), "rotary embedding"),
        ("deepseek_v3", json!({}), "rotary embedding 0: "),
        ("muse_glimmer", json!({}), "no place for MuseGlimmer"),
    ] {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let base = changed(family, &changes, folder.path());
        let error = written(&base, None, folder.path()).expect_err(part);
        assert!(error.starts_with("llama.cpp cannot compute this model: "), "{family}: {error}");
        assert!(error.contains(part), "{family}: {error}, expected {part}");
    }
}

/// An adapter alone: rows and columns as the matrix has them, and what llama.cpp leaves out is refused.
#[test]
fn adapters_alone() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let path = folder.path().join("adapter.gguf");
    let of = |family: &str| {
        let config = ModelConfig::load(&directory(family)).expect("a config");
        let adapter = Adapter::read(&directory(family).join("adapter"), &config).expect("an adapter of the model");
        let file = AdapterFile { adapter: &adapter, config: &config, kind: TensorType::F32, name: family };
        write_adapter(&RealDisk, &file, &path).map_err(|error| error.to_string())
    };
    of("granite").expect("a file");
    let names: Vec<String> = File::open(&path).expect("a file").tensors().iter().map(|t| t.name.clone()).collect();
    assert!(names.iter().any(|name| name == "blk.0.attn_q.weight.lora_b"), "{names:?}");
    let error = of("deepseek_v3").expect_err("branches that llama.cpp leaves out");
    assert!(error.contains("llama.cpp has no place for the branch on `model.layers.0.self_attn."), "{error}");
}
