//! PEFT's branches of stacked experts, as those of single ones.
//!
//! transformers 5 holds the experts of a layer in two parameters, `gate_up_proj` and `down_proj`. PEFT
//! 0.21 gives each of them one branch with the experts one after the other: A [e · r, i] by expert, and
//! B [o, r · e] by rank. The branch of `gate_up_proj` changes both projections with one A. It is read as two
//! branches, but of gpt-oss, where gate and up have one branch here too.

use std::collections::BTreeMap;

use finetune_store::TensorView;
use serde_json::{Map, Value, json};

use crate::adapter::settings::Settings;
use crate::adapter::tensors::{Branches, Parts, of_shape};
use crate::adapter::write::whole;
use crate::config::{ExpertsConfig, ModelConfig};
use crate::error::ModelError;
use crate::files::wrapper::{Spelling, name_inside};
use crate::lora::LoraTarget;
use crate::merge::BranchValues;

/// The stacked parameters.
const GATE_UP: &str = "gate_up_proj";
const DOWN: &str = "down_proj";

/// The branch of one projection of one expert.
pub(super) struct OfExpert {
    pub(super) target: LoraTarget,
    /// [r, i]
    pub(super) a: Vec<f32>,
    /// [o, r]
    pub(super) b: Vec<f32>,
}

/// The names in PEFT's settings of the stacked parameters of a model.
pub(super) fn parameters(config: &ModelConfig) -> Vec<String> {
    modules(config).flat_map(|module| [GATE_UP, DOWN].map(|part| format!("{module}.{part}"))).collect()
}

fn modules(config: &ModelConfig) -> impl Iterator<Item = String> {
    let layers = config.layers.iter().enumerate().filter(|(_, layer)| layer.has_experts);
    layers.map(|(n, _)| format!("model.layers.{n}.{}", config.family.names.experts))
}

/// What PEFT's settings call a parameter in a new adapter.
fn in_settings(module: &str, parameter: &str, config: &ModelConfig) -> String {
    let name = format!("{module}.{parameter}");
    if config.is_named_inside() { name_inside(&name) } else { name }
}

/// Takes the branches of stacked parameters out of `branches`: those of single experts, by module.
///
/// # Errors
/// If the shapes are those of neither parameter, or half of a branch is missing.
pub(super) fn take(
    branches: &mut Branches<'_>,
    settings: &Settings,
    config: &ModelConfig,
    spelling: Spelling,
) -> Result<BTreeMap<String, OfExpert>, ModelError> {
    let mut found = BTreeMap::new();
    let Some(experts) = &config.experts else { return Ok(found) };
    for module in modules(config) {
        // PEFT wraps the module once for each of its parameters.
        for wrapped in [format!("{module}.base_layer"), module.clone()] {
            let Some(Parts { found: [Some(a), Some(b), None] }) = branches.by_module.get(&(wrapped.clone(), false))
            else {
                continue;
            };
            let target = |part: &str, rank| settings.target(&spelling.name(&format!("{module}.{part}")), rank);
            let stack = Stack::new(a, b, experts, config, target)?;
            found.extend(stack.of_experts(&module));
            branches.by_module.remove(&(wrapped, false));
        }
    }
    Ok(found)
}

/// The branch of one stacked parameter.
struct Stack {
    /// The projections that it changes, each with its first output and their number.
    parts: Vec<(&'static str, usize, usize)>,
    experts: usize,
    inputs: usize,
    rank: usize,
    target: LoraTarget,
    /// [e, r, i]
    a: Vec<f32>,
    /// [o, r, e]
    b: Vec<f32>,
}

impl Stack {
    fn new(
        a: &TensorView<'_>,
        b: &TensorView<'_>,
        experts: &ExpertsConfig,
        config: &ModelConfig,
        target: impl Fn(&str, usize) -> Result<LoraTarget, ModelError>,
    ) -> Result<Stack, ModelError> {
        let (count, inner, hidden) = (experts.count, experts.intermediate_size, config.hidden_size);
        let rank = a.shape.first().map_or(0, |rows| rows / count).max(1);
        let is_down = b.shape.first() == Some(&hidden) && a.shape.get(1) == Some(&inner);
        let (part, inputs, outputs) = if is_down { (DOWN, inner, hidden) } else { (GATE_UP, hidden, 2 * inner) };
        let [gate, up, down] = config.family.names.gated;
        Ok(Stack {
            parts: match (is_down, config.family.has_expert_parameters()) {
                (true, _) => vec![(down, 0, hidden)],
                (false, true) => vec![(GATE_UP, 0, 2 * inner)],
                (false, false) => vec![(gate, 0, inner), (up, inner, inner)],
            },
            experts: count,
            inputs,
            rank,
            target: target(part, rank)?,
            a: of_shape(a, &[count * rank, inputs])?,
            b: of_shape(b, &[outputs, rank * count])?,
        })
    }

