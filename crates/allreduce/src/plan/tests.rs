//! Carries out the plans of all ranks in memory, in seeded random orders of arrival.

use std::collections::{BTreeMap, VecDeque};

use super::*;
use crate::arithmetic;
use crate::frame::Reduction;

/// A small generator (SplitMix64) so that a failure can be replayed from its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// About -4..4, with all bits of the mantissa in use: sums of these round.
    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 21) as f32 - 4.0
    }
}

/// Runs the plans to their end; every rank's data is changed in place.
fn carry_out(plans: &[Plan], data: &mut [Vec<f32>], inputs: &[Vec<f32>], random: &mut Random) {
    let mut wires: BTreeMap<(usize, usize, usize), VecDeque<Vec<f32>>> = BTreeMap::new();
    let mut scratch: Vec<Vec<f32>> = plans.iter().map(|plan| vec![f32::NAN; plan.scratch]).collect();
    let mut cursors: Vec<Vec<(usize, usize)>> = plans.iter().map(|plan| vec![(0, 0); plan.channels.len()]).collect();
    loop {
        // Everything that could happen now; one of it does.
        let mut possible = Vec::new();
        let mut left = 0;
        for (rank, plan) in plans.iter().enumerate() {
            let due =
                |after: &Option<After>| after.is_none_or(|after| cursors[rank][after.channel].1 >= after.receives);
            for (index, channel) in plan.channels.iter().enumerate() {
                let (sent, received) = cursors[rank][index];
                left += channel.sends.len() - sent + channel.receives.len() - received;
                if channel.sends.get(sent).is_some_and(|frame| due(&frame.after)) {
                    possible.push((rank, index, true));
                }
                let arrived = wires.get(&(channel.peer, rank, channel.link)).is_some_and(|wire| !wire.is_empty());
                if arrived && channel.receives.get(received).is_some_and(|frame| due(&frame.after)) {
                    possible.push((rank, index, false));
                }
            }
        }
        if left == 0 {
            break;
        }
        assert!(!possible.is_empty(), "deadlock with {left} frames to go");
        let (rank, index, sending) = possible[random.below(possible.len())];
        let channel = &plans[rank].channels[index];
        if sending {
            let frame = &channel.sends[cursors[rank][index].0];
            let source = if frame.source == Source::Input { &inputs[rank] } else { &data[rank] };
            let payload = source[frame.at.clone()].to_vec();
            wires.entry((rank, channel.peer, channel.link)).or_default().push_back(payload);
            cursors[rank][index].0 += 1;
            continue;
        }
        let frame = &channel.receives[cursors[rank][index].1];
        let wire = wires.get_mut(&(channel.peer, rank, channel.link)).expect("it has arrived");
        let incoming = wire.pop_front().expect("it has arrived");
        assert_eq!(incoming.len(), frame.at.len(), "both ends cut the message alike");
        let (data, scratch, length) = (&mut data[rank][frame.at.clone()], &mut scratch[rank], frame.at.len());
        match frame.action {
            Action::Store => data.copy_from_slice(&incoming),
            Action::Add => arithmetic::add(Reduction::Sum, data, &incoming),
            Action::AddBefore => arithmetic::add_before(Reduction::Sum, data, &incoming),
            Action::Scratch { at } => scratch[at..at + length].copy_from_slice(&incoming),
            Action::ScratchAdd { at } => arithmetic::add(Reduction::Sum, &mut scratch[at..at + length], &incoming),
            Action::Join { at } => arithmetic::join(Reduction::Sum, data, &scratch[at..at + length], &incoming),
        }
        cursors[rank][index].1 += 1;
    }
    assert!(wires.values().all(VecDeque::is_empty), "frames were sent that nobody receives");
}

fn bits(data: &[f32]) -> Vec<u32> {
    data.iter().map(|value| value.to_bits()).collect()
}

const WORLDS: [usize; 6] = [2, 3, 4, 5, 8, 16];

/// Sizes around the edges: fewer elements than ranks, uneven segments, several frames, several
/// lanes.
fn sizes(world: usize) -> Vec<usize> {
    vec![0, 1, world - 1, world, world + 1, 63, 64 * world + 3, 1000 * world + 7]
}

