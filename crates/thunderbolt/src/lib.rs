//! How hosts are cabled over Thunderbolt, what is wrong with them, and what they lack for RDMA.
//!
//! **Owns:** the facts of a host (`facts.rs`), cables and what they form (`cabling.rs`,
//! `shape.rs`), a hostfile from them (`discover.rs`), pictures (`diagram.rs`), the commands of a
//! set-up (`setup.rs`), checks (`doctor.rs`).
//!
//! **Must never know:** maths, models, recipes, ranks.
//!
//! **Start reading** in `discover.rs` (facts become a picture and a hostfile). Then follow the
//! facts back: `gather.rs` (one ssh round trip per host), `facts.rs` (what the commands said),
//! `cabling.rs`, `shape.rs`.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod cabling;
pub mod diagram;
pub mod discover;
pub mod doctor;
#[cfg(test)]
#[path = "../tests/support/documentation.rs"]
mod documentation;
#[cfg(test)]
#[path = "../tests/support/example_cluster.rs"]
mod example_cluster;
pub mod facts;
pub mod gather;
mod questions;
pub mod setup;
pub mod shape;

pub use questions::Questions;
