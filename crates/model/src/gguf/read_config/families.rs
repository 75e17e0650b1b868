//! What the keys of an architecture say beyond those that all have, as config.json has it.

use serde_json::{Value as Json, json};

use super::rope::FREQUENCIES;
use super::{Keys, OTHER_COPY};
use crate::error::ModelError;
use crate::gguf::architecture::Kind;

const WINDOWS: &[&str] = &["attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"];
const CAPS: &[&str] = &["attn_logit_softcapping", "final_logit_softcapping"];
const YARN: &[&str] = &[
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_attn_factor",
];
const EXPERTS: &[&str] = &[
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "expert_shared_count",
    "expert_group_count",
    "expert_group_used_count",
    "expert_weights_scale",
    "expert_weights_norm",
    "expert_gating_func",
    "leading_dense_block_count",
    "nextn_predict_layers",
];
const LATENT: &[&str] =
    &["attention.q_lora_rank", "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla"];
const GEMMA4: &[&str] = &[
    "attention.key_length_swa",
    "attention.value_length_swa",
    "attention.shared_kv_layers",
    "embedding_length_per_layer_input",
    "rope.dimension_count_swa",
];
const MULTIPLIERS: &[&str] = &["attention.scale", "embedding_scale", "residual_scale", "logit_scale"];
/// Of Mamba layers and experts; a file of Granite 4 without such has them too.
const MAMBA: &[&str] = &[
    "expert_count",
    "expert_used_count",
    "expert_shared_feed_forward_length",
    "ssm.conv_kernel",
    "ssm.state_size",
    "ssm.group_count",
    "ssm.inner_size",
    "ssm.time_step_rank",
];
const DELTA: &[&str] = &[
    "ssm.conv_kernel",
    "ssm.state_size",
    "ssm.group_count",
    "ssm.inner_size",
    "ssm.time_step_rank",
    "full_attention_interval",
    "attention.recurrent_layers",
    // Of images: text has the same position in all sections.
    "rope.dimension_sections",
];

/// The keys that an architecture of this kind has beside those of all.
pub(super) fn keys(kind: Kind) -> &'static [&'static [&'static str]] {
    match kind {
        Kind::Plain => &[],
        Kind::Mistral3 => &[YARN, &["attention.temperature_scale"]],
        Kind::Granite | Kind::GraniteHybrid => &[MULTIPLIERS, MAMBA],
        Kind::Phi3 => &[&["attention.sliding_window", "rope.scaling.attn_factor"]],
        Kind::Olmo2 => &[WINDOWS, YARN],
        Kind::Glm4 => &[],
        Kind::Gemma2 | Kind::Gemma3 => &[WINDOWS, CAPS],
        Kind::Gemma4 => &[WINDOWS, CAPS, EXPERTS, GEMMA4],
        Kind::Qwen3Moe | Kind::Glm4Moe => &[EXPERTS],
        Kind::GptOss => &[WINDOWS, YARN, EXPERTS],
        Kind::Deepseek2 => &[YARN, EXPERTS, LATENT],
        Kind::Lfm2 => &[EXPERTS, &["shortconv.l_cache"]],
        Kind::Delta => &[EXPERTS, DELTA],
    }
}

