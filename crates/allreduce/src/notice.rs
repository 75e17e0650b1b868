//! What a group tells while it works. A library prints nothing: the program decides what becomes of
//! these.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::frame::Algorithm;
use crate::transport::Backend;

/// Who gets the notices. Called from several threads; must not block.
pub type Notices = Arc<dyn Fn(Notice) + Send + Sync>;

/// Something worth a line of log.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Notice {
    /// A connection was refused; the group is not disturbed.
    Refused {
        /// Where it came from.
        from: SocketAddr,
        /// Why.
        why: String,
    },
    /// A rank that holds the token was turned away, and rank 0 waits for another.
    TurnedAway {
        /// Who, and why.
        what: String,
    },
    /// Rank 0's address is not known yet.
    Unresolved {
        /// The rendezvous.
        address: String,
        /// What the first try said.
        why: String,
    },
    /// Ranks are awaited for a while.
    Waiting {
        /// This rank.
        rank: usize,
        /// Ranks.
        world: usize,
        /// Who started it, for people; may be empty.
        started_by: String,
        /// Who is awaited, where, and what the last try said.
        what: String,
        /// Until it gives up.
        left: Duration,
    },
    /// The group is complete.
    Joined {
        /// Ranks.
        world: usize,
        /// What carries the data.
        backend: Backend,
        /// From the first call to the last rank's readiness.
        took: Duration,
    },
    /// What was asked for or is usual cannot be had; something else is used.
    FellBack {
        /// What is used, and why.
        what: String,
    },
    /// An RDMA connection of this rank is used.
    Wired {
        /// Its devices, addresses and depths.
        wire: String,
    },
    /// How messages will travel, from what was measured.
    Chosen {
        /// Seconds that the smallest operation takes.
        latency: f64,
        /// Each algorithm and the size in bytes from which messages use it.
        algorithms: Vec<(usize, Algorithm)>,
    },
    /// A rank has said nothing for a while.
    Silent {
        /// The rank.
        rank: usize,
        /// Its host.
        host: String,
        /// For how long.
        silence: Duration,
    },
    /// A rank that was silent has said something again.
    Back {
        /// The rank.
        rank: usize,
    },
    /// The group has failed, and this rank has not come to it: it computes, reads or writes for long.
    Failed {
        /// What happened.
        what: String,
        /// This rank.
        rank: usize,
        /// The step that it is in.
        step: u64,
    },
}

impl fmt::Display for Notice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Notice::Refused { from, why } => write!(formatter, "a connection from {from} was refused: {why}"),
            Notice::Unresolved { address, why } => {
                write!(formatter, "rank 0's address {address} cannot be resolved yet ({why}); trying on")
            }
            Notice::Waiting { rank, world, started_by, what, left } => {
                write!(formatter, "rank {rank} of {world}")?;
                if !started_by.is_empty() {
                    write!(formatter, " (by {started_by})")?;
                }
                write!(formatter, ": {what}; {} s more", left.as_secs())
            }
            Notice::Joined { world, backend, took } => {
                write!(formatter, "{world} ranks joined over {backend} in {:.0} ms", took.as_secs_f64() * 1e3)
            }
            Notice::TurnedAway { what } => formatter.write_str(what),
            Notice::Wired { wire } => formatter.write_str(wire),
            Notice::FellBack { what } => formatter.write_str(what),
            Notice::Chosen { latency, algorithms } => {
                if *latency > 0.0 {
                    write!(formatter, "the smallest all-reduce takes {:.0} µs; ", latency * 1e6)?;
                }
                write!(formatter, "messages go by")?;
                for (n, (from, algorithm)) in algorithms.iter().enumerate() {
                    match (n, from) {
                        (0, _) => write!(formatter, " {algorithm}")?,
                        (_, from) if *from < 1024 => write!(formatter, ", from {from} bytes by {algorithm}")?,
                        (_, from) => write!(formatter, ", from {} KiB by {algorithm}", from >> 10)?,
                    }
                }
                Ok(())
            }
            Notice::Silent { rank, host, silence } => {
                write!(formatter, "rank {rank} ({host}) has said nothing for {:.1} s", silence.as_secs_f64())
            }
            Notice::Back { rank } => write!(formatter, "rank {rank} is heard again"),
            Notice::Failed { what, rank, step } => {
                write!(formatter, "{what}; rank {rank} is still at work in step {step} and ends after that")
            }
        }
    }
}

/// Drops all notices.
pub fn no_notices() -> Notices {
    Arc::new(|_| {})
}
