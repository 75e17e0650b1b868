//! The keys that describe a model, as llama.cpp's converter writes them and its loader asks for them. What one
//! kind of architecture has beyond all is in `metadata/families.rs`; `read_config.rs` is the reverse of both.

use finetune_gguf::{Metadata, TensorType, Value};

use crate::config::{LayerConfig, MixerKind, ModelConfig, Rope, RopeScaling, YarnKeys};
use crate::gguf::architecture::{Architecture, Kind};
use crate::gguf::read::ROPE_FACTORS;

mod families;

/// The version of ggml's packed types (`GGML_QNT_VERSION`).
const QUANTIZATION_VERSION: u32 = 2;
/// What Gemma 4's files divide the frequencies by of pairs that do not turn.
const STILL: f32 = 1e30;

/// `general.file_type` (`enum llama_ftype`).
fn file_type(kind: TensorType) -> u32 {
    match kind {
        TensorType::F32 => 0,
        TensorType::Q8_0 => 7,
        TensorType::BF16 => 32,
        // Experts that stay in it, whatever the other matrices are in.
        TensorType::Mxfp4 => 38,
        // No other type is written.
        _ => 1,
    }
}

/// What every file begins with: what is in it, and for which architecture.
pub(super) fn general(architecture: &Architecture, holds: &str, name: &str, kind: TensorType) -> Metadata {
    let text = |text: &str| Value::String(text.to_owned());
    vec![
        ("general.architecture".to_owned(), text(architecture.name)),
        ("general.type".to_owned(), text(holds)),
        ("general.name".to_owned(), text(name)),
        ("general.file_type".to_owned(), Value::U32(file_type(kind))),
        ("general.quantization_version".to_owned(), Value::U32(QUANTIZATION_VERSION)),
    ]
}

