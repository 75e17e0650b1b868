//! What mlx-lm 0.32 calls the modules of a model, where that differs from transformers, and the
//! branches of its stacks of experts (`LoRASwitchLinear`): A [e, r, i] and B [e, o, r].
//!
//! Of gpt-oss's experts and of Granite 4 it holds gate and up apart, each with a branch. Here they have one for both:
//! it is written as two with the same A, and two are read as one.

use std::collections::BTreeMap;

use crate::adaptation::{TargetLayer, is_expert};
use crate::adapter::files::Format;
use crate::adapter::settings::Settings;
use crate::adapter::stacked::OfExpert;
use crate::adapter::tensors::{Branches, Parts, of_shape, values};
use crate::config::ModelConfig;
use crate::config::family::InMlx;
use crate::error::ModelError;
use crate::lora::LoraTarget;
use crate::merge::BranchValues;

/// A module in mlx-lm.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MlxModule {
    /// Its name in the text model.
    pub(crate) name: String,
    /// Its place, if it is one expert's in a stack.
    pub(crate) expert: Option<usize>,
}

/// What mlx-lm has for a module of a model of this config.
pub(crate) fn of_module(module: &str, config: &ModelConfig) -> MlxModule {
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
        let stack = match (family.has_stacks_only(), family.has_expert_parameters()) {
            (true, _) => "experts.switch_glu",
            (false, true) => "experts",
            (false, false) => "switch_mlp",
        };
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

/// What mlx-lm has for a module of a model of this config, with Granite 4's dense part, which it calls as transformers
/// does in files of that alone.
pub(crate) fn of_branch(module: &str, config: &ModelConfig) -> MlxModule {
    match module.strip_suffix(".shared_mlp.output_linear") {
        Some(layer) => MlxModule { name: format!("{layer}.mlp.down_proj"), expert: None },
        None => of_module(module, config),
    }
}

/// Gate and up in mlx-lm, where one matrix here is both.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Halves {
    pub(crate) names: [String; 2],
    /// Whether their outputs take turns in the matrix of both. Otherwise those of the gate come first.
    pub(crate) take_turns: bool,
}

impl Halves {
    /// Those of a module, if this is the name that [`of_branch`] has for both.
    pub(crate) fn of(name: &str) -> Option<Halves> {
        let (outer, take_turns) = match name.strip_suffix(".experts.gate_up_proj") {
            Some(layer) => (format!("{layer}.experts"), true),
            None => (format!("{}.mlp", name.strip_suffix(".shared_mlp.input_linear")?), false),
        };
        Some(Halves { names: ["gate_proj", "up_proj"].map(|part| format!("{outer}.{part}")), take_turns })
    }

    /// Where a row of one half, of `rows` rows, lies in the matrix of both.
    fn place(&self, half: usize, row: usize, rows: usize) -> usize {
        if self.take_turns { 2 * row + half } else { half * rows + row }
    }

    /// The rows of B [2 o, r] that are one half's.
    pub(super) fn rows_of(&self, half: usize, b: &[f32], rank: usize) -> Vec<f32> {
        let rows = b.len() / rank.max(1) / 2;
        let row = |row: usize| &b[self.place(half, row, rows) * rank..][..rank];
        (0..rows).flat_map(row).copied().collect()
    }
}

/// The names in mlx-lm of a module: two of gate and up together.
pub(super) fn names_of(module: &str, config: &ModelConfig) -> Vec<String> {
    let name = of_branch(module, config).name;
    match Halves::of(&name) {
        Some(halves) => Vec::from(halves.names),
        None => vec![name],
    }
}

