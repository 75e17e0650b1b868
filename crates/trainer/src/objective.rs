//! What a run minimises.
//!
//! An objective is given the losses of single targets on the host, and says by how much each
//! counts. Everything else of a step (passes, sums over ranks, clipping, the update) is the same
//! for all objectives.

use std::collections::BTreeMap;

use finetune_model::Coefficients;

use crate::ranks::Sums;

/// What a run minimises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Objective {
    /// The mean of -ln p(target) over all trained tokens of a step.
    CrossEntropy,
}

impl Objective {
    /// The coefficient of each target's loss in what is minimised, before the division by
    /// [`Self::normaliser`].
    pub(crate) fn coefficients(self) -> Coefficients<'static> {
        match self {
            Objective::CrossEntropy => Coefficients::Ones,
        }
    }

    /// What the sums of loss and gradients of a step, over all ranks, are divided by; at least 1.
    pub(crate) fn normaliser(self, sums: &Sums) -> u64 {
        match self {
            Objective::CrossEntropy => sums.trained_tokens.max(1),
        }
    }

    /// The objective's own numbers of a step, for the row of metrics: name and value.
    pub(crate) fn numbers(self, _sums: &Sums) -> BTreeMap<String, f64> {
        match self {
            // The loss is all there is.
            Objective::CrossEntropy => BTreeMap::new(),
        }
    }
}
