//! The keys that describe a model, as llama.cpp's loader asks for them.

use finetune_gguf::{Metadata, TensorType, Value};

use crate::config::{ModelConfig, Rope, RopeScaling};
use crate::gguf::place::Destination;

/// The version of ggml's packed types (`GGML_QNT_VERSION`).
const QUANTIZATION_VERSION: u32 = 2;

/// `general.file_type` (`enum llama_ftype`).
fn file_type(kind: TensorType) -> u32 {
    match kind {
        TensorType::F32 => 0,
        TensorType::Q8_0 => 7,
        TensorType::BF16 => 32,
        // No other type is written.
        _ => 1,
    }
}

/// What every file begins with: what is in it, and for which architecture.
pub(super) fn general(destination: Destination, holds: &str, name: &str, kind: TensorType) -> Metadata {
    let text = |text: &str| Value::String(text.to_owned());
    vec![
        ("general.architecture".to_owned(), text(destination.architecture)),
        ("general.type".to_owned(), text(holds)),
        ("general.name".to_owned(), text(name)),
        ("general.file_type".to_owned(), Value::U32(file_type(kind))),
        ("general.quantization_version".to_owned(), Value::U32(QUANTIZATION_VERSION)),
    ]
}

/// The sizes of a model. `context_length`: tokens of the longest text.
pub(super) fn sizes(config: &ModelConfig, destination: Destination, context_length: usize) -> Metadata {
    let count = |number: usize| Value::U32(u32::try_from(number).unwrap_or(u32::MAX));
    let mut keys: Vec<(&str, Value)> = vec![
        ("block_count", count(config.layers.len())),
        ("context_length", count(context_length)),
        ("embedding_length", count(config.hidden_size)),
        ("feed_forward_length", count(config.intermediate_size)),
        ("attention.head_count", count(config.heads)),
        ("attention.head_count_kv", count(config.key_value_heads)),
        ("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32)),
        ("attention.key_length", count(config.head_dim)),
        ("attention.value_length", count(config.head_dim)),
        ("vocab_size", count(config.vocabulary)),
    ];
    for rope in &config.ropes {
        keys.push(("rope.dimension_count", count(rope.width)));
        keys.push(("rope.freq_base", Value::F32(rope.theta as f32)));
        // Llama 3's scaling is a tensor (`rope_factors`).
        if let RopeScaling::Linear { factor } = rope.scaling {
            keys.push(("rope.scaling.type", Value::String("linear".to_owned())));
            keys.push(("rope.scaling.factor", Value::F32(factor as f32)));
        }
    }
    let named = |(key, value)| (format!("{}.{key}", destination.architecture), value);
    keys.into_iter().map(named).collect()
}

/// What llama.cpp divides the rotary frequencies by, [width / 2], if the scaling is Llama 3's.
pub(super) fn rope_factors(rope: &Rope) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { .. } = rope.scaling else { return None };
    let plain = Rope { scaling: RopeScaling::None, ..rope.clone() };
    let pairs = plain.frequencies().into_iter().zip(rope.frequencies());
    Some(pairs.map(|(plain, stretched)| plain / stretched).collect())
}