/// Why mlx-lm has no branch on a module. `None`: it has one.
pub(super) fn without_branch(target: &LoraTarget, config: &ModelConfig) -> Option<String> {
    let module = &target.module;
    let is_gate = config.family.mixture.is_some_and(|mixture| mixture.in_mlx == InMlx::PlainRouter);
    if module.ends_with(".kv_b_proj") {
        return Some(format!("mlx-lm holds `{module}` in two parts, and one branch is not two"));
    }
    if target.use_dora && module.ends_with(".shared_mlp.input_linear") {
        return Some(format!("mlx-lm holds gate and up of `{module}` apart, and DoRA of both is not read of two"));
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

/// Takes the branches of stacks, and of gate and up apart, out of `branches`: those that single experts and both
/// together have here, by module. `layers`: all that may have a branch.
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
    let experts = config.experts.as_ref().map_or(0, |experts| experts.count);
    let mut of_stacks: BTreeMap<String, Option<Taken>> = BTreeMap::new();
    let mut shared: BTreeMap<String, bool> = BTreeMap::new();
    for layer in layers {
        let MlxModule { name, expert } = of_branch(&layer.module, config);
        let both = Halves::of(&name);
        let (names, outputs) = match &both {
            Some(halves) => (halves.names.to_vec(), layer.outputs / 2),
            None if expert.is_some() => (vec![name], layer.outputs),
            None => continue,
        };
        let shape = (outputs, layer.inputs);
        for name in &names {
            if !of_stacks.contains_key(name) {
                let taken = match expert {
                    Some(_) => take_stack(branches, name, experts, shape, settings)?,
                    None => take_one(branches, name, shape, settings)?,
                };
                of_stacks.insert(name.clone(), taken);
            }
        }
        let of = |name: &String| of_stacks.get(name).and_then(Option::as_ref);
        let expert = expert.unwrap_or(0);
        let taken = match &both {
            Some(halves) => {
                let both = [&halves.names[0], &halves.names[1]].map(of);
                let is_shared = *shared.entry(names[0].clone()).or_insert_with(|| have_one_a(both));
                of_both(halves, both, is_shared, expert, shape)
            }
            None => of(&names[0]).map(|taken| taken.of_expert(expert, shape)),
        };
        let Some(OfExpert { target, a, b }) = taken else { continue };
        let target = LoraTarget { module: layer.module.clone(), ..target };
        found.insert(layer.module.clone(), OfExpert { target, a, b });
    }
    Ok(found)
}

/// Takes the branch of a stack of matrices [o, i] out of `branches`, if it is there.
fn take_stack(
    branches: &mut Branches<'_>,
    name: &str,
    experts: usize,
    (outputs, inputs): (usize, usize),
    settings: &Settings,
) -> Result<Option<Taken>, ModelError> {
    let place = (name.to_owned(), false);
    let Some(Parts { found: [Some(a), Some(b), None] }) = branches.by_module.get(&place) else { return Ok(None) };
    let rank = a.shape.get(1).copied().unwrap_or(0).max(1);
    let (a, b) = (of_shape(a, &[experts, rank, inputs])?, of_shape(b, &[experts, outputs, rank])?);
    branches.by_module.remove(&place);
    Ok(Some(Taken { target: settings.target(name, rank)?, a, b }))
}

/// Takes the branch of one matrix [o, i] out of `branches`, if it is there: as that of a stack of one.
fn take_one(
    branches: &mut Branches<'_>,
    name: &str,
    shape: (usize, usize),
    settings: &Settings,
) -> Result<Option<Taken>, ModelError> {
    let place = (name.to_owned(), false);
    let Some(Parts { found: [Some(a), Some(b), None] }) = branches.by_module.get(&place) else { return Ok(None) };
    let (a, b, rank) = values(a, b, shape, Format::Mlx)?;
    branches.by_module.remove(&place);
    Ok(Some(Taken { target: settings.target(name, rank)?, a, b }))
}

/// The branch of a stack, as it was read.
struct Taken {
    target: LoraTarget,
    /// [e, r, i]
    a: Vec<f32>,
    /// [e, o, r]
    b: Vec<f32>,
}

impl Taken {
    /// The branch of one expert, of a matrix [o, i].
    fn of_expert(&self, expert: usize, (outputs, inputs): (usize, usize)) -> OfExpert {
        let rank = self.target.rank;
        let of = |values: &[f32], each: usize| values[expert * each..(expert + 1) * each].to_vec();
        OfExpert { target: self.target.clone(), a: of(&self.a, rank * inputs), b: of(&self.b, outputs * rank) }
    }
}

/// Whether gate and up of all experts have the same A.
fn have_one_a(both: [Option<&Taken>; 2]) -> bool {
    matches!(both, [Some(gate), Some(up)] if gate.a == up.a)
}

/// The branches of an expert's gate and up, [o, i] each, as one of both. If their A are not shared, it has the rows
/// of both, and B has zeros where a row is the other one's.
fn of_both(
    halves: &Halves,
    [gate, up]: [Option<&Taken>; 2],
    is_shared: bool,
    expert: usize,
    shape: (usize, usize),
) -> Option<OfExpert> {
    let first = gate.or(up)?;
    let rank_of = |taken: Option<&Taken>| taken.map_or(0, |taken| taken.target.rank);
    let rank = if is_shared { first.target.rank } else { rank_of(gate) + rank_of(up) };
    let mut b = vec![0.0; 2 * shape.0 * rank];
    let mut a = Vec::new();
    for (half, taken) in [gate, up].into_iter().enumerate() {
        let Some(OfExpert { target, a: own, b: rows }) = taken.map(|taken| taken.of_expert(expert, shape)) else {
            continue;
        };
        let column = if is_shared { 0 } else { a.len() / shape.1 };
        for (row, values) in rows.chunks(target.rank).enumerate() {
            b[halves.place(half, row, shape.0) * rank + column..][..target.rank].copy_from_slice(values);
        }
        if !is_shared || half == 0 {
            a.extend(own);
        }
    }
    // The scale stays.
    let alpha = first.target.alpha / first.target.rank as f64 * rank as f64;
    Some(OfExpert { target: LoraTarget { rank, alpha, ..first.target.clone() }, a, b })
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
            ("gpt_oss", "mlp.experts.3.down_proj", "mlp.experts.down_proj", Some(3)),
            ("gpt_oss", "mlp.router", "mlp.router", None),
            ("phi3", "self_attn.qkv_proj", "self_attn.qkv_proj", None),
            ("granitemoehybrid", "shared_mlp.output_linear", "mlp.down_proj", None),
        ] {
            let found = of_branch(&format!("{layer}{ours}"), &config(family));
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
            ("granitemoehybrid", "shared_mlp.input_linear", true, "DoRA of both"),
            ("granitemoehybrid", "shared_mlp.input_linear", false, ""),
            ("granitemoehybrid", "shared_mlp.output_linear", true, ""),
            ("qwen3_moe", "mlp.experts.0.up_proj", true, "no DoRA on experts"),
            ("qwen3_moe", "mlp.experts.0.up_proj", false, ""),
            ("qwen3_moe", "mlp.gate", false, ""),
        ] {
            let found = without_branch(&target(module, use_dora), &config(family)).unwrap_or_default();
            assert!(found.contains(told) && found.is_empty() == told.is_empty(), "{family} {module}: {found}");
        }
    }

    /// Of one expert: gate and up with one A, with two, and one of them alone. Two inputs, one output each.
    #[test]
    fn gate_and_up_become_one_branch() {
        let both = of_branch("model.layers.1.mlp.experts.0.gate_up_proj", &config("gpt_oss"));
        let halves = Halves::of(&both.name).expect("two stacks");
        assert_eq!(halves.names, ["gate_proj", "up_proj"].map(|part| format!("model.layers.1.mlp.experts.{part}")));
        let taken = |a: &[f32], b: &[f32]| {
            let rank = b.len();
            let module = "stack".to_owned();
            let target = LoraTarget { module, rank, alpha: 3.0 * rank as f64, use_rslora: false, use_dora: false };
            Taken { target, a: a.to_vec(), b: b.to_vec() }
        };
        let (gate, up) = (taken(&[1.0, 2.0], &[5.0]), taken(&[1.0, 2.0], &[6.0]));
        let other = taken(&[3.0, 4.0, 7.0, 8.0], &[9.0, 10.0]);
        #[expect(clippy::type_complexity, reason = "a table of cases")]
        let cases: [(Option<&Taken>, Option<&Taken>, &[f32], &[f32]); 4] = [
            (Some(&gate), Some(&up), &[1.0, 2.0], &[5.0, 6.0]),
            (Some(&gate), Some(&other), &[1.0, 2.0, 3.0, 4.0, 7.0, 8.0], &[5.0, 0.0, 0.0, 0.0, 9.0, 10.0]),
            (Some(&gate), None, &[1.0, 2.0], &[5.0, 0.0]),
            (None, Some(&other), &[3.0, 4.0, 7.0, 8.0], &[0.0, 0.0, 9.0, 10.0]),
        ];
        for (gate, up, a, b) in cases {
            let found = of_both(&halves, [gate, up], have_one_a([gate, up]), 0, (1, 2)).expect("a branch");
            assert_eq!((found.a.as_slice(), found.b.as_slice()), (a, b));
            assert_eq!((found.target.rank, found.target.scale()), (a.len() / 2, 3.0));
        }
        assert!(of_both(&halves, [None, None], false, 0, (1, 2)).is_none());
        assert_eq!(halves.rows_of(1, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 2), [3.0, 4.0, 7.0, 8.0]);
        assert_eq!(Halves::of("model.layers.1.mlp.gate_up_proj"), None);
    }

    /// Granite 4's gate has the first half of the rows: two outputs each here, of rank 1.
    #[test]
    fn gate_and_up_of_granite_lie_one_behind_the_other() {
        let both = of_branch("model.layers.1.shared_mlp.input_linear", &config("granitemoehybrid"));
        let halves = Halves::of(&both.name).expect("two matrices");
        assert_eq!(halves.names, ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]);
        let b = [1.0, 2.0, 3.0, 4.0];
        let taken = [0, 1].map(|half| {
            let target =
                LoraTarget { module: "half".to_owned(), rank: 1, alpha: 3.0, use_rslora: false, use_dora: false };
            Taken { target, a: vec![7.0], b: halves.rows_of(half, &b, 1) }
        });
        assert_eq!([&taken[0].b, &taken[1].b], [&[1.0_f32, 2.0], &[3.0, 4.0]]);
        let found = of_both(&halves, taken.each_ref().map(Some), true, 0, (2, 1)).expect("a branch");
        assert_eq!((found.a.as_slice(), found.b.as_slice(), found.target.rank), (&[7.0][..], &b[..], 1));
        let found = of_both(&halves, [None, Some(&taken[1])], false, 0, (2, 1)).expect("a branch");
        assert_eq!(found.b, [0.0, 0.0, 3.0, 4.0]);
    }

    /// No two modules of a model share a place.
    #[test]
    fn each_module_has_a_place_of_its_own() {
        for family in
            ["qwen3_moe", "lfm2_moe", "gemma4_moe", "deepseek_v3", "qwen3_5_moe", "gpt_oss", "granitemoehybrid"]
        {
            let config = config(family);
            let layers = target_layers(&config);
            let places: BTreeSet<_> = layers
                .iter()
                .map(|layer| of_branch(&layer.module, &config))
                .map(|place| (place.name, place.expert))
                .collect();
            assert_eq!(places.len(), layers.len(), "{family}");
        }
    }
}
