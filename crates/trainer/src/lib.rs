//! The training loop, and everything a run remembers.
//!
//! Owns: the loop, AdamW, learning-rate schedules, what a checkpoint holds, metrics, evaluation,
//! the report; how the sums of several ranks become one.
//! Must never know: command lines, colors, ssh.
//! Start reading at [`train`]: it is the whole program in pipeline order. What it needs is put together in `prepare.rs`; what it
//! does between steps is in `look.rs`.

#![forbid(unsafe_code)]

mod adamw;
mod card;
mod cheaper_settings;
mod copies;
mod date;
mod deal;
mod disk_need;
mod diverged;
mod error;
mod evaluate;
mod events;
mod findings;
mod identity;
mod journal;
mod learning;
mod limits;
mod look;
mod loss_scale;
mod memory;
mod metrics;
pub mod numbers;
mod objective;
mod pace;
mod place;
mod prepare;
mod ranks;
mod report;
mod resume;
mod run_directory;
mod schedule;
mod state;
mod stragglers;
mod summary;
mod train;

pub use adamw::AdamW;
pub use copies::COPIES;
pub use disk_need::DiskNeed;
pub use error::{Fault, TrainError};
pub use evaluate::{Answers, Sample, evaluate};
pub use events::Event;
pub use findings::{DataFindings, Findings, Problem, findings};
pub use memory::Estimate;
pub use metrics::{EvalRow, RankRow, StepRow};
pub use place::{Machine, Place};
pub use prepare::{Prepared, Resume, Run, load_data, model_directory, prepare, stored_type};
pub use ranks::Ranks;
pub use resume::newest_checkpoint;
pub use run_directory::{home, recipe_file};
pub use schedule::Schedule;
pub use state::{Best, CHECKPOINTS, TrainState};
pub use summary::Summary;
pub use train::{Outcome, train};
