//! What makes the layers of config.json different from each other: windows, positions, mixers.

use serde_json::Value;

use super::{LayerSizes, Reader};
use crate::config::family::{Family, OtherMixer, RopeLayers, Windows};
use crate::config::{ConvolutionConfig, DeltaConfig, LayerConfig, MixerKind, Values};
use crate::error::ModelError;

/// The key with the kinds of layers, its older name in Granite 4, and the kinds.
const KINDS: &str = "layer_types";
const OLDER_KINDS: &str = "layers_block_type";
const FULL: &str = "full_attention";
const WINDOWED: &str = "sliding_attention";
const DELTA: &str = "linear_attention";
const CONVOLUTION: &str = "conv";

impl Reader<'_> {
    /// Which layers have a window, and which a rotary embedding.
    pub(super) fn layers(
        &self,
        family: &Family,
        count: usize,
        sizes: &LayerSizes,
    ) -> Result<Vec<LayerConfig>, ModelError> {
        let ropes = self.ropes_of_layers(family, count)?;
        let window = self.window(family)?;
        let is_used = self.object.get("use_sliding_window").and_then(Value::as_bool) == Some(true);
        let types = self.kinds_of_layers(family, count)?;
        let types = types.as_deref();
        let first = self.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28) as usize;
        let pattern = self.optional_size("sliding_window_pattern")?.unwrap_or(match family.windows {
            Windows::AllButEvery(pattern) => pattern,
            _ => usize::MAX,
        });
        let is_kind = |types: &[&str], n: usize, kind: &str| types.get(n) == Some(&kind);
        let is_named = |types: &[&str], n: usize| is_kind(types, n, WINDOWED);
        let has_window = |n: usize, rope: Option<usize>| match (family.windows, types) {
            (Windows::Never, _) => false,
            (Windows::EveryLayer, _) => true,
            (Windows::Asked, _) => is_used,
            (Windows::Later | Windows::WithoutRope, Some(types)) => is_used && is_named(types, n),
            (Windows::Later, None) => is_used && n >= first,
            (Windows::WithoutRope, None) => is_used && rope.is_none(),
            (Windows::AllButEvery(_) | Windows::EveryOther | Windows::AllButEveryFromLast(_), Some(types)) => {
                is_named(types, n)
            }
            (Windows::AllButEvery(_), None) => !(n + 1).is_multiple_of(pattern),
            (Windows::EveryOther, None) => n.is_multiple_of(2),
            (Windows::AllButEveryFromLast(every), None) => !(count - 1 - n).is_multiple_of(every),
        };
        let has_experts = self.layers_with_experts(family, count)?;
        let interval = self.optional_size("full_attention_interval")?.unwrap_or(4);
        let with_attention = self.layers_with_attention(count)?;
        let layer = |(n, rope): (usize, Option<usize>)| {
            let has_window = has_window(n, rope);
            let rope = if has_window && family.window_rope_theta.is_some() { Some(1) } else { rope };
            let is_other = match (family.other_mixer, types) {
                (OtherMixer::None, _) => false,
                (OtherMixer::Delta { .. }, Some(types)) => is_kind(types, n, DELTA),
                (OtherMixer::Delta { .. }, None) => !(n + 1).is_multiple_of(interval),
                (OtherMixer::Convolution, Some(types)) => is_kind(types, n, CONVOLUTION),
                (OtherMixer::Convolution, None) => !with_attention.contains(&n),
            };
            let mixer = match (family.other_mixer, family.latent) {
                (OtherMixer::Delta { .. }, _) if is_other => MixerKind::Delta,
                (OtherMixer::Convolution, _) if is_other => MixerKind::Convolution,
                (_, Some(_)) => MixerKind::Latent,
                (_, None) => MixerKind::Attention,
            };
            LayerConfig {
                window: window.filter(|_| has_window),
                rope,
                has_experts: has_experts(n),
                mixer,
                key_value_heads: sizes.key_value_heads,
                head_dim: sizes.head_dim,
                values: Values::Own,
                intermediate_size: sizes.intermediate_size,
            }
        };
        let mut layers: Vec<LayerConfig> = ropes.into_iter().enumerate().map(layer).collect();
        if family.wide_heads.is_some() {
            self.widen(family, &mut layers)?;
        }
        Ok(layers)
    }

    /// The kinds of `layer_types`, one for each layer, if the family reads them. transformers refuses other lists too.
    fn kinds_of_layers(&self, family: &Family, count: usize) -> Result<Option<Vec<&str>>, ModelError> {
        let other = match (family.other_mixer, family.windows) {
            (OtherMixer::Delta { .. }, _) => Some(DELTA),
            (OtherMixer::Convolution, _) => Some(CONVOLUTION),
            (OtherMixer::None, Windows::Never | Windows::EveryLayer | Windows::Asked) => None,
            (OtherMixer::None, _) => Some(WINDOWED),
        };
        let key = if family.is_hybrid && self.get(KINDS).is_none() { OLDER_KINDS } else { KINDS };
        let list = self.get(key).filter(|_| other.is_some() || family.is_hybrid);
        let Some(list) = list else { return Ok(None) };
        let list = list.as_array().ok_or_else(|| self.wrong_type(key, "a list with a kind for each layer"))?;
        if list.len() != count {
            let kinds = list.len();
            return Err(self.malformed(&format!("`{key}` has {kinds} entries, and `num_hidden_layers` is {count}")));
        }
        let Some(other) = other else { return Ok(None) };
        let mut kinds = Vec::with_capacity(count);
        for (n, kind) in list.iter().enumerate() {
            match kind.as_str() {
                Some(kind) if kind == FULL || kind == other => kinds.push(kind),
                _ => {
                    let what = format!("`{key}` has {kind} for layer {n}, where \"{FULL}\" or \"{other}\" is expected");
                    return Err(self.malformed(&what));
                }
            }
        }
        Ok(Some(kinds))
    }

    /// How many keys a query sees in layers with a window. null means all.
    fn window(&self, family: &Family) -> Result<Option<usize>, ModelError> {
        match self.object.contains_key("sliding_window") {
            true => self.optional_size("sliding_window"),
            false => Ok(family.sliding_window),
        }
    }

    /// The layers of `full_attn_idxs`; all if it is left out.
    fn layers_with_attention(&self, count: usize) -> Result<Vec<usize>, ModelError> {
        let Some(list) = self.get("full_attn_idxs") else { return Ok((0..count).collect()) };
        let numbers = list.as_array().and_then(|list| list.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>());
        let numbers = numbers.ok_or_else(|| self.wrong_type("full_attn_idxs", "a list of layer numbers"))?;
        Ok(numbers.into_iter().map(|number| usize::try_from(number).unwrap_or(usize::MAX)).collect())
    }

    /// Refuses the members of Granite 4 with Mamba layers or experts.
    pub(super) fn expect_attention_only(&self) -> Result<(), ModelError> {
        let types = self.get(KINDS).or(self.get(OLDER_KINDS)).and_then(Value::as_array);
        let is_attention = |kind: &Value| matches!(kind.as_str(), Some("attention" | "full_attention"));
        match types {
            Some(types) if types.iter().all(is_attention) => {}
            Some(types) => {
                let other = types.iter().find(|kind| !is_attention(kind)).unwrap_or(&Value::Null);
                return Err(self.unsupported("layer_types", &other.to_string()));
            }
            None => return Err(self.unsupported("layer_types", "left out, which means Mamba layers")),
        }
        match self.get("num_local_experts").and_then(Value::as_u64) {
            Some(0) => Ok(()),
            Some(count) => Err(self.unsupported("num_local_experts", &count.to_string())),
            None => Err(self.unsupported("num_local_experts", "left out, which means 8")),
        }
    }

    /// The short convolutions: LFM2's keys.
    pub(super) fn convolutions(&self, family: &Family) -> Result<Option<ConvolutionConfig>, ModelError> {
        if family.other_mixer != OtherMixer::Convolution {
            return Ok(None);
        }
        let taps = self.optional_size("conv_L_cache")?.unwrap_or(3);
        if !(2..=64).contains(&taps) {
            return Err(self.unsupported("conv_L_cache", &taps.to_string()));
        }
        Ok(Some(ConvolutionConfig { taps, bias: self.flag("conv_bias")?.unwrap_or(false) }))
    }

    /// The gated delta nets: Qwen3.5's keys.
    pub(super) fn delta_nets(&self, family: &Family) -> Result<Option<DeltaConfig>, ModelError> {
        if !matches!(family.other_mixer, OtherMixer::Delta { .. }) {
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

    /// For each layer the number of its rotary embedding.
    fn ropes_of_layers(&self, family: &Family, count: usize) -> Result<Vec<Option<usize>>, ModelError> {
        match family.rope_layers {
            RopeLayers::Asked if self.text("position_embedding_type")? != Some("rope") => Ok(vec![None; count]),
            RopeLayers::All | RopeLayers::Asked => Ok(vec![Some(0); count]),
            RopeLayers::Listed => self.listed_ropes(count),
            RopeLayers::WithTheta => self.ropes_with_theta(family, count),
        }
    }

    /// `layer_rope_theta` has 0 for a layer without a rotary embedding. If it is left out, every fourth layer
    /// has none, counted from the last.
    fn ropes_with_theta(&self, family: &Family, count: usize) -> Result<Vec<Option<usize>>, ModelError> {
        const KEY: &str = "layer_rope_theta";
        let Some(list) = self.get(KEY) else {
            return Ok((0..count).map(|n| (!(count - 1 - n).is_multiple_of(4)).then_some(0)).collect());
        };
        let wrong = || self.malformed(&format!("`{KEY}` should be a list of a number for each of {count} layers"));
        let list = list.as_array().filter(|list| list.len() >= count).ok_or_else(wrong)?;
        let parameters = self.nested("rope_scaling")?.or(self.nested("rope_parameters")?);
        let inner = parameters.map(|object| Reader { object, path: self.path });
        let inner = inner.map(|inner| inner.number("rope_theta")).transpose()?.flatten();
        let common = inner.or(self.number("rope_theta")?).unwrap_or(family.rope_theta);
        let rope = |value: &Value| match value.as_f64().ok_or_else(wrong)? {
            0.0 => Ok(None),
            theta if theta == common => Ok(Some(0)),
            // transformers and mlx-lm turn such a layer by the common one.
            theta => Err(self.unsupported(KEY, &format!("{theta}, where `rope_theta` is {common}"))),
        };
        list[..count].iter().map(rope).collect()
    }

    /// `no_rope_layers` has 0 for a layer without a rotary embedding. If it is left out, every fourth layer has
    /// none (`no_rope_layer_interval`).
    fn listed_ropes(&self, count: usize) -> Result<Vec<Option<usize>>, ModelError> {
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
