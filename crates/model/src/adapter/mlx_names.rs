//! What mlx-lm 0.32 calls the modules of a model, where that differs from transformers, and the
//! branches of its stacks of experts (`LoRASwitchLinear`): A [e, r, i] and B [e, o, r].

use std::collections::BTreeMap;

use finetune_store::TensorView;

use crate::adaptation::{TargetLayer, is_expert};
use crate::adapter::settings::Settings;
use crate::adapter::stacked::OfExpert;
use crate::adapter::tensors::{Branches, Parts, of_shape};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::lora::LoraTarget;
use crate::merge::BranchValues;

/// A linear layer in mlx-lm.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MlxModule {
    /// Its name in the text model.
    pub(super) name: String,
    /// Its place, if it is one expert's in a stack.
    pub(super) expert: Option<usize>,
}

/// What mlx-lm has for a module of a model of this config.
pub(super) fn of_module(module: &str, config: &ModelConfig) -> MlxModule {
    let family = config.family;
    let part = |name: &str| {
        let parts = family.names.gated.iter().zip(["gate_proj", "up_proj", "down_proj"]);
        parts.into_iter().find(|(ours, _)| **ours == name).map_or(name.to_owned(), |(_, theirs)| theirs.to_owned())
    };
    if let Some((layer, rest)) = module.split_once(".experts.")
        && let Some((expert, projection)) = rest.split_once('.')
        && let Ok(expert) = expert.parse()
    {
        // Gemma 4's experts are beside a dense part, not in its place.
        let stack = if family.has_stacks_only() { "experts.switch_glu" } else { "switch_mlp" };
        return MlxModule { name: format!("{layer}.{stack}.{}", part(projection)), expert: Some(expert) };
    }
    // LFM2-MoE's dense layers; LFM2 keeps its names.
    let is_renamed = family.mixture.is_some() && module.contains(".feed_forward.");
    let name = match module.rsplit_once('.').filter(|_| is_renamed) {
        Some((before, last)) => format!("{before}.{}", part(last)),
        None => module.to_owned(),
    };
    MlxModule { name, expert: None }
}

/// Why mlx-lm has no branch on a module. `None`: it has one.
pub(super) fn without_branch(target: &LoraTarget, config: &ModelConfig) -> Option<String> {
    let module = &target.module;
    let is_gate = config.family.mixture.is_some_and(|mixture| mixture.correction.is_some());
    if module.ends_with(".kv_b_proj") || module.ends_with(".shared_mlp.input_linear") {
        return Some(format!("mlx-lm holds `{module}` in two parts, and one branch is not two"));
    }
    if module.ends_with(".shared_mlp.output_linear") {
        return Some(format!("mlx-lm has another name for `{module}` in each form of this family"));
    }
    if module.ends_with(".mlp.gate") && is_gate {
        return Some(format!("the router `{module}` is no linear layer in mlx-lm"));
    }
    if target.use_dora && is_expert(module) {
        return Some(format!("mlx-lm has no DoRA on experts, and `{module}` is one"));
    }
    None
}

/// The branch of a stack of experts while it is put together. Experts without a branch have zeros.
pub(super) struct Stack {
    outputs: usize,
    inputs: usize,
    rank: usize,
    /// [e, r, i]
    a: Vec<f32>,
    /// [e, o, r]
    b: Vec<f32>,
}

impl Stack {
    pub(super) fn new(experts: usize, (outputs, inputs): (usize, usize), rank: usize) -> Self {
        let (a, b) = (vec![0.0; experts * rank * inputs], vec![0.0; experts * outputs * rank]);
        Self { outputs, inputs, rank, a, b }
    }

    /// Puts in the branch of an expert, of at most the stack's rank. B is multiplied by `factor`.
    pub(super) fn put(&mut self, expert: usize, branch: &BranchValues<'_>, factor: f64) {
        let first = expert * self.rank * self.inputs;
        self.a[first..first + branch.a.len()].copy_from_slice(branch.a);
        let rows = self.b.chunks_mut(self.rank).skip(expert * self.outputs);
        for (row, values) in rows.zip(branch.b.chunks(branch.rank)) {
            for (place, value) in row.iter_mut().zip(values) {
                *place = if factor == 1.0 { *value } else { (f64::from(*value) * factor) as f32 };
            }
        }
    }