impl Keys<'_> {
    /// Adds what an architecture of this kind has.
    ///
    /// # Errors
    /// [`ModelError::GgufBase`] for a key whose value is not computed here.
    pub(super) fn add_family(&self, kind: Kind, config: &mut Json) -> Result<(), ModelError> {
        match kind {
            Kind::Plain => Ok(()),
            Kind::Glm4 => {
                // Left out it would mean true.
                config["attention_bias"] = json!(self.has(0, "attn_q.bias"));
                Ok(())
            }
            Kind::Mistral3 => self.add_mistral3(config),
            Kind::Granite | Kind::GraniteHybrid => self.add_granite(kind, config),
            Kind::Phi3 => self.add_phi3(config),
            Kind::Olmo2 => self.add_olmo2(config),
            Kind::Gemma2 | Kind::Gemma3 => self.add_gemma(kind, config),
            Kind::Gemma4 => self.add_gemma4(config),
            Kind::Qwen3Moe => {
                self.add_experts(config)?;
                let dense = (0..layers(config)).filter(|&layer| !self.has(layer, "ffn_gate_inp.weight"));
                config["mlp_only_layers"] = dense.collect::<Vec<_>>().into();
                config["norm_topk_prob"] = json!(true);
                Ok(())
            }
            Kind::GptOss => self.add_gpt_oss(config),
            Kind::Deepseek2 => self.add_deepseek2(config),
            Kind::Glm4Moe => {
                self.expect_sigmoid(2)?;
                self.add_experts(config)?;
                self.add_dense_layers(config, "first_k_dense_replace")?;
                config["use_qk_norm"] = json!(self.has(0, "attn_q_norm.weight"));
                Ok(())
            }
            Kind::Lfm2 => self.add_lfm2(config),
            Kind::Delta => self.add_delta(config),
        }
    }

    /// Which layers have a window, and how wide it is. Without a list of them, all but every `every`th.
    pub(super) fn add_windows(&self, config: &mut Json, every: u64) -> Result<(), ModelError> {
        let window = self.size("attention.sliding_window")?.filter(|&window| window > 0);
        let key = "attention.sliding_window_pattern";
        let has_list = self.get(key).is_some_and(|value| value.as_array().is_some());
        let count = layers(config);
        let flags = match (has_list, window) {
            (_, None) => vec![0; count],
            (true, _) => self.of_layers(key, count)?.unwrap_or_default(),
            (false, _) => {
                let every = self.size(key)?.unwrap_or(every);
                (0..count as u64).map(|n| u64::from(every == 0 || n % every < every - 1)).collect()
            }
        };
        let kind = |flag: &u64| if *flag == 0 { "full_attention" } else { "sliding_attention" };
        config["layer_types"] = flags.iter().map(kind).collect::<Vec<_>>().into();
        config["sliding_window"] = json!(window);
        Ok(())
    }

    fn add_gemma(&self, kind: Kind, config: &mut Json) -> Result<(), ModelError> {
        self.add_activation_of_gemma(config);
        self.add_windows(config, if kind == Kind::Gemma2 { 2 } else { 6 })?;
        for key in CAPS {
            if let Some(cap) = self.number(key)?.filter(|&cap| cap != 0.0) {
                // The config calls it the same.
                config[*key] = json!(cap);
            }
        }
        // No key says it: llama.cpp goes by the number of layers too.
        let is_27b = layers(config) == if kind == Kind::Gemma2 { 46 } else { 62 };
        let head_dim = config["head_dim"].as_u64().unwrap_or(1);
        let per_head = config["hidden_size"].as_u64().unwrap_or(1) / self.needed("attention.head_count")?.max(1);
        config["query_pre_attn_scalar"] = json!(if is_27b { per_head } else { head_dim });
        if kind == Kind::Gemma3 {
            let (theta, width) = (config["rope_theta"].as_f64().unwrap_or(1e6), head_dim as usize);
            if let Some(scaling) = self.scaling(theta, width, config)? {
                config["rope_scaling"] = scaling;
            }
            config["rope_local_base_freq"] = json!(self.number("rope.freq_base_swa")?.unwrap_or(10_000.0));
        }
        Ok(())
    }

    pub(super) fn add_activation_of_gemma(&self, config: &mut Json) {
        for key in ["hidden_act", "hidden_activation"] {
            config[key] = json!("gelu_pytorch_tanh");
        }
    }

    fn add_mistral3(&self, config: &mut Json) -> Result<(), ModelError> {
        config["sliding_window"] = Json::Null;
        let growth = self.number("attention.temperature_scale")?.filter(|&growth| growth != 0.0);
        // 0 means that cosines and sines have YaRN's own factor.
        let multiplier = self.number("rope.scaling.yarn_log_multiplier")?.filter(|&scale| scale != 0.0);
        if let (Some(scale), Some(scaling)) = (multiplier, config.get_mut("rope_scaling")) {
            scaling["mscale"] = json!(1.0);
            scaling["mscale_all_dim"] = json!(scale);
        }
        let Some(beta) = growth else { return Ok(()) };
        let Some(scaling) = config.get_mut("rope_scaling").filter(|scaling| scaling["rope_type"] == "yarn") else {
            let what = format!("`{}` without YaRN is not computed here", self.full("attention.temperature_scale"));
            return Err(self.refused(what, OTHER_COPY));
        };
        scaling["llama_4_scaling_beta"] = json!(beta);
        config["model_type"] = json!("ministral3");
        Ok(())
    }

    fn add_granite(&self, kind: Kind, config: &mut Json) -> Result<(), ModelError> {
        for (key, ours) in MULTIPLIERS.iter().zip([
            "attention_multiplier",
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
        ]) {
            if let Some(factor) = self.number(key)?.filter(|&factor| factor != 0.0) {
                config[ours] = json!(factor);
            }
        }
        // Its absence means 1 / √head_dim there, and 1 in the config.
        if config.get("attention_multiplier").is_none() {
            let head_dim = config["head_dim"].as_f64().unwrap_or(1.0);
            config["attention_multiplier"] = json!(1.0 / head_dim.sqrt());
        }
        if let Some(experts) = self.size("expert_count")?.filter(|&experts| experts > 0) {
            let what = format!("`{}` = {experts}: experts of Granite are not computed here", self.full("expert_count"));
            return Err(self.refused(what, OTHER_COPY));
        }
        // Of these architectures alone the key means whether there are positions.
        let is_turned = self.number("rope.scaling.finetuned")? != Some(0.0);
        // Granite 4 without Mamba layers is a file of `granite` too. With positions it computes what Granite 3 does.
        match kind == Kind::Granite && is_turned {
            true => Ok(()),
            false => self.add_granite4(config, is_turned),
        }
    }

    /// Layers of Granite 4, all of which have attention.
    fn add_granite4(&self, config: &mut Json, is_turned: bool) -> Result<(), ModelError> {
        let count = layers(config);
        let heads = self.of_layers("attention.head_count_kv", count)?;
        let heads = heads.unwrap_or_else(|| vec![config["num_attention_heads"].as_u64().unwrap_or(0); count]);
        let first = heads.first().copied().unwrap_or(0);
        if let Some(layer) = (0..count).find(|&layer| heads.get(layer) != Some(&first) || first == 0) {
            let what = format!("layer {layer} is a Mamba layer or has heads of its own, which is not computed here");
            return Err(self.refused(what, OTHER_COPY));
        }
        let width = self.size("expert_shared_feed_forward_length")?.filter(|&width| width > 0);
        config["model_type"] = json!("granitemoehybrid");
        config["shared_intermediate_size"] = json!(width.map_or_else(|| self.needed("feed_forward_length"), Ok)?);
        config["num_key_value_heads"] = json!(first);
        config["layer_types"] = vec!["full_attention"; count].into();
        config["num_local_experts"] = json!(0);
        config["position_embedding_type"] = json!(if is_turned { "rope" } else { "nope" });
        Ok(())
    }

    fn add_phi3(&self, config: &mut Json) -> Result<(), ModelError> {
        config["sliding_window"] = json!(self.size("attention.sliding_window")?.filter(|&window| window > 0));
        let head_dim = config["head_dim"].as_u64().unwrap_or(2);
        let turned = self.size("rope.dimension_count")?.unwrap_or(head_dim);
        if let Some(scaling) = self.long(usize::try_from(turned).unwrap_or(0))? {
            config["rope_scaling"] = scaling;
            let context = config["max_position_embeddings"].clone();
            let original = self.size("rope.scaling.original_context_length")?;
            config["original_max_position_embeddings"] = original.map_or(context, |original| json!(original));
        }
        Ok(())
    }

    fn add_olmo2(&self, config: &mut Json) -> Result<(), ModelError> {
        if self.size("attention.sliding_window")?.unwrap_or(0) == 0 {
            let what = "it is a model of OLMo 2, which is not known here: OLMo 3 has windows".to_owned();
            return Err(self.refused(what, OTHER_COPY));
        }
        self.add_windows(config, 4)?;
        let theta = config["rope_theta"].clone();
        let of_window = self.number("rope.freq_base_swa")?.map_or(theta.clone(), |theta| json!(theta));
        let head_dim = config["head_dim"].as_u64().unwrap_or(2) as usize;
        // Layers with a window have no scaling.
        let scaling = self.scaling(theta.as_f64().unwrap_or(1e4), head_dim, config)?;
        let mut of_all = scaling.unwrap_or_else(|| json!({ "rope_type": "default" }));
        of_all["rope_theta"] = theta;
        config["rope_parameters"] = json!({
            "full_attention": of_all,
            "sliding_attention": { "rope_type": "default", "rope_theta": of_window },
        });
        Ok(())
    }

    /// Sizes, windows and rotary embeddings of two kinds of layers, what layers share, and inputs of each.
    fn add_gemma4(&self, config: &mut Json) -> Result<(), ModelError> {
        let count = layers(config);
        self.add_activation_of_gemma(config);
        self.add_windows(config, 6)?;
        let is_full: Vec<bool> = (0..count).map(|n| config["layer_types"][n] == "full_attention").collect();
        let wide = self.needed("attention.key_length")?;
        let narrow = self.size("attention.key_length_swa")?.unwrap_or(wide);
        config["head_dim"] = json!(narrow);
        config["global_head_dim"] = json!(wide);
        let heads = self.of_layers("attention.head_count_kv", count)?.unwrap_or_default();
        let of = |wanted: bool| (0..count).find(|&n| is_full[n] == wanted).and_then(|n| heads.get(n).copied());
        let of_window = of(false).or(of(true)).unwrap_or(1);
        config["num_key_value_heads"] = json!(of_window);
        let shared = self.size("attention.shared_kv_layers")?.unwrap_or(0);
        config["num_kv_shared_layers"] = json!(shared);
        let own = count.saturating_sub(usize::try_from(shared).unwrap_or(count));
        let keys_are_values = (0..own).any(|n| is_full[n] && !self.has(n, "attn_v.weight"));
        config["attention_k_eq_v"] = json!(keys_are_values);
        if keys_are_values {
            config["num_global_key_value_heads"] = json!(of(true));
        } else if let Some(of_full) = of(true).filter(|&of_full| of_full != of_window) {
            let layers = (0..count).filter(|&n| is_full[n]);
            let object = |n: usize| (n.to_string(), json!({ "num_key_value_heads": of_full }));
            config["per_layer_config"] = Json::Object(layers.map(object).collect());
        }
        let widths = self.of_layers("feed_forward_length", count)?.unwrap_or_default();
        let width = widths.first().copied().unwrap_or(0);
        config["intermediate_size"] = json!(width);
        config["use_double_wide_mlp"] = json!(widths.last().is_some_and(|&last| last == 2 * width));
        let inputs = self.size("embedding_length_per_layer_input")?.unwrap_or(0);
        config["hidden_size_per_layer_input"] = json!(inputs);
        if let Some(table) = self.header.tensor("per_layer_token_embd.weight") {
            config["vocab_size_per_layer_input"] = json!(table.shape.first());
        }
        if let Some(cap) = self.number("final_logit_softcapping")?.filter(|&cap| cap != 0.0) {
            config["final_logit_softcapping"] = json!(cap);
        }
        if self.size("expert_count")?.is_some_and(|experts| experts > 0) {
            config["enable_moe_block"] = json!(true);
            self.add_experts(config)?;
            config["top_k_experts"] = config["num_experts_per_tok"].clone();
        }
        self.add_ropes_of_gemma4(config, wide, narrow)
    }

    /// In layers that see all keys, the first pairs turn as those of a head that turns whole.
    fn add_ropes_of_gemma4(&self, config: &mut Json, wide: u64, narrow: u64) -> Result<(), ModelError> {
        let turned = self.size("rope.dimension_count")?.unwrap_or(wide);
        let of_window = self.size("rope.dimension_count_swa")?.unwrap_or(narrow);
        if turned != wide || of_window != narrow {
            let what = format!("heads of {wide} and {narrow} elements, of which {turned} and {of_window} are turned");
            return Err(self.refused(what, OTHER_COPY));
        }
        let pairs = usize::try_from(wide / 2).unwrap_or(0);
        let factors = self.factors(FREQUENCIES, pairs)?.unwrap_or_else(|| vec![1.0; pairs]);
        let first = factors.iter().take_while(|factor| **factor == 1.0).count();
        // The factor of a pair that does not turn is beyond all wavelengths.
        if factors[first..].iter().any(|factor| *factor < 1e20) {
            let what = format!("the factors of rotary frequencies in `{FREQUENCIES}` are not Gemma 4's");
            return Err(self.refused(what, OTHER_COPY));
        }
        config["rope_parameters"] = json!({
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": config["rope_theta"],
                "partial_rotary_factor": first as f64 / pairs.max(1) as f64,
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": self.number("rope.freq_base_swa")?.unwrap_or(10_000.0),
            },
        });
        Ok(())
    }
}

/// Layers of a config, without those that predict further tokens.
pub(super) fn layers(config: &Json) -> usize {
    config["num_hidden_layers"].as_u64().and_then(|layers| usize::try_from(layers).ok()).unwrap_or(0)
}
