//! The training loop, and everything a run remembers.
//!
//! Owns: the loop, AdamW, learning-rate schedules, what a checkpoint holds, metrics, evaluation,
//! the report; how the sums of several ranks become one.
//! Must never know: command lines, colors, ssh.
//! Start reading at [`train`]: it is the whole program in pipeline order. What it needs is put together in `prepare.rs`.

#![forbid(unsafe_code)]

mod adamw;
mod copies;
mod error;
mod evaluate;
mod events;
mod findings;
mod identity;
mod journal;
mod loss_scale;
mod memory;
mod metrics;
mod place;
mod prepare;
mod ranks;
mod report;
mod schedule;
mod state;
mod stragglers;
mod train;

pub use adamw::AdamW;
pub use copies::COPIES;
pub use error::{Fault, TrainError};
pub use evaluate::{Answers, Sample, evaluate};
pub use events::Event;
pub use findings::{DataFindings, Findings, findings};
pub use memory::Estimate;
pub use metrics::{EvalRow, RankRow, StepRow};
pub use place::{Machine, Place};
pub use prepare::{Prepared, Resume, Run, load_data, model_directory, prepare, stored_type};
pub use ranks::Ranks;
pub use schedule::Schedule;
pub use state::{CHECKPOINTS, TrainState};
pub use train::{Outcome, train};