    /// The columns of B that a projection uses. PEFT puts two branches of single projections together by
    /// zeros: then each of them has half of the columns.
    fn columns(&self, part: usize) -> std::ops::Range<usize> {
        let half = self.rank / 2;
        let column = |place: usize| place / self.experts % self.rank;
        let of_outputs = |first: usize, count: usize| {
            let width = self.rank * self.experts;
            self.b[first * width..(first + count) * width].iter().enumerate()
        };
        let is_apart = self.parts.len() == 2
            && self.rank.is_multiple_of(2)
            && self.parts.iter().enumerate().all(|(n, &(_, first, count))| {
                of_outputs(first, count).all(|(place, &value)| value == 0.0 || (column(place) < half) == (n == 0))
            });
        match (is_apart, part) {
            (false, _) => 0..self.rank,
            (true, 0) => 0..half,
            (true, _) => half..self.rank,
        }
    }

    fn of_experts(&self, module: &str) -> Vec<(String, OfExpert)> {
        let mut found = Vec::new();
        for (n, &(part, first, outputs)) in self.parts.iter().enumerate() {
            let columns = self.columns(n);
            let rank = columns.len();
            let divisor = if self.target.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
            let whole = self.rank as f64;
            let scale = self.target.alpha / if self.target.use_rslora { whole.sqrt() } else { whole };
            for expert in 0..self.experts {
                let module = format!("{module}.{expert}.{part}");
                let start = (expert * self.rank + columns.start) * self.inputs;
                let a = self.a[start..start + rank * self.inputs].to_vec();
                let element = |output: usize, column: usize| {
                    self.b[((first + output) * self.rank + column) * self.experts + expert]
                };
                let b = (0..outputs).flat_map(|output| columns.clone().map(move |column| element(output, column)));
                let target = LoraTarget { module: module.clone(), rank, alpha: scale * divisor, ..self.target.clone() };
                found.push((module, OfExpert { target, a, b: b.collect() }));
            }
        }
        found
    }
}

/// A module, and the shapes and values of A [e · r, i] and B [o, r · e].
type OfModule = (String, [Vec<usize>; 2], [Vec<f32>; 2]);

/// Branches of single experts, put together as PEFT's of stacked parameters.
#[derive(Default)]
pub(super) struct Stacked {
    pub(super) tensors: Vec<OfModule>,
    /// `target_parameters`
    pub(super) parameters: Vec<String>,
    /// `rank_pattern` and `alpha_pattern` of them.
    pub(super) ranks: Map<String, Value>,
    pub(super) alphas: Map<String, Value>,
}

/// Puts the branches of experts together. `branches` and `targets`: those of an adapter, in its order.
///
/// # Errors
/// [`ModelError::NotExpressible`] if the experts of a layer have branches of several ranks or scales, or
/// only some of them have one.
pub(super) fn put_together(
    branches: &[BranchValues<'_>],
    targets: &[LoraTarget],
    config: &ModelConfig,
) -> Result<Stacked, ModelError> {
    let mut stacked = Stacked::default();
    let Some(experts) = &config.experts else { return Ok(stacked) };
    let of_module: BTreeMap<&str, (&BranchValues<'_>, &LoraTarget)> =
        branches.iter().zip(targets).map(|(branch, target)| (branch.module, (branch, target))).collect();
    for module in modules(config) {
        let part = |part: &'static str| -> Result<Option<Projection<'_>>, ModelError> {
            let found: Vec<_> =
                (0..experts.count).filter_map(|n| of_module.get(format!("{module}.{n}.{part}").as_str())).collect();
            let Some((_, first)) = found.first() else { return Ok(None) };
            let is_alike = |target: &LoraTarget| target.rank == first.rank && target.scale() == first.scale();
            if found.len() != experts.count || !found.iter().all(|(_, target)| is_alike(target)) {
                return Err(ModelError::NotExpressible {
                    what: format!("PEFT has one branch for all experts: those of `{module}` differ in {part}"),
                    hint: "--format merged writes the model with them".to_owned(),
                });
            }
            Ok(Some(Projection { of_experts: found.into_iter().map(|(branch, _)| *branch).collect(), target: first }))
        };
        let (hidden, inner) = (config.hidden_size, experts.intermediate_size);
        let [gate, up, down] = config.family.names.gated;
        let gate_up = match config.family.has_expert_parameters() {
            true => vec![(part(GATE_UP)?, 0)],
            false => vec![(part(gate)?, 0), (part(up)?, inner)],
        };
        let down = part(down)?;
        let wraps_both = down.is_some() && gate_up.iter().any(|(part, _)| part.is_some());
        let first = if wraps_both { format!("{module}.base_layer") } else { module.clone() };
        let gate_up: Vec<_> = gate_up.into_iter().filter_map(|(part, row)| Some((part?, row))).collect();
        if !gate_up.is_empty() {
            stacked.add(first, in_settings(&module, GATE_UP, config), &gate_up, [2 * inner, hidden]);
        }
        if let Some(down) = down {
            stacked.add(module.clone(), in_settings(&module, DOWN, config), &[(down, 0)], [hidden, inner]);
        }
    }
    Ok(stacked)
}

/// The branches of one projection of all experts.
struct Projection<'a> {
    of_experts: Vec<&'a BranchValues<'a>>,
    target: &'a LoraTarget,
}

impl Stacked {
    /// Adds the branch of a parameter [o, i] of each expert. `parts`: its projections, and the first of
    /// the outputs of each.
    fn add(
        &mut self,
        wrapped: String,
        parameter: String,
        parts: &[(Projection<'_>, usize)],
        [outputs, inputs]: [usize; 2],
    ) {
        let rank: usize = parts.iter().map(|(part, _)| part.target.rank).sum();
        let experts = parts[0].0.of_experts.len();
        let mut a = Vec::with_capacity(experts * rank * inputs);
        let mut b = vec![0.0; outputs * rank * experts];
        for expert in 0..experts {
            let mut column = 0;
            for (part, first) in parts {
                let branch = part.of_experts[expert];
                a.extend_from_slice(branch.a);
                for (output, row) in branch.b.chunks(branch.rank).enumerate() {
                    for (n, value) in row.iter().enumerate() {
                        b[((first + output) * rank + column + n) * experts + expert] = *value;
                    }
                }
                column += branch.rank;
            }
        }
        let target = parts[0].0.target;
        let divisor = if target.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
        let own = if target.use_rslora { (target.rank as f64).sqrt() } else { target.rank as f64 };
        self.ranks.insert(parameter.clone(), json!(rank));
        self.alphas.insert(parameter.clone(), whole(target.alpha / own * divisor));
        self.parameters.push(parameter);
        self.tensors.push((wrapped, [vec![experts * rank, inputs], vec![outputs, rank * experts]], [a, b]));
    }

    /// Adds what PEFT has to know of them to its settings.
    pub(super) fn describe(&self, config: &mut Value) {
        if self.parameters.is_empty() {
            return;
        }
        let mut parameters = config["target_parameters"].as_array().cloned().unwrap_or_default();
        parameters.extend(self.parameters.iter().map(|name| json!(name)));
        config["target_parameters"] = json!(parameters);
        for (key, pattern) in [("rank_pattern", &self.ranks), ("alpha_pattern", &self.alphas)] {
            let Some(table) = config[key].as_object_mut() else { continue };
            table.extend(pattern.iter().map(|(name, value)| (name.clone(), value.clone())));
        }
    }
}
