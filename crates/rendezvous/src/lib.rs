//! Who this process is among the ranks, and how the ranks find each other.
//!
//! **Owns:** launchers' variables (`launchers.rs`), hostfiles in MLX's format (`hostfile.rs`), which machine this is
//! (`identity.rs`).
//!
//! **Must never know:** maths, models, recipes, ssh.
//!
//! **Start reading** in `launchers.rs`.

#![forbid(unsafe_code)]

mod hostfile;
pub mod identity;
mod launchers;

pub use hostfile::{
    Host, Hostfile, HostfileError, MAX_HOSTFILE_BYTES, MAX_HOSTS, is_loopback, machine_name, name_fault,
};
pub use launchers::{Environment, EnvironmentError, Launcher, Rendezvous};
