//! All-reduce for a handful of machines.
#![deny(unsafe_code)]
mod arithmetic;
mod background;
mod choose;
mod collectives;
mod config;
mod control;
mod devices;
mod engine;
mod environment;
mod error;
mod flight;
mod frame;
mod group;
mod handshake;
mod join;
mod lobby;
mod notice;
mod operation;
mod plan;
mod planted;
mod sealed;
mod secret;
mod session;
mod split;
mod transport;
mod verdict;

pub use background::Pending;
pub use config::{BackendChoice, Config, RdmaOptions};
pub use devices::{
    DeviceMatrix, DeviceMatrixError, MAX_DEVICE_FILE_BYTES, Shape, WiresError, wires_from_json, wires_to_json,
};
pub use environment::{Environment, EnvironmentError, Launcher, Rendezvous};
pub use error::{GroupError, Who};
pub use flight::FlightEntry;
pub use frame::{Algorithm, Descriptor, Element, FrameError, Kind, PROTOCOL_VERSION, Reduction, Wire};
pub use group::{Group, Reduce};
pub use join::JoinError;
pub use notice::{Notice, Notices, no_notices};
pub use plan::segment;
pub use secret::{Secret, new_token};
pub use session::Progress;
pub use transport::Backend;
pub use transport::tcp::TcpOptions;
pub use verdict::{Cause, Verdict};
