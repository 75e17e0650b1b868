//! The training loop, and everything a run remembers.
//!
//! Owns: the loop, AdamW, learning-rate schedules, what a checkpoint holds, metrics, evaluation,
//! the report; how the sums of several ranks become one.
//! Must never know: command lines, colors, ssh.
//! Start reading at [`train`]: it is the whole program in pipeline order. What it needs is examined
//! in `examine.rs`, put together in `prepare.rs`, and behaves as `run.rs` says.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod adamw;
mod assumed;
mod base_digest;
mod base_model;
mod card;
mod cheaper_settings;
mod copies;
mod date;
mod dealing;
mod device_plan;
mod disk_need;
mod diverged;
mod error;
mod evaluate;
mod events;
mod examine;
mod gathering;
mod identity;
mod initial_adapter;
mod learning;
mod limits;
mod load;
mod local_steps;
mod loss_scale;
mod memory;
mod metrics;
mod names;
mod norm;
pub mod numbers;
mod objective;
mod output_directory;
mod plan;
mod prepare;
mod product_time;
mod progress;
mod ranks;
mod read_run;
mod reading_share;
mod report;
mod residency;
mod resume;
mod router_loss;
mod rows;
mod run;
mod run_directory;
mod run_facts;
mod samples;
mod schedule;
mod share_assignment;
mod snapshot;
mod stages;
mod state;
mod step;
mod stragglers;
mod summary;
mod tensorboard;
#[cfg(test)]
mod test_recipe;
mod together;
mod train;
mod validate;
mod whole_lines;

pub use adamw::AdamW;
pub use base_model::{model_directory, stored_type};
pub use device_plan::{DevicePlan, Fetch, ThisHost};
pub use disk_need::DiskNeed;
pub use error::{Fault, NotFetched, TrainError};
pub use evaluate::evaluate;
pub use events::Event;
pub use memory::Estimate;
pub use metrics::{EvalRow, ExpertRow, RankRow, StepRow};
pub use names::{CHECKPOINTS, COPIES};
pub use output_directory::{home, recipe_file};
pub use plan::{Machines, MachinesPlan, RankNeed, Way, plan};
pub use prepare::{Prepared, prepare};
pub use ranks::Ranks;
pub use read_run::{LocalRun, RECORD_FILES, RunRecord, RunState};
pub use reading_share::ReadingShare;
pub use report::{Compared, compare_page, thinned};
pub use resume::Resume;
pub use rows::load_data;
pub use run::Run;
pub use run_facts::{RowFile, RunFacts, RunStatus};
pub use samples::{Answers, Sample};
pub use schedule::Schedule;
pub use state::{Best, TrainState};
pub use summary::Summary;
pub use together::{OnRank, Parallel, Replies, Reply, Sizes, Together};
pub use train::{Outcome, train};
pub use validate::{DataSummary, FirstRow, Problem, Validation, validate};
