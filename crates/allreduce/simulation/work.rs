//! What the ranks do: a list of operations with their data, and what has to come out of each.
//!
//! What comes out is worked out from the documented order of summation, without plans, frames or
//! links, and compared bit by bit. It depends on the seed alone: ranks that pass have the same bits
//! as each other and as any other run of the seed.

use std::time::Duration;

use bytemuck::{cast_slice, cast_slice_mut};

use super::random::Random;
use crate::arithmetic;
use crate::frame::{Algorithm, Descriptor, Element, Kind, Reduction, WireDtype};
use crate::operation::Buffers;
use crate::plan::{self, FrameLength, Plan, part, segment};

/// Links between two ranks.
pub(super) const LINKS: usize = 2;

/// One operation of the list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Task {
    pub(super) descriptor: Descriptor,
    /// What the rank computes before it.
    pub(super) pause: Duration,
    /// Whole numbers, whose sum is exact in any order, rather than full mantissas.
    whole_numbers: bool,
    /// The data are a function of this and the rank.
    seed: u64,
}

/// A rank's memory during one operation.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    data: Vec<f32>,
    /// The copy that direct reductions send from, and the blocks of all_to_all.
    input: Vec<f32>,
    /// Bytes of `data` that the operation uses.
    bytes: usize,
}

impl Memory {
    pub(super) fn buffers(&mut self) -> Buffers<'_> {
        let (data, input): (&mut [u8], &[u8]) = (cast_slice_mut(&mut self.data), cast_slice(&self.input));
        Buffers { data: &mut data[..self.bytes], input: &input[..self.bytes.min(input.len())] }
    }
}

/// The algorithms that the operations of one run may take, as one configuration of a group allows
/// them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AlgorithmChoice {
    AroundTheRing,
    OverAllPairs,
    /// The caller chooses one for each reduction.
    Mixed,
}

impl Task {
    pub(super) fn random(random: &mut Random, world: usize, choice: AlgorithmChoice, longest_pause: Duration) -> Task {
        let kinds = [
            Kind::AllReduce,
            Kind::AllReduce,
            Kind::AllReduce,
            Kind::ReduceScatter,
            Kind::AllGather,
            Kind::Broadcast,
            Kind::AllToAll,
            Kind::Barrier,
        ];
        let kind = match random.pick(&kinds) {
            Kind::AllToAll if choice == AlgorithmChoice::AroundTheRing => Kind::AllReduce, // has no ring
            kind => kind,
        };
        let ring = match choice {
            AlgorithmChoice::AroundTheRing => true,
            AlgorithmChoice::OverAllPairs => false,
            AlgorithmChoice::Mixed => random.one_in(2),
        };
        let algorithm = match (kind, ring) {
            (Kind::AllToAll, _) => Algorithm::Direct,
            // A chain, which meshes use too, for long messages.
            (Kind::Broadcast, false) => random.pick(&[Algorithm::Direct, Algorithm::Ring]),
            (_, true) => Algorithm::Ring,
            (Kind::AllReduce | Kind::Barrier, false) => {
                random.pick(&[Algorithm::Star, Algorithm::Direct, Algorithm::Mesh, Algorithm::Mesh])
            }
            (_, false) => Algorithm::Mesh,
        };
        let reduces = matches!(kind, Kind::AllReduce | Kind::ReduceScatter);
        let most = [5, 40, 40, 300, 300, 300, 300, 1000, 1000, 3000];
        let most = random.pick(&most);
        let mut elements = random.below(most + 1);
        if random.one_in(200) && reduces {
            elements = 2 * 2048 * world + random.below(50); // enough for a ring in both directions
        }
        let elements = match kind {
            Kind::Barrier => 0,
            Kind::AllGather | Kind::AllToAll => elements / world * world,
            _ => elements,
        };
        let wires = [WireDtype::Exact, WireDtype::Exact, WireDtype::Exact, WireDtype::Bf16, WireDtype::F16];
        let descriptor = Descriptor {
            kind,
            reduction: if reduces {
                random.pick(&[Reduction::Sum, Reduction::Sum, Reduction::Max])
            } else {
                Reduction::Sum
            },
            element: if reduces { Element::F32 } else { Element::Byte },
            wire: if kind == Kind::AllReduce { random.pick(&wires) } else { WireDtype::Exact },
            algorithm,
            root: if kind == Kind::Broadcast { random.below(world) as u16 } else { 0 },
            elements: elements as u64,
            tag: if reduces && random.one_in(2) { random.next() } else { 0 },
        };
        let pause = random.between(Duration::ZERO, longest_pause);
        Task { descriptor, pause, whole_numbers: random.one_in(3), seed: random.next() }
    }

