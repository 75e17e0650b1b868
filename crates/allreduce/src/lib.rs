//! All-reduce and its relatives for a handful of machines: exact, deterministic, authenticated, and
//! never hanging.
//!
//! **Owns:** the group ([`Group::join`]): rendezvous, authentication, liveness; the algorithms
//! (star, direct, mesh, ring) and their order of summation; the transports (threads of one process,
//! TCP, RDMA verbs through `finetune-rdma`); the benchmark of the operations ([`bench`]).
//!
//! **Must never know:** models, recipes, files, launchers, the verbs library.
//!
//! ```text
//! group ── operation ──▶ plan ── frames in order ──▶ operation, operation_driver ──▶ transport
//!   │
//!   ├── line ── messages beside the operations ──▶ operation ──▶ transport
//!   │
//!   ├── join, calling, handshake, listener, connector: how ranks meet
//!   │
//!   └── control ── bytes ──▶ control_driver ── events ──▶ session ── records ──▶ verdict
//! ```
//!
//! **Start reading** in `group.rs` (what callers see), then `plan.rs` and `plan/mesh.rs` (an
//! operation as data), `operation.rs` (which frames move), `operation_driver.rs` (how long an
//! operation waits), `frame.rs` (what travels). For the other half: `join.rs` and `handshake.rs`
//! (how ranks meet), `session.rs` and `verdict.rs` (who is alive, who is to blame),
//! `control_driver.rs` (the control connections), `control.rs` (their thread). `simulation/` tests
//! both halves with its own clock and network.
//!
//! # What is promised
//!
//! - **Same inputs, same bits**, on every rank, in every run, over every transport, in every order
//!   of arrival: see [`Group`].
//! - **No hang.** All other ranks know of a killed rank within a second, and of one that is frozen
//!   or cut off within [`Config::timeout`]. Ranks that do different things get an error at the
//!   first frame. Every survivor names the same culprit ([`Verdict`]).
//! - **Only holders of the token join** ([`Secret`]), and strangers do not disturb them. Data
//!   is checksummed (except in memory of one machine), not encrypted. On a network that others
//!   can read or write, use WireGuard or ssh tunnels.

#![forbid(unsafe_code)]

mod arithmetic;
mod background;
pub mod bench;
mod calling;
mod choose;
mod collectives;
mod config;
mod connector;
mod control;
mod control_driver;
mod devices;
mod engine;
mod error;
mod flight;
mod frame;
mod group;
mod group_status;
mod handshake;
mod interfaces;
mod introduction;
mod join;
mod join_error;
mod line;
mod listener;
mod mutations;
mod notice;
mod operation;
mod operation_driver;
mod plan;
mod progress;
mod queue;
mod random_bytes;
mod rdma_group;
mod roster;
mod same_machine;
mod sealed;
mod secret;
mod session;
#[cfg(test)]
#[path = "../simulation/mod.rs"]
mod simulation;
mod split;
mod transport;
mod user_secret;
mod verdict;
mod waiting;

pub use background::Pending;
pub use config::{BackendChoice, Config, RdmaOptions};
pub use devices::{
    DeviceMatrix, DeviceMatrixError, MAX_DEVICE_FILE_BYTES, Shape, WiresError, wires_from_json, wires_to_json,
};
pub use error::{GroupError, GroupFailure, Who};
pub use flight::FlightEntry;
pub use frame::{Algorithm, Descriptor, Element, FrameError, Kind, PROTOCOL_VERSION, Reduction, WireDtype};
pub use group::{Group, Reduce};
pub use join_error::{JoinError, Met};
pub use line::{Receiver, Sender};
pub use notice::{Notice, Notices, no_notices};
pub use plan::segment;
pub use progress::{CurrentOperation, Progress};
pub use random_bytes::new_token;
pub use secret::Secret;
pub use transport::Backend;
pub use transport::tcp::TcpOptions;
pub use verdict::{Cause, Verdict};
