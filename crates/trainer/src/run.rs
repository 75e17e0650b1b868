//! A run: what it is made of, how it computes a step, and what it does between steps.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use finetune_allreduce::Reduction;
use finetune_dataset::{ChatTokenizer, Dataset, Plan};
use finetune_model::{BaseName, Model};
use finetune_recipe::Recipe;
use finetune_store::failpoint;

use crate::copies::spread;
use crate::diverged;
use crate::error::TrainError;
use crate::evaluate::evaluate_together;
use crate::events::Event;
use crate::identity::Identity;
use crate::local_steps::Meetings;
use crate::memory::{Estimate, Sizing, Subject};
use crate::metrics::{EvalRow, Row};
use crate::objective::Objective;
use crate::progress::Progress;
use crate::ranks::{Ranks, Sums};
use crate::run_directory::{RunDirectory, keeps_best};
use crate::run_facts::End;
use crate::samples::{Answers, BeforeAfter, SampleSettings, answer};
use crate::schedule::Schedule;
use crate::share_assignment::ShareAssignment;
use crate::snapshot::Snapshot;
use crate::state::{Best, TrainState};
use crate::summary::{Summary, before_and_after};
use crate::train::Outcome;

/// Steps after which ranks compare their states if no checkpoint is due.
const COMPARE_EVERY: u64 = 50;

/// Rows that an error names in full.
const SHOWN: usize = 8;

/// A run, ready to go on from `state`.
pub struct Run {
    /// The recipe, with the date that templates are given.
    pub recipe: Recipe,
    /// The model, with the parameters of `state`.
    pub model: Model,
    /// Rows to train on.
    pub train: Dataset,
    /// Held-back rows; `None` without any.
    pub eval: Option<Dataset>,
    /// `None` only if every row is tokens already and the model directory has no tokenizer.
    pub tokenizer: Option<ChatTokenizer>,
    /// Which rows each step takes.
    pub plan: Plan,
    /// Steps of the whole run.
    pub steps: u64,
    /// The learning rate of each step.
    pub schedule: Schedule,
    pub(crate) objective: Objective,
    /// What the run remembers: step, parameters, optimizer.
    pub state: TrainState,
    /// All ranks, and this rank among them.
    pub ranks: Arc<Ranks>,
    /// The device and number type, for people.
    pub device: String,
    /// The memory that the run takes, by the estimate.
    pub estimate: Estimate,
    pub(crate) sizing: Sizing,
    /// The run directory, on rank 0 only.
    pub(crate) directory: Option<RunDirectory>,
    pub(crate) identity: Identity,
    /// What adapter_config.json calls the base model.
    pub(crate) base: BaseName,
    /// The digest of weights and config.json of the base model, by which other weights are
    /// recognized.
    pub(crate) base_digest: String,
    /// YYYY-MM-DD: what a chat template's "today" is.
    pub date: String,
    /// On rank 0: the files by which another program writes and ends text as this run does, for
    /// results and checkpoints.
    pub(crate) text: Vec<(String, Vec<u8>)>,
    /// Says how much memory this process has had at most, in bytes.
    pub(crate) peak_memory: Option<fn() -> u64>,
    /// The commit that the program was built from, if it is known.
    pub(crate) commit: Option<&'static str>,
}

impl Run {
    /// Settings that would need less memory, and how much less.
    pub fn cheaper_settings(&self) -> Vec<String> {
        Subject { recipe: &self.recipe, train: &self.train, eval: self.eval.as_ref(), sizing: &self.sizing }
            .cheaper_settings()
    }

    /// Refuses a loss or gradient that is not finite before it changes anything. The error names
    /// the rows to look at.
    pub(crate) fn ensure_finite(&self, sums: &Sums, grad_norm: f64, rows: &[(usize, f64)]) -> Result<(), TrainError> {
        match (sums.loss.is_finite(), grad_norm.is_finite()) {
            (true, true) => Ok(()),
            (false, _) => Err(self.not_finite("the loss", rows)?),
            (true, false) => Err(self.not_finite("the gradient", rows)?),
        }
    }

    /// Refuses parameters that an update made too large for f32, before they are saved. (A finite
    /// gradient can still do that.)
    pub(crate) fn ensure_finite_parameters(&self, rows: &[(usize, f64)]) -> Result<(), TrainError> {
        let is_finite = self.state.parameters.iter().all(|value| value.is_finite());
        if !self.ranks.of_any_stage(!is_finite)? {
            return Ok(());
        }
        Err(self.not_finite("a parameter after the update", rows)?)
    }

