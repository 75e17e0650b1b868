//! Plans that move data and reduce nothing.

use std::ops::Range;

use super::{Action, FrameLength, Outgoing, Plan, Source, frames, part};

/// The root sends everything to everyone.
pub(crate) fn broadcast_star(
    rank: usize,
    world: usize,
    root: usize,
    elements: usize,
    links: usize,
    length: FrameLength<'_>,
) -> Plan {
    let mut plan = Plan::default();
    for link in 0..links {
        let region = part(&(0..elements), links, link);
        if rank == root {
            for peer in (1..world).map(|step| (rank + step) % world) {
                let channel = plan.channel(peer, link);
                for frame in frames(&region, length) {
                    plan.send(channel, frame, None, true);
                }
            }
        } else {
            let channel = plan.channel(root, link);
            for frame in frames(&region, length) {
                plan.receive(channel, frame, Action::Store, None);
            }
        }
    }
    plan
}

/// From the root along the ring; every rank passes on what it gets. Each byte leaves the root once.
pub(crate) fn broadcast_chain(
    rank: usize,
    world: usize,
    root: usize,
    elements: usize,
    links: usize,
    length: FrameLength<'_>,
) -> Plan {
    let mut plan = Plan::default();
    let place = (rank + world - root) % world;
    for link in 0..links {
        let from = (place > 0).then(|| plan.channel((rank + world - 1) % world, link));
        let to = (place + 1 < world).then(|| plan.channel((rank + 1) % world, link));
        for frame in frames(&part(&(0..elements), links, link), length) {
            let after = from.map(|from| plan.receive(from, frame.clone(), Action::Store, None));
            if let Some(to) = to {
                plan.send(to, frame, after, true);
            }
        }
    }
    plan
}

/// Block j of `Input` goes to rank j; block j of the data comes from rank j. The caller copies its
/// own block.
pub(crate) fn all_to_all(rank: usize, world: usize, block: usize, links: usize, length: FrameLength<'_>) -> Plan {
    let mut plan = Plan::default();
    for link in 0..links {
        for peer in (1..world).map(|step| (rank + step) % world) {
            let region = part(&(peer * block..(peer + 1) * block), links, link);
            let channel = plan.channel(peer, link);
            for frame in frames(&region, length) {
                let outgoing = Outgoing { source: Source::Input, at: frame.clone(), after: None, is_final: true };
                plan.channels[channel].sends.push(outgoing);
                plan.receive(channel, frame, Action::Store, None);
            }
        }
    }
    plan
}

/// `elements` to (`sending`) or from `peer`.
pub(crate) fn point_to_point(
    peer: usize,
    sending: bool,
    elements: usize,
    links: usize,
    length: FrameLength<'_>,
) -> Plan {
    let mut plan = Plan::default();
    for link in 0..links {
        let channel = plan.channel(peer, link);
        let region: Range<usize> = part(&(0..elements), links, link);
        for frame in frames(&region, length) {
            if sending {
                plan.channels[channel].sends.push(Outgoing {
                    source: Source::Input,
                    at: frame,
                    after: None,
                    is_final: true,
                });
            } else {
                plan.receive(channel, frame, Action::Store, None);
            }
        }
    }
    plan
}
