//! Tests of the whole program: real processes on real files, as a user or a scheduler starts them.
//!
//! Start reading at `program.rs` (starts `finetune`, with a deadline) and `folder.rs` (a folder
//! with a small recipe, model and rows in it). Each other file has one topic. `UPDATE_EXPECT=1`
//! rewrites the snapshots.

#![allow(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]

mod architecture;
mod changed;
mod cluster;
mod commands;
mod compare;
#[path = "../../crates/trainer/tests/common/deeper.rs"]
mod deeper;
mod disk;
mod end_command;
mod engines;
mod export_formats;
mod failpoints;
mod folder;
mod gpu;
mod hostile;
mod hub;
mod import;
mod init;
mod joining;
mod launch;
mod loading;
mod memory;
mod memory_limit;
mod messages;
mod models;
mod new_tokens;
mod packed;
mod program;
mod promises;
mod quantized;
mod random;
mod rdma;
mod recipes;
mod resume;
mod run_directory;
mod schema;
mod shell;
mod signals;
mod ssh;
mod stage_faults;
mod stages;
mod tensorboard;
mod together;
mod watch;