/// Keys without the name of the architecture in front.
type Keys = Vec<(&'static str, Value)>;

/// The description of a model. `context_length`: tokens of the longest text.
pub(super) fn description(config: &ModelConfig, architecture: &Architecture, context_length: usize) -> Metadata {
    let mut keys = sizes(config, architecture.keys, context_length);
    rotary(config, architecture.keys, &mut keys);
    families::add(config, architecture, &mut keys);
    let named = |(key, value)| (format!("{}.{key}", architecture.name), value);
    keys.into_iter().map(named).collect()
}

fn count(number: usize) -> Value {
    Value::U32(u32::try_from(number).unwrap_or(u32::MAX))
}

fn number(number: f64) -> Value {
    Value::F32(number as f32)
}

/// One number if all layers have the same, else a list.
fn of_layers(numbers: &[usize]) -> Value {
    match numbers {
        [first, rest @ ..] if rest.iter().all(|other| other == first) => count(*first),
        _ => {
            Value::Array(numbers.iter().map(|&number| Value::I32(i32::try_from(number).unwrap_or(i32::MAX))).collect())
        }
    }
}

fn sizes(config: &ModelConfig, kind: Kind, context_length: usize) -> Keys {
    let mut keys: Keys = vec![
        ("block_count", count(config.layers.len())),
        ("context_length", count(context_length)),
        ("embedding_length", count(config.hidden_size)),
        ("feed_forward_length", of_layers(&widths(config))),
        ("attention.head_count", count(config.heads)),
        ("attention.head_count_kv", of_layers(&key_value_heads(config))),
        ("attention.layer_norm_rms_epsilon", number(config.rms_norm_eps)),
        ("vocab_size", count(config.vocabulary)),
    ];
    let (key, value) = match (config.latent, kind) {
        // The short vector takes the place of keys and values.
        (Some(latent), _) => (latent.rank + latent.turned, latent.rank),
        // Layers that see all keys have wider heads.
        (None, Kind::Gemma4) => (turned(config), turned(config)),
        (None, _) => (config.head_dim, config.head_dim),
    };
    keys.extend([("attention.key_length", count(key)), ("attention.value_length", count(value))]);
    keys
}

/// Elements that turn of a head of layers that see all keys.
fn turned(config: &ModelConfig) -> usize {
    config.ropes.first().map_or(config.head_dim, |rope| rope.width)
}

/// Elements of a token inside the dense part of each layer. In models of experts alone the number is of no use.
fn widths(config: &ModelConfig) -> Vec<usize> {
    let is_dense = |layer: &&LayerConfig| has_dense_part(config, layer.has_experts);
    let first = config.layers.iter().find(is_dense).map_or(config.intermediate_size, |layer| layer.intermediate_size);
    let layers = config.layers.iter();
    layers.map(|layer| if is_dense(&layer) { layer.intermediate_size } else { first }).collect()
}

/// Whether a layer has a dense feed-forward part.
pub(super) fn has_dense_part(config: &ModelConfig, has_experts: bool) -> bool {
    !has_experts || config.family.mixture.is_some_and(|mixture| mixture.is_beside)
}

fn key_value_heads(config: &ModelConfig) -> Vec<usize> {
    let heads = config.layers.iter().map(|layer| match layer.mixer {
        MixerKind::Convolution => 0,
        MixerKind::Latent => 1,
        MixerKind::Attention | MixerKind::Delta => layer.key_value_heads,
    });
    heads.collect()
}

/// The rotary embedding of layers that see all keys, and the base of the others.
fn rotary(config: &ModelConfig, kind: Kind, keys: &mut Keys) {
    let Some(rope) = config.ropes.first() else { return };
    keys.push(("rope.dimension_count", count(rope.width)));
    keys.push(("rope.freq_base", number(rope.theta)));
    if let (Some(of_window), Kind::Gemma3 | Kind::Gemma4 | Kind::Olmo2) = (config.ropes.get(1), kind) {
        keys.push(("rope.freq_base_swa", number(of_window.theta)));
    }
    let text = |text: &str| Value::String(text.to_owned());
    match rope.scaling {
        // The scalings of Llama 3 and Gemma 4 are tensors (`factors`).
        RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::Proportional { .. } => {}
        RopeScaling::Linear { factor } => {
            keys.push(("rope.scaling.type", text("linear")));
            keys.push(("rope.scaling.factor", number(factor)));
        }
        RopeScaling::Yarn { factor, stated, .. } => {
            keys.push(("rope.scaling.type", text("yarn")));
            keys.push(("rope.scaling.factor", number(factor)));
            yarn(stated, kind, keys);
        }
        RopeScaling::Long { original, attention_factor, .. } => {
            keys.push(("rope.scaling.original_context_length", count(original)));
            keys.push(("rope.scaling.attn_factor", number(attention_factor)));
        }
    }
}

fn yarn(stated: YarnKeys, kind: Kind, keys: &mut Keys) {
    keys.push(("rope.scaling.original_context_length", count(stated.original as usize)));
    keys.push(("rope.scaling.yarn_beta_fast", number(stated.beta_fast)));
    keys.push(("rope.scaling.yarn_beta_slow", number(stated.beta_slow)));
    keys.extend(stated.attention_factor.map(|factor| ("rope.scaling.yarn_attn_factor", number(factor))));
    let multiplier = match kind {
        // llama.cpp has kept the tenth of it in these files.
        Kind::Deepseek2 => stated.scale_of_all.map(|scale| 0.1 * scale),
        Kind::Mistral3 => stated.scale_of_all,
        _ => None,
    };
    keys.extend(multiplier.map(|scale| ("rope.scaling.yarn_log_multiplier", number(scale))));
}

/// Tensors of factors that rotary frequencies are divided by, [width / 2]: their names and numbers.
pub(super) fn factors(config: &ModelConfig, kind: Kind) -> Vec<(&'static str, Vec<f32>)> {
    let [of_all, long_rows, short_rows] = ROPE_FACTORS;
    let Some(rope) = config.ropes.first() else { return Vec::new() };
    match &rope.scaling {
        RopeScaling::Llama3 { .. } => rope_factors(rope).map(|factors| (of_all, factors)).into_iter().collect(),
        RopeScaling::Long { short, long, .. } => {
            let numbers = |list: &[f64]| list.iter().map(|&factor| factor as f32).collect();
            vec![(long_rows, numbers(long)), (short_rows, numbers(short))]
        }
        // llama.cpp asks for it in every file of Gemma 4.
        scaling if kind == Kind::Gemma4 => {
            let all = rope.width / 2;
            let turning = if let RopeScaling::Proportional { pairs, .. } = scaling { *pairs } else { all };
            vec![(of_all, (0..all).map(|pair| if pair < turning { 1.0 } else { STILL }).collect())]
        }
        _ => Vec::new(),
    }
}

/// What llama.cpp divides the rotary frequencies by, [width / 2], if the scaling is Llama 3's.
pub(super) fn rope_factors(rope: &Rope) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { .. } = rope.scaling else { return None };
    let plain = Rope { scaling: RopeScaling::None, ..rope.clone() };
    let pairs = plain.frequencies().into_iter().zip(rope.frequencies());
    Some(pairs.map(|(plain, stretched)| plain / stretched).collect())
}
