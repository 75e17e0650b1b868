//! The loop.

use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Instant;

use finetune_dataset::Dataset;
use finetune_model::{Batch, LossSum, Randomness};
use finetune_recipe::Method;
use finetune_store::{NewFile, failpoint, replace_directory};

use crate::adamw::{clip, norm};
use crate::error::TrainError;
use crate::evaluate::{Answers, BeforeAfter, Questions, answer, batch_row, evaluate};
use crate::events::Event;
use crate::metrics::{EvalRow, Row, StepRow};
use crate::prepare::Run;
use crate::report;
use crate::state::{Best, prune};

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// All steps are done, or early stopping ended it.
    Finished { step: u64, before: Option<Answers>, after: Option<Answers> },
    /// A signal asked it to stop; everything up to this step is saved.
    Stopped { step: u64, signal: i32 },
}

/// Σ over all micro-batches of a step. Means are formed from it once.
struct StepSums {
    loss: f64,
    trained_tokens: u64,
    tokens: u64,
    /// Row index and loss of each row.
    rows: Vec<(usize, f64)>,
}

/// Trains from `run.state` to the last step. `stop` holds the number of a signal that asks to stop, 0 for none.
pub fn train(run: &mut Run, stop: &AtomicI32, tell: &mut dyn FnMut(Event<'_>)) -> Result<Outcome, TrainError> {
    let before = run.answers("before", stop, tell)?;
    let mut gradients = vec![0.0; run.model.layout().len()];
    tell(Event::Begin { from: run.state.step, to: run.steps, trained_parameters: gradients.len() });
    while run.state.step < run.steps && !run.state.stopped_early {
        if let signal @ 1.. = stop.load(Ordering::SeqCst) {
            return Ok(Outcome::Stopped { step: run.state.step, signal });
        }
        failpoint::hit("train.step");
        let start = Instant::now();
        let sums = run.forward_and_backward(&mut gradients);
        let mean_loss = sums.loss / sums.trained_tokens.max(1) as f64;
        for gradient in &mut gradients {
            *gradient /= sums.trained_tokens.max(1) as f32;
        }
        let grad_norm = norm(&gradients);
        run.ensure_finite(&sums, grad_norm)?;
        clip(&mut gradients, grad_norm, run.recipe.train.max_grad_norm);
        let learning_rate = run.schedule.at(run.state.step);
        run.state.optimizer.update(&mut run.state.parameters, &gradients, learning_rate, &run.recipe.optimizer);
        run.ensure_finite_parameters(&sums)?;
        run.model.set_parameters(&run.state.parameters);
        run.state.step += 1;
        failpoint::hit("train.updated");

        let seconds = start.elapsed().as_secs_f64();
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
        };
        tell(Event::Step { row: &row, steps: run.steps });
        run.metrics.append(Row::Step(row))?;

        let last = run.state.step == run.steps;
        let improved = if run.evaluation_due(last) { run.evaluate(tell)? } else { false };
        failpoint::hit("train.evaluated");
        let asked_to_stop = stop.load(Ordering::SeqCst) != 0;
        if last || run.state.stopped_early || asked_to_stop || run.checkpoint_due(improved) {
            run.save(tell)?;
        }
    }
    let after = run.answers("after", stop, tell)?;
    // Once more for a run that was killed between its last save and the pruning after it.
    run.prune()?;
    failpoint::hit("train.publish");
    run.publish()?;
    failpoint::hit("train.published");
    report::write(run)?;
    Ok(Outcome::Finished { step: run.state.step, before, after })
}

impl Run {
    /// Sums of loss and gradients over this step's rows, a micro-batch at a time.
    fn forward_and_backward(&mut self, gradients: &mut [f32]) -> StepSums {
        gradients.fill(0.0);
        let share = self.plan.share(self.state.step, 0, 1);
        let randomness = Randomness { seed: self.recipe.seed, step: self.state.step };
        let mut sums = StepSums { loss: 0.0, trained_tokens: 0, tokens: 0, rows: Vec::with_capacity(share.len()) };
        for rows in share.chunks(self.recipe.train.micro_batch_size) {
            let batch = Batch { rows: rows.iter().map(|&row| batch_row(row, &self.train.rows[row])).collect() };
            let checkpointing = self.recipe.train.gradient_checkpointing;
            let LossSum { loss, trained_tokens, row_losses } =
                self.model.loss_and_gradients(&batch, randomness, checkpointing, gradients);
            sums.loss += loss;
            sums.trained_tokens += trained_tokens;
            sums.tokens += batch.tokens();
            sums.rows.extend(rows.iter().copied().zip(row_losses));
        }
        sums
    }

