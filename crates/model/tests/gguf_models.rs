//! GGUF files of llama.cpp's converter as bases: logits against transformers
//! (`scripts/make_gguf_models_golden.py` made the files), and what damaged ones are refused with.

use std::path::{Path, PathBuf};

use finetune_gguf::{File, Metadata, TensorInfo, TensorType, Value, header, padding};
use finetune_model::adapter::Adapter;
use finetune_model::merge::{MergedForm, write_merged};
use finetune_model::{Model, ModelConfig};
use finetune_store::{RealDisk, Staging, TensorFile};

mod golden;

use golden::{LOGITS, directory, floats, goldens, json, largest_difference, placement, rows};

/// The files, and the golden models whose rows their logits are of.
const FILES: [(&str, &str); 28] = [
    ("deepseek_v3", "deepseek_v3"),
    ("deepseek_v3_q8_0", "deepseek_v3_plain"),
    ("gemma2", "gemma2"),
    ("gemma3", "gemma3"),
    ("gemma3_q8_0", "gemma3"),
    ("gemma4", "gemma4"),
    ("gemma4_k_eq_v", "gemma4_k_eq_v"),
    ("gemma4_moe", "gemma4_moe"),
    ("glm4", "glm4"),
    ("glm4_moe", "glm4_moe"),
    ("glm4_moe_lite", "glm4_moe_lite"),
    ("gpt_oss", "gpt_oss"),
    ("gpt_oss_mxfp4", "gpt_oss_mxfp4"),
    ("granite", "granite"),
    ("granite4", "granitemoehybrid_rope"),
    ("granite4_nope", "granitemoehybrid"),
    ("lfm2", "lfm2"),
    ("lfm2_moe", "lfm2_moe"),
    ("llama3", "llama3"),
    ("ministral3", "ministral3"),
    ("olmo3", "olmo3"),
    ("phi3", "phi3"),
    ("qwen3_5", "qwen3_5"),
    ("qwen3_5_moe", "qwen3_5_moe"),
    ("qwen3_5_q8_0", "qwen3_5"),
    ("qwen3_moe", "qwen3_moe_experts"),
    ("qwen3_moe_q8_0", "qwen3_moe_experts"),
    ("qwen3_next", "qwen3_next"),
];

fn folder() -> PathBuf {
    goldens().join("gguf/models")
}

fn path_of(name: &str) -> PathBuf {
    folder().join(format!("{name}.gguf"))
}

#[test]
fn every_file_is_listed() {
    let entries = std::fs::read_dir(folder()).expect("golden files").map(|entry| entry.expect("an entry").path());
    let mut found: Vec<String> = entries
        .filter(|path| path.extension().is_some_and(|extension| extension == "gguf"))
        .map(|path| path.file_stem().expect("a name").to_string_lossy().into_owned())
        .collect();
    found.sort();
    assert_eq!(found, FILES.map(|(name, _)| name));
}

