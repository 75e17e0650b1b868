//! Plans around a ring: each rank talks to its two neighbours only.
//!
//! **Order of summation: around the ring, ending at the segment's owner.** Going forward, an
//! element of segment s is ((x(s+1) ⊕ x(s+2)) ⊕ …) ⊕ x(s), ranks modulo N; going backward ((x(s-1)
//! ⊕ x(s-2)) ⊕ …) ⊕ x(s). With more than two ranks the first half of each long segment goes forward
//! and the second backward.

use std::ops::Range;

use super::{Action, After, FrameLength, Plan, frames, part, segment};

/// Fewest elements of a segment for which a further lane is faster in spite of its frames.
const LANE_ELEMENTS: usize = 2048;

/// One way around, over one link of each neighbour.
struct Lane {
    directions: usize,
    backward: bool,
    links: usize,
    link: usize,
}

impl Lane {
    /// The part of a segment that goes this way: one half per direction, each cut among the links.
    /// So the direction of an element, and with it the order of its summation, does not depend on
    /// the number of links.
    fn part(&self, segment: &Range<usize>) -> Range<usize> {
        part(&part(segment, self.directions, usize::from(self.backward)), self.links, self.link)
    }
}

/// The lanes of a ring whose neighbours are joined by `links` links. Two ranks have one neighbour
/// each: a second direction would use the same cables.
fn lanes(world: usize, links: usize, segment_elements: usize) -> Vec<Lane> {
    let directions = if world > 2 && segment_elements >= 2 * LANE_ELEMENTS { 2 } else { 1 };
    let links = (segment_elements / LANE_ELEMENTS / directions).clamp(1, links.max(1));
    let lane = |index| Lane { directions, backward: index % directions == 1, links, link: index / directions };
    (0..links * directions).map(lane).collect()
}

/// The ring as one lane of one rank sees it.
struct RingView {
    rank: usize,
    world: usize,
    backward: bool,
    to: usize,
    from: usize,
}

impl RingView {
    fn new(plan: &mut Plan, rank: usize, world: usize, lane: &Lane) -> RingView {
        let (next, previous) = ((rank + 1) % world, (rank + world - 1) % world);
        let (to, from) = if lane.backward { (previous, next) } else { (next, previous) };
        let (to, from) = (plan.channel(to, lane.link), plan.channel(from, lane.link));
        RingView { rank, world, backward: lane.backward, to, from }
    }

    /// The rank `steps` places before this one on the ring.
    fn before(&self, steps: usize) -> usize {
        let steps = steps % self.world;
        (if self.backward { self.rank + steps } else { self.rank + self.world - steps }) % self.world
    }
}

/// All-reduce (`gather`) or reduce-scatter around the ring.
pub(crate) fn ring_reduce(
    rank: usize,
    world: usize,
    elements: usize,
    links: usize,
    gather: bool,
    length: FrameLength<'_>,
) -> Plan {
    let mut plan = Plan::default();
    let lanes = lanes(world, links, elements / world);
    for lane in &lanes {
        let ring = RingView::new(&mut plan, rank, world, lane);
        let region = |owner: usize| frames(&lane.part(&segment(elements, world, owner)), length);
        // The segment that ends at the rank before this one starts here. What arrives is passed on
        // with our own data added.
        let mut outgoing: Vec<(Range<usize>, Option<After>)> =
            region(ring.before(1)).into_iter().map(|frame| (frame, None)).collect();
        for step in 0..world - 1 {
            for (frame, after) in outgoing.drain(..) {
                plan.send(ring.to, frame, after, false);
            }
            for frame in region(ring.before(step + 2)) {
                let after = plan.receive(ring.from, frame.clone(), Action::AddBefore, None);
                outgoing.push((frame, Some(after)));
            }
        }
        if gather {
            pass_around(&mut plan, &ring, outgoing, &region);
        }
    }
    plan
}

/// Sends the owner's frames around until all ranks have them.
fn pass_around(
    plan: &mut Plan,
    ring: &RingView,
    mut outgoing: Vec<(Range<usize>, Option<After>)>,
    region: &dyn Fn(usize) -> Vec<Range<usize>>,
) {
    for step in 0..ring.world - 1 {
        for (frame, after) in outgoing.drain(..) {
            plan.send(ring.to, frame, after, step == 0);
        }
        for frame in region(ring.before(step + 1)) {
            let after = plan.receive(ring.from, frame.clone(), Action::Store, None);
            outgoing.push((frame, Some(after)));
        }
    }
}

/// All-gather around the ring: `block` elements per rank, this rank's own already in its place.
pub(crate) fn ring_all_gather(rank: usize, world: usize, block: usize, links: usize, length: FrameLength<'_>) -> Plan {
    let mut plan = Plan::default();
    let lanes = lanes(world, links, block);
    for lane in &lanes {
        let ring = RingView::new(&mut plan, rank, world, lane);
        let region = |owner: usize| frames(&lane.part(&(owner * block..(owner + 1) * block)), length);
        let outgoing = region(rank).into_iter().map(|frame| (frame, None)).collect();
        pass_around(&mut plan, &ring, outgoing, &region);
    }
    plan
}
