//! Ranks that hold the layers of one model together to use it: `finetune launch -- generate` and `-- serve`.

use std::sync::Arc;

use finetune_model::{Model, ModelConfig, Placement};
use finetune_rendezvous::Membership;
use finetune_trainer::Together;

use crate::failure::Failure;
use crate::membership::{self, Assignment};
use crate::progress::Verbosity;
use crate::rank_event;
use crate::signals::Signals;

/// This rank of a command that the launcher has started.
pub(crate) struct OneOf {
    membership: Membership,
    /// What must be the same on all ranks.
    words: String,
}

impl OneOf {
    /// Reads the rank's place from standard input. `words`: what must be the same on all ranks.
    pub(crate) fn assigned(signals: &Arc<Signals>, words: String) -> Result<OneOf, Failure> {
        let Assignment { membership, .. } = Assignment::read(signals)?;
        membership::share_cores(&membership);
        finetune_store::failpoint::set_label(membership.rank.to_string());
        Ok(OneOf { membership, words })
    }

    /// Whether this rank speaks for all.
    pub(crate) fn is_first(&self) -> bool {
        self.membership.rank == 0
    }

    /// Only the first rank speaks.
    pub(crate) fn verbosity(&self, verbosity: Verbosity) -> Verbosity {
        if self.is_first() { verbosity } else { Verbosity::Quiet }
    }

    /// Tells the others why this rank has failed before it could join them.
    pub(crate) fn excuse(&self, failure: &Failure) {
        membership::excuse(&self.membership, failure);
    }

    /// Joins the others. `None` if there is only this rank.
    pub(crate) fn join(&self, config: &ModelConfig) -> Result<Option<Together>, Failure> {
        let group = membership::join_to_use(&self.membership, &self.words)?;
        if group.world() == 1 {
            return Ok(None);
        }
        Ok(Some(Together::connect(group, config)?))
    }
}

/// The placement of this rank's layers.
pub(crate) fn placed(placement: Placement, together: Option<&Together>) -> Placement {
    match together {
        None => placement,
        Some(together) => placement.with_stage(Some(together.stage.clone())),
    }
}

/// Connects a loaded model with the other ranks.
pub(crate) fn connect(model: &mut Model, together: Option<&Together>) {
    if let Some(together) = together {
        model.connect(Arc::clone(&together.hops));
    }
}

/// Tells the launcher if another rank's failure has ended this one.
pub(crate) fn tell_of(failure: &Failure) {
    if let Some(event) = rank_event::of_failure(failure) {
        rank_event::send(&event);
    }
}