    /// The error that names the rows of this step whose loss is not finite on some rank. If there
    /// are none, it names all rows.
    pub(crate) fn not_finite(&self, what: &'static str, mine: &[(usize, f64)]) -> Result<TrainError, TrainError> {
        let rows = self.plan.rows(self.state.step);
        let bad = |row: &usize| mine.iter().any(|(computed, loss)| computed == row && !loss.is_finite());
        let mut counts: Vec<f32> = rows.iter().map(|row| f32::from(u8::from(bad(row)))).collect();
        self.ranks.group().all_reduce(&mut counts, Reduction::Sum)?;
        let suspects: Vec<usize> =
            rows.iter().zip(&counts).filter(|(_, count)| **count > 0.0).map(|(row, _)| *row).collect();
        let suspects = if suspects.is_empty() { rows } else { suspects };
        Ok(not_finite(what, self.state.step + 1, &self.train, &suspects))
    }

    /// Does what comes before the first step of this process: the evaluation before any training,
    /// or the evaluation that a signal has interrupted. Returns the signal that asks to stop, 0 if
    /// none does.
    pub(crate) fn begin(
        &mut self,
        assignment: &ShareAssignment,
        stop: &AtomicI32,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<i32, TrainError> {
        self.tell_of_another_curve(tell);
        let given_up = self.state.evaluation_due;
        if given_up && let Some(directory) = &mut self.directory {
            directory.metrics.forget_evaluation(self.state.step)?;
        }
        self.state.evaluation_due |= self.state.step == 0 && self.eval.is_some();
        let improved = self.evaluate(assignment, stop, tell)?;
        let asked = self.asked_to_stop(stop)?;
        // If it was interrupted again, the checkpoint says so already.
        if given_up && !self.state.evaluation_due && (self.is_done() || self.checkpoint_due(improved)) {
            self.save(tell)?;
        }
        Ok(asked)
    }

    /// Evaluates and saves if it is due. Returns the signal that asks to stop, 0 if none does.
    pub(crate) fn look_and_save(
        &mut self,
        assignment: &ShareAssignment,
        progress: &mut Progress,
        stop: &AtomicI32,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<i32, TrainError> {
        self.state.evaluation_due = self.evaluation_due();
        let improved = self.evaluate(assignment, stop, tell)?;
        failpoint::hit("train.evaluated");
        let asked = self.asked_to_stop(stop)?;
        if asked != 0 {
            tell(Event::Stopping { step: self.state.step });
        }
        if self.is_done() || asked != 0 || self.checkpoint_due(improved) {
            self.save(tell)?;
            progress.saved = self.state.step;
        } else if self.state.step.is_multiple_of(COMPARE_EVERY) {
            self.compare()?;
        } else if progress.report_due()
            && let Some(directory) = &self.directory
        {
            directory.describe(&self.snapshot(), &End::default())?;
        }
        Ok(asked)
    }

    /// Whether no step is left to do.
    fn is_done(&self) -> bool {
        self.state.step >= self.steps || self.state.stopped_early
    }

    /// Whether a run that stops now has something to go on with.
    pub(crate) fn is_unfinished(&self) -> bool {
        !self.is_done() || self.state.evaluation_due
    }

    /// Tells if the resumed run goes on along another learning-rate curve, because its number of
    /// steps has changed.
    fn tell_of_another_curve(&self, tell: &mut dyn FnMut(Event<'_>)) {
        let rows = self.directory.as_ref().map_or(&[] as &[Row], |directory| directory.metrics.rows.as_slice());
        let last = rows.iter().rev().find_map(|row| if let Row::Step(row) = row { Some(row) } else { None });
        let Some(last) = last.filter(|row| row.step == self.state.step) else { return };
        let (was, now) = (last.learning_rate, self.schedule.at(last.step - 1));
        if (was - now).abs() > 1e-9 * was.abs().max(now.abs()) && !self.is_done() {
            tell(Event::CurveChanged { step: last.step, was, now });
        }
    }

    /// The signal that any rank was asked to stop with, 0 if none was.
    fn asked_to_stop(&self, stop: &AtomicI32) -> Result<i32, TrainError> {
        Ok(self.ranks.largest(stop.load(Ordering::SeqCst))?)
    }

    /// Checks that all ranks still have the same numbers.
    fn compare(&self) -> Result<(), TrainError> {
        // Ranks with other layers have nothing else in common.
        let numbers = [("state", self.state.digest_of_numbers())];
        let compared = if self.ranks.stages() > 1 { self.ranks.expect_same(&numbers) } else { Ok(()) };
        let compared = compared.and_then(|()| self.ranks.expect_same_layers(&[("state", self.state.digest())]));
        compared.map_err(|error| match error {
            TrainError::Differ { differences } => TrainError::Drifted { step: self.state.step, differences },
            error => error,
        })
    }

    /// What can be done after numbers that are not finite. Only rank 0 knows it.
    pub(crate) fn ways_on(&self) -> Vec<String> {
        let ways_on = |kept: &RunDirectory| diverged::ways_on(&self.recipe, &kept.directory, &kept.metrics.rows);
        self.directory.as_ref().map(ways_on).unwrap_or_default()
    }

    /// The newest checkpoint, on rank 0; `None` if the run was already diverging when it was saved.
    pub(crate) fn saved(&self) -> Option<PathBuf> {
        let directory = self.directory.as_ref()?;
        directory.saved.clone().filter(|path| diverged::is_safe(&directory.metrics.rows, path))
    }

    /// Appends a row to the metrics, on rank 0.
    pub(crate) fn write(&mut self, row: Row) -> Result<(), TrainError> {
        self.directory.as_mut().map_or(Ok(()), |directory| directory.append(row))
    }

    /// Whether an evaluation is due after this step.
    fn evaluation_due(&self) -> bool {
        self.eval.is_some() && (self.state.step == self.steps || self.is_time(self.recipe.eval.every))
    }

    /// Whether what is due every so many steps is due now: after this step, or after one since the last common
    /// state. `every`: 0 for never.
    fn is_time(&self, every: u64) -> bool {
        let step = self.state.step;
        let before = match Meetings::of(&self.recipe) {
            None => step.saturating_sub(1),
            Some(Meetings { every, .. }) => step.saturating_sub(1) / every * every,
        };
        step.checked_div(every) != before.checked_div(every)
    }

    /// Whether a checkpoint is due. `improved`: an evaluation was the best so far.
    fn checkpoint_due(&self, improved: bool) -> bool {
        self.is_time(self.recipe.checkpoint.every) || (improved && keeps_best(&self.recipe))
    }

    /// Makes the evaluation that is due, and writes its row. Returns whether it is the best so far.
    /// If a signal interrupts it, it stays due.
    fn evaluate(
        &mut self,
        assignment: &ShareAssignment,
        stop: &AtomicI32,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<bool, TrainError> {
        let Some(data) = self.eval.as_ref().filter(|_| self.state.evaluation_due) else { return Ok(false) };
        let (step, rows) = (self.state.step, data.rows.len());
        tell(Event::Evaluating { rows });
        let micro_batch_size = self.recipe.train.micro_batch_size;
        let sums = evaluate_together(&self.model, data, micro_batch_size, &self.ranks, assignment, &mut |done| {
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
            // No checkpoint holds these parameters, so this evaluation never counts as the best.
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
        let saved = match &self.directory {
            Some(directory) => Some(directory.save(&self.snapshot(), &self.ranks)?),
            None => self.state.send(&self.model, &self.ranks, true).map(|()| None)?,
        };
        if let (Some(path), Some(directory)) = (saved, &mut self.directory) {
            directory.saved = Some(path.clone());
            tell(Event::Saved { step: self.state.step, path });
        }
        if let Some(directory) = &self.directory {
            directory.tidy(&self.snapshot())?;
        }
        let directory = self.directory.as_ref().map(|directory| directory.directory.as_path());
        spread(&self.ranks, &self.recipe, directory, self.state.step, tell)
    }

    /// Writes down, on rank 0, that the run goes on.
    pub(crate) fn note_beginning(&self) -> Result<(), TrainError> {
        self.directory.as_ref().map_or(Ok(()), |directory| directory.describe(&self.snapshot(), &End::default()))
    }

    /// Writes down, on rank 0, how the run has ended, unless [`Run::finish`] did.
    pub(crate) fn note_end(&self, outcome: &Result<Outcome, TrainError>) {
        if matches!(outcome, Ok(Outcome::Finished { .. })) {
            return;
        }
        if let Some(directory) = &self.directory {
            // An error is ignored: what has ended the run is told, and a full disk may be just that.
            let _ = directory.describe(&self.snapshot(), &End::of(outcome));
        }
    }

    /// Writes the result. No rank leaves before it is there.
    pub(crate) fn finish(&self) -> Result<(), TrainError> {
        let of_state = self.directory.as_ref().is_some_and(|kept| kept.publishes_state(&self.recipe, &self.state));
        let of_state = self.ranks.as_first_says(of_state)?;
        if of_state && self.directory.is_none() {
            self.state.send(&self.model, &self.ranks, false)?;
        }
        if let Some(directory) = &self.directory {
            // A run may have been killed between its last save and the pruning after it.
            let snapshot = self.snapshot();
            directory.prune(&snapshot)?;
            failpoint::hit("train.publish");
            directory.publish(&snapshot, &self.ranks)?;
            failpoint::hit("train.published");
            directory.describe(&snapshot, &End::done())?;
        }
        Ok(self.ranks.group().barrier()?)
    }

    /// Answers to held-back rows before or after training (`when`). They are kept in the run
    /// directory, so a resumed run still has those from before. `None` if none are asked for, or if
    /// a signal interrupts them.
    pub(crate) fn answers(
        &self,
        when: &'static str,
        stop: &AtomicI32,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<Option<Answers>, TrainError> {
        let (Some(data), Some(tokenizer)) = (&self.eval, &self.tokenizer) else { return Ok(None) };
        let eval = &self.recipe.eval;
        let settings =
            SampleSettings { shown: eval.samples, scored: eval.exact_match, max_new_tokens: eval.max_new_tokens };
        let rows = settings.rows(data);
        let mut kept =
            self.directory.as_ref().map(|directory| BeforeAfter::read(&directory.directory)).unwrap_or_default();
        if rows == 0 || (when == "before" && self.state.step > 0) {
            return Ok(if when == "before" { kept.before } else { None });
        }
        let mut told = None;
        let answers = answer(&self.model, data, tokenizer, settings, &self.ranks, &mut |done| {
            if told.replace(done) != Some(done) {
                tell(Event::Answering { done, rows });
            }
            self.ranks.keep_alive();
            stop.load(Ordering::SeqCst) == 0
        })?;
        let Some(answers) = answers else { return Ok(None) };
        tell(Event::Answered { when, answers: &answers });
        if let Some(directory) = &self.directory {
            let place = if when == "before" { &mut kept.before } else { &mut kept.after };
            *place = Some(answers.clone());
            kept.write(&directory.directory)?;
        }
        Ok(Some(answers))
    }

    /// Losses before and after, for the end of the run.
    pub(crate) fn summary(&self) -> Summary {
        let rows = self.directory.as_ref().map_or(&[] as &[Row], |directory| directory.metrics.rows.as_slice());
        let (state, recipe) = (&self.state, &self.recipe);
        let result_step = self.directory.as_ref().map_or(state.step, |directory| directory.result_step(recipe, state));
        let (loss, eval) = before_and_after(rows, result_step);
        Summary { loss, eval, best: state.best, result_step }
    }

    /// The run as its directory and its report show it.
    pub(crate) fn snapshot(&self) -> Snapshot<'_> {
        Snapshot {
            recipe: &self.recipe,
            model: &self.model,
            train: &self.train,
            eval: self.eval.as_ref(),
            tokenizer: self.tokenizer.as_ref(),
            steps: self.steps,
            state: &self.state,
            who: self.ranks.group().who(),
            device: &self.device,
            estimate: &self.estimate,
            identity: &self.identity,
            base: &self.base,
            base_digest: &self.base_digest,
            date: &self.date,
            text: &self.text,
            peak_memory: self.peak_memory,
            commit: self.commit,
        }
    }
}

/// The error that names these rows of a dataset, the first few in full.
pub(crate) fn not_finite(what: &'static str, step: u64, data: &Dataset, rows: &[usize]) -> TrainError {
    let named = rows.iter().take(SHOWN).map(|&row| data.origin(row)).collect();
    TrainError::NotFinite { what, step, rows: named, more: rows.len().saturating_sub(SHOWN), ways: Vec::new() }
}
