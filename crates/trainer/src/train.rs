//! The loop.

use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Instant;

use finetune_allreduce::Reduction;
use finetune_dataset::Dataset;
use finetune_model::{Batch, LossSum, Randomness};
use finetune_store::failpoint;

use crate::adamw::{clip, norm};
use crate::error::TrainError;
use crate::evaluate::{Answers, BeforeAfter, Questions, answer, batch_row, evaluate_together};
use crate::events::Event;
use crate::memory;
use crate::metrics::{EvalRow, RankRow, Row, StepRow};
use crate::prepare::Run;
use crate::ranks::Sums;
use crate::report;
use crate::state::Best;
use crate::stragglers::Stragglers;

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// All steps are done, or early stopping ended it.
    Finished { step: u64, before: Option<Answers>, after: Option<Answers> },
    /// A signal asked it to stop; everything up to this step is saved.
    Stopped { step: u64, signal: i32 },
}

/// Steps after which ranks compare their states, checkpoints aside.
const COMPARE_EVERY: u64 = 50;

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
    let outcome = outcome.map_err(|error| error.with_knobs(|| run.smaller_settings()));
    // The others must not wait for a rank that cannot go on.
    outcome.inspect_err(|error| run.ranks.abort(error)).map_err(|error| error.with_saved(run.saved()))
}

