//! The losses and gradients of a step: this rank's shares, then the sums over all ranks.

use std::time::Instant;

use finetune_allreduce::WireDtype;
use finetune_model::{Backward, Batch, LossSum, Part, Randomness};
use finetune_recipe::{Recipe, WireChoice};
use finetune_store::failpoint;

use crate::error::TrainError;
use crate::evaluate::batch_row;
use crate::events::Event;
use crate::local_steps::LocalShares;
use crate::metrics::{ExpertRow, RankRow, StepRow};
use crate::norm::{clip, norm, squares};
use crate::progress::Progress;
use crate::ranks::Sums;
use crate::run::Run;
use crate::share_assignment::ShareAssignment;

/// Sums become means.
fn divide(gradients: &mut [f32], normaliser: u64) {
    gradients.iter_mut().for_each(|gradient| *gradient /= normaliser as f32);
}

/// What gradients are on the way between ranks.
fn wire(recipe: &Recipe) -> WireDtype {
    match recipe.distributed.wire {
        None | Some(WireChoice::F32) => WireDtype::Exact,
        Some(WireChoice::Bf16) => WireDtype::Bf16,
    }
}

/// The sums of a step over all ranks.
pub(crate) struct StepSums {
    /// Loss and counts over all ranks.
    pub(crate) sums: Sums,
    /// Each rank's part; empty if there is only one rank.
    pub(crate) ranks: Vec<RankRow>,
    /// Index and loss of each row that this rank computed.
    pub(crate) rows: Vec<(usize, f64)>,
    /// The sums of this rank's shares.
    pub(crate) of_shares: Vec<Sums>,
    /// Seconds that this rank has waited for layers from the disk; `None` if all are in memory.
    pub(crate) reading: Option<f64>,
}

