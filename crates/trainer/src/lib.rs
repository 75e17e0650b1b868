//! The training loop, and everything a run remembers.
//!
//! Owns: the loop, AdamW, learning-rate schedules, what a checkpoint holds, metrics, evaluation, the report.
//! Must never know: command lines, colors, ssh.
//! Start reading at [`train`]: it is the whole program in pipeline order. What it needs is put together in `prepare.rs`.

#![forbid(unsafe_code)]

mod adamw;
mod error;
mod evaluate;
mod events;
mod findings;
mod identity;
mod metrics;
mod prepare;
mod report;
mod schedule;
mod state;
mod train;

pub use adamw::AdamW;
pub use error::TrainError;
pub use evaluate::{Answers, Sample, evaluate};
pub use events::Event;
pub use findings::{DataFindings, Estimate, Findings, findings};
pub use metrics::{EvalRow, StepRow};
pub use prepare::{Prepared, Resume, Run, load_data, model_directory, prepare};
pub use schedule::Schedule;
pub use state::{CHECKPOINTS, TrainState};
pub use train::{Outcome, train};
