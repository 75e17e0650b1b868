use std::path::PathBuf;

use finetune_gguf::{Metadata, TensorInfo, TensorType, Value, header, padding};

use super::*;
use crate::config::{Rope, RopeScaling};

const HIDDEN: usize = 64;
const HEADS: usize = 4;
const HEAD_DIM: usize = 16;
const INNER: usize = 96;
const VOCABULARY: usize = 40;

/// A file that is to be written: keys, and tensors with their numbers.
struct Tiny {
    architecture: &'static str,
    keys: Metadata,
    tensors: Vec<(TensorInfo, Vec<u8>)>,
}

impl Tiny {
    /// A model of one layer. Its query projection is q8_0, and every row of it has its number as
    /// scale.
    fn new(architecture: &'static str) -> Tiny {
        let mut tiny = Tiny { architecture, keys: Metadata::new(), tensors: Vec::new() };
        tiny.keys.push(("general.architecture".to_owned(), Value::String(architecture.to_owned())));
        for (key, number) in [
            ("block_count", 1),
            ("context_length", 8192),
            ("embedding_length", HIDDEN),
            ("feed_forward_length", INNER),
            ("attention.head_count", HEADS),
            ("attention.head_count_kv", HEADS),
        ] {
            tiny.set(key, Value::U32(number as u32));
        }
        tiny.set("attention.layer_norm_rms_epsilon", Value::F32(1e-5));
        tiny.set("rope.freq_base", Value::F32(500_000.0));
        tiny.floats("token_embd.weight", &[VOCABULARY, HIDDEN]);
        tiny.floats("output_norm.weight", &[HIDDEN]);
        for (part, shape) in [
            ("attn_norm", &[HIDDEN][..]),
            ("ffn_norm", &[HIDDEN]),
            ("attn_k", &[HIDDEN, HIDDEN]),
            ("attn_v", &[HIDDEN, HIDDEN]),
            ("attn_output", &[HIDDEN, HIDDEN]),
            ("ffn_gate", &[INNER, HIDDEN]),
            ("ffn_up", &[INNER, HIDDEN]),
            ("ffn_down", &[HIDDEN, INNER]),
        ] {
            tiny.floats(&format!("blk.0.{part}.weight"), shape);
        }
        let row =
            |row: usize| [&half::f16::from_f32(row as f32).to_le_bytes()[..], &[1; 32]].concat().repeat(HIDDEN / 32);
        let bytes = (0..HIDDEN).flat_map(row).collect();
        tiny.put("blk.0.attn_q.weight", &[HIDDEN, HIDDEN], TensorType::Q8_0, bytes);
        tiny
    }

    /// Sets a key of the architecture, or another one if it begins with `general.`.
    fn set(&mut self, key: &str, value: Value) {
        let key = if key.starts_with("general.") { key.to_owned() } else { format!("{}.{key}", self.architecture) };
        self.keys.retain(|(known, _)| *known != key);
        self.keys.push((key, value));
    }

    fn put(&mut self, name: &str, shape: &[usize], kind: TensorType, bytes: Vec<u8>) {
        self.remove(name);
        self.tensors.push((TensorInfo { name: name.to_owned(), shape: shape.to_vec(), kind }, bytes));
    }

    fn floats(&mut self, name: &str, shape: &[usize]) {
        self.put(name, shape, TensorType::F32, vec![0; 4 * shape.iter().product::<usize>()]);
    }

    fn remove(&mut self, name: &str) {
        self.tensors.retain(|(info, _)| info.name != name);
    }

    /// The bytes of a file with some of the tensors.
    #[expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]
    fn write(&self, path: &Path, tensors: &[(TensorInfo, Vec<u8>)]) {
        let infos: Vec<TensorInfo> = tensors.iter().map(|(info, _)| info.clone()).collect();
        let mut bytes = header(&self.keys, &infos).expect("a header");
        for (_, numbers) in tensors {
            bytes.extend(numbers);
            bytes.resize(bytes.len() + padding(numbers.len() as u64), 0);
        }
        std::fs::write(path, bytes).expect("a file in a temporary directory");
    }

    fn open(&self) -> Result<GgufBase, ModelError> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("tiny.gguf");
        self.write(&path, &self.tensors);
        GgufBase::open(&path).map(|base| base.expect("a GGUF file"))
    }
}

