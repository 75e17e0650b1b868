//! Who this process is among the ranks, and how the ranks find and join each other.
//!
//! **Owns:** the [`Membership`] of a rank and the one join, launchers' variables (`launchers.rs`),
//! hostfiles in MLX's format (`hostfile.rs`), the token (`token.rs`), which host this is
//! (`this_host.rs`, `identity.rs`).
//!
//! **Must never know:** maths, models, recipes, ssh.
//!
//! **Start reading** in `membership.rs`, then `launchers.rs` and `hostfile.rs`, from which
//! memberships are made.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod hostfile;
pub mod identity;
mod launchers;
mod membership;
mod this_host;
mod token;

pub use hostfile::{Host, Hostfile, HostfileError, MAX_HOSTFILE_BYTES, MAX_HOSTS, name_fault};
pub use launchers::{EnvironmentError, HostPort, Launcher};
pub use membership::{Membership, MembershipError, slurm_tasks_without_srun};
pub use this_host::{is_loopback, is_this_host, machine_name, own_name};
