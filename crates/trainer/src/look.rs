//! What a run does between steps: it looks at held-back rows, saves, and hears of a stop.

use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, Ordering};

use finetune_store::failpoint;

use crate::deal::Deal;
use crate::diverged;
use crate::error::TrainError;
use crate::evaluate::{Answers, BeforeAfter, Questions, answer, evaluate_together};
use crate::events::Event;
use crate::journal::keeps_best;
use crate::metrics::{EvalRow, Row};
use crate::pace::Pace;
use crate::prepare::Run;
use crate::report;
use crate::state::Best;
use crate::train::not_finite;

/// Steps after which ranks compare their states, checkpoints aside.
const COMPARE_EVERY: u64 = 50;

/// Rows that an error names in full.
const SHOWN: usize = 8;

impl Run {
    /// What comes before the first step of this process: the loss on held-back rows before any training, or the evaluation that
    /// a signal has given up. Returns the signal that asks to stop, 0 if none does.
    pub(crate) fn begin(
        &mut self,
        deal: &Deal,
        stop: &AtomicI32,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<i32, TrainError> {
        self.tell_of_another_curve(tell);
        let given_up = self.state.evaluation_due;
        if given_up && let Some(journal) = &mut self.journal {
            journal.metrics.forget_evaluation(self.state.step)?;
        }
        self.state.evaluation_due |= self.state.step == 0 && self.eval.is_some();
        let improved = self.evaluate(deal, stop, tell)?;
        let asked = self.asked_to_stop(stop)?;
        // Where it was given up again, its checkpoint says so already.
        if given_up && !self.state.evaluation_due && (self.is_done() || self.checkpoint_due(improved)) {
            self.save(tell)?;
        }
        Ok(asked)
    }

    /// Evaluates and saves where it is time to. Returns the signal that asks to stop, 0 if none does.
    pub(crate) fn look_and_save(
        &mut self,
        deal: &Deal,
        pace: &mut Pace,
        stop: &AtomicI32,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<i32, TrainError> {
        self.state.evaluation_due = self.evaluation_due();
        let improved = self.evaluate(deal, stop, tell)?;
        failpoint::hit("train.evaluated");
        let asked = self.asked_to_stop(stop)?;
        if asked != 0 {
            tell(Event::Stopping { step: self.state.step });
        }
        if self.is_done() || asked != 0 || self.checkpoint_due(improved) {
            self.save(tell)?;
            pace.saved = self.state.step;
        } else if self.state.step.is_multiple_of(COMPARE_EVERY) {
            self.compare()?;
        } else if pace.report_due()
            && let Some(journal) = &self.journal
        {
            report::write(self, journal)?;
        }
        Ok(asked)
    }

    /// No step is left to do.
    fn is_done(&self) -> bool {
        self.state.step >= self.steps || self.state.stopped_early
    }

    /// Whether a run that stops now has something to go on with.
    pub(crate) fn is_unfinished(&self) -> bool {
        !self.is_done() || self.state.evaluation_due
    }

    /// A run that is resumed with another number of steps goes on along another curve.
    fn tell_of_another_curve(&self, tell: &mut dyn FnMut(Event<'_>)) {
        let rows = self.journal.as_ref().map_or(&[] as &[Row], |journal| journal.metrics.rows.as_slice());
        let last = rows.iter().rev().find_map(|row| if let Row::Step(row) = row { Some(row) } else { None });
        let Some(last) = last.filter(|row| row.step == self.state.step) else { return };
        let (was, now) = (last.learning_rate, self.schedule.at(last.step - 1));
        if (was - now).abs() > 1e-9 * was.abs().max(now.abs()) && !self.is_done() {
            tell(Event::CurveChanged { step: last.step, was, now });
        }
    }

    /// The signal that a rank was asked to stop with, 0 if none was.
    fn asked_to_stop(&self, stop: &AtomicI32) -> Result<i32, TrainError> {
        Ok(self.ranks.largest(stop.load(Ordering::SeqCst))?)
    }

    /// Whether all ranks still have the same numbers.
    fn compare(&self) -> Result<(), TrainError> {
        self.ranks.expect_same(&[("state", self.state.digest())]).map_err(|error| match error {
            TrainError::Differ { differences } => TrainError::Drifted { step: self.state.step, differences },
            error => error,
        })
    }

    /// The newest checkpoint, on rank 0; none where the run was diverging already when it was saved.
    pub(crate) fn saved(&self) -> Option<PathBuf> {
        let journal = self.journal.as_ref()?;
        journal.saved.clone().filter(|path| diverged::is_safe(journal, path))
    }

    pub(crate) fn write(&mut self, row: Row) -> Result<(), TrainError> {
        self.journal.as_mut().map_or(Ok(()), |journal| Ok(journal.metrics.append(row)?))
    }

    fn evaluation_due(&self) -> bool {
        let (every, step) = (self.recipe.eval.every, self.state.step);
        self.eval.is_some() && (step == self.steps || (every > 0 && step.is_multiple_of(every)))
    }

    fn checkpoint_due(&self, improved: bool) -> bool {
        let every = self.recipe.checkpoint.every;
        (every > 0 && self.state.step.is_multiple_of(every)) || (improved && keeps_best(&self.recipe))
    }

    /// Makes the evaluation that is due, writes its row and returns whether it is the best so far. A signal gives it up: it stays
    /// due.
    fn evaluate(&mut self, deal: &Deal, stop: &AtomicI32, tell: &mut dyn FnMut(Event<'_>)) -> Result<bool, TrainError> {
        let Some(data) = self.eval.as_ref().filter(|_| self.state.evaluation_due) else { return Ok(false) };
        let (step, rows) = (self.state.step, data.rows.len());
        tell(Event::Evaluating { rows });
        let micro_batch_size = self.recipe.train.micro_batch_size;
        let sums = evaluate_together(&self.model, data, micro_batch_size, &self.ranks, deal, &mut |done| {
            tell(Event::EvaluatedRows { done, rows });
            stop.load(Ordering::SeqCst) == 0
        })?;
        let Some(sums) = sums else { return Ok(false) };
        let eval_loss = sums.loss / sums.trained_tokens.max(1) as f64;
        if !eval_loss.is_finite() && step == 0 {
            // Nothing has been trained that could have diverged.
            let rows = sums.bad_rows().into_iter().take(SHOWN).map(|row| data.origin(row)).collect();
            return Err(TrainError::NotFiniteEvaluation { rows });
        }
        if !eval_loss.is_finite() {
            return Err(not_finite("the evaluation's loss", step, data, &sums.bad_rows()));
        }
        self.state.evaluation_due = false;
        let row = EvalRow { step, eval_loss, eval_tokens: sums.trained_tokens };
        if step == 0 {
            // No checkpoint holds it, so it is nothing to go back to.
            tell(Event::Evaluated { row: &row, best: false });
            self.write(Row::Eval(row))?;
            return Ok(false);
        }
        let best = self.state.best.is_none_or(|best| eval_loss < best.eval_loss);
        if best {
            self.state.best = Some(Best { step, eval_loss });
            self.state.evaluations_without_improvement = 0;
        } else {
            self.state.evaluations_without_improvement += 1;
        }
        tell(Event::Evaluated { row: &row, best });
        self.write(Row::Eval(row))?;
        let waited = self.state.evaluations_without_improvement;
        if self.recipe.eval.early_stopping_patience.is_some_and(|patience| waited >= patience.max(1)) {
            self.state.stopped_early = true;
            tell(Event::StoppingEarly { step, evaluations: waited });
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
    pub(crate) fn finish(&self) -> Result<(), TrainError> {
        if let Some(journal) = &self.journal {
            // Once more for a run that was killed between its last save and the pruning after it.
            journal.prune(self)?;
            failpoint::hit("train.publish");
            journal.publish(self)?;
            failpoint::hit("train.published");
            report::write_last(self, journal)?;
        }
        Ok(self.ranks.group().barrier()?)
    }

    /// Answers to held-back rows, kept in the run directory: a resumed run has its first answers still.
    pub(crate) fn answers(
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
