//! Machines: which there are, what runs on them, and how fast they talk.
//!
//! **Owns:** hostfiles (MLX's format), starting one worker process per rank here or over ssh, bringing files to
//! other machines, the benchmark of the collectives.
//!
//! **Must never know:** maths, models, recipes.
//!
//! **Start reading** in `workers.rs` (how processes are started, fed and ended), then `bench.rs`.

#![forbid(unsafe_code)]

pub mod bench;
pub mod copy;
mod hostfile;
pub mod reach;
pub mod workers;

pub use hostfile::{Host, Hostfile, HostfileError, MAX_HOSTFILE_BYTES, MAX_HOSTS};