#[test]
fn config_tensors_and_their_order() {
    let base = Tiny::new("llama").open().expect("a model");
    let config = base.config();
    assert_eq!((config.family.model_type, config.hidden_size, config.head_dim), ("llama", HIDDEN, HEAD_DIM));
    assert_eq!((config.rms_norm_eps, config.ropes[0].theta, config.tied_embeddings), (1e-5, 5e5, true));
    assert_eq!(base.names().len(), 11);
    let query = "model.layers.0.self_attn.q_proj.weight";
    let bytes = HIDDEN * HIDDEN / 32 * 34;
    assert_eq!(base.stored(query), Some(GgufStored::Packed { name: "q8_0", bytes, shape: [HIDDEN, HIDDEN] }));
    // llama.cpp's rows 0, 2, 4, ... of a head are its first half.
    let values = base.dense_f32(query).expect("values");
    let rows: Vec<f32> = values.chunks(HIDDEN).map(|row| row[0]).take(HEAD_DIM).collect();
    let expected: Vec<f32> = (0..8).map(|n| 2.0 * n as f32).chain((0..8).map(|n| 2.0 * n as f32 + 1.0)).collect();
    assert_eq!(rows, expected);
    let stored = base.stored("model.norm.weight");
    assert_eq!(stored, Some(GgufStored::Dense(FloatType::F32, vec![HIDDEN])));
    assert_eq!(base.stored("lm_head.weight"), None);
    // The config.json of an export is read as the same config.
    let text = base.config_json().to_string();
    assert_eq!(ModelConfig::parse(&text, Path::new("config.json")).expect("a config"), *config);
}

/// In Qwen's models rows stay where they are.
#[test]
fn rows_of_other_architectures_stay() {
    let mut tiny = Tiny::new("qwen3");
    for norm in ["attn_q_norm", "attn_k_norm"] {
        tiny.floats(&format!("blk.0.{norm}.weight"), &[HEAD_DIM]);
    }
    tiny.set("attention.key_length", Value::U32(HEAD_DIM as u32));
    let base = tiny.open().expect("a model");
    let values = base.dense_f32("model.layers.0.self_attn.q_proj.weight").expect("values");
    assert!(values.chunks(HIDDEN).enumerate().all(|(row, values)| values[0] == row as f32));
}

#[test]
fn factors_of_llama_3_become_its_scaling() {
    let scaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192.0,
    };
    let rope = Rope { theta: 5e5, scaling, width: HEAD_DIM, growth: None };
    let mut factors = crate::gguf::metadata::rope_factors(&rope).expect("factors");
    let bytes = |factors: &[f32]| factors.iter().flat_map(|factor| factor.to_le_bytes()).collect::<Vec<u8>>();
    let mut tiny = Tiny::new("llama");
    tiny.put(ROPE_FACTORS[0], &[HEAD_DIM / 2], TensorType::F32, bytes(&factors));
    assert_eq!(tiny.open().expect("a model").config().ropes, [rope]);
    factors[4] *= 1.5;
    tiny.put(ROPE_FACTORS[0], &[HEAD_DIM / 2], TensorType::F32, bytes(&factors));
    let error = tiny.open().expect_err("other factors").to_string();
    assert!(error.contains("are not those of Llama 3's scaling"), "{error}");
}

/// (what is changed, part of the refusal)
#[test]
fn what_this_program_does_not_have_is_refused_by_name() {
    type Change = fn(&mut Tiny);
    let table: [(Change, &str); 13] = [
        (|tiny| tiny.set("general.architecture", Value::String("gemma3n".into())), "the architecture `gemma3n`"),
        (|tiny| tiny.set("general.type", Value::String("adapter".into())), "general.type is `adapter`"),
        (|tiny| tiny.set("expert_count", Value::U32(8)), "the key `llama.expert_count` = 8"),
        (|tiny| tiny.set("attention.sliding_window", Value::U32(64)), "`llama.attention.sliding_window` = 64"),
        (|tiny| tiny.set("rope.scaling.type", Value::String("yarn".into())), "`llama.rope.scaling.type` = yarn"),
        (|tiny| tiny.set("rope.dimension_count", Value::U32(8)), "heads of 16 elements, of which 8 are turned"),
        (|tiny| tiny.set("vocab_size", Value::U32(41)), "`llama.vocab_size` is 41"),
        (
            |tiny| tiny.set("attention.head_count_kv", Value::Array(vec![Value::U32(4), Value::U32(2)])),
            "`llama.attention.head_count_kv` differs between layers",
        ),
        (|tiny| tiny.set("attention.layer_norm_rms_epsilon", Value::F32(f32::NAN)), "epsilon` is no number"),
        (|tiny| tiny.remove("blk.0.ffn_up.weight"), "it has no tensor `blk.0.ffn_up.weight`"),
        (|tiny| tiny.floats("blk.0.ffn_up.weight", &[INNER, 32]), "`blk.0.ffn_up.weight` has the shape [96, 32]"),
        (|tiny| tiny.floats("blk.0.ffn_gate_inp.weight", &[4, HIDDEN]), "uses `blk.0.ffn_gate_inp.weight`"),
        (
            |tiny| tiny.put("blk.0.attn_norm.weight", &[HIDDEN], TensorType::Q8_0, vec![0; 68]),
            "`blk.0.attn_norm.weight` is in the type q8_0",
        ),
    ];
    for (change, part) in table {
        let mut tiny = Tiny::new("llama");
        change(&mut tiny);
        let error = tiny.open().map(|_| ()).expect_err(part).to_string();
        assert!(error.contains("tiny.gguf") && error.contains(part), "{error}, expected {part}");
    }
    let mut untied = Tiny::new("llama");
    untied.put("output.weight", &[VOCABULARY, HIDDEN], TensorType::F16, vec![0; 2 * VOCABULARY * HIDDEN]);
    assert!(!untied.open().expect("a model").config().tied_embeddings);
}