impl Run {
    /// Sums of loss and gradients over this step's rows, of all ranks. If f16 overflows in the
    /// backward pass, the step is computed again with half the loss scale. No row is skipped for
    /// it.
    pub(crate) fn step_sums(
        &mut self,
        assignment: &ShareAssignment,
        progress: &Progress,
        gradients: &mut [Vec<f32>],
        local: Option<&LocalShares>,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<StepSums, TrainError> {
        // What an evaluation has waited is not this step's.
        self.model.take_waited();
        loop {
            let start = Instant::now();
            // The time to tell it counts as this rank's. A slow listener holds the others up as a
            // slow computation does.
            tell(Event::Working { step: self.state.step + 1, seconds: progress.seconds(), saved: progress.saved });
            let step = self.forward_and_backward(assignment, start, gradients, local)?;
            // Without a scale nothing can be halved.
            let may_overflow = self.state.loss_scale.scale > 1.0 && step.sums.loss.is_finite();
            let overflow =
                may_overflow && self.ranks.of_any_stage(gradients[0].iter().any(|value| !value.is_finite()))?;
            if !overflow || !self.state.loss_scale.halve() {
                self.state.loss_scale.passed(overflow);
                return Ok(step);
            }
            tell(Event::LossScale { step: self.state.step + 1, scale: self.state.loss_scale.scale });
        }
    }

    /// Sums of loss and gradients over this step's rows, of all ranks. `gradients`: one vector for
    /// each share of this rank, for the parameters that it has. The first gets the sum. With `local`,
    /// each share has parameters of its own, and keeps its gradients.
    fn forward_and_backward(
        &mut self,
        assignment: &ShareAssignment,
        start: Instant,
        gradients: &mut [Vec<f32>],
        local: Option<&LocalShares>,
    ) -> Result<StepSums, TrainError> {
        self.ranks.group().set_step(self.state.step + 1);
        let backward = Backward {
            randomness: Randomness { seed: self.recipe.seed, step: self.state.step },
            checkpointing: self.recipe.train.gradient_checkpointing,
            loss_scale: self.state.loss_scale.scale,
            coefficients: self.objective.coefficients(),
        };
        let shares: Vec<Vec<usize>> = assignment
            .shares_of(self.ranks.group().rank())
            .map(|share| self.plan.share(self.state.step, share, assignment.shares()))
            .collect();
        let mut parts = Vec::new();
        for (sum, share) in shares.iter().enumerate() {
            for rows in share.chunks(self.recipe.train.micro_batch_size) {
                let batch = Batch { rows: rows.iter().map(|&row| batch_row(row, &self.train.rows[row])).collect() };
                parts.push((rows, Part { batch, sum }));
            }
        }
        gradients.iter_mut().for_each(|gradients| gradients.fill(0.0));
        let mut sums: Vec<&mut [f32]> = gradients.iter_mut().map(Vec::as_mut_slice).collect();
        let (mut of_shares, mut rows) = (vec![Sums::default(); shares.len()], Vec::new());
        let at_once = self.sizing.at_once;
        // Those of a share together, if each has parameters of its own.
        let together = parts.chunk_by(|(_, one), (_, other)| local.is_none() || one.sum == other.sum);
        for group in together.flat_map(|parts| parts.chunks(at_once)) {
            if let (Some(local), Some((_, first))) = (local, group.first()) {
                self.model.set_parameters(local.parameters(first.sum));
            }
            let of_group: Vec<Part<'_>> = group.iter().map(|(_, part)| part.clone()).collect();
            let mut alive = || self.ranks.keep_alive();
            let losses = self.model.losses_and_gradients(&of_group, backward, &mut sums, &mut alive)?;
            for ((of_part, part), losses) in group.iter().zip(losses) {
                let LossSum { loss, trained_tokens, row_losses, router_loss } = losses;
                let share = &mut of_shares[part.sum];
                if !self.model.has_losses() {
                    continue;
                }
                share.loss += loss;
                share.trained_tokens += trained_tokens;
                share.tokens += part.batch.tokens();
                share.router_loss += router_loss;
                rows.extend(of_part.iter().copied().zip(row_losses));
            }
        }
        failpoint::hit("train.reduce");
        let reading = self.model.reads_layers().then(|| self.model.take_waited().0.as_secs_f64());
        let seconds = start.elapsed().as_secs_f64();
        let (sums, ranks) = self.ranks.sum_losses(assignment, &of_shares, seconds, reading)?;
        if local.is_none() {
            self.ranks.sum_gradients(assignment, gradients, wire(&self.recipe))?;
        }
        Ok(StepSums { sums, ranks, rows, of_shares, reading })
    }

    /// Updates the parameters with the sums over all ranks. Returns the norm of the gradient.
    pub(crate) fn update(
        &mut self,
        sums: &Sums,
        gradients: &mut [f32],
        rows: &[(usize, f64)],
    ) -> Result<f64, TrainError> {
        divide(gradients, self.objective.normaliser(sums));
        let squares = squares(self.model.layout(), gradients);
        let grad_norm = norm(&self.ranks.squares_of_all(self.model.spread(), squares)?);
        self.ensure_finite(sums, grad_norm, rows)?;
        clip(gradients, grad_norm, self.recipe.train.max_grad_norm);
        let learning_rate = self.schedule.at(self.state.step);
        self.state.optimizer.update(&mut self.state.parameters, gradients, learning_rate, &self.recipe.optimizer);
        self.ensure_finite_parameters(rows)?;
        self.model.set_parameters(&self.state.parameters);
        Ok(grad_norm)
    }

    /// Updates the parameters of each share with its own sums. Returns the largest norm of all shares' gradients.
    pub(crate) fn update_shares(
        &mut self,
        local: &mut LocalShares,
        sums: &Sums,
        of_shares: &[Sums],
        gradients: &mut [Vec<f32>],
        rows: &[(usize, f64)],
    ) -> Result<f64, TrainError> {
        gradients.iter_mut().zip(of_shares).for_each(|(gradients, sums)| {
            divide(gradients, self.objective.normaliser(sums));
        });
        // A NaN is the largest.
        let larger = |one: f64, other: f64| if one.total_cmp(&other.abs()).is_lt() { other.abs() } else { one };
        let layout = self.model.layout();
        let norms: Vec<f64> = gradients.iter().map(|gradients| norm(&squares(layout, gradients))).collect();
        let largest = norms.iter().copied().fold(0.0, larger);
        let largest = self.ranks.gather(&[largest])?.into_iter().fold(0.0, larger);
        self.ensure_finite(sums, largest, rows)?;
        let learning_rate = self.schedule.at(self.state.step);
        gradients.iter_mut().zip(norms).for_each(|(gradients, norm)| {
            clip(gradients, norm, self.recipe.train.max_grad_norm);
        });
        local.update(gradients, learning_rate, &self.recipe.optimizer);
        if self.ranks.largest(i32::from(!local.are_finite()))? > 0 {
            return Err(self.not_finite("a parameter after the update", rows)?);
        }
        Ok(largest)
    }

    /// The step that was just made, as metrics have it.
    pub(crate) fn step_row(
        &self,
        sums: &Sums,
        ranks: Vec<RankRow>,
        grad_norm: f64,
        learning_rate: f64,
        seconds: f64,
        reading_seconds: Option<f64>,
    ) -> Result<StepRow, TrainError> {
        Ok(StepRow {
            step: self.state.step,
            epoch: self.state.step as f64 / self.plan.steps_per_epoch() as f64,
            loss: sums.loss / self.objective.normaliser(sums) as f64,
            trained_tokens: sums.trained_tokens,
            tokens: sums.tokens,
            grad_norm,
            learning_rate,
            tokens_per_second: sums.tokens as f64 / seconds,
            seconds,
            objective: self.objective.numbers(sums),
            reading_seconds,
            experts: self.expert_use()?,
            ranks,
        })
    }

    /// How evenly the experts of each layer were used by the rows of all ranks since the last call.
    pub(crate) fn expert_use(&self) -> Result<Vec<ExpertRow>, TrainError> {
        let config = &self.model.config;
        let Some(experts) = config.experts.as_ref().map(|experts| experts.count) else { return Ok(Vec::new()) };
        let layers = config.layers.len();
        // Counts below 2^53 travel as f64 without loss.
        let mut counts = vec![0.0; layers * experts];
        for (layer, of_layer) in self.model.take_expert_counts() {
            let places = &mut counts[layer * experts..][..experts];
            places.iter_mut().zip(of_layer).for_each(|(place, count)| *place = count as f64);
        }
        let all = self.ranks.gather(&counts)?;
        let of_layer = |layer: usize| -> Vec<u64> {
            let of_expert = |place: usize| all.iter().skip(place).step_by(counts.len()).sum::<f64>() as u64;
            (layer * experts..(layer + 1) * experts).map(of_expert).collect()
        };
        let has_experts = (0..layers).filter(|&layer| config.layers[layer].has_experts);
        Ok(has_experts.map(|layer| ExpertRow::new(layer, &of_layer(layer))).collect())
    }
}
