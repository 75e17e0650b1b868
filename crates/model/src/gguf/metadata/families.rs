//! What one kind of architecture has beyond the keys of all: the reverse of `read_config/families.rs` and
//! `read_config/mixtures.rs`.

use finetune_gguf::Value;
use finetune_kernels::Scores;

use super::{Keys, count, number, turned};
use crate::config::family::Shared;
use crate::config::{ExpertsConfig, MixerKind, ModelConfig, Values};
use crate::gguf::architecture::{Architecture, Kind};
use crate::gguf::read_config::SIGMOID;

/// Adds the keys of the architecture's kind.
pub(super) fn add(config: &ModelConfig, architecture: &Architecture, keys: &mut Keys) {
    let kind = architecture.keys;
    match kind {
        Kind::Plain | Kind::Qwen3Moe | Kind::GptOss | Kind::Glm4 | Kind::Glm4Moe => {}
        Kind::Mistral3 => {
            let growth = config.ropes.iter().find_map(|rope| rope.growth);
            keys.extend(growth.map(|growth| ("attention.temperature_scale", number(growth.beta))));
        }
        Kind::Granite | Kind::GraniteHybrid => {
            let factor = |factor: Option<f32>| Value::F32(factor.unwrap_or(1.0));
            keys.push(("attention.scale", Value::F32(config.score_scale)));
            keys.push(("embedding_scale", factor(config.embedding_scale)));
            keys.push(("residual_scale", factor(config.residual_scale)));
            keys.push(("logit_scale", factor(config.logits_divisor)));
            // llama.cpp takes this key of Granite for whether there are positions, and its absence for yes.
            if config.layers.iter().all(|layer| layer.rope.is_none()) {
                keys.push(("rope.scaling.finetuned", Value::Bool(false)));
            }
        }
        Kind::Gemma2 | Kind::Gemma3 | Kind::Phi3 | Kind::Olmo2 => {}
        Kind::Gemma4 => gemma4(config, keys),
        Kind::Deepseek2 => latent(config, keys),
        Kind::Lfm2 => {
            keys.extend(config.convolution.map(|sizes| ("shortconv.l_cache", count(sizes.taps))));
        }
        Kind::Delta => delta(config, architecture.tiled, keys),
    }
    windows(config, kind, keys);
    for (key, cap) in [("attn_logit_softcapping", config.score_cap), ("final_logit_softcapping", config.logits_cap)] {
        keys.extend(cap.map(|cap| (key, Value::F32(cap))));
    }
    if let Some(experts) = config.experts.as_ref().filter(|_| config.layers.iter().any(|layer| layer.has_experts)) {
        mixture(config, experts, kind, keys);
    }
}

fn flags(flags: impl Iterator<Item = bool>) -> Value {
    Value::Array(flags.map(Value::Bool).collect())
}

/// How wide windows are, and in some files which layers have one.
fn windows(config: &ModelConfig, kind: Kind, keys: &mut Keys) {
    let window = config.layers.iter().find_map(|layer| layer.window);
    if !kind.has_windows() && kind != Kind::Phi3 {
        return;
    }
    // Files of Phi-3 say 0 where there is none.
    let said = window.or((kind == Kind::Phi3).then_some(0));
    keys.extend(said.map(|window| ("attention.sliding_window", count(window))));
    if matches!(kind, Kind::Gemma4 | Kind::Olmo2) {
        let have = config.layers.iter().map(|layer| layer.window.is_some());
        keys.push(("attention.sliding_window_pattern", flags(have)));
    }
}

fn gemma4(config: &ModelConfig, keys: &mut Keys) {
    let shared = config.layers.iter().filter(|layer| matches!(layer.values, Values::OfLayer(_))).count();
    keys.push(("attention.shared_kv_layers", count(shared)));
    keys.push(("embedding_length_per_layer_input", count(config.per_layer.map_or(0, |sizes| sizes.width))));
    for key in ["attention.key_length_swa", "attention.value_length_swa"] {
        keys.push((key, count(config.head_dim)));
    }
    let of_window = config.ropes.get(1).map_or_else(|| turned(config), |rope| rope.width);
    keys.push(("rope.dimension_count_swa", count(of_window)));
}

fn latent(config: &ModelConfig, keys: &mut Keys) {
    let Some(sizes) = config.latent else { return };
    // llama.cpp asks for it in models of most numbers of layers, and takes 0 for none.
    keys.push(("attention.q_lora_rank", count(sizes.query_rank.unwrap_or(0))));
    keys.push(("attention.kv_lora_rank", count(sizes.rank)));
    keys.push(("attention.key_length_mla", count(sizes.plain + sizes.turned)));
    keys.push(("attention.value_length_mla", count(sizes.value)));
}

fn delta(config: &ModelConfig, has_sections: bool, keys: &mut Keys) {
    let Some(sizes) = config.delta else { return };
    keys.push(("ssm.conv_kernel", count(sizes.taps)));
    keys.push(("ssm.state_size", count(sizes.key_dim)));
    keys.push(("ssm.group_count", count(sizes.key_heads)));
    keys.push(("ssm.time_step_rank", count(sizes.value_heads)));
    keys.push(("ssm.inner_size", count(sizes.value_dim * sizes.value_heads)));
    let is_delta: Vec<bool> = config.layers.iter().map(|layer| layer.mixer == MixerKind::Delta).collect();
    // Older programs know the distance of layers with attention alone.
    let interval = is_delta.iter().position(|is_delta| !is_delta).map_or(is_delta.len() + 1, |first| first + 1);
    keys.push(("attention.recurrent_layers", flags(is_delta.into_iter())));
    keys.push(("full_attention_interval", count(interval)));
    if has_sections {
        // Pairs take turns over time, height and width, which are one in text.
        let pairs = turned(config) / 2;
        let sections = [pairs.div_ceil(3), (pairs + 1) / 3, pairs / 3, 0];
        let numbers = sections.iter().map(|&pairs| Value::I32(i32::try_from(pairs).unwrap_or(i32::MAX)));
        keys.push(("rope.dimension_sections", Value::Array(numbers.collect())));
    }
}

fn mixture(config: &ModelConfig, experts: &ExpertsConfig, kind: Kind, keys: &mut Keys) {
    keys.push(("expert_count", count(experts.count)));
    keys.push(("expert_used_count", count(experts.choices)));
    keys.push(("expert_feed_forward_length", count(experts.intermediate_size)));
    match config.family.mixture.map(|mixture| mixture.shared) {
        Some(Shared::Plain(_)) => {
            let shared = experts.shared.unwrap_or(0) / experts.intermediate_size.max(1);
            keys.push(("expert_shared_count", count(shared)));
        }
        Some(Shared::Gated(_)) => {
            keys.extend(experts.shared.map(|width| ("expert_shared_feed_forward_length", count(width))));
        }
        Some(Shared::None) | None => {}
    }
    if experts.weights.scores == Scores::Sigmoid {
        let dense = config.layers.iter().take_while(|layer| !layer.has_experts).count();
        keys.push(("leading_dense_block_count", count(dense)));
        keys.push(("expert_gating_func", count(SIGMOID as usize)));
    }
    if matches!(kind, Kind::Deepseek2 | Kind::Glm4Moe) {
        let [groups, chosen] = experts.groups.unwrap_or([1, 1]);
        keys.push(("expert_group_count", count(groups)));
        keys.push(("expert_group_used_count", count(chosen)));
        keys.push(("expert_weights_scale", Value::F32(experts.weights.scale)));
        keys.push(("expert_weights_norm", Value::Bool(experts.weights.normalized.is_some())));
    }
}
