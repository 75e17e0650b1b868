//! Which linear layers are trained, as a recipe says it before there is a model.

use std::collections::HashMap;

use crate::lora::{LoraTarget, LoraTargets};
use crate::tree::Linear;

/// Which linear layers are trained, and so keep their input.
#[derive(Debug)]
pub(crate) struct Adapted<'a> {
    /// The rank of each module's branch; `None`: all weights are trained.
    ranks: Option<HashMap<&'a str, usize>>,
}

impl<'a> Adapted<'a> {
    pub(crate) fn new(targets: Option<&'a LoraTargets>) -> Adapted<'a> {
        let rank = |target: &'a LoraTarget| (target.module.as_str(), target.rank);
        Adapted { ranks: targets.map(|targets| targets.iter().map(rank).collect()) }
    }

    pub(crate) fn has(&self, linear: &Linear) -> bool {
        self.ranks.as_ref().is_none_or(|ranks| ranks.contains_key(linear.module.as_str()))
    }

    /// The width of the input that these layers share, if one of them keeps it.
    pub(crate) fn input_of(&self, linears: &[&Linear]) -> u64 {
        let keeps = linears.iter().find(|linear| self.has(linear));
        keeps.map_or(0, |linear| linear.weight.shape[1] as u64)
    }

    /// The rank of its branch, 0 without one.
    pub(crate) fn rank(&self, linear: &Linear) -> u64 {
        self.ranks.as_ref().and_then(|ranks| ranks.get(linear.module.as_str())).map_or(0, |&rank| rank as u64)
    }
}
