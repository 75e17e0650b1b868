//! Which layers are trained, as a recipe says it before a model is loaded.

use std::collections::HashMap;

use crate::adaptation::Adaptation;
use crate::branch::GateUp;
use crate::lora::LoraTarget;
use crate::tree::Linear;

/// Which layers are trained, and so keep their input for the backward pass.
#[derive(Debug)]
pub(crate) struct Adapted<'a> {
    /// `None`: all weights are trained.
    parts: Option<Parts<'a>>,
}

#[derive(Debug)]
struct Parts<'a> {
    /// The branch of each module that has one.
    branches: HashMap<&'a str, &'a LoraTarget>,
    adaptation: &'a Adaptation,
}

impl<'a> Adapted<'a> {
    /// `adaptation`: what is trained; `None` if all weights are.
    pub(crate) fn new(adaptation: Option<&'a Adaptation>) -> Adapted<'a> {
        let parts = |adaptation: &'a Adaptation| Parts {
            branches: adaptation.targets.iter().map(|target| (target.module.as_str(), target)).collect(),
            adaptation,
        };
        Adapted { parts: adaptation.map(parts) }
    }

    /// Whether the layer has a branch or is trained.
    pub(crate) fn has(&self, linear: &Linear) -> bool {
        self.parts.is_none() || self.branch(&linear.module).is_some() || self.saves(&linear.weight.name)
    }

    /// Whether a tensor of the model is trained.
    pub(crate) fn saves(&self, tensor: &str) -> bool {
        self.parts.as_ref().is_none_or(|parts| parts.adaptation.saves(tensor))
    }

    /// The branch of a module.
    pub(crate) fn branch(&self, module: &str) -> Option<&'a LoraTarget> {
        self.parts.as_ref().and_then(|parts| parts.branches.get(module).copied())
    }

    /// The width in elements of the input that these layers share, if one of them keeps it;
    /// otherwise 0.
    pub(crate) fn input_of(&self, linears: &[&Linear]) -> u64 {
        let keeps = linears.iter().find(|linear| self.has(linear));
        keeps.map_or(0, |linear| linear.weight.shape[1] as u64)
    }

    /// As [`Adapted::input_of`], of the input of a branch that two layers have together.
    pub(crate) fn input_of_both(&self, gate_up: Option<&GateUp>) -> u64 {
        gate_up.filter(|both| self.branch(&both.module).is_some()).map_or(0, |both| both.weight.shape[1] as u64)
    }

    /// Elements that a branch that two layers have together keeps of each token: each layer's product with A.
    pub(crate) fn of_both(&self, gate_up: Option<&GateUp>) -> u64 {
        gate_up.and_then(|both| self.branch(&both.module)).map_or(0, |target| 2 * target.rank as u64)
    }

    /// Elements that the layer's branch keeps of each token: the product with A; with DoRA, the
    /// outputs before the magnitudes. With DoRA and dropout, the dropped input and the outputs of
    /// layer and branch.
    pub(crate) fn of_branch(&self, linear: &Linear) -> u64 {
        let Some(target) = self.branch(&linear.module) else { return 0 };
        let [outputs, inputs] = linear.weight.shape.map(|size| size as u64);
        let dropout = self.parts.as_ref().is_some_and(|parts| parts.adaptation.dropout > 0.0);
        let of_dora = match (target.use_dora, dropout) {
            (false, _) => 0,
            (true, false) => outputs,
            (true, true) => inputs + 2 * outputs,
        };
        target.rank as u64 + of_dora
    }
}