fn rank_order(inputs: &[Vec<f32>]) -> Vec<f32> {
    let mut sum = inputs[0].clone();
    for input in &inputs[1..] {
        arithmetic::add(Reduction::Sum, &mut sum, input);
    }
    sum
}

#[test]
fn meshes_sum_in_rank_order_whatever_arrives_first() {
    for world in WORLDS {
        for elements in sizes(world) {
            for (links, share) in
                [(1, Share::Everything), (1, Share::Segment { gather: true }), (3, Share::Segment { gather: true })]
            {
                let seed = (world * 1_000_003 + elements * 17 + links) as u64;
                let mut random = Random(seed);
                let inputs: Vec<Vec<f32>> =
                    (0..world).map(|_| (0..elements).map(|_| random.float()).collect()).collect();
                let plans: Vec<Plan> = (0..world)
                    .map(|rank| mesh_reduce(rank, world, elements, links, share, &|left| left.min(48)))
                    .collect();
                let mut data = inputs.clone();
                carry_out(&plans, &mut data, &inputs, &mut random);
                for (rank, data) in data.iter().enumerate() {
                    let same = bits(data) == bits(&rank_order(&inputs));
                    assert!(same, "rank {rank} of {world}, {elements} elements, {share:?}, {links} links, seed {seed}");
                }
            }
        }
    }
}

/// The order that the documentation states, element by element.
fn ring_order(inputs: &[Vec<f32>], element: usize, owner: usize, backward: bool) -> f32 {
    let world = inputs.len();
    let place = |step: usize| if backward { (owner + world - step) % world } else { (owner + step) % world };
    let mut sum = inputs[place(1)][element];
    for step in 2..=world {
        sum += inputs[place(step)][element];
    }
    sum
}

#[test]
fn stars_sum_in_rank_order_too() {
    for world in WORLDS {
        for elements in sizes(world) {
            let mut random = Random((world * 77 + elements) as u64);
            let inputs: Vec<Vec<f32>> = (0..world).map(|_| (0..elements).map(|_| random.float()).collect()).collect();
            let plans: Vec<Plan> =
                (0..world).map(|rank| star_reduce(rank, world, elements, &|left| left.min(48))).collect();
            let mut data = inputs.clone();
            carry_out(&plans, &mut data, &inputs, &mut random);
            assert!(data.iter().all(|data| bits(data) == bits(&rank_order(&inputs))), "{world} ranks, {elements}");
        }
    }
}