#[test]
fn logits_are_those_of_transformers() {
    let mut wrong = Vec::new();
    for (name, family) in FILES {
        let expected = TensorFile::open(&folder().join(format!("{name}.safetensors"))).expect("logits");
        let model = match Model::load(&path_of(name), &placement()) {
            Ok(model) => model,
            Err(error) => {
                wrong.push(format!("{name}: {error}"));
                continue;
            }
        };
        for (n, (tokens, _)) in rows(&json(&directory(family).join("golden.json"))).iter().enumerate() {
            let got = model.logits(tokens).expect("tokens of the vocabulary");
            let difference = largest_difference(&got, &floats(&expected, &format!("base_logits.{n}")));
            if difference.is_nan() || difference >= LOGITS {
                wrong.push(format!("{name}, row {n}: {difference:e}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A file with other keys and tensors.
struct Changed {
    keys: Metadata,
    tensors: Vec<(TensorInfo, Vec<u8>)>,
}

impl Changed {
    fn of(name: &str) -> Changed {
        let file = File::open(&path_of(name)).expect("a golden file");
        let bytes = |info: &TensorInfo| (info.clone(), file.bytes(&info.name).expect("numbers"));
        Changed { keys: file.metadata().clone(), tensors: file.tensors().iter().map(bytes).collect() }
    }

    fn set(&mut self, key: &str, value: Value) {
        self.keys.retain(|(known, _)| known != key);
        self.keys.push((key.to_owned(), value));
    }

    fn unset(&mut self, key: &str) {
        let before = self.keys.len();
        self.keys.retain(|(known, _)| known != key);
        assert_eq!(self.keys.len() + 1, before, "{key}");
    }

    fn tensor(&mut self, name: &str) -> &mut (TensorInfo, Vec<u8>) {
        self.tensors.iter_mut().find(|(info, _)| info.name == name).unwrap_or_else(|| panic!("{name} in the file"))
    }

    fn remove(&mut self, name: &str) {
        let _ = self.tensor(name);
        self.tensors.retain(|(info, _)| info.name != name);
    }

    fn swap(&mut self, name: &str) {
        self.tensor(name).0.shape.reverse();
    }

    #[expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]
    fn write(&self, path: &Path) {
        let infos: Vec<TensorInfo> = self.tensors.iter().map(|(info, _)| info.clone()).collect();
        let mut bytes = header(&self.keys, &infos).expect("a header");
        for (_, numbers) in &self.tensors {
            bytes.extend(numbers);
            bytes.resize(bytes.len() + padding(numbers.len() as u64), 0);
        }
        std::fs::write(path, bytes).expect("a file in a temporary directory");
    }
}

/// Factors of LongRoPE, which most architectures do not have.
fn factors() -> (TensorInfo, Vec<u8>) {
    let info = TensorInfo { name: "rope_factors_long.weight".to_owned(), shape: vec![4], kind: TensorType::F32 };
    (info, vec![0; 16])
}

/// (file, what is changed, part of the refusal)
#[test]
fn damaged_and_other_files_are_refused_by_name() {
    type Change = fn(&mut Changed);
    let table: [(&str, Change, &str); 19] = [
        (
            "qwen3_moe",
            |f| f.remove("blk.1.ffn_up_exps.weight"),
            "no tensor `blk.1.ffn_up_exps.weight` (`model.layers.1",
        ),
        (
            "qwen3_moe",
            |f| f.swap("blk.0.ffn_down_exps.weight"),
            "`blk.0.ffn_down_exps.weight` has the shape [24, 32, 5]",
        ),
        ("qwen3_moe", |f| f.set("general.architecture", Value::String("grok".into())), "the architecture `grok`"),
        ("qwen3_moe", |f| f.set("qwen3moe.expert_count", Value::U32(6)), "has the shape [5, "),
        ("qwen3_moe", |f| f.unset("qwen3moe.expert_used_count"), "no `qwen3moe.expert_used_count`"),
        ("qwen3_moe", |f| f.set("qwen3moe.ssm.conv_kernel", Value::U32(4)), "the key `qwen3moe.ssm.conv_kernel` = 4"),
        ("gemma2", |f| f.remove("blk.2.post_ffw_norm.weight"), "no tensor `blk.2.post_ffw_norm.weight`"),
        ("gemma4", |f| f.tensor("rope_freqs.weight").1[..4].copy_from_slice(&2_f32.to_le_bytes()), "are not Gemma 4's"),
        ("gemma4_moe", |f| f.remove("blk.0.pre_ffw_norm_2.weight"), "no tensor `blk.0.pre_ffw_norm_2.weight`"),
        ("gpt_oss_mxfp4", |f| f.remove("blk.0.attn_sinks.weight"), "no tensor `blk.0.attn_sinks.weight`"),
        ("deepseek_v3", |f| f.set("deepseek2.expert_gating_func", Value::U32(1)), "`deepseek2.expert_gating_func` = 1"),
        ("deepseek_v3", |f| f.swap("blk.0.attn_k_b.weight"), "`blk.0.attn_k_b.weight` has the shape [12, 16, 4]"),
        ("deepseek_v3", |f| f.remove("blk.2.ffn_gate_inp.weight"), "no tensor `blk.2.ffn_gate_inp.weight`"),
        ("olmo3", |f| f.set("olmo2.attention.sliding_window", Value::U32(0)), "a model of OLMo 2"),
        ("granite", |f| f.tensors.push(factors()), "uses `rope_factors_long.weight`"),
        ("granite", |f| f.set("granite.expert_count", Value::U32(4)), "experts of Granite are not computed"),
        ("lfm2", |f| f.remove("blk.0.shortconv.conv.weight"), "no tensor `blk.0.shortconv.conv.weight`"),
        ("phi3", |f| f.remove("rope_factors_short.weight"), "only one of `rope_factors_long.weight`"),
        ("qwen3_5", |f| f.set("qwen35.ssm.inner_size", Value::U32(96)), "has the shape"),
    ];
    let directory = tempfile::tempdir().expect("a temporary directory");
    for (n, (name, change, part)) in table.into_iter().enumerate() {
        let mut file = Changed::of(name);
        change(&mut file);
        let path = directory.path().join(format!("{n}.gguf"));
        file.write(&path);
        let error = ModelConfig::load(&path).map(|_| ()).expect_err(part).to_string();
        assert!(error.contains(&format!("{n}.gguf")) && error.contains(part), "{name}: {error}, expected {part}");
    }
}

/// A delta net's rate and a scale that are no numbers.
#[test]
fn numbers_that_are_not_finite_are_refused_by_name() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut file = Changed::of("qwen3_5");
    let (info, bytes) = file.tensor("blk.0.ssm_a");
    assert_eq!(info.kind, TensorType::F32);
    bytes[..4].copy_from_slice(&1_f32.to_le_bytes());
    let path = directory.path().join("rate.gguf");
    file.write(&path);
    let error = Model::load(&path, &placement()).map(|_| ()).expect_err("a logarithm").to_string();
    assert!(error.contains("rate.gguf") && error.contains("model.layers.0.linear_attn.A_log"), "{error}");

    let mut file = Changed::of("gpt_oss_mxfp4");
    file.tensor("blk.1.ffn_up_exps.weight").1[0] = 0xff;
    let path = directory.path().join("scale.gguf");
    file.write(&path);
    let error = Model::load(&path, &placement()).map(|_| ()).expect_err("a NaN").to_string();
    assert!(error.contains("scale.gguf") && error.contains("blk.1.ffn_up_exps.weight"), "{error}");
}

/// Files whose directory is a golden model as it is, so that the merged model has that model's logits.
#[test]
fn merged_models_are_directories_of_their_families() {
    for family in
        ["qwen3_5", "qwen3_next", "glm4_moe", "gemma4_moe", "phi3", "olmo3", "granite", "ministral3", "llama3"]
    {
        let base = path_of(family);
        let config = ModelConfig::load(&base).expect("a config");
        let adapter = Adapter::read(&directory(family).join("adapter"), &config).expect("an adapter of the model");
        let parent = tempfile::tempdir().expect("a directory");
        let mut staging = Staging::begin(&RealDisk, parent.path(), "merged").expect("a new directory");
        let form = MergedForm::of_shards(u64::MAX);
        write_merged(&RealDisk, &base, &adapter, &mut staging, form, &[], &|_, _| {}).expect("a merge");
        let merged = staging.publish(&serde_json::json!({"kind": "merged"})).expect("published");
        let model = Model::load(&merged, &placement()).expect("the merged model loads");
        let expected = TensorFile::open(&directory(family).join("golden.safetensors")).expect("golden.safetensors");
        for (n, (tokens, _)) in rows(&json(&directory(family).join("golden.json"))).iter().enumerate() {
            let got = model.logits(tokens).expect("tokens of the vocabulary");
            let difference = largest_difference(&got, &floats(&expected, &format!("merged_logits.{n}")));
            assert!(difference < LOGITS, "{family} merged {n}: {difference:e}");
        }
    }
}

/// Stacks with gate and up in turns, which the file has apart.
#[test]
fn merged_stacks_are_refused() {
    for (name, family) in [("gpt_oss", "gpt_oss"), ("gpt_oss_mxfp4", "gpt_oss_mxfp4")] {
        let base = path_of(name);
        let config = ModelConfig::load(&base).expect("a config");
        let adapter = Adapter::read(&directory(family).join("adapter"), &config).expect("an adapter of the model");
        let parent = tempfile::tempdir().expect("a directory");
        let mut staging = Staging::begin(&RealDisk, parent.path(), "merged").expect("a new directory");
        let form = MergedForm::of_shards(u64::MAX);
        let merged = write_merged(&RealDisk, &base, &adapter, &mut staging, form, &[], &|_, _| {});
        let error = merged.expect_err("experts in stacks").to_string();
        assert!(error.contains("in a GGUF file are not written"), "{error}");
    }
}