    /// Another operation than this one, as a rank does it that runs another program or sees other
    /// data.
    pub(super) fn diverged(&self, random: &mut Random, world: usize, choice: AlgorithmChoice) -> Task {
        let mut other = *self;
        let descriptor = &mut other.descriptor;
        match random.below(3) {
            0 => descriptor.tag ^= 1 << random.below(64),
            1 if descriptor.kind != Kind::Barrier => descriptor.elements += world as u64 * (1 + random.below(9) as u64),
            _ => {
                while other.descriptor.kind == self.descriptor.kind {
                    other = Task::random(random, world, choice, self.pause);
                }
            }
        }
        other
    }

    fn elements(&self) -> usize {
        self.descriptor.elements as usize
    }

    /// A group takes several links for long messages only; here any message may.
    fn links(&self) -> usize {
        if self.elements() % 2 == 1 { LINKS } else { 1 }
    }

    pub(super) fn plan(&self, rank: usize, world: usize, frame_bytes: usize) -> Plan {
        let bytes = self.descriptor.element.wire_bytes(self.descriptor.wire);
        let length: FrameLength<'_> = &|remaining| ((remaining * bytes).min(frame_bytes) / bytes).max(1);
        plan::collective(&self.descriptor, rank, world, self.links(), length)
    }

    /// What a rank brings to a reduction.
    fn contribution(&self, rank: usize) -> Vec<f32> {
        let mut random = Random::new(self.seed ^ (rank as u64 + 1) << 32);
        let number = |random: &mut Random| match self.whole_numbers {
            true => random.below(16) as f32, // the sum of eight is exact in bfloat16 too
            false => random.float(),
        };
        (0..self.elements()).map(|_| number(&mut random)).collect()
    }

