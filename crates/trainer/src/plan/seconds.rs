//! How long a step takes: the products of the layers and of the output layer, at the rates that are measured.

use finetune_model::{Order, Seconds, Stage};

use super::Planner;
use crate::product_time::{Multiplied, Rates, StepOperations, operations};

/// Seconds of a step on one machine with all layers.
#[derive(Clone, Copy)]
pub(super) struct Alone {
    /// Of the layers, forward.
    pub(super) forward: f64,
    /// Of the layers on the way back, with what is computed again there.
    pub(super) back: f64,
    /// Of the output layer and the losses, which one machine computes while others wait.
    pub(super) head: f64,
}

impl Alone {
    pub(super) fn total(&self) -> f64 {
        self.forward + self.back + self.head
    }
}

/// The micro-batches of a step that machines compute together.
#[derive(Clone, Copy)]
pub(super) struct Together {
    pub(super) micro_batches: usize,
    /// Of each group.
    pub(super) at_once: usize,
    pub(super) order: Order,
    /// Seconds of one micro-batch from one machine to the next.
    pub(super) hop: f64,
}

/// Seconds of a step whose layers are spread.
pub(super) fn seconds_over(stage: &Stage, alone: Alone, together: Together) -> f64 {
    let Together { micro_batches, at_once, order, hop } = together;
    let micro_batch = |seconds: f64| seconds / micro_batches.max(1) as f64;
    let layer = |seconds: f64| micro_batch(seconds) / stage.of_layer.len() as f64;
    let seconds =
        Seconds { forward: layer(alone.forward), back: layer(alone.back), head: micro_batch(alone.head), hop };
    let group = |count: usize| stage.simulate(count, 0, order, seconds).map_or(f64::INFINITY, |done| done.seconds);
    let (groups, rest) = (micro_batches / at_once.max(1), micro_batches % at_once.max(1));
    groups as f64 * group(at_once) + if rest > 0 { group(rest) } else { 0.0 }
}

impl Planner<'_> {
    /// Seconds of a model's part of a step.
    pub(super) fn alone(&self, rates: &Rates, replicas: usize, again: bool) -> Alone {
        let forward = self.of_step(replicas, false).layers.forward / rates.forward;
        let StepOperations { layers, output } = self.of_step(replicas, again);
        Alone { forward, back: rates.seconds(&layers) - forward, head: rates.seconds(&output) }
    }

    /// Operations of a model's part of a step.
    pub(super) fn of_step(&self, replicas: usize, again: bool) -> StepOperations {
        let multiplied = Multiplied::of(&self.subject.sizing.config, self.parameters);
        operations(self.subject.recipe.train.method, self.subject.train, self.rows(replicas), multiplied, again)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two groups of micro-batches take twice as long as one, the rest as long as it has. One machine is never idle.
    #[test]
    fn groups_follow_each_other() {
        let alone = Alone { forward: 8.0, back: 16.0, head: 4.0 };
        let over = |machines: usize, at_once: usize| {
            let together = Together { micro_batches: 8, at_once, order: Order::Layers, hop: 0.0 };
            seconds_over(&Stage::in_turn(8, machines, 0), alone, together)
        };
        for at_once in [1, 3, 8] {
            assert!((over(1, at_once) - alone.total()).abs() < 1e-9, "{at_once}");
        }
        // Four machines: the losses of all eight, and six seconds of layers with what the ends of the ring wait.
        let all = over(4, 8);
        assert!(all > 4.0 + 24.0 / 4.0 && all < 4.0 + 24.0 / 4.0 + 2.0, "{all}");
        assert!(over(4, 4) > all && over(4, 3) > all, "smaller groups wait more often");
        assert!((over(4, 1) - alone.total()).abs() < 1e-9, "one at a time, nobody computes beside another");
    }
}