fn steps(run: &mut Run, stop: &AtomicI32, tell: &mut dyn FnMut(Event<'_>)) -> Result<Outcome, TrainError> {
    let before = run.answers("before", stop, tell)?;
    let parameters = run.model.layout().len();
    let mut gradients = vec![vec![0.0; parameters]; run.ranks.mine().len()];
    tell(Event::Begin { from: run.state.step, to: run.steps, trained_parameters: parameters });
    let mut stragglers = Stragglers::default();
    let mut asked = run.asked_to_stop(stop)?;
    while run.state.step < run.steps && !run.state.stopped_early && asked == 0 {
        failpoint::hit("train.step");
        let start = Instant::now();
        let StepSums { sums, ranks, rows } = run.step_sums(&mut gradients, tell)?;
        let gradients = &mut gradients[0];
        let mean_loss = sums.loss / sums.trained_tokens.max(1) as f64;
        for gradient in &mut *gradients {
            *gradient /= sums.trained_tokens.max(1) as f32;
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
        stragglers.watch(&ranks, tell);
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
            ranks,
        };
        tell(Event::Step { row: &row, steps: run.steps });
        run.write(Row::Step(row))?;

        let last = run.state.step == run.steps;
        let improved = if run.evaluation_due(last) { run.evaluate(tell)? } else { false };
        failpoint::hit("train.evaluated");
        asked = run.asked_to_stop(stop)?;
        if last || run.state.stopped_early || asked != 0 || run.checkpoint_due(improved) {
            run.save(tell)?;
        } else if run.state.step.is_multiple_of(COMPARE_EVERY) {
            run.compare()?;
        }
    }
    if asked != 0 && run.state.step < run.steps && !run.state.stopped_early {
        return Ok(Outcome::Stopped { step: run.state.step, signal: asked });
    }
    let after = run.answers("after", stop, tell)?;
    run.finish()?;
    Ok(Outcome::Finished { step: run.state.step, before, after })
}

impl Run {
    /// Sums of loss and gradients over this step's rows, of all ranks, in the range of the numbers that are computed in: where
    /// f16 overflows on the way back, the step is computed again from half the loss scale. No row is skipped for it.
    fn step_sums(
        &mut self,
        gradients: &mut [Vec<f32>],
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<StepSums, TrainError> {
        loop {
            let step = self.forward_and_backward(gradients)?;
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
    fn forward_and_backward(&mut self, gradients: &mut [Vec<f32>]) -> Result<StepSums, TrainError> {
        let start = Instant::now();
        self.ranks.group().set_step(self.state.step + 1);
        let randomness = Randomness { seed: self.recipe.seed, step: self.state.step };
        let (mut shares, mut rows) = (Vec::new(), Vec::new());
        for (share, gradients) in self.ranks.mine().zip(&mut *gradients) {
            gradients.fill(0.0);
            let share = self.plan.share(self.state.step, share, self.ranks.shares());
            let mut sums = Sums::default();
            for micro_batch in share.chunks(self.recipe.train.micro_batch_size) {
                self.ranks.group().keep_alive();
                let batch =
                    Batch { rows: micro_batch.iter().map(|&row| batch_row(row, &self.train.rows[row])).collect() };
                let checkpointing = self.recipe.train.gradient_checkpointing;
                let scale = self.state.loss_scale.scale;
                let LossSum { loss, trained_tokens, row_losses } =
                    self.model.loss_and_gradients(&batch, randomness, checkpointing, scale, gradients)?;
                sums.loss += loss;
                sums.trained_tokens += trained_tokens;
                sums.tokens += batch.tokens();
                rows.extend(micro_batch.iter().copied().zip(row_losses));
            }
            shares.push(sums);
        }
        failpoint::hit("train.reduce");
        let (sums, ranks) = self.ranks.sum_losses(&shares, start.elapsed().as_secs_f64())?;
        self.ranks.sum_gradients(gradients)?;
        Ok(StepSums { sums, ranks, rows })
    }

    /// Settings that would need less memory, and how much.
    pub fn smaller_settings(&self) -> Vec<String> {
        memory::knobs(
            &self.recipe,
            &self.model.config,
            self.model.lora_targets(),
            &self.train,
            self.model.placement(),
            self.stored,
            self.has_bf16,
        )
    }

    /// The signal that a rank was asked to stop with, 0 if none was.
    fn asked_to_stop(&self, stop: &AtomicI32) -> Result<i32, TrainError> {
        Ok(self.ranks.largest(stop.load(Ordering::SeqCst))?)
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

    /// Whether all ranks still have the same numbers.
    fn compare(&self) -> Result<(), TrainError> {
        self.ranks.expect_same(&[("state", self.state.digest())]).map_err(|error| match error {
            TrainError::Differ { differences } => TrainError::Drifted { step: self.state.step, differences },
            error => error,
        })
    }

    /// The newest checkpoint, on rank 0.
    fn saved(&self) -> Option<PathBuf> {
        self.journal.as_ref().and_then(|journal| journal.saved.clone())
    }

    fn write(&mut self, row: Row) -> Result<(), TrainError> {
        self.journal.as_mut().map_or(Ok(()), |journal| Ok(journal.metrics.append(row)?))
    }

    fn evaluation_due(&self, last: bool) -> bool {
        let every = self.recipe.eval.every;
        self.eval.is_some() && (last || (every > 0 && self.state.step.is_multiple_of(every)))
    }

    fn checkpoint_due(&self, improved: bool) -> bool {
        let every = self.recipe.checkpoint.every;
        (every > 0 && self.state.step.is_multiple_of(every)) || (improved && self.recipe.checkpoint.keep_best)
    }

    /// Writes the row of an evaluation and returns whether it is the best so far.
    fn evaluate(&mut self, tell: &mut dyn FnMut(Event<'_>)) -> Result<bool, TrainError> {
        let Some(data) = &self.eval else { return Ok(false) };
        tell(Event::Evaluating { rows: data.rows.len() });
        let sums = evaluate_together(&self.model, data, self.recipe.train.micro_batch_size, &self.ranks)?;
        let eval_loss = sums.loss / sums.trained_tokens.max(1) as f64;
        if !eval_loss.is_finite() {
            return Err(not_finite("the evaluation's loss", self.state.step, data, &sums.bad_rows()));
        }
        let row = EvalRow { step: self.state.step, eval_loss, eval_tokens: sums.trained_tokens };
        let best = self.state.best.is_none_or(|best| eval_loss < best.eval_loss);
        if best {
            self.state.best = Some(Best { step: self.state.step, eval_loss });
            self.state.evaluations_without_improvement = 0;
        } else {
            self.state.evaluations_without_improvement += 1;
        }
        tell(Event::Evaluated { row: &row, best });
        self.write(Row::Eval(row))?;
        let waited = self.state.evaluations_without_improvement;
        if self.recipe.eval.early_stopping_patience.is_some_and(|patience| waited >= patience.max(1)) {
            self.state.stopped_early = true;
            tell(Event::StoppingEarly { step: self.state.step, evaluations: waited });
        }
        Ok(best)
    }

    /// Saves what all ranks agree on.
    fn save(&mut self, tell: &mut dyn FnMut(Event<'_>)) -> Result<(), TrainError> {
        self.compare()?;
        if let Some(mut journal) = self.journal.take() {
            let saved = journal.save(self);
            self.journal = Some(journal);
            tell(Event::Saved { step: self.state.step, path: saved? });
        }
        self.spread(tell)
    }

    /// Writes the result. No rank leaves before it is there.
    fn finish(&self) -> Result<(), TrainError> {
        if let Some(journal) = &self.journal {
            // Once more for a run that was killed between its last save and the pruning after it.
            journal.prune(self)?;
            failpoint::hit("train.publish");
            journal.publish(self)?;
            failpoint::hit("train.published");
            report::write(self, journal)?;
        }
        Ok(self.ranks.group().barrier()?)
    }

    /// Answers to held-back rows, kept in the run directory: a resumed run has its first answers still.
    fn answers(
        &self,
        when: &'static str,
        stop: &AtomicI32,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<Option<Answers>, TrainError> {
        let (Some(data), Some(tokenizer)) = (&self.eval, &self.tokenizer) else { return Ok(None) };
        let eval = &self.recipe.eval;
        let questions =
            Questions { shown: eval.samples, scored: eval.exact_match, max_new_tokens: eval.max_new_tokens };
        let rows = questions.rows(data);
        let mut kept = self.journal.as_ref().map(|journal| BeforeAfter::read(&journal.directory)).unwrap_or_default();
        if rows == 0 || (when == "before" && self.state.step > 0) {
            return Ok(if when == "before" { kept.before } else { None });
        }
        let answers = answer(&self.model, data, tokenizer, questions, &self.ranks, &mut |done| {
            tell(Event::Answering { done, rows });
            self.ranks.group().keep_alive();
            stop.load(Ordering::SeqCst) == 0
        })?;
        let Some(answers) = answers else { return Ok(None) };
        tell(Event::Answered { when, answers: &answers });
        if let Some(journal) = &self.journal {
            let place = if when == "before" { &mut kept.before } else { &mut kept.after };
            *place = Some(answers.clone());
            kept.write(&journal.directory)?;
        }
        Ok(Some(answers))
    }
}

/// The error that names these rows of a dataset, the first few in full.
fn not_finite(what: &'static str, step: u64, data: &Dataset, rows: &[usize]) -> TrainError {
    const SHOWN: usize = 8;
    let named = rows.iter().take(SHOWN).map(|&row| data.origin(row)).collect();
    TrainError::NotFinite { what, step, rows: named, more: rows.len().saturating_sub(SHOWN) }
}
