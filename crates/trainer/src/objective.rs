//! What a run minimises.
//!
//! An objective is given the losses of single targets on the host, and says by how much each
//! counts. Everything else of a step (passes, sums over ranks, clipping, the update) is the same
//! for all objectives.

use std::collections::BTreeMap;

use finetune_model::{Coefficients, ModelConfig};
use finetune_recipe::Recipe;

use crate::ranks::Sums;
use crate::router_loss;

/// What metrics call the auxiliary loss of routers.
const ROUTER_LOSS: &str = "router_aux_loss";

/// What a run minimises.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Objective {
    /// The mean of -ln p(target) over all trained tokens of a step, and `router_loss` times the mean of the rows'
    /// auxiliary losses of routers over the same tokens.
    CrossEntropy {
        /// 0: there is no such loss.
        router_loss: f64,
    },
}

impl Objective {
    /// What this recipe minimises.
    pub(crate) fn new(recipe: &Recipe, config: &ModelConfig) -> Objective {
        Objective::CrossEntropy { router_loss: router_loss::coefficient(recipe, config) }
    }

    /// The coefficient of each target's loss in what is minimised, before the division by
    /// [`Self::normaliser`].
    pub(crate) fn coefficients(self) -> Coefficients<'static> {
        match self {
            Objective::CrossEntropy { .. } => Coefficients::Ones,
        }
    }

    /// What the sums of loss and gradients of a step, over all ranks, are divided by; at least 1.
    pub(crate) fn normaliser(self, sums: &Sums) -> u64 {
        match self {
            Objective::CrossEntropy { .. } => sums.trained_tokens.max(1),
        }
    }

    /// The objective's own numbers of a step, for the row of metrics: name and value.
    pub(crate) fn numbers(self, sums: &Sums) -> BTreeMap<String, f64> {
        match self {
            // The loss is all there is.
            Objective::CrossEntropy { router_loss: 0.0 } => BTreeMap::new(),
            Objective::CrossEntropy { .. } => {
                let mean = sums.router_loss / self.normaliser(sums) as f64;
                BTreeMap::from([(ROUTER_LOSS.to_owned(), mean)])
            }
        }
    }
}
