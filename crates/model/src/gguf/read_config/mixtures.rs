//! Mixtures of experts, latent attention, delta nets and short convolutions: what their keys say, as
//! config.json has it.

use serde_json::{Value as Json, json};

use super::families::layers;
use super::{Keys, OTHER_COPY};
use crate::error::ModelError;

/// `expert_gating_func` of routers with sigmoids.
pub(in crate::gguf) const SIGMOID: u64 = 2;
/// Rows of GLM-4.7-Flash's embedding, by which llama.cpp knows it too.
const GLM_FLASH_VOCABULARY: u64 = 154_880;

impl Keys<'_> {
    /// Numbers and sizes of experts, under the names of most families.
    pub(super) fn add_experts(&self, config: &mut Json) -> Result<(), ModelError> {
        let count = self.needed("expert_count")?;
        for key in ["num_experts", "num_local_experts", "n_routed_experts"] {
            config[key] = json!(count);
        }
        config["num_experts_per_tok"] = json!(self.needed("expert_used_count")?);
        config["moe_intermediate_size"] = json!(self.needed("expert_feed_forward_length")?);
        // 0 of any of these means none.
        let given = |key: &str| self.size(key).map(|size| size.filter(|&size| size > 0));
        if let Some(shared) = given("expert_shared_count")? {
            config["n_shared_experts"] = json!(shared);
        }
        if let Some(width) = given("expert_shared_feed_forward_length")? {
            config["shared_expert_intermediate_size"] = json!(width);
        }
        config["n_group"] = json!(given("expert_group_count")?.unwrap_or(1));
        config["topk_group"] = json!(given("expert_group_used_count")?.unwrap_or(1));
        // 0 means that they are not multiplied.
        let scale = self.number("expert_weights_scale")?.filter(|&scale| scale != 0.0);
        config["routed_scaling_factor"] = json!(scale.unwrap_or(1.0));
        config["norm_topk_prob"] = json!(self.number("expert_weights_norm")? == Some(1.0));
        Ok(())
    }

    /// Refuses routers without sigmoids. `default`: what it means that the key is left out.
    pub(super) fn expect_sigmoid(&self, default: u64) -> Result<(), ModelError> {
        let key = "expert_gating_func";
        let kind = self.size(key)?.filter(|&kind| kind != 0).unwrap_or(default);
        if kind == SIGMOID {
            return Ok(());
        }
        let what = format!("`{}` = {kind}: routers of this kind are not computed here", self.full(key));
        Err(self.refused(what, OTHER_COPY))
    }

    /// How many of the first layers have no experts, as the tensors have it.
    pub(super) fn add_dense_layers(&self, config: &mut Json, key: &str) -> Result<(), ModelError> {
        let has_experts = |layer: &usize| self.has(*layer, "ffn_gate_inp.weight");
        let all = layers(config);
        let first = (0..all).find(has_experts).unwrap_or(all);
        if let Some(layer) = (first..all).find(|layer| !has_experts(layer)) {
            let what = format!("it has no tensor `blk.{layer}.ffn_gate_inp.weight`, and layer {first} has one");
            return Err(self.refused(what, "the file is damaged or not complete: fetch it again"));
        }
        config[key] = json!(first);
        Ok(())
    }

    pub(super) fn add_gpt_oss(&self, config: &mut Json) -> Result<(), ModelError> {
        self.add_experts(config)?;
        for key in ["n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "moe_intermediate_size"] {
            config.as_object_mut().map(|config| config.remove(key));
        }
        config["intermediate_size"] = json!(self.needed("expert_feed_forward_length")?);
        config["attention_bias"] = json!(true);
        self.add_windows(config, 2)?;
        if let Some(scaling) = config.get_mut("rope_scaling") {
            // Its ranges are not whole pairs, which the file does not say.
            scaling["truncate"] = json!(false);
        }
        Ok(())
    }

    pub(super) fn add_deepseek2(&self, config: &mut Json) -> Result<(), ModelError> {
        let is_glm = config["vocab_size"].as_u64() == Some(GLM_FLASH_VOCABULARY);
        self.expect_sigmoid(if is_glm { SIGMOID } else { 1 })?;
        self.add_experts(config)?;
        self.add_dense_layers(config, "first_k_dense_replace")?;
        if is_glm {
            config["model_type"] = json!("glm4_moe_lite");
            let dense = config["first_k_dense_replace"].as_u64().unwrap_or(0) as usize;
            let kind = |layer: usize| if layer < dense { "dense" } else { "sparse" };
            config["mlp_layer_types"] = (0..layers(config)).map(kind).collect::<Vec<_>>().into();
        }
        config["intermediate_size"] = json!(self.needed("feed_forward_length")?);
        let turned = self.needed("rope.dimension_count")?;
        // Older files have the sizes of heads in the keys of other families.
        let key = match self.size("attention.key_length_mla")? {
            Some(key) => key,
            None => self.needed("attention.key_length")?,
        };
        let value = match self.size("attention.value_length_mla")? {
            Some(value) => value,
            None => self.needed("attention.value_length")?,
        };
        let Some(plain) = key.checked_sub(turned) else {
            let what = format!("heads of {key} elements, of which {turned} are turned");
            return Err(self.refused(what, OTHER_COPY));
        };
        config["q_lora_rank"] = json!(self.size("attention.q_lora_rank")?.filter(|&rank| rank > 0));
        config["kv_lora_rank"] = json!(self.needed("attention.kv_lora_rank")?);
        config["qk_nope_head_dim"] = json!(plain);
        config["qk_rope_head_dim"] = json!(turned);
        config["v_head_dim"] = json!(value);
        config["num_key_value_heads"] = config["num_attention_heads"].clone();
        let theta = config["rope_theta"].as_f64().unwrap_or(1e4);
        let width = usize::try_from(turned).unwrap_or(0);
        if let Some(mut scaling) = self.scaling(theta, width, config)? {
            // The factor of the scores: 0.1 of what config.json calls so.
            if let Some(multiplier) = self.number("rope.scaling.yarn_log_multiplier")? {
                let scale = (multiplier * 10.0 * 1e6).round() / 1e6;
                scaling["mscale"] = json!(scale);
                scaling["mscale_all_dim"] = json!(scale);
            }
            config["rope_scaling"] = scaling;
        }
        Ok(())
    }

    pub(super) fn add_lfm2(&self, config: &mut Json) -> Result<(), ModelError> {
        let count = layers(config);
        let heads = self.of_layers("attention.head_count_kv", count)?.unwrap_or_default();
        let kind = |heads: &u64| if *heads == 0 { "conv" } else { "full_attention" };
        config["layer_types"] = heads.iter().map(kind).collect::<Vec<_>>().into();
        let of_attention = heads.iter().copied().find(|&heads| heads > 0).unwrap_or(1);
        if heads.iter().any(|&heads| heads != 0 && heads != of_attention) {
            let what = format!(
                "`{}` differs between layers, which is not computed here",
                self.full("attention.head_count_kv")
            );
            return Err(self.refused(what, OTHER_COPY));
        }
        config["num_key_value_heads"] = json!(of_attention);
        config["norm_eps"] = config["rms_norm_eps"].clone();
        config["conv_L_cache"] = json!(self.needed("shortconv.l_cache")?);
        config["conv_bias"] = json!((0..count).any(|layer| self.has(layer, "shortconv.conv.bias")));
        config["block_auto_adjust_ff_dim"] = json!(false);
        if self.size("expert_count")?.is_some_and(|experts| experts > 0) {
            self.expect_sigmoid(0)?;
            self.add_experts(config)?;
            self.add_dense_layers(config, "num_dense_layers")?;
            config["norm_topk_prob"] = json!(true);
        }
        Ok(())
    }

    pub(super) fn add_delta(&self, config: &mut Json) -> Result<(), ModelError> {
        let count = layers(config);
        let is_delta = match self.of_layers("attention.recurrent_layers", count)? {
            Some(flags) => flags,
            None => {
                let every = self.size("full_attention_interval")?.unwrap_or(4).max(1);
                (1..=count as u64).map(|number| u64::from(!number.is_multiple_of(every))).collect()
            }
        };
        let kind = |flag: &u64| if *flag == 0 { "full_attention" } else { "linear_attention" };
        config["layer_types"] = is_delta.iter().map(kind).collect::<Vec<_>>().into();
        let heads = self.needed("ssm.time_step_rank")?;
        let inner = self.needed("ssm.inner_size")?;
        config["linear_num_key_heads"] = json!(self.needed("ssm.group_count")?);
        config["linear_num_value_heads"] = json!(heads);
        config["linear_key_head_dim"] = json!(self.needed("ssm.state_size")?);
        config["linear_value_head_dim"] = json!(inner / heads.max(1));
        config["linear_conv_kernel_dim"] = json!(self.needed("ssm.conv_kernel")?);
        if self.size("expert_count")?.is_some_and(|experts| experts > 0) {
            self.add_experts(config)?;
            config["norm_topk_prob"] = json!(true);
        }
        Ok(())
    }
}
