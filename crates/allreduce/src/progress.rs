//! How far a rank has come, as its heartbeats say.

use serde::{Deserialize, Serialize};

use crate::frame::Descriptor;

/// Where a rank is, as its heartbeats say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The caller's step, as set by [`crate::Group::set_step`].
    pub step: u64,
    /// Operations begun.
    pub operation: u64,
    /// Whether the rank is inside that operation now.
    pub inside: bool,
    /// Payload bytes sent and received so far.
    pub moved: u64,
    /// The collective operation that the rank is inside now.
    pub doing: Option<CurrentOperation>,
}

/// A collective operation as one rank sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CurrentOperation {
    /// The group, which may be one within the first group.
    pub group: u64,
    /// The number of the operation in that group.
    pub operation: u64,
    /// What it is.
    pub descriptor: Descriptor,
}
