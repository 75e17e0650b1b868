//! The keys of config.json that describe mixtures of experts and latent attention.

use finetune_kernels::ExpertWeights;
use serde_json::Value;

use super::{Heads, Reader};
use crate::config::family::{ExpertLayout, Family, Mixture, Normalized, Shared};
use crate::config::{ExpertsConfig, LatentConfig, MOST_EXPERTS};
use crate::error::ModelError;

/// `router_aux_loss_coef` if the key is left out, in all families that have the loss.
const ROUTER_LOSS: f64 = 0.001;

impl Reader<'_> {
    /// The first of these sizes that is there.
    fn first_size(&self, keys: &[&str], default: usize) -> Result<usize, ModelError> {
        for key in keys {
            if let Some(size) = self.optional_size(key)? {
                return Ok(size);
            }
        }
        Ok(default)
    }

    /// The experts of layers with such.
    pub(super) fn experts(&self, family: &Family) -> Result<Option<ExpertsConfig>, ModelError> {
        let Some(mixture) = &family.mixture else { return Ok(None) };
        if mixture.is_beside && !self.flag("enable_moe_block")?.unwrap_or(false) {
            return Ok(None);
        }
        // transformers 5 writes the second name where a class has the first.
        let count = self.first_size(&["num_experts", "num_local_experts", "n_routed_experts"], mixture.sizes[0])?;
        let choices =
            self.first_size(&["num_experts_per_tok", "experts_per_token", "top_k_experts"], mixture.sizes[1])?;
        if count > MOST_EXPERTS || choices > count {
            return Err(
                self.malformed(&format!("{choices} of {count} experts for each token (at most {MOST_EXPERTS})"))
            );
        }
        let key =
            if mixture.layout == ExpertLayout::TakingTurns { "intermediate_size" } else { "moe_intermediate_size" };
        let inner = self.first_size(&[key], mixture.sizes[2])?;
        let is_normalized = match mixture.normalized.0 {
            Normalized::Always => true,
            Normalized::Asked(default) => self.flag("norm_topk_prob")?.unwrap_or(default),
        };
        let scale = self.number_within("routed_scaling_factor", 1e-6, 1e6)?.unwrap_or(mixture.scale);
        Ok(Some(ExpertsConfig {
            count,
            choices,
            intermediate_size: inner,
            shared: match mixture.shared {
                Shared::None => None,
                Shared::Gated(default) => Some(self.first_size(&["shared_expert_intermediate_size"], default)?),
                Shared::Plain(default) => Some(inner * self.first_size(&["n_shared_experts"], default)?),
            },
            groups: self.groups(mixture.groups, count, choices)?,
            weights: ExpertWeights {
                scores: mixture.scores,
                normalized: is_normalized.then_some(mixture.normalized.1),
                scale: scale as f32,
            },
            router_loss: self.router_loss(mixture)?,
        }))
    }

    /// The coefficient of the routers' auxiliary loss; 0 unless `output_router_logits` asks for it, as in
    /// transformers.
    fn router_loss(&self, mixture: &Mixture) -> Result<f64, ModelError> {
        if !mixture.has_router_loss || !self.flag("output_router_logits")?.unwrap_or(false) {
            return Ok(0.0);
        }
        Ok(self.number_within("router_aux_loss_coef", 0.0, 1e6)?.unwrap_or(ROUTER_LOSS))
    }

    /// How many groups the experts are in, and how many of those a token chooses from.
    fn groups(&self, default: [usize; 2], count: usize, choices: usize) -> Result<Option<[usize; 2]>, ModelError> {
        if default == [1, 1] && self.get("n_group").is_none() {
            return Ok(None);
        }
        let groups = self.first_size(&["n_group"], default[0])?;
        let chosen = self.first_size(&["topk_group"], default[1])?;
        if groups == chosen {
            return Ok(None);
        }
        // A group is scored by its two best.
        let fits = chosen < groups && count.is_multiple_of(groups) && count / groups >= 2;
        if !fits || choices > count / groups * chosen {
            return Err(self.malformed(&format!(
                "{choices} of {count} experts out of {chosen} of {groups} groups (n_group, topk_group)"
            )));
        }
        Ok(Some([groups, chosen]))
    }

    /// Whether the layer of a number has experts: as `mlp_layer_types` says. Otherwise all but the first
    /// (`first_k_dense_replace`, `num_dense_layers`), and of those every `decoder_sparse_step`th, but those of
    /// `mlp_only_layers`.
    pub(super) fn layers_with_experts(
        &self,
        family: &Family,
        count: usize,
    ) -> Result<impl Fn(usize) -> bool, ModelError> {
        let wrong =
            |key: &str| self.malformed(&format!("`{key}` should be a list of layer numbers, or of kinds of layers"));
        let list = |key: &'static str| match self.get(key) {
            None => Ok(None),
            Some(list) => list.as_array().map(Some).ok_or_else(|| wrong(key)),
        };
        let types: Option<Vec<bool>> =
            list("mlp_layer_types")?.map(|list| list.iter().map(|kind| kind.as_str() == Some("sparse")).collect());
        if let Some(types) = types.as_ref().filter(|types| types.len() < count) {
            let kinds = types.len();
            return Err(
                self.malformed(&format!("`mlp_layer_types` has {kinds} entries, and `num_hidden_layers` is {count}"))
            );
        }
        let dense: Vec<u64> = match list("mlp_only_layers")? {
            None => Vec::new(),
            Some(list) => {
                let numbers = list.iter().map(Value::as_u64).collect::<Option<_>>();
                numbers.ok_or_else(|| wrong("mlp_only_layers"))?
            }
        };
        let first = match self.get("first_k_dense_replace").or(self.get("num_dense_layers")) {
            None => family.mixture.map_or(0, |mixture| mixture.dense),
            Some(count) => {
                let count = count.as_u64().ok_or_else(|| self.wrong_type("first_k_dense_replace", "a number"))?;
                usize::try_from(count).unwrap_or(usize::MAX)
            }
        };
        let step = self.optional_size("decoder_sparse_step")?.unwrap_or(1);
        let has_experts = self.experts(family)?.is_some();
        Ok(move |n: usize| {
            has_experts
                && match &types {
                    Some(types) => types.get(n).copied().unwrap_or(false),
                    None => n >= first && !dense.contains(&(n as u64)) && (n + 1).is_multiple_of(step),
                }
        })
    }

    /// The sizes of latent attention.
    pub(super) fn latent(&self, family: &Family) -> Result<Option<LatentConfig>, ModelError> {
        let Some(sizes) = family.latent else { return Ok(None) };
        // null means that queries are made of the token itself.
        let query_rank = match self.object.contains_key("q_lora_rank") {
            true => self.optional_size("q_lora_rank")?,
            false => Some(sizes.query_rank),
        };
        let latent = LatentConfig {
            query_rank,
            rank: self.first_size(&["kv_lora_rank"], 512)?,
            plain: self.first_size(&["qk_nope_head_dim"], sizes.plain)?,
            turned: self.first_size(&["qk_rope_head_dim"], 64)?,
            value: self.first_size(&["v_head_dim"], sizes.value)?,
        };
        if !latent.turned.is_multiple_of(2) || latent.plain > 4096 || latent.value > 4096 || latent.turned > 4096 {
            return Err(self.malformed("`qk_rope_head_dim` is odd, or a size of heads is beyond 4096"));
        }
        Ok(Some(latent))
    }

    /// Every head of latent attention has keys and values of its own.
    pub(super) fn latent_heads(&self, latent: LatentConfig) -> Result<Heads, ModelError> {
        let heads = self.size("num_attention_heads")?;
        Ok(Heads { heads, key_value_heads: heads, head_dim: latent.plain + latent.turned })
    }

    /// What latent attention's scores are multiplied by where the rotary embedding is stretched: the square
    /// of `0.1 · mscale_all_dim · ln factor + 1`.
    pub(super) fn latent_scale(&self) -> Result<f32, ModelError> {
        let Some(object) = self.nested("rope_scaling")?.or(self.nested("rope_parameters")?) else { return Ok(1.0) };
        let rope = Reader { object, path: self.path };
        let kind = rope.text("rope_type")?.or(rope.text("type")?).unwrap_or("default");
        let (factor, all) = (rope.number("factor")?.unwrap_or(1.0), rope.number("mscale_all_dim")?.unwrap_or(0.0));
        if kind == "default" || all == 0.0 || factor <= 1.0 {
            return Ok(1.0);
        }
        let scale = 0.1 * all * factor.ln() + 1.0;
        Ok((scale * scale) as f32)
    }
}
