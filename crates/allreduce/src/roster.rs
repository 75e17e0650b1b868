//! Who is in a group, as rank 0 tells it; or why there is none.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// A rank as the roster lists it. The roster has this rank too, so an entry is a member rather than
/// a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub(crate) host: String,
    pub(crate) pid: u32,
    /// Its addresses, the likeliest first.
    pub(crate) addresses: Vec<SocketAddr>,
}

/// What rank 0 says to a rank that has called.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Refused { rank: usize, host: String, why: String },
    Missing { missing: String, seconds: u64, here: usize, world: usize },
    OtherRun { run: String },
    Failed { rank: usize, host: String, why: String, code: u8 },
    Roster { session: u64, streams: usize, members: Vec<Member> },
}
