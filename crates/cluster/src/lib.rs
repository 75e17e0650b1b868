//! Machines: which there are, how they are cabled, what is wrong with them, what runs on them, and how fast they talk.
//!
//! **Owns:** hostfiles (MLX's format), what hosts say of themselves and how Thunderbolt joins them (`discover`, `setup`,
//! `doctor`), starting one worker process per rank here or over ssh, bringing files to other machines, the benchmark of the
//! collectives.
//!
//! **Must never know:** maths, models, recipes.
//!
//! **Start reading** in `discover.rs` (facts become a picture and a hostfile) and follow the facts back: `gather.rs` (one ssh
//! round trip per host), `facts.rs` (what the commands said), `cabling.rs`, `shape.rs`. Or in `session.rs` (how a command at a
//! host is opened) and `workers.rs` (how ranks are started, fed and ended), then `bench.rs`.

#![forbid(unsafe_code)]

pub mod bench;
pub mod cabling;
pub mod complaint;
pub mod copy;
pub mod discover;
pub mod doctor;
#[cfg(test)]
mod documentation;
pub mod draw;
mod end;
#[cfg(test)]
mod example;
pub mod facts;
pub mod gather;
mod hostfile;
pub mod identity;
mod lines;
pub mod reach;
mod script;
mod session;
pub mod setup;
pub mod shape;
mod shell;
mod unanswered;
pub mod workers;

pub use hostfile::{Host, Hostfile, HostfileError, MAX_HOSTFILE_BYTES, MAX_HOSTS, is_loopback, machine_name};
pub use script::{Questions, Section, Transcript};
pub use unanswered::Unanswered;
