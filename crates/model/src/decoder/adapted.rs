//! Which linear layers are trained, as a recipe says it before a model is loaded.

use std::collections::HashMap;

use crate::lora::{LoraTarget, LoraTargets};
use crate::tree::Linear;

/// Which linear layers are trained, and so keep their input for the backward pass.
#[derive(Debug)]
pub(crate) struct Adapted<'a> {
    /// The rank of each module's branch; `None`: all weights are trained.
    ranks: Option<HashMap<&'a str, usize>>,
}

impl<'a> Adapted<'a> {
    /// `targets`: the branches; `None` if all weights are trained.
    pub(crate) fn new(targets: Option<&'a LoraTargets>) -> Adapted<'a> {
        let rank = |target: &'a LoraTarget| (target.module.as_str(), target.rank);
        Adapted { ranks: targets.map(|targets| targets.iter().map(rank).collect()) }
    }

    /// Whether the layer is trained.
    pub(crate) fn has(&self, linear: &Linear) -> bool {
        self.ranks.as_ref().is_none_or(|ranks| ranks.contains_key(linear.module.as_str()))
    }

    /// The width in elements of the input that these layers share, if one of them keeps it;
    /// otherwise 0.
    pub(crate) fn input_of(&self, linears: &[&Linear]) -> u64 {
        let keeps = linears.iter().find(|linear| self.has(linear));
        keeps.map_or(0, |linear| linear.weight.shape[1] as u64)
    }

    /// The rank of the layer's branch, 0 without one.
    pub(crate) fn rank(&self, linear: &Linear) -> u64 {
        self.ranks.as_ref().and_then(|ranks| ranks.get(linear.module.as_str())).map_or(0, |&rank| rank as u64)
    }
}
