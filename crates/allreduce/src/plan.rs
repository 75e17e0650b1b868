//! An operation as data: which frames a rank sends and receives on which link, in which order, and
//! what is done with them.
//!
//! The algorithms (`mesh.rs`, `ring.rs`, `data_movement.rs`) only make such plans; `operation.rs`
//! carries them out over any transport. A plan is a pure function of the operation, the rank and
//! the world. So all ranks' plans fit together, and a test can carry them out in memory in every
//! order of arrival.
//!
//! The **order of summation** is fixed by the plan: frames of one link come in order, and a frame
//! that depends on another link says so in `after`. A frame that arrives early waits in its socket
//! or slot.

mod data_movement;
mod mesh;
mod ring;

use std::ops::Range;

pub(crate) use data_movement::point_to_point;
use data_movement::{all_to_all, broadcast_chain, broadcast_star};
use mesh::{Share, mesh_all_gather, mesh_reduce, star_reduce};
use ring::{ring_all_gather, ring_reduce};

use crate::frame::{Algorithm, Descriptor, Kind};

/// What a rank does in one operation. Ranges count elements of the caller's buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) channels: Vec<Channel>,
    /// Elements of scratch memory that the actions use.
    pub(crate) scratch: usize,
}

/// The frames of one link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Channel {
    pub(crate) peer: usize,
    pub(crate) link: usize,
    pub(crate) sends: Vec<Outgoing>,
    pub(crate) receives: Vec<Incoming>,
}

/// A frame to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outgoing {
    pub(crate) source: Source,
    pub(crate) at: Range<usize>,
    pub(crate) after: Option<After>,
    /// These elements are final. With a narrow wire type they are rounded here too, so that this
    /// rank holds what it sends.
    pub(crate) is_final: bool,
}

/// Where outgoing elements are read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The buffer that the operation works on.
    Data,
    /// A second buffer that the operation does not change.
    Input,
}

/// A frame to receive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Incoming {
    /// Elements of the data that the frame is for.
    pub(crate) at: Range<usize>,
    pub(crate) action: Action,
    pub(crate) after: Option<After>,
}

/// What is done with a frame (`in`), for reduction ⊕. Operands keep the order of the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// data = in
    Store,
    /// data = data ⊕ in
    Add,
    /// data = in ⊕ data
    AddBefore,
    /// scratch = in
    Scratch { at: usize },
    /// scratch = scratch ⊕ in
    ScratchAdd { at: usize },
    /// data = (scratch ⊕ in) ⊕ data
    Join { at: usize },
}

/// A frame is due when this channel has dealt with so many of its receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct After {
    pub(crate) channel: usize,
    pub(crate) receives: usize,
}

/// How long frames are, in elements: a function of the elements that remain.
pub(crate) type FrameLength<'a> = &'a dyn Fn(usize) -> usize;

/// The `index`-th of `parts` nearly equal parts of a range. If it does not divide evenly, the first
/// parts are one longer.
pub(crate) fn part(range: &Range<usize>, parts: usize, index: usize) -> Range<usize> {
    let (length, rest) = (range.len() / parts, range.len() % parts);
    let start = range.start + index * length + index.min(rest);
    start..start + length + usize::from(index < rest)
}

/// The elements of a buffer that `rank` reduces, in `reduce_scatter` and in the two-step
/// algorithms.
pub fn segment(elements: usize, world: usize, rank: usize) -> Range<usize> {
    part(&(0..elements), world, rank)
}

/// The plan of one rank for a collective operation, with `links` links to each peer.
pub(crate) fn collective(
    descriptor: &Descriptor,
    rank: usize,
    world: usize,
    links: usize,
    length: FrameLength<'_>,
) -> Plan {
    let Descriptor { kind, algorithm, root, .. } = *descriptor;
    let elements = descriptor.elements as usize;
    let block = elements / world;
    match (kind, algorithm) {
        (Kind::AllReduce | Kind::Barrier, Algorithm::Star) => star_reduce(rank, world, elements, length),
        (Kind::AllReduce, Algorithm::Direct) => mesh_reduce(rank, world, elements, links, Share::Everything, length),
        (Kind::AllReduce, Algorithm::Mesh) => {
            mesh_reduce(rank, world, elements, links, Share::Segment { gather: true }, length)
        }
        (Kind::AllReduce, Algorithm::Ring) => ring_reduce(rank, world, elements, links, true, length),
        (Kind::ReduceScatter, Algorithm::Ring) => ring_reduce(rank, world, elements, links, false, length),
        (Kind::ReduceScatter, _) => mesh_reduce(rank, world, elements, links, Share::Segment { gather: false }, length),
        (Kind::AllGather, Algorithm::Ring) => ring_all_gather(rank, world, block, links, length),
        (Kind::AllGather, _) => mesh_all_gather(rank, world, block, links, length),
        (Kind::Broadcast, Algorithm::Direct | Algorithm::Star) => {
            broadcast_star(rank, world, usize::from(root), elements, links, length)
        }
        (Kind::Broadcast, _) => broadcast_chain(rank, world, usize::from(root), elements, links, length),
        (Kind::AllToAll, _) => all_to_all(rank, world, block, links, length),
        (Kind::Barrier, Algorithm::Ring) => ring_all_gather(rank, world, 0, 1, length),
        (Kind::Barrier, _) => mesh_all_gather(rank, world, 0, 1, length),
        (Kind::Send, _) => unreachable!("a message between two ranks has a plan of its own"),
    }
}

/// The elements of its own data that `rank` rounds to a narrow wire type before an all-reduce:
/// those that it adds without sending them.
pub(crate) fn rounded_before(algorithm: Algorithm, elements: usize, world: usize, rank: usize) -> Range<usize> {
    match algorithm {
        Algorithm::Direct => 0..elements,
        Algorithm::Mesh => segment(elements, world, rank),
        Algorithm::Star if rank == 0 => 0..elements,
        Algorithm::Star | Algorithm::Ring => 0..0,
    }
}

/// A range cut into frames: at least one, which has no elements if the range has none. So ranks
/// always hear each other.
fn frames(range: &Range<usize>, length: FrameLength<'_>) -> Vec<Range<usize>> {
    let mut frames = Vec::new();
    let mut start = range.start;
    while start < range.end {
        let end = start + length(range.end - start).clamp(1, range.end - start);
        frames.push(start..end);
        start = end;
    }
    if frames.is_empty() {
        frames.push(range.clone());
    }
    frames
}

impl Plan {
    fn channel(&mut self, peer: usize, link: usize) -> usize {
        let known = self.channels.iter().position(|channel| (channel.peer, channel.link) == (peer, link));
        known.unwrap_or_else(|| {
            self.channels.push(Channel { peer, link, sends: Vec::new(), receives: Vec::new() });
            self.channels.len() - 1
        })
    }

    fn send(&mut self, channel: usize, at: Range<usize>, after: Option<After>, is_final: bool) {
        self.channels[channel].sends.push(Outgoing { source: Source::Data, at, after, is_final });
    }

    /// Adds a receive. Returns the `after` of a frame that waits for it.
    fn receive(&mut self, channel: usize, at: Range<usize>, action: Action, after: Option<After>) -> After {
        let receives = &mut self.channels[channel].receives;
        receives.push(Incoming { at, action, after });
        After { channel, receives: receives.len() }
    }
}

#[cfg(test)]
mod tests;