#[test]
fn numbers_that_are_not_finite_are_refused_by_name() {
    let mut tiny = Tiny::new("llama");
    let bytes = [f32::NAN.to_le_bytes().to_vec(), vec![0; 4 * HIDDEN - 4]].concat();
    tiny.put("output_norm.weight", &[HIDDEN], TensorType::F32, bytes);
    let scale = [half::f16::INFINITY.to_le_bytes().to_vec(), vec![0; HIDDEN * HIDDEN / 32 * 34 - 2]].concat();
    tiny.put("blk.0.attn_v.weight", &[HIDDEN, HIDDEN], TensorType::Q8_0, scale);
    let base = tiny.open().expect("the header is fine");
    let error = base.dense_f32("model.norm.weight").expect_err("a NaN").to_string();
    assert!(error.contains("model.norm.weight") && error.contains("element 0"), "{error}");
    let error = base.packed("model.layers.0.self_attn.v_proj.weight").expect_err("an infinity").to_string();
    assert!(error.contains("blk.0.attn_v.weight: the scale of block 0 of row 0 is inf"), "{error}");
}

/// One file, its directory, a split model by each of its parts, and what none of these is.
#[test]
fn files_and_directories() {
    let tiny = Tiny::new("llama");
    let directory = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| directory.path().join(name);
    let open = |path: PathBuf| GgufBase::open(&path);
    assert!(open(at("")).expect("an empty directory").is_none());
    tiny.write(&at("whole.gguf"), &tiny.tensors);
    let digest = |path: PathBuf| open(path).expect("a model").expect("a model").digest().expect("a digest");
    assert_eq!(digest(at("")), digest(at("whole.gguf")));
    std::fs::remove_file(at("whole.gguf")).expect("the file");

    let (first, second) = tiny.tensors.split_at(5);
    for (number, tensors) in [(0, first), (1, second)] {
        let mut part = Tiny::new("llama");
        part.keys.push(("split.no".to_owned(), Value::U16(number)));
        part.keys.push(("split.count".to_owned(), Value::U16(2)));
        part.keys.push(("split.tensors.count".to_owned(), Value::I32(tiny.tensors.len() as i32)));
        part.write(&at(&format!("tiny-0000{}-of-00002.gguf", number + 1)), tensors);
    }
    for named in ["", "tiny-00001-of-00002.gguf", "tiny-00002-of-00002.gguf"] {
        let base = open(at(named)).expect("a split model").expect("a split model");
        assert_eq!(base.names().len(), 11, "{named}");
        assert!(base.dense_f32("model.layers.0.mlp.down_proj.weight").is_ok());
    }
    tiny.write(&at("other.gguf"), &tiny.tensors);
    let error = open(at("")).expect_err("two models").to_string();
    assert!(error.contains("2 GGUF models: `other.gguf`, `tiny-00001-of-00002.gguf`"), "{error}");
    std::fs::remove_file(at("other.gguf")).expect("the file");
    std::fs::remove_file(at("tiny-00002-of-00002.gguf")).expect("the second part");
    let error = open(at("")).expect_err("half a model").to_string();
    assert!(error.contains("tiny-00002-of-00002.gguf"), "{error}");
}
