//! Starts ranks on this host and over ssh, and brings files to other hosts.
//!
//! **Owns:** the command line of ssh (`ssh.rs`), commands at other hosts and their ends
//! (`session.rs`, `end.rs`), one worker process per rank and its orders (`workers.rs`,
//! `orders.rs`), questions to hosts (`reach.rs`, `gather.rs`), files that are followed
//! (`follow.rs`), copies (`copy.rs`), and who is to blame for the end of a launch (`restart.rs`).
//!
//! **Must never know:** maths, models, recipes, what a host is made of.
//!
//! **Start reading** in `ssh.rs` and `session.rs` (how a command at a host is opened), then
//! `workers.rs` (how ranks are started, fed and ended).

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod complaint;
pub mod copy;
mod end;
pub mod follow;
pub mod gather;
mod lines;
mod orders;
pub mod reach;
pub mod restart;
mod session;
pub mod shell;
mod ssh;
mod transcript;
mod unanswered;
pub mod workers;

pub use orders::{Order, assignment};
pub use ssh::{Remote, WorkerHost};
pub use transcript::{Section, Transcript};
pub use unanswered::Unanswered;