    /// Part, shape and values of each of its tensors.
    pub(super) fn tensors(self, experts: usize) -> [(&'static str, Vec<usize>, Vec<f32>); 2] {
        let shapes = [vec![experts, self.rank, self.inputs], vec![experts, self.outputs, self.rank]];
        let [of_a, of_b] = shapes;
        [("lora_a", of_a, self.a), ("lora_b", of_b, self.b)]
    }
}

/// Takes the branches of stacks out of `branches`: those of single experts, by module. `layers`: all
/// that may have a branch.
///
/// # Errors
/// If shapes are not those of the stacks, or not finite.
pub(super) fn take(
    branches: &mut Branches<'_>,
    settings: &Settings,
    config: &ModelConfig,
    layers: &[TargetLayer],
) -> Result<BTreeMap<String, OfExpert>, ModelError> {
    let mut found = BTreeMap::new();
    let Some(experts) = &config.experts else { return Ok(found) };
    let mut of_stacks: BTreeMap<String, Option<Taken>> = BTreeMap::new();
    for layer in layers {
        let MlxModule { name, expert: Some(expert) } = of_module(&layer.module, config) else { continue };
        if !of_stacks.contains_key(&name) {
            let parts = branches.by_module.get(&(name.clone(), false));
            let taken = match parts {
                Some(Parts { found: [Some(a), Some(b), None] }) => {
                    let taken = Taken::new(a, b, experts.count, (layer.outputs, layer.inputs))?;
                    branches.by_module.remove(&(name.clone(), false));
                    Some(taken)
                }
                _ => None,
            };
            of_stacks.insert(name.clone(), taken);
        }
        let Some(Some(Taken { rank, a, b })) = of_stacks.get(&name) else { continue };
        let target = LoraTarget { module: layer.module.clone(), ..settings.target(&name, *rank)? };
        let (a, b) = (of_expert(a, expert, rank * layer.inputs), of_expert(b, expert, layer.outputs * rank));
        found.insert(layer.module.clone(), OfExpert { target, a, b });
    }
    Ok(found)
}

fn of_expert(values: &[f32], expert: usize, each: usize) -> Vec<f32> {
    values[expert * each..(expert + 1) * each].to_vec()
}

/// The branch of a stack, as it was read.
struct Taken {
    rank: usize,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Taken {
    fn new(
        a: &TensorView<'_>,
        b: &TensorView<'_>,
        experts: usize,
        (outputs, inputs): (usize, usize),
    ) -> Result<Self, ModelError> {
        let rank = a.shape.get(1).copied().unwrap_or(0).max(1);
        Ok(Self { rank, a: of_shape(a, &[experts, rank, inputs])?, b: of_shape(b, &[experts, outputs, rank])? })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;
    use crate::adaptation::target_layers;

    fn config(family: &str) -> ModelConfig {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models");
        ModelConfig::load(&goldens.join(family)).expect("a config")
    }

    /// The names are those that `named_modules()` of mlx-lm 0.32.2's models lists.
    #[test]
    fn modules_are_called_as_in_mlx_lm() {
        let layer = "model.layers.1.";
        for (family, ours, theirs, expert) in [
            ("qwen3_moe", "mlp.experts.3.up_proj", "mlp.switch_mlp.up_proj", Some(3)),
            ("qwen3_next", "mlp.experts.0.down_proj", "mlp.switch_mlp.down_proj", Some(0)),
            ("deepseek_v3", "mlp.experts.2.gate_proj", "mlp.switch_mlp.gate_proj", Some(2)),
            ("glm4_moe", "mlp.shared_experts.up_proj", "mlp.shared_experts.up_proj", None),
            ("lfm2_moe", "feed_forward.experts.1.w1", "feed_forward.switch_mlp.gate_proj", Some(1)),
            ("lfm2_moe", "feed_forward.experts.1.w2", "feed_forward.switch_mlp.down_proj", Some(1)),
            ("lfm2_moe", "feed_forward.w3", "feed_forward.up_proj", None),
            ("lfm2_moe", "feed_forward.gate", "feed_forward.gate", None),
            ("lfm2", "feed_forward.w3", "feed_forward.w3", None),
            ("gemma4_moe", "experts.1.up_proj", "experts.switch_glu.up_proj", Some(1)),
            ("gemma4_moe", "router.proj", "router.proj", None),
            ("phi3", "self_attn.qkv_proj", "self_attn.qkv_proj", None),
        ] {
            let found = of_module(&format!("{layer}{ours}"), &config(family));
            assert_eq!(found, MlxModule { name: format!("{layer}{theirs}"), expert }, "{family}");
        }
    }

    #[test]
    fn what_mlx_lm_has_no_branch_for_is_told_by_name() {
        let target = |module: &str, use_dora: bool| LoraTarget {
            module: format!("model.layers.1.{module}"),
            rank: 4,
            alpha: 8.0,
            use_rslora: false,
            use_dora,
        };
        for (family, module, use_dora, told) in [
            ("deepseek_v3", "self_attn.kv_b_proj", false, "in two parts"),
            ("glm4_moe", "mlp.gate", false, "no linear layer"),
            ("granitemoehybrid", "shared_mlp.input_linear", false, "in two parts"),
            ("granitemoehybrid", "shared_mlp.output_linear", false, "another name"),
            ("qwen3_moe", "mlp.experts.0.up_proj", true, "no DoRA on experts"),
            ("qwen3_moe", "mlp.experts.0.up_proj", false, ""),
            ("qwen3_moe", "mlp.gate", false, ""),
        ] {
            let found = without_branch(&target(module, use_dora), &config(family)).unwrap_or_default();
            assert!(found.contains(told) && found.is_empty() == told.is_empty(), "{family} {module}: {found}");
        }
    }

    /// No two modules of a model share a place.
    #[test]
    fn each_module_has_a_place_of_its_own() {
        for family in ["qwen3_moe", "lfm2_moe", "gemma4_moe", "deepseek_v3", "qwen3_5_moe"] {
            let config = config(family);
            let layers = target_layers(&config);
            let places: BTreeSet<_> = layers
                .iter()
                .map(|layer| of_module(&layer.module, &config))
                .map(|place| (place.name, place.expert))
                .collect();
            assert_eq!(places.len(), layers.len(), "{family}");
        }
    }
}
