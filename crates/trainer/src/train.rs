//! The training loop.

use std::sync::atomic::AtomicI32;
use std::time::Instant;

use finetune_recipe::SharesChoice;
use finetune_store::failpoint;

use crate::error::TrainError;
use crate::events::Event;
use crate::local_steps::{LocalShares, Meetings};
use crate::metrics::Row;
use crate::progress::Progress;
use crate::run::Run;
use crate::samples::Answers;
use crate::share_assignment::ShareBalancer;
use crate::step::StepSums;
use crate::stragglers::Stragglers;
use crate::summary::Summary;

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// All steps are done, or early stopping ended it.
    Finished {
        /// The last step that was done.
        step: u64,
        /// Answers to held-back rows before training, if any were asked for.
        before: Option<Answers>,
        /// Answers to them after training.
        after: Option<Answers>,
        /// Losses before and after.
        summary: Summary,
    },
    /// A signal asked it to stop; everything up to this step is saved.
    Stopped {
        /// The last step that was done.
        step: u64,
        /// The number of the signal.
        signal: i32,
    },
}

/// Trains from `run.state` to the last step. `stop` holds the number of a signal that asks to stop,
/// 0 for none. `tell` is called with everything worth showing.
///
/// # Errors
/// If a number is not finite, if ranks are lost or have different numbers, or if the device, the
/// disk or the memory fails.
pub fn train(run: &mut Run, stop: &AtomicI32, tell: &mut dyn FnMut(Event<'_>)) -> Result<Outcome, TrainError> {
    let outcome = steps(run, stop, tell);
    let outcome = outcome.map_err(|error| error.with_cheaper_settings(|| run.cheaper_settings()));
    // The others must not wait for a rank that cannot go on.
    let outcome = outcome.inspect_err(|error| run.ranks.abort(error)).map_err(|error| error.with_saved(run.saved()));
    let outcome = outcome.map_err(|error| error.with_ways(|| run.ways_on()));
    run.note_end(&outcome);
    outcome
}

/// The loop itself.
fn steps(run: &mut Run, stop: &AtomicI32, tell: &mut dyn FnMut(Event<'_>)) -> Result<Outcome, TrainError> {
    run.note_beginning()?;
    let before = run.answers("before", stop, tell)?;
    let measured = run.recipe.distributed.shares == SharesChoice::Measured;
    let mut balancer = ShareBalancer::new(run.ranks.even(), measured);
    let mut asked = run.begin(&balancer.assignment, stop, tell)?;
    let trained_parameters = run.model.spread().whole().len();
    let alone = Meetings::of(&run.recipe).map_or(1, |meetings| meetings.every);
    tell(Event::Begin { from: run.state.step, to: run.steps, alone, trained_parameters });
    let parameters = run.model.layout().len();
    let mut gradients: Vec<Vec<f32>> = Vec::new();
    let of_this_rank = balancer.assignment.count_of(run.ranks.group().rank());
    let mut local = Meetings::of(&run.recipe).map(|meetings| LocalShares::new(meetings, &run.state, of_this_rank));
    let (mut stragglers, mut progress) = (Stragglers::default(), Progress::new(run.state.step));
    while run.state.step < run.steps && !run.state.stopped_early && asked == 0 {
        failpoint::hit("train.step");
        let start = Instant::now();
        let mine = balancer.assignment.count_of(run.ranks.group().rank());
        gradients.resize_with(mine, || vec![0.0; parameters]);
        let StepSums { sums, ranks, rows, of_shares, reading } =
            run.step_sums(&balancer.assignment, &progress, &mut gradients, local.as_ref(), tell)?;
        let grad_norm = match &mut local {
            None => run.update(&sums, &mut gradients[0], &rows)?,
            Some(local) => run.update_shares(local, &sums, &of_shares, &mut gradients, &rows)?,
        };
        let learning_rate = run.schedule.at(run.state.step);
        run.state.step += 1;
        failpoint::hit("train.updated");

        let seconds = start.elapsed().as_secs_f64();
        progress.add(seconds);
        // Ranks that hold a model together take the same time: they wait for each other.
        if run.ranks.stages() == 1 {
            stragglers.watch(&ranks, seconds, &balancer.assignment, tell);
        }
        if balancer.watch(&ranks) {
            stragglers.forget();
            tell(Event::SharesAssigned { shares: balancer.assignment.counts() });
        }
        let row = run.step_row(&sums, ranks, grad_norm, learning_rate, seconds, reading)?;
        tell(Event::Step { row: &row, steps: run.steps });
        run.write(Row::Step(row))?;
        if let Some(local) = &mut local {
            // Between two meetings there is no common state that could be evaluated or saved.
            if !local.meet_after(run.state.step, run.steps) {
                continue;
            }
            local.meet(&mut run.state, &run.ranks, &balancer.assignment)?;
            run.model.set_parameters(&run.state.parameters);
        }
        asked = run.look_and_save(&balancer.assignment, &mut progress, stop, tell)?;
    }
    if asked != 0 && run.is_unfinished() {
        return Ok(Outcome::Stopped { step: run.state.step, signal: asked });
    }
    let after = run.answers("after", stop, tell)?;
    run.finish()?;
    Ok(Outcome::Finished { step: run.state.step, before, after, summary: run.summary() })
}
