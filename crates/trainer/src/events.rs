//! What a run tells whoever shows it.

use std::path::PathBuf;

use crate::evaluate::Answers;
use crate::metrics::{EvalRow, StepRow};

#[derive(Debug)]
pub enum Event<'a> {
    /// Training goes from step `from` (0: the beginning) to step `to`.
    Begin {
        from: u64,
        to: u64,
        trained_parameters: usize,
    },
    Step {
        row: &'a StepRow,
        steps: u64,
    },
    /// An evaluation has begun on this many rows.
    Evaluating {
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
    /// For the last minute this rank took so many times as long for its rows as the others' median.
    Straggler {
        rank: usize,
        factor: f64,
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
