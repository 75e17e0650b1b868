//! What a run tells the code that shows it.

use std::path::PathBuf;

use crate::metrics::{EvalRow, StepRow};
use crate::samples::Answers;

/// What a run tells while it runs. Steps count from 1.
#[derive(Debug)]
pub enum Event<'a> {
    /// Training goes from step `from` to step `to`.
    Begin {
        /// Steps that ranks make alone before they have a common state (`distributed.sync_every`); 1: none.
        alone: u64,
        /// The last step that is done; 0: none.
        from: u64,
        /// The last step of the run.
        to: u64,
        /// The number of trained parameters.
        trained_parameters: usize,
    },
    /// The schedule now gives another learning rate for the last step that was done than the rate
    /// it was done with. The number of steps, or the rate, has changed since.
    CurveChanged {
        /// The last step that is done.
        step: u64,
        /// The learning rate that it had.
        was: f64,
        /// The learning rate that it would have now.
        now: f64,
    },
    /// Work on a step begins. A stop waits for its end.
    Working {
        /// The step.
        step: u64,
        /// The median of the last steps, in seconds; `None` before the first.
        seconds: Option<f64>,
        /// The newest step that a resume would go on from; 0: none.
        saved: u64,
    },
    /// A step is done.
    Step {
        /// Its row of the metrics.
        row: &'a StepRow,
        /// Steps of the whole run.
        steps: u64,
    },
    /// An evaluation has begun.
    Evaluating {
        /// Rows to evaluate.
        rows: usize,
    },
    /// A part of the evaluation is done.
    EvaluatedRows {
        /// Rows done so far, over all ranks.
        done: usize,
        /// Rows to evaluate.
        rows: usize,
    },
    /// An evaluation is done.
    Evaluated {
        /// Its row of the metrics.
        row: &'a EvalRow,
        /// Whether it is the best so far. The one before the first step never is.
        best: bool,
    },
    /// Answers to held-back rows are being generated.
    Answering {
        /// Rows answered so far.
        done: usize,
        /// Rows to answer.
        rows: usize,
    },
    /// All answers are generated.
    Answered {
        /// "before" or "after" training.
        when: &'static str,
        /// The answers.
        answers: &'a Answers,
    },
    /// A stop was asked for, on any rank. What is done up to this step is saved next.
    Stopping {
        /// The step that is done.
        step: u64,
    },
    /// A checkpoint is saved.
    Saved {
        /// Its step.
        step: u64,
        /// Its directory.
        path: PathBuf,
    },
    /// What was saved is kept on another host too, or could not be.
    Copied {
        /// The step of the checkpoint.
        step: u64,
        /// The other host.
        host: String,
        /// Why it is not kept there; `None` if it is.
        failed: Option<String>,
    },
    /// A rank took much longer for its rows than the others.
    Straggler {
        /// The slow rank.
        rank: usize,
        /// Its time for its rows, divided by the median of the others'.
        factor: f64,
        /// The number of steps that were measured.
        steps: u64,
        /// Seconds of a step.
        seconds: f64,
        /// About the seconds of a step without this rank, its shares spread among the others.
        /// `None` if that would not be shorter.
        without: Option<f64>,
    },
    /// From the next step on, ranks compute other shares.
    SharesAssigned {
        /// The number of shares of each rank.
        shares: &'a [usize],
    },
    /// f16 overflowed in this step, which is computed again with another loss scale.
    LossScale {
        /// The step.
        step: u64,
        /// The new loss scale.
        scale: f32,
    },
    /// Early stopping ends the run.
    StoppingEarly {
        /// The step that is done.
        step: u64,
        /// Evaluations in a row without a better one.
        evaluations: u64,
    },
}