#[test]
fn rings_sum_around_to_the_owner() {
    for world in WORLDS {
        for elements in [0, 1, world + 1, 100 * world + 7, 5000 * world] {
            for links in [1, 2] {
                let seed = (world * 7919 + elements + links) as u64;
                let mut random = Random(seed);
                let inputs: Vec<Vec<f32>> =
                    (0..world).map(|_| (0..elements).map(|_| random.float()).collect()).collect();
                let plans: Vec<Plan> = (0..world)
                    .map(|rank| ring_reduce(rank, world, elements, links, true, &|left| left.min(1024)))
                    .collect();
                let mut data = inputs.clone();
                carry_out(&plans, &mut data, &inputs, &mut random);
                // The direction of an element does not depend on the number of links.
                let directions = if world > 2 && elements / world >= 4096 { 2 } else { 1 };
                for owner in 0..world {
                    for direction in 0..directions {
                        for element in part(&segment(elements, world, owner), directions, direction) {
                            let expected = ring_order(&inputs, element, owner, direction == 1);
                            for (rank, data) in data.iter().enumerate() {
                                let same = data[element].to_bits() == expected.to_bits();
                                assert!(same, "rank {rank} of {world}, element {element} of {elements}, seed {seed}");
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn reduce_scatter_leaves_each_rank_its_own_segment() {
    for world in WORLDS {
        for elements in sizes(world) {
            let mut random = Random((world + elements) as u64);
            let inputs: Vec<Vec<f32>> =
                (0..world).map(|_| (0..elements).map(|_| random.below(1000) as f32).collect()).collect();
            let expected = rank_order(&inputs); // whole numbers: any order gives the same
            for ring in [false, true] {
                let plan = |rank| match ring {
                    true => ring_reduce(rank, world, elements, 2, false, &|left| left.min(100)),
                    false => {
                        mesh_reduce(rank, world, elements, 2, Share::Segment { gather: false }, &|left| left.min(100))
                    }
                };
                let plans: Vec<Plan> = (0..world).map(plan).collect();
                let mut data = inputs.clone();
                carry_out(&plans, &mut data, &inputs, &mut random);
                for (rank, data) in data.iter().enumerate() {
                    let mine = segment(elements, world, rank);
                    assert_eq!(data[mine.clone()], expected[mine], "rank {rank} of {world}, {elements}, ring {ring}");
                }
            }
        }
    }
}

#[test]
fn moves_put_everything_in_its_place() {
    for world in WORLDS {
        for block in [0, 1, 5, 333, 5000] {
            let mut random = Random((world * 31 + block) as u64);
            let length = |left: usize| left.min(64);
            let value = |rank: usize, element: usize| (rank * 100_000 + element) as f32;

            for ring in [false, true] {
                for links in [1, 2, 3] {
                    let gather = if ring { ring_all_gather } else { mesh_all_gather };
                    let plans: Vec<Plan> = (0..world).map(|rank| gather(rank, world, block, links, &length)).collect();
                    let whole: Vec<f32> = (0..world).flat_map(|rank| (0..block).map(move |i| value(rank, i))).collect();
                    let mut data = vec![vec![f32::NAN; world * block]; world];
                    for (rank, data) in data.iter_mut().enumerate() {
                        data[rank * block..(rank + 1) * block]
                            .copy_from_slice(&whole[rank * block..(rank + 1) * block]);
                    }
                    carry_out(&plans, &mut data, &[], &mut random);
                    assert!(
                        data.iter().all(|data| *data == whole),
                        "all_gather {world} {block} ring {ring} links {links}"
                    );
                }
            }

            for root in [0, world / 2, world - 1] {
                for broadcast in [broadcast_star, broadcast_chain] {
                    let plans: Vec<Plan> =
                        (0..world).map(|rank| broadcast(rank, world, root, block, 2, &length)).collect();
                    let mut data = vec![vec![f32::NAN; block]; world];
                    data[root] = (0..block).map(|i| value(root, i)).collect();
                    let expected = data[root].clone();
                    carry_out(&plans, &mut data, &[], &mut random);
                    assert!(data.iter().all(|data| *data == expected), "broadcast {world} {block} from {root}");
                }
            }

            let inputs: Vec<Vec<f32>> =
                (0..world).map(|rank| (0..world * block).map(|i| value(rank, i)).collect()).collect();
            let plans: Vec<Plan> = (0..world).map(|rank| all_to_all(rank, world, block, 2, &length)).collect();
            let mut data = vec![vec![f32::NAN; world * block]; world];
            carry_out(&plans, &mut data, &inputs, &mut random);
            for (to, data) in data.iter().enumerate() {
                for from in (0..world).filter(|&from| from != to) {
                    let expected = &inputs[from][to * block..(to + 1) * block];
                    assert_eq!(&data[from * block..(from + 1) * block], expected, "all_to_all {world}: {from} to {to}");
                }
            }
        }
    }
}

#[test]
fn segments_cover_everything_once() {
    for world in 1..20 {
        for elements in 0..100 {
            let mut end = 0;
            for rank in 0..world {
                let segment = segment(elements, world, rank);
                assert_eq!(segment.start, end);
                assert!(segment.len() == elements / world || segment.len() == elements / world + 1);
                end = segment.end;
            }
            assert_eq!(end, elements);
        }
    }
}

#[test]
fn a_ring_sends_no_more_than_it_must() {
    for world in WORLDS {
        let elements = 1 << 16;
        for rank in 0..world {
            let plan = ring_reduce(rank, world, elements, 1, true, &|left| left.min(4096));
            let sent: usize = plan.channels.iter().flat_map(|channel| &channel.sends).map(|frame| frame.at.len()).sum();
            let floor = 2.0 * (world - 1) as f64 / world as f64 * elements as f64;
            assert!((sent as f64 / floor - 1.0).abs() < 0.01, "{world} ranks: {sent} elements, floor {floor}");
        }
    }
}
