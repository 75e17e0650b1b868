//! What a run tells whoever shows it.

use std::path::PathBuf;

use crate::metrics::{EvalRow, StepRow};
use crate::samples::Answers;

#[derive(Debug)]
pub enum Event<'a> {
    /// Training goes from step `from` (0: the beginning) to step `to`.
    Begin {
        from: u64,
        to: u64,
        trained_parameters: usize,
    },
    /// The learning rate of the step before this process's first is not what the run's schedule gives it now: the number of
    /// steps, or the rate, has changed since.
    CurveChanged {
        step: u64,
        was: f64,
        now: f64,
    },
    /// Work on a step begins, which a stop will wait for. `seconds`: the median of the last steps, `None` before the first.
    /// `saved`: the newest step that a resume would go on from, 0 for none.
    Working {
        step: u64,
        seconds: Option<f64>,
        saved: u64,
    },
    Step {
        row: &'a StepRow,
        steps: u64,
    },
    /// An evaluation has begun on this many rows.
    Evaluating {
        rows: usize,
    },
    /// Rows of it done so far, over all ranks.
    EvaluatedRows {
        done: usize,
        rows: usize,
    },
    Evaluated {
        row: &'a EvalRow,
        best: bool,
    },
    /// Answers to held-back rows are being generated.
    Answering {
        done: usize,
        rows: usize,
    },
    Answered {
        when: &'static str,
        answers: &'a Answers,
    },
    /// A stop was asked for, on whichever rank: what is done up to this step is saved next.
    Stopping {
        step: u64,
    },
    Saved {
        step: u64,
        path: PathBuf,
    },
    /// What was saved is kept on another host too, or why it is not.
    Copied {
        step: u64,
        host: String,
        failed: Option<String>,
    },
    /// For the last `steps` steps this rank took so many times as long for its rows as the others' median. A step takes
    /// `seconds`; `without` this rank, its rows shared out among the others, about so many, where that is less.
    Straggler {
        rank: usize,
        factor: f64,
        steps: u64,
        seconds: f64,
        without: Option<f64>,
    },
    /// From the next step on each rank computes so many shares of it.
    SharesAssigned {
        shares: &'a [usize],
    },
    /// f16 overflowed in this step, which is computed again with this loss scale.
    LossScale {
        step: u64,
        scale: f32,
    },
    /// Evaluations in a row without a better one.
    StoppingEarly {
        step: u64,
        evaluations: u64,
    },
}
