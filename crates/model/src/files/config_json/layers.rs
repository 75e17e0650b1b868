//! What makes the layers of config.json different from each other: windows, positions, experts.

use finetune_kernels::{ExpertWeights, Scores};
use serde_json::Value;

use super::Reader;
use crate::config::family::{Family, Windows};
use crate::config::{DeltaConfig, ExpertsConfig, LayerConfig, MOST_EXPERTS};
use crate::error::ModelError;

impl Reader<'_> {
    /// Which layers have a window, and which a rotary embedding.
    pub(super) fn layers(&self, family: &Family, count: usize) -> Result<Vec<LayerConfig>, ModelError> {
        let ropes = self.ropes_of_layers(family, count)?;
        // null means none.
        let window = match self.object.contains_key("sliding_window") {
            true => self.optional_size("sliding_window")?,
            false => family.sliding_window,
        };
        let is_used = self.object.get("use_sliding_window").and_then(Value::as_bool) == Some(true);
        let types = self.object.get("layer_types").and_then(Value::as_array);
        let first = self.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28) as usize;
        let pattern = self.optional_size("sliding_window_pattern")?.unwrap_or(match family.windows {
            Windows::AllButEvery(pattern) => pattern,
            _ => usize::MAX,
        });
        let is_named = |types: &Vec<Value>, n: usize| types.get(n).and_then(Value::as_str) == Some("sliding_attention");
        let has_window = |n: usize, rope: Option<usize>| match (family.windows, types) {
            (Windows::Never, _) => false,
            (Windows::EveryLayer, _) => true,
            (Windows::Asked, _) => is_used,
            (Windows::Later | Windows::WithoutRope, Some(types)) => is_used && is_named(types, n),
            (Windows::Later, None) => is_used && n >= first,
            (Windows::WithoutRope, None) => is_used && rope.is_none(),
            (Windows::AllButEvery(_), Some(types)) => is_named(types, n),
            (Windows::AllButEvery(_), None) => !(n + 1).is_multiple_of(pattern),
        };
        let has_experts = self.layers_with_experts(family)?;
        let interval = self.optional_size("full_attention_interval")?.unwrap_or(4);
        let layer = |(n, rope): (usize, Option<usize>)| {
            let has_window = has_window(n, rope);
            let rope = if has_window && family.window_rope_theta.is_some() { Some(1) } else { rope };
            let is_recurrent = family.has_delta_nets
                && match types {
                    Some(types) => types.get(n).and_then(Value::as_str) == Some("linear_attention"),
                    None => !(n + 1).is_multiple_of(interval),
                };
            LayerConfig { window: window.filter(|_| has_window), rope, has_experts: has_experts(n), is_recurrent }
        };
        Ok(ropes.into_iter().enumerate().map(layer).collect())
    }

    /// The gated delta nets: Qwen3.5's keys.
    pub(super) fn delta_nets(&self, family: &Family) -> Result<Option<DeltaConfig>, ModelError> {
        if !family.has_delta_nets {
            return Ok(None);
        }
        let size = |key: &str, default: usize| -> Result<usize, ModelError> {
            let size = self.optional_size(key)?.unwrap_or(default);
            if size <= 4096 { Ok(size) } else { Err(self.malformed(&format!("`{key}` = {size} is beyond 4096"))) }
        };
        let delta = DeltaConfig {
            key_heads: size("linear_num_key_heads", 16)?,
            value_heads: size("linear_num_value_heads", 32)?,
            key_dim: size("linear_key_head_dim", 128)?,
            value_dim: size("linear_value_head_dim", 128)?,
            taps: size("linear_conv_kernel_dim", 4)?,
        };
        if !delta.value_heads.is_multiple_of(delta.key_heads) {
            return Err(self.malformed("linear_num_value_heads is no multiple of linear_num_key_heads"));
        }
        if delta.taps < 2 {
            return Err(self.unsupported("linear_conv_kernel_dim", &delta.taps.to_string()));
        }
        Ok(Some(delta))
    }

    /// The experts of layers with such: Qwen3-MoE's keys.
    pub(super) fn experts(&self, family: &Family) -> Result<Option<ExpertsConfig>, ModelError> {
        if !family.has_experts {
            return Ok(None);
        }
        let is_shared = family.has_shared_expert;
        // transformers 5 writes the second name.
        let count = match self.optional_size("num_experts")? {
            Some(count) => count,
            None => self.optional_size("num_local_experts")?.unwrap_or(if is_shared { 256 } else { 128 }),
        };
        let choices = self.optional_size("num_experts_per_tok")?.unwrap_or(8);
        if count > MOST_EXPERTS || choices > count {
            return Err(
                self.malformed(&format!("{choices} of {count} experts for each token (at most {MOST_EXPERTS})"))
            );
        }
        let is_normalized = is_shared || self.flag("norm_topk_prob")?.unwrap_or(false);
        let size = |key: &str, default: usize| Ok::<_, ModelError>(self.optional_size(key)?.unwrap_or(default));
        Ok(Some(ExpertsConfig {
            count,
            choices,
            intermediate_size: size("moe_intermediate_size", if is_shared { 512 } else { 768 })?,
            shared: is_shared.then(|| size("shared_expert_intermediate_size", 512)).transpose()?,
            weights: ExpertWeights { scores: Scores::Softmax, normalized: is_normalized.then_some(0.0), scale: 1.0 },
        }))
    }

    /// Whether the layer of a number has experts: every `decoder_sparse_step`th, but those of
    /// `mlp_only_layers`.
    fn layers_with_experts(&self, family: &Family) -> Result<impl Fn(usize) -> bool, ModelError> {
        let step = self.optional_size("decoder_sparse_step")?.unwrap_or(1);
        let dense: Vec<u64> = match self.get("mlp_only_layers") {
            None => Vec::new(),
            Some(list) => {
                let numbers = list.as_array().and_then(|list| list.iter().map(Value::as_u64).collect::<Option<_>>());
                numbers.ok_or_else(|| self.malformed("`mlp_only_layers` should be a list of layer numbers"))?
            }
        };
        let has_experts = family.has_experts;
        Ok(move |n: usize| has_experts && !dense.contains(&(n as u64)) && (n + 1).is_multiple_of(step))
    }

    /// For each layer the number of its rotary embedding. `no_rope_layers` has 0 for a layer
    /// without one. If it is left out, every fourth layer has none (`no_rope_layer_interval`).
    fn ropes_of_layers(&self, family: &Family, count: usize) -> Result<Vec<Option<usize>>, ModelError> {
        if !family.has_layers_without_rope {
            return Ok(vec![Some(0); count]);
        }
        let Some(list) = self.get("no_rope_layers") else {
            let interval = self.optional_size("no_rope_layer_interval")?.unwrap_or(4);
            return Ok((1..=count).map(|number| (!number.is_multiple_of(interval)).then_some(0)).collect());
        };
        let wrong = || self.malformed(&format!("`no_rope_layers` should be a list of 0 and 1 for {count} layers"));
        let list = list.as_array().filter(|list| list.len() >= count).ok_or_else(wrong)?;
        let rope = |value: &Value| match value.as_u64() {
            Some(0) => Ok(None),
            Some(1) => Ok(Some(0)),
            _ => Err(wrong()),
        };
        list[..count].iter().map(rope).collect()
    }
}
