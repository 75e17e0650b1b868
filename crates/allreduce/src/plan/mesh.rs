//! Plans over every pair of ranks.
//!
//! **Order of summation: rank order.** Each element is ((x0 ⊕ x1) ⊕ x2) ⊕ … ⊕ x(N-1), whether every
//! rank sums everything ([`crate::Algorithm::Direct`]), each rank one segment
//! ([`crate::Algorithm::Mesh`]) or rank 0 everything ([`crate::Algorithm::Star`]); the three give
//! the same bits.

use std::ops::Range;

use super::{Action, After, FrameLength, Plan, Source, frames, part, segment};

/// How many frames the first ranks' sums may run ahead of this rank's own contribution. Bounds the
/// scratch memory to what stays in a processor's cache.
const WINDOW: usize = 4;

/// What the reduction covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// Every rank reduces the whole buffer, sending from the untouched `Input`.
    Everything,
    /// Every rank reduces its own segment.
    Segment {
        /// Then hands it to all others.
        gather: bool,
    },
}

/// All-reduce or reduce-scatter over all pairs, each pair with `links` links.
pub(crate) fn mesh_reduce(
    rank: usize,
    world: usize,
    elements: usize,
    links: usize,
    share: Share,
    length: FrameLength<'_>,
) -> Plan {
    let mut plan = Plan::default();
    let region = |owner: usize, link: usize| match share {
        Share::Everything => part(&(0..elements), links, link),
        Share::Segment { .. } => part(&segment(elements, world, owner), links, link),
    };
    for link in 0..links {
        let channels: Vec<usize> =
            (0..world).map(|peer| if peer == rank { usize::MAX } else { plan.channel(peer, link) }).collect();
        // What the others reduce. Each rank starts with the next one, so that not all send to rank
        // 0 first.
        let others = (1..world).map(|step| (rank + step) % world);
        for peer in others.clone() {
            for frame in frames(&region(peer, link), length) {
                plan.send(channels[peer], frame, None, false);
                if share == Share::Everything {
                    plan.channels[channels[peer]].sends.last_mut().expect("just sent").source = Source::Input;
                }
            }
        }
        let mine = frames(&region(rank, link), length);
        let complete = sum_in_rank_order(&mut plan, rank, world, &channels, &mine);
        if share == (Share::Segment { gather: true }) {
            for peer in others {
                for (frame, after) in mine.iter().zip(&complete) {
                    plan.send(channels[peer], frame.clone(), *after, true);
                }
                for frame in frames(&region(peer, link), length) {
                    plan.receive(channels[peer], frame, Action::Store, None);
                }
            }
        }
    }
    plan
}

/// Receives every peer's part of `mine` and sums in rank order. Returns, for each frame, the
/// receive that completes it.
fn sum_in_rank_order(
    plan: &mut Plan,
    rank: usize,
    world: usize,
    channels: &[usize],
    mine: &[Range<usize>],
) -> Vec<Option<After>> {
    let longest = mine.iter().map(Range::len).max().unwrap_or(0);
    let base = plan.scratch;
    if rank > 1 {
        plan.scratch += longest * WINDOW.min(mine.len());
    }
    let mut complete = vec![None; mine.len()];
    for peer in (0..world).filter(|&peer| peer != rank) {
        for (index, frame) in mine.iter().enumerate() {
            let at = base + (index % WINDOW) * longest;
            let action = match peer {
                _ if peer > rank => Action::Add,
                0 if rank == 1 => Action::AddBefore,
                0 => Action::Scratch { at },
                _ if peer + 1 == rank => Action::Join { at },
                _ => Action::ScratchAdd { at },
            };
            // Rank 0's frame waits until the scratch of WINDOW frames ago is free; the other ranks'
            // frames wait for the rank before.
            let mut after = complete[index];
            if peer == 0 && rank > 1 && index >= WINDOW {
                after = Some(After { channel: channels[rank - 1], receives: index - WINDOW + 1 });
            }
            complete[index] = Some(plan.receive(channels[peer], frame.clone(), action, after));
        }
    }
    complete
}

/// All-reduce through rank 0.
pub(crate) fn star_reduce(rank: usize, world: usize, elements: usize, length: FrameLength<'_>) -> Plan {
    let mut plan = Plan::default();
    let frames = frames(&(0..elements), length);
    if rank > 0 {
        let channel = plan.channel(0, 0);
        for frame in frames {
            plan.send(channel, frame.clone(), None, false);
            plan.receive(channel, frame, Action::Store, None);
        }
        return plan;
    }
    let mut complete = vec![None; frames.len()];
    for peer in 1..world {
        let channel = plan.channel(peer, 0);
        for (frame, complete) in frames.iter().zip(&mut complete) {
            *complete = Some(plan.receive(channel, frame.clone(), Action::Add, *complete));
        }
    }
    for channel in 0..world - 1 {
        for (frame, after) in frames.iter().zip(&complete) {
            plan.send(channel, frame.clone(), *after, true);
        }
    }
    plan
}

/// All-gather over all pairs: `block` elements per rank, this rank's own already in its place.
pub(crate) fn mesh_all_gather(rank: usize, world: usize, block: usize, links: usize, length: FrameLength<'_>) -> Plan {
    let mut plan = Plan::default();
    for link in 0..links {
        let region = |owner: usize| part(&(owner * block..(owner + 1) * block), links, link);
        for peer in (1..world).map(|step| (rank + step) % world) {
            let channel = plan.channel(peer, link);
            for frame in frames(&region(rank), length) {
                plan.send(channel, frame, None, true);
            }
            for frame in frames(&region(peer), length) {
                plan.receive(channel, frame, Action::Store, None);
            }
        }
    }
    plan
}
