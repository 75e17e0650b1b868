//! Steps that each share makes alone, with an average now and then: DiLoCo (Douillard et al. 2023, "DiLoCo:
//! Distributed Low-Communication Training of Language Models", arXiv 2311.08105).
//!
//! Each share of a step has parameters and moments of its own. After `distributed.sync_every` steps the changes of
//! all are averaged, and the common parameters move along that average, with Nesterov's momentum if asked for. The
//! moments of AdamW are averaged too, so that a checkpoint holds one state, whatever the number of ranks.

use finetune_recipe::{Distributed, Optimizer, Recipe};
use finetune_store::failpoint;

use crate::adamw::AdamW;
use crate::error::TrainError;
use crate::ranks::Ranks;
use crate::share_assignment::ShareAssignment;
use crate::state::TrainState;

/// The plain average. The paper has 0.7 and 0.9 for averages after 500 steps of pretraining. After the 10 to 50 of
/// tuning with LoRA these overshoot: docs/slow-networks.md.
const OUTER_LEARNING_RATE: f64 = 1.0;
const OUTER_MOMENTUM: f64 = 0.0;

/// When and how shares meet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meetings {
    /// Steps from one to the next, 2 or more.
    pub(crate) every: u64,
    learning_rate: f32,
    momentum: f32,
}

impl Meetings {
    /// `None`: every step is made together.
    pub(crate) fn of(recipe: &Recipe) -> Option<Meetings> {
        let Distributed { sync_every, outer_learning_rate, outer_momentum, .. } = recipe.distributed;
        let every = sync_every.filter(|steps| *steps > 1)?;
        let learning_rate = outer_learning_rate.unwrap_or(OUTER_LEARNING_RATE) as f32;
        Some(Meetings { every, learning_rate, momentum: outer_momentum.unwrap_or(OUTER_MOMENTUM) as f32 })
    }
}

/// The shares of this rank between two meetings.
pub(crate) struct LocalShares {
    meetings: Meetings,
    shares: Vec<LocalShare>,
}

struct LocalShare {
    parameters: Vec<f32>,
    optimizer: AdamW,
}

impl LocalShares {
    /// `count` shares, which all begin with the common state.
    pub(crate) fn new(meetings: Meetings, state: &TrainState, count: usize) -> LocalShares {
        let share = || LocalShare { parameters: state.parameters.clone(), optimizer: state.optimizer.clone() };
        LocalShares { meetings, shares: (0..count).map(|_| share()).collect() }
    }

    /// The parameters of a share.
    pub(crate) fn parameters(&self, share: usize) -> &[f32] {
        &self.shares[share].parameters
    }

    /// Whether all parameters are finite.
    pub(crate) fn are_finite(&self) -> bool {
        self.shares.iter().all(|share| share.parameters.iter().all(|value| value.is_finite()))
    }

    /// Updates each share with its own gradients, which are means already, and clipped.
    pub(crate) fn update(&mut self, gradients: &[Vec<f32>], learning_rate: f64, settings: &Optimizer) {
        for (share, gradients) in self.shares.iter_mut().zip(gradients) {
            share.optimizer.update(&mut share.parameters, gradients, learning_rate, settings);
        }
    }

    /// Whether the shares meet after this step.
    pub(crate) fn meet_after(&self, step: u64, last: u64) -> bool {
        step.is_multiple_of(self.meetings.every) || step == last
    }

    /// Averages what the shares have learned since the last meeting, in the order of the shares, and lets all go
    /// on from there.
    ///
    /// # Errors
    /// If the group fails.
    pub(crate) fn meet(
        &mut self,
        state: &mut TrainState,
        ranks: &Ranks,
        assignment: &ShareAssignment,
    ) -> Result<(), TrainError> {
        let count = assignment.shares() as f32;
        let mean = |of_shares: Vec<Vec<f32>>| -> Result<Vec<f32>, TrainError> {
            let mut sums = of_shares;
            ranks.sum_exactly(assignment, &mut sums)?;
            let mut mean = sums.swap_remove(0);
            mean.iter_mut().for_each(|sum| *sum /= count);
            Ok(mean)
        };
        let change = |share: &LocalShare| -> Vec<f32> {
            share.parameters.iter().zip(&state.parameters).map(|(new, old)| new - old).collect()
        };
        let change = mean(self.shares.iter().map(change).collect())?;
        failpoint::hit("local.meet");
        let take = |moment: fn(&mut AdamW) -> &mut Vec<f32>, shares: &mut [LocalShare]| -> Vec<Vec<f32>> {
            shares.iter_mut().map(|share| std::mem::take(moment(&mut share.optimizer))).collect()
        };
        state.optimizer.first_moment = mean(take(|optimizer| &mut optimizer.first_moment, &mut self.shares))?;
        state.optimizer.second_moment = mean(take(|optimizer| &mut optimizer.second_moment, &mut self.shares))?;
        state.optimizer.updates = self.shares[0].optimizer.updates;
        if self.meetings.momentum == 0.0 {
            let move_by = |(parameter, change): (&mut f32, &f32)| *parameter += self.meetings.learning_rate * change;
            state.parameters.iter_mut().zip(&change).for_each(move_by);
        } else {
            let velocity = state.velocity.get_or_insert_with(|| vec![0.0; change.len()]);
            nesterov(&mut state.parameters, velocity, &change, self.meetings);
        }
        let count = self.shares.len();
        *self = LocalShares::new(self.meetings, state, count);
        Ok(())
    }
}

/// A step of `torch.optim.SGD(nesterov=True)` against the change, which stands for a negative gradient.
fn nesterov(parameters: &mut [f32], velocity: &mut [f32], change: &[f32], meetings: Meetings) {
    let Meetings { learning_rate, momentum, .. } = meetings;
    for ((parameter, velocity), change) in parameters.iter_mut().zip(velocity).zip(change) {
        *velocity = momentum * *velocity + change;
        *parameter += learning_rate * (change + momentum * *velocity);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// torch 2.9: `SGD([p], lr=0.7, momentum=0.9, nesterov=True)` with gradients -0.5, -0.25, 1.
    #[test]
    fn the_outer_step_is_that_of_torch() {
        let meetings = Meetings { every: 2, learning_rate: 0.7, momentum: 0.9 };
        let (mut parameters, mut velocity) = (vec![1.0f32], vec![0.0f32]);
        for (change, want) in [(0.5, 1.665), (0.25, 2.281), (-1.0, 1.3479)] {
            nesterov(&mut parameters, &mut velocity, &[change], meetings);
            assert!((parameters[0] - want).abs() < 1e-5, "{parameters:?} {want}");
        }
    }
}
