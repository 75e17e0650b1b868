//! PEFT's branches of stacked experts, as those of single ones.
//!
//! transformers 5 holds the experts of a layer in two parameters, `gate_up_proj` and `down_proj`. PEFT
//! 0.21 gives each of them one branch with the experts one after the other: A [e · r, i] by expert, and
//! B [o, r · e] by rank. The branch of `gate_up_proj` changes both projections with one A.

use std::collections::BTreeMap;

use finetune_store::TensorView;

use crate::adapter::settings::Settings;
use crate::adapter::tensors::{Branches, Parts, of_shape};
use crate::config::{ExpertsConfig, ModelConfig};
use crate::error::ModelError;
use crate::lora::LoraTarget;

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
    layers.map(|(n, _)| format!("model.layers.{n}.mlp.experts"))
}

/// Takes the branches of stacked parameters out of `branches`: those of single experts, by module.
///
/// # Errors
/// If the shapes are those of neither parameter, or half of a branch is missing.
pub(super) fn take(
    branches: &mut Branches<'_>,
    settings: &Settings,
    config: &ModelConfig,
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
            let stack = Stack::new(a, b, experts, config.hidden_size, settings, &module)?;
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
        hidden: usize,
        settings: &Settings,
        module: &str,
    ) -> Result<Stack, ModelError> {
        let (count, inner) = (experts.count, experts.intermediate_size);
        let rank = a.shape.first().map_or(0, |rows| rows / count).max(1);
        let is_down = b.shape.first() == Some(&hidden) && a.shape.get(1) == Some(&inner);
        let (part, inputs, outputs) = if is_down { (DOWN, inner, hidden) } else { (GATE_UP, hidden, 2 * inner) };
        Ok(Stack {
            parts: match is_down {
                true => vec![("down_proj", 0, hidden)],
                false => vec![("gate_proj", 0, inner), ("up_proj", inner, inner)],
            },
            experts: count,
            inputs,
            rank,
            target: settings.target(&format!("{module}.{part}"), rank)?,
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
