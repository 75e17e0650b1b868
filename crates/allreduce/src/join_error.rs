//! Why a group did not come about.

use std::io;

use finetune_advice::Advice;
use thiserror::Error;

/// What a rank met at rank 0's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Met {
    /// Nothing that answers.
    Nobody,
    /// Nothing, and the address is one of this rank's own machine.
    Itself,
    /// Something that takes connections and says nothing.
    Silence,
    /// A rank with another token.
    OtherToken,
    /// A rank that speaks another version of the protocol.
    OtherVersion,
    /// A rank of another run.
    OtherRun,
    /// Another program.
    OtherProgram,
}

impl Met {
    /// What to do about it.
    fn hint(self) -> &'static str {
        match self {
            Self::Nobody => "is rank 0 running there, and does a firewall let the port through?",
            Self::Itself => {
                "is rank 0 running on this machine? If it is on another one, name that one: not localhost, and not this machine"
            }
            Self::Silence => {
                "another program may listen there, or rank 0 may be frozen: each run needs a port of its own"
            }
            Self::OtherToken => "all ranks need the same token, and each run a port of its own",
            Self::OtherVersion => "all ranks need the same version of the program",
            Self::OtherRun | Self::OtherProgram => {
                "each run needs a port of its own, at which nothing else listens on rank 0's machine"
            }
        }
    }
}

/// A group that did not come about.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum JoinError {
    /// The configuration cannot work.
    #[error("{0}")]
    Config(String),
    /// Rank 0 cannot take connections.
    #[error("rank 0 cannot listen at {address}: {error}")]
    Listen {
        /// The rendezvous.
        address: String,
        /// The system's message.
        error: io::Error,
    },
    /// Another process of this run is rank 0 already.
    #[error("this process cannot be rank 0 at {address}: {who}")]
    SecondRankZero {
        /// The rendezvous.
        address: String,
        /// Who is rank 0.
        who: String,
    },
    /// Rank 0 was not reached.
    #[error("rank {rank} did not reach rank 0 at {address} within {seconds} s: {last}")]
    Unreachable {
        /// This rank.
        rank: usize,
        /// The rendezvous.
        address: String,
        /// How long it tried.
        seconds: u64,
        /// What the last try said.
        last: String,
        /// What is at the address.
        met: Met,
    },
    /// The rendezvous address could not be resolved.
    #[error("rank 0's address {address} could not be resolved within {seconds} s: {error}")]
    Unresolved {
        /// The rendezvous.
        address: String,
        /// How long it tried.
        seconds: u64,
        /// What the last try said.
        error: io::Error,
    },
    /// Ranks are missing.
    #[error("{missing} did not join within {seconds} s; {here} of {world} ranks are here")]
    Missing {
        /// The missing ranks, as text for people.
        missing: String,
        /// How long rank 0 waited.
        seconds: u64,
        /// Ranks that came, this one included.
        here: usize,
        /// Ranks that were due.
        world: usize,
        /// The rendezvous.
        address: String,
    },
    /// Ranks do not agree on what they are about to do.
    #[error("rank {rank} ({host}) cannot join: {why}")]
    Differs {
        /// The rank.
        rank: usize,
        /// Its host.
        host: String,
        /// What differs.
        why: String,
    },
    /// A rank failed before it could join.
    #[error("rank {rank} ({host}) failed before it joined: {why}")]
    Failed {
        /// The rank.
        rank: usize,
        /// Its host.
        host: String,
        /// Its error.
        why: String,
        /// Its exit code.
        code: u8,
    },
    /// Two ranks that rank 0 has heard of do not reach each other.
    #[error("rank {rank} ({host}) cannot connect to rank {peer} ({peer_host}): {tried}")]
    Pair {
        /// Who called.
        rank: usize,
        /// Its host.
        host: String,
        /// Who was called.
        peer: usize,
        /// Its host.
        peer_host: String,
        /// The addresses that were tried, and what came of each.
        tried: String,
    },
    /// A connection within the group failed while it was being set up.
    #[error("rank {rank} lost rank {peer} while the group was set up: {why}")]
    Peer {
        /// This rank.
        rank: usize,
        /// The other.
        peer: usize,
        /// What happened.
        why: String,
    },
    /// The system refused something.
    #[error("{what}: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's message.
        error: io::Error,
    },
    /// RDMA was asked for and is not available.
    #[error("RDMA cannot be used: {0}")]
    Rdma(String),
    /// The group failed while it was being tried out.
    #[error("{0}")]
    Group(crate::error::GroupError),
}

impl Advice for JoinError {
    fn hints(&self) -> Vec<String> {
        let hint = match self {
            Self::Listen { error, .. } if error.kind() == io::ErrorKind::AddrNotAvailable => {
                return vec![
                    "the rendezvous address must be one of rank 0's machine, with a free port".to_owned(),
                    "if it leads there all the same (a service of Kubernetes, a published port): 0.0.0.0 as the address on rank 0 alone listens at all it has".to_owned(),
                ];
            }
            Self::Listen { error, .. } if error.kind() == io::ErrorKind::AddrInUse => {
                "another program listens at that port: take another one (MASTER_PORT, `launch --port`)"
            }
            Self::Listen { .. } => "the rendezvous address must be one of rank 0's machine, with a free port",
            Self::SecondRankZero { .. } => "give each process its own rank, each run its own port",
            Self::Unreachable { met, .. } => met.hint(),
            Self::Unresolved { .. } => "is the name right?",
            Self::Missing { missing, address, .. } => {
                return vec![format!("look at the output of {missing}, and whether its machine reaches {address}")];
            }
            Self::Pair { host, peer_host, .. } => {
                return vec![
                    format!("does a firewall on {peer_host} let {host} in, and is there a way between the two?"),
                    "distributed.ports in the recipe, or `launch --port FIRST-LAST`, chooses the ports of all ranks, \"ips\" in a hostfile their addresses"
                        .to_owned(),
                ];
            }
            Self::Rdma(_) => "set the backend to auto or tcp to go over TCP",
            Self::Group(error) => return error.hints(),
            Self::Config(_) | Self::Differs { .. } | Self::Failed { .. } | Self::Peer { .. } | Self::System { .. } => {
                return Vec::new();
            }
        };
        vec![hint.to_owned()]
    }
}