    /// What a rank brings to an operation that moves bytes.
    fn bytes(&self, rank: usize, count: usize) -> Vec<u8> {
        let mut random = Random::new(self.seed ^ (rank as u64 + 1) << 32);
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend_from_slice(&random.next().to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }

    /// The memory as it is before the operation; `collectives.rs` prepares it so.
    pub(super) fn memory(&self, rank: usize, world: usize) -> Memory {
        let Descriptor { kind, algorithm, element, wire, root, .. } = self.descriptor;
        let elements = self.elements();
        if element == Element::F32 {
            let mut data = self.contribution(rank);
            let mut input = Vec::new();
            arithmetic::round_to_wire(wire, &mut data[plan::rounded_before(algorithm, elements, world, rank)]);
            if algorithm == Algorithm::Direct {
                input = data.clone();
            }
            return Memory { data, input, bytes: elements * 4 };
        }
        // What a rank is to receive is not there before: NaN.
        let mut memory = Memory { data: vec![f32::NAN; elements.div_ceil(4)], input: Vec::new(), bytes: elements };
        let data: &mut [u8] = cast_slice_mut(&mut memory.data);
        let block = elements / world;
        match kind {
            Kind::AllGather => data[rank * block..(rank + 1) * block].copy_from_slice(&self.bytes(rank, block)),
            Kind::Broadcast if usize::from(root) == rank => {
                data[..elements].copy_from_slice(&self.bytes(rank, elements))
            }
            Kind::AllToAll => {
                let blocks = self.bytes(rank, elements);
                data[rank * block..(rank + 1) * block].copy_from_slice(&blocks[rank * block..(rank + 1) * block]);
                memory.input = vec![0.0; elements.div_ceil(4)];
                cast_slice_mut(&mut memory.input)[..elements].copy_from_slice(&blocks);
            }
            _ => {}
        }
        memory
    }

    /// What a rank must hold after the operation: the bytes of its buffer, and which of them count.
    pub(super) fn check(&self, rank: usize, world: usize, memory: &mut Memory) -> Result<(), String> {
        let Descriptor { kind, algorithm, wire, root, .. } = self.descriptor;
        let (elements, block) = (self.elements(), self.elements() / world);
        let wrong = |index: usize, found: &dyn std::fmt::Debug, expected: &dyn std::fmt::Debug| {
            Err(format!("{}: element {index} is {found:?} instead of {expected:?}", self.descriptor))
        };
        if matches!(kind, Kind::AllReduce | Kind::ReduceScatter) {
            if algorithm == Algorithm::Direct {
                arithmetic::round_to_wire(wire, &mut memory.data);
            }
            let contributions: Vec<Vec<f32>> = (0..world).map(|rank| self.contribution(rank)).collect();
            let own = if kind == Kind::ReduceScatter { segment(elements, world, rank) } else { 0..elements };
            let expected = self.reduced(&contributions);
            return match own.clone().find(|&index| memory.data[index].to_bits() != expected[index].to_bits()) {
                Some(index) => wrong(index, &memory.data[index], &expected[index]),
                None => Ok(()),
            };
        }
        let expected: Vec<u8> = match kind {
            Kind::AllGather => (0..world).flat_map(|rank| self.bytes(rank, block)).collect(),
            Kind::Broadcast => self.bytes(usize::from(root), elements),
            Kind::AllToAll => (0..world)
                .flat_map(|from| self.bytes(from, elements)[rank * block..(rank + 1) * block].to_vec())
                .collect(),
            _ => Vec::new(),
        };
        let found = &cast_slice::<f32, u8>(&memory.data)[..elements];
        match (0..elements).find(|&index| found[index] != expected[index]) {
            Some(index) => wrong(index, &found[index], &expected[index]),
            None => Ok(()),
        }
    }

    /// The reduction in the documented order, each partial result rounded where it travels in a
    /// narrow type.
    fn reduced(&self, contributions: &[Vec<f32>]) -> Vec<f32> {
        let Descriptor { algorithm, wire, reduction, .. } = self.descriptor;
        let (world, elements) = (contributions.len(), self.elements());
        let round = |mut value: f32| {
            arithmetic::round_to_wire(wire, std::slice::from_mut(&mut value));
            value
        };
        let combine = |a: f32, b: f32| match reduction {
            Reduction::Sum => a + b,
            Reduction::Max => a.max(b),
            Reduction::Min => a.min(b),
        };
        let mut reduced = vec![0.0; elements];
        if algorithm != Algorithm::Ring {
            // Rank order: every contribution is rounded, then the total.
            for (index, reduced) in reduced.iter_mut().enumerate() {
                let all = contributions.iter().map(|contribution| round(contribution[index]));
                *reduced = round(all.reduce(combine).expect("there are ranks"));
            }
            return reduced;
        }
        // Around the ring to the owner, half of each long segment the other way; every partial
        // result is rounded.
        let directions = if world > 2 { 2 } else { 1 };
        let lanes = (elements / world / 2048).clamp(1, self.links() * directions);
        for owner in 0..world {
            for lane in 0..lanes {
                let backward = lane % directions == 1;
                let place =
                    |step: usize| if backward { (owner + world - step) % world } else { (owner + step) % world };
                for index in part(&segment(elements, world, owner), lanes, lane) {
                    let all = (1..=world).map(|step| contributions[place(step)][index]);
                    reduced[index] = round(all.reduce(|sum, next| combine(round(sum), next)).expect("there are ranks"));
                }
            }
        }
        reduced
    }
}
