//! The loop.

use std::sync::atomic::AtomicI32;
use std::time::Instant;

use finetune_allreduce::Reduction;
use finetune_dataset::Dataset;
use finetune_model::{Backward, Batch, LossSum, Randomness};
use finetune_recipe::SharesChoice;
use finetune_store::failpoint;

use crate::adamw::{clip, norm};
use crate::deal::{Deal, Dealer};
use crate::diverged;
use crate::error::TrainError;
use crate::evaluate::{Answers, batch_row};
use crate::events::Event;
use crate::memory;
use crate::metrics::{RankRow, Row, StepRow};
use crate::pace::Pace;
use crate::prepare::Run;
use crate::ranks::Sums;
use crate::stragglers::Stragglers;
use crate::summary::Summary;

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// All steps are done, or early stopping ended it.
    Finished { step: u64, before: Option<Answers>, after: Option<Answers>, summary: Summary },
    /// A signal asked it to stop; everything up to this step is saved.
    Stopped { step: u64, signal: i32 },
}

/// What a step came to, over all ranks.
struct StepSums {
    sums: Sums,
    ranks: Vec<RankRow>,
    /// Index and loss of each row that this rank computed.
    rows: Vec<(usize, f64)>,
}

/// Trains from `run.state` to the last step. `stop` holds the number of a signal that asks to stop, 0 for none.
pub fn train(run: &mut Run, stop: &AtomicI32, tell: &mut dyn FnMut(Event<'_>)) -> Result<Outcome, TrainError> {
    let outcome = steps(run, stop, tell);
    let outcome = outcome.map_err(|error| error.with_cheaper_settings(|| run.cheaper_settings()));
    // The others must not wait for a rank that cannot go on.
    let outcome = outcome.inspect_err(|error| run.ranks.abort(error)).map_err(|error| error.with_saved(run.saved()));
    outcome.map_err(|error| error.with_ways(|| diverged::ways_on(run)))
}

fn steps(run: &mut Run, stop: &AtomicI32, tell: &mut dyn FnMut(Event<'_>)) -> Result<Outcome, TrainError> {
    let before = run.answers("before", stop, tell)?;
    let measured = run.recipe.distributed.shares == SharesChoice::Measured;
    let mut dealer = Dealer::new(run.ranks.even(), measured);
    let mut asked = run.begin(&dealer.deal, stop, tell)?;
    let parameters = run.model.layout().len();
    tell(Event::Begin { from: run.state.step, to: run.steps, trained_parameters: parameters });
    let mut gradients: Vec<Vec<f32>> = Vec::new();
    let (mut stragglers, mut pace) = (Stragglers::default(), Pace::new(run.state.step));
    while run.state.step < run.steps && !run.state.stopped_early && asked == 0 {
        failpoint::hit("train.step");
        let start = Instant::now();
        let mine = dealer.deal.counts()[run.ranks.group().rank()];
        gradients.resize_with(mine, || vec![0.0; parameters]);
        let StepSums { sums, ranks, rows } = run.step_sums(&dealer.deal, &pace, &mut gradients, tell)?;
        let gradients = &mut gradients[0];
        let normaliser = run.objective.normaliser(&sums);
        let mean_loss = sums.loss / normaliser as f64;
        for gradient in &mut *gradients {
            *gradient /= normaliser as f32;
        }
        let grad_norm = norm(gradients);
        run.ensure_finite(&sums, grad_norm, &rows)?;
        clip(gradients, grad_norm, run.recipe.train.max_grad_norm);
        let learning_rate = run.schedule.at(run.state.step);
        run.state.optimizer.update(&mut run.state.parameters, gradients, learning_rate, &run.recipe.optimizer);
        run.ensure_finite_parameters(&rows)?;
        run.model.set_parameters(&run.state.parameters);
        run.state.step += 1;
        failpoint::hit("train.updated");

        let seconds = start.elapsed().as_secs_f64();
        pace.add(seconds);
        stragglers.watch(&ranks, seconds, &dealer.deal, tell);
        if dealer.watch(&ranks) {
            stragglers.forget();
            tell(Event::Dealt { shares: dealer.deal.counts() });
        }
        let row = StepRow {
            step: run.state.step,
            epoch: run.state.step as f64 / run.plan.steps_per_epoch() as f64,
            loss: mean_loss,
            trained_tokens: sums.trained_tokens,
            tokens: sums.tokens,
            grad_norm,
            learning_rate,
            tokens_per_second: sums.tokens as f64 / seconds,
            seconds,
            objective: run.objective.numbers(&sums),
            ranks,
        };
        tell(Event::Step { row: &row, steps: run.steps });
        run.write(Row::Step(row))?;
        asked = run.look_and_save(&dealer.deal, &mut pace, stop, tell)?;
    }
    if asked != 0 && run.is_unfinished() {
        return Ok(Outcome::Stopped { step: run.state.step, signal: asked });
    }
    let after = run.answers("after", stop, tell)?;
    run.finish()?;
    Ok(Outcome::Finished { step: run.state.step, before, after, summary: run.summary() })
}

impl Run {
    /// Sums of loss and gradients over this step's rows, of all ranks, in the range of the numbers that are computed in: where
    /// f16 overflows on the way back, the step is computed again from half the loss scale. No row is skipped for it.
    fn step_sums(
        &mut self,
        deal: &Deal,
        pace: &Pace,
        gradients: &mut [Vec<f32>],
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<StepSums, TrainError> {
        loop {
            let start = Instant::now();
            // Its time counts as this rank's: one that cannot be heard holds the others up as one that computes slowly does.
            tell(Event::Working { step: self.state.step + 1, seconds: pace.seconds(), saved: pace.saved });
            let step = self.forward_and_backward(deal, start, gradients)?;
            let overflow = step.sums.loss.is_finite() && !norm(&gradients[0]).is_finite();
            if !overflow || !self.state.loss_scale.halve() {
                self.state.loss_scale.passed(overflow);
                return Ok(step);
            }
            tell(Event::LossScale { step: self.state.step + 1, scale: self.state.loss_scale.scale });
        }
    }

    /// Sums of loss and gradients over this step's rows, of all ranks. The first of `gradients`, one per share of this rank,
    /// gets the sum.
    fn forward_and_backward(
        &mut self,
        deal: &Deal,
        start: Instant,
        gradients: &mut [Vec<f32>],
    ) -> Result<StepSums, TrainError> {
        self.ranks.group().set_step(self.state.step + 1);
        let backward = Backward {
            randomness: Randomness { seed: self.recipe.seed, step: self.state.step },
            checkpointing: self.recipe.train.gradient_checkpointing,
            loss_scale: self.state.loss_scale.scale,
            coefficients: self.objective.coefficients(),
        };
        let (mut shares, mut rows) = (Vec::new(), Vec::new());
        for (share, gradients) in deal.of(self.ranks.group().rank()).zip(&mut *gradients) {
            gradients.fill(0.0);
            let share = self.plan.share(self.state.step, share, deal.shares());
            let mut sums = Sums::default();
            for micro_batch in share.chunks(self.recipe.train.micro_batch_size) {
                self.ranks.group().keep_alive();
                let batch =
                    Batch { rows: micro_batch.iter().map(|&row| batch_row(row, &self.train.rows[row])).collect() };
                let LossSum { loss, trained_tokens, row_losses } =
                    self.model.loss_and_gradients(&batch, backward, gradients)?;
                sums.loss += loss;
                sums.trained_tokens += trained_tokens;
                sums.tokens += batch.tokens();
                rows.extend(micro_batch.iter().copied().zip(row_losses));
            }
            shares.push(sums);
        }
        failpoint::hit("train.reduce");
        let (sums, ranks) = self.ranks.sum_losses(deal, &shares, start.elapsed().as_secs_f64())?;
        self.ranks.sum_gradients(deal, gradients)?;
        Ok(StepSums { sums, ranks, rows })
    }

    /// Settings that would need less memory, and how much.
    pub fn cheaper_settings(&self) -> Vec<String> {
        let subject = memory::Subject {
            recipe: &self.recipe,
            config: &self.model.config,
            targets: self.model.lora_targets(),
            train: &self.train,
            eval: self.eval.as_ref(),
            text: self.text_bytes(),
            placement: self.model.placement(),
            stored: self.stored,
            has_bf16: self.has_bf16,
        };
        subject.cheaper_settings()
    }

    /// Stops before a loss or gradient that is not finite changes anything, naming the rows to look at.
    fn ensure_finite(&self, sums: &Sums, grad_norm: f64, rows: &[(usize, f64)]) -> Result<(), TrainError> {
        match (sums.loss.is_finite(), grad_norm.is_finite()) {
            (true, true) => Ok(()),
            (false, _) => Err(self.not_finite("the loss", rows)?),
            (true, false) => Err(self.not_finite("the gradient", rows)?),
        }
    }

    /// An update too large for f32 is not saved. (A finite gradient can still give one.)
    fn ensure_finite_parameters(&self, rows: &[(usize, f64)]) -> Result<(), TrainError> {
        if self.state.parameters.iter().all(|value| value.is_finite()) {
            return Ok(());
        }
        Err(self.not_finite("a parameter after the update", rows)?)
    }

    /// The error that names the rows of this step whose loss is not finite on some rank; all of them where each is.
    fn not_finite(&self, what: &'static str, mine: &[(usize, f64)]) -> Result<TrainError, TrainError> {
        let rows = self.plan.rows(self.state.step);
        let bad = |row: &usize| mine.iter().any(|(computed, loss)| computed == row && !loss.is_finite());
        let mut counts: Vec<f32> = rows.iter().map(|row| f32::from(u8::from(bad(row)))).collect();
        self.ranks.group().all_reduce(&mut counts, Reduction::Sum)?;
        let suspects: Vec<usize> =
            rows.iter().zip(&counts).filter(|(_, count)| **count > 0.0).map(|(row, _)| *row).collect();
        let suspects = if suspects.is_empty() { rows } else { suspects };
        Ok(not_finite(what, self.state.step + 1, &self.train, &suspects))
    }
}

/// The error that names these rows of a dataset, the first few in full.
pub(crate) fn not_finite(what: &'static str, step: u64, data: &Dataset, rows: &[usize]) -> TrainError {
    const SHOWN: usize = 8;
    let named = rows.iter().take(SHOWN).map(|&row| data.origin(row)).collect();
    TrainError::NotFinite { what, step, rows: named, more: rows.len().saturating_sub(SHOWN), ways: Vec::new() }
}