    /// Stops before a loss or gradient that is not finite changes anything, naming the rows to look at.
    fn ensure_finite(&self, sums: &StepSums, grad_norm: f64) -> Result<(), TrainError> {
        let what = match (sums.loss.is_finite(), grad_norm.is_finite()) {
            (true, true) => return Ok(()),
            (false, _) => "the loss",
            (true, false) => "the gradient",
        };
        let suspects: Vec<usize> =
            sums.rows.iter().filter(|(_, loss)| !loss.is_finite()).map(|(row, _)| *row).collect();
        let suspects = if suspects.is_empty() { sums.rows.iter().map(|(row, _)| *row).collect() } else { suspects };
        Err(not_finite(what, self.state.step + 1, &self.train, &suspects))
    }

    /// An update too large for f32 is not saved. (A finite gradient can still give one.)
    fn ensure_finite_parameters(&self, sums: &StepSums) -> Result<(), TrainError> {
        if self.state.parameters.iter().all(|value| value.is_finite()) {
            return Ok(());
        }
        let rows: Vec<usize> = sums.rows.iter().map(|(row, _)| *row).collect();
        Err(not_finite("a parameter after the update", self.state.step + 1, &self.train, &rows))
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
        let sums = evaluate(&self.model, data, self.recipe.train.micro_batch_size, &mut |_| {});
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
        self.metrics.append(Row::Eval(row))?;
        let waited = self.state.evaluations_without_improvement;
        if self.recipe.eval.early_stopping_patience.is_some_and(|patience| waited >= patience.max(1)) {
            self.state.stopped_early = true;
            tell(Event::StoppingEarly { step: self.state.step, evaluations: waited });
        }
        Ok(best)
    }

    fn save(&mut self, tell: &mut dyn FnMut(Event<'_>)) -> Result<(), TrainError> {
        self.metrics.sync()?;
        let path = self.state.save(&*self.disk, &self.directory, &self.model, &self.base, &self.identity)?;
        self.prune()?;
        tell(Event::Saved { step: self.state.step, path });
        report::write(self)
    }

    fn prune(&self) -> Result<(), TrainError> {
        let best = self.state.best.filter(|_| self.recipe.checkpoint.keep_best).map(|best| best.step);
        prune(&*self.disk, &self.directory, self.recipe.checkpoint.keep_last, best)
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
        let mut kept = BeforeAfter::read(&self.directory);
        if rows == 0 || (when == "before" && self.state.step > 0) {
            return Ok(if when == "before" { kept.before } else { None });
        }
        let answers = answer(&self.model, data, tokenizer, questions, &mut |done| {
            tell(Event::Answering { done, rows });
            stop.load(Ordering::SeqCst) == 0
        })?;
        let Some(answers) = answers else { return Ok(None) };
        tell(Event::Answered { when, answers: &answers });
        let place = if when == "before" { &mut kept.before } else { &mut kept.after };
        *place = Some(answers.clone());
        kept.write(&self.directory)?;
        Ok(Some(answers))
    }

    /// The result under a name of its own: `adapter/`, or `model/` where all weights were trained.
    fn publish(&self) -> Result<(), TrainError> {
        let (name, kind) = match self.recipe.train.method {
            Method::Lora => ("adapter", "adapter"),
            Method::Full => ("model", "model"),
        };
        let files = self.model.files(&self.state.parameters, &self.base)?;
        let files: Vec<NewFile<'_>> =
            files.iter().map(|(name, bytes)| NewFile { name, bytes: bytes.as_slice().into() }).collect();
        let about = serde_json::json!({"kind": kind, "step": self.state.step});
        replace_directory(&*self.disk, &self.directory.join(name), &files, &about)?;
        Ok(())
    }
}

/// The error that names these rows of a dataset, the first few in full.
fn not_finite(what: &'static str, step: u64, data: &Dataset, rows: &[usize]) -> TrainError {
    const SHOWN: usize = 8;
    let named = rows.iter().take(SHOWN).map(|&row| data.origin(row)).collect();
    TrainError::NotFinite { what, step, rows: named, more: rows.len().saturating_sub(SHOWN) }
}
