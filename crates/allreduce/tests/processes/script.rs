//! Every operation at every awkward size, played alike by processes and by threads, with what each
//! result must be.

use finetune_allreduce::{Algorithm, Group, Reduce, Reduction, WireDtype, segment};
use half::{bf16, f16};

use crate::lines;

/// Ranks of the biggest group of these tests.
const MOST_RANKS: usize = 8;

/// None: what suits the size.
const WAYS: [Option<Algorithm>; 5] =
    [None, Some(Algorithm::Star), Some(Algorithm::Direct), Some(Algorithm::Mesh), Some(Algorithm::Ring)];

/// What the numbers are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Texture {
    /// Whole numbers, whose sums are exact in f32.
    Whole,
    /// Whole numbers so small that their sums are exact in bfloat16.
    Small,
    /// All bits of the mantissa, of all sizes from 2^-10 to 2^10.
    Full,
}

/// The input of a rank: a pure function, so every rank knows the input of all.
fn value(texture: Texture, seed: u64, rank: usize, index: usize) -> f32 {
    let mut bits = seed.wrapping_add((index as u64) << 8 | rank as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^= bits >> 31;
    match texture {
        Texture::Whole => (bits % 2001) as f32 - 1000.0,
        Texture::Small => (bits % 33) as f32 - 16.0,
        Texture::Full => {
            let exponent = 117 + (bits >> 40) as u32 % 20;
            f32::from_bits((bits as u32 & 0x8000_0000) | exponent << 23 | (bits as u32 & 0x007f_ffff))
        }
    }
}

fn input(texture: Texture, seed: u64, rank: usize, elements: usize) -> Vec<f32> {
    (0..elements).map(|index| value(texture, seed, rank, index)).collect()
}

fn rounded(wire: WireDtype, value: f32) -> f32 {
    match wire {
        WireDtype::Exact => value,
        WireDtype::Bf16 => bf16::from_f32(value).to_f32(),
        WireDtype::F16 => f16::from_f32(value).to_f32(),
    }
}

fn combined(reduction: Reduction, a: f32, b: f32) -> f32 {
    match reduction {
        Reduction::Sum => a + b,
        Reduction::Max => a.max(b),
        Reduction::Min => a.min(b),
    }
}

/// Sixteen digits that stand for a result.
fn digest<T: bytemuck::Pod>(data: &[T]) -> String {
    let hash = blake3::hash(bytemuck::cast_slice(data));
    format!("{} of {}", &hash.to_hex()[..16], data.len())
}

/// One reduction and what it is given.
#[derive(Clone, Copy)]
struct Case {
    texture: Texture,
    seed: u64,
    reduce: Reduce,
}

impl Case {
    /// Checks elements `from..` of a result against an f64 sum, and to the bit against the
    /// documented order.
    fn check(&self, world: usize, elements: usize, from: usize, result: &[f32]) {
        let Case { texture, seed, reduce: Reduce { reduction, wire, algorithm, .. } } = *self;
        let ring = algorithm == Some(Algorithm::Ring);
        let epsilon = match wire {
            WireDtype::Exact => 0.0,
            WireDtype::Bf16 => 2f64.powi(-8),
            WireDtype::F16 => 2f64.powi(-11),
        };
        let owners = (0..world).map(|rank| segment(elements, world, rank));
        for (owner, part) in owners.enumerate() {
            for index in part.start.max(from)..part.end.min(from + result.len()) {
                let found = result[index - from];
                let mut of = [0.0; MOST_RANKS];
                (0..world).for_each(|rank| of[rank] = value(texture, seed, rank, index));
                let explain =
                    || format!("{reduction} by {algorithm:?} over {wire}, element {index} of {elements}: {found}");
                if reduction == Reduction::Sum {
                    let sum: f64 = of.iter().copied().map(f64::from).sum();
                    let size: f64 = of.iter().map(|value| f64::from(value.abs())).sum();
                    let ulp = f64::from((size as f32).next_up()) - f64::from(size as f32);
                    let allowed = match texture {
                        Texture::Full => (world - 1) as f64 * ulp + 2.0 * world as f64 * epsilon * size,
                        _ => 0.0,
                    };
                    assert!((f64::from(found) - sum).abs() <= allowed, "{}, expected {sum} ± {allowed}", explain());
                }
                let fold = |rank: &dyn Fn(usize) -> usize| {
                    let first = rounded(wire, of[rank(0)]);
                    let add = |sum, step| combined(reduction, sum, rounded(wire, of[rank(step)]));
                    rounded(wire, (1..world).fold(first, add))
                };
                if ring && wire == WireDtype::Exact {
                    let forward = fold(&|step| (owner + step + 1) % world);
                    let backward = || fold(&|step| (owner + world - 1 - step) % world);
                    let right = found.to_bits() == forward.to_bits() || found.to_bits() == backward().to_bits();
                    assert!(right, "{}: around the ring it is {forward} or {}", explain(), backward());
                } else if !ring {
                    let expected = fold(&|step| step);
                    assert_eq!(found.to_bits(), expected.to_bits(), "{}: in rank order it is {expected}", explain());
                }
            }
        }
    }
}

/// Plays everything and gives the digest of each result. `verify`: compares them with what they
/// must be.
///
/// Names that begin with "=" belong to results that all ranks share; what "star", "direct" and
/// "mesh" name has the same bits.
pub(crate) fn play(group: &Group, big: bool, verify: bool) -> Vec<(String, String)> {
    let mut player = Player { group, verify, digests: Vec::new() };
    let world = group.world();
    let mut sizes = vec![0, 1, world - 1, world, world + 1, 1000, 65_537];
    sizes.dedup();
    for elements in sizes {
        player.reductions(elements);
        player.moves(elements);
    }
    player.background();
    player.parts();
    player.lines();
    if big {
        let elements = 1_000_003;
        for algorithm in WAYS {
            player.reduce(elements, Texture::Full, Reduce { algorithm, ..Reduce::SUM });
        }
        player.reduce(elements, Texture::Full, Reduce { wire: WireDtype::Bf16, ..Reduce::SUM });
        player.broadcast(elements, world - 1);
        player.reduce_scatter(elements);
    }
    group.barrier().expect("a barrier at the end");
    player.digests
}

struct Player<'a> {
    group: &'a Group,
    verify: bool,
    digests: Vec<(String, String)>,
}

impl Player<'_> {
    fn note<T: bytemuck::Pod>(&mut self, name: String, data: &[T]) {
        self.digests.push((name, digest(data)));
    }

    /// What all ranks share is checked by the first only.
    fn checks(&self) -> bool {
        self.verify && self.group.rank() == 0
    }

    fn reductions(&mut self, elements: usize) {
        for algorithm in WAYS {
            for texture in [Texture::Whole, Texture::Full] {
                self.reduce(elements, texture, Reduce { algorithm, tag: 7, ..Reduce::SUM });
            }
            for reduction in [Reduction::Max, Reduction::Min] {
                self.reduce(elements, Texture::Full, Reduce { algorithm, ..Reduce::of(reduction) });
            }
            for (wire, texture) in [
                (WireDtype::Bf16, Texture::Small),
                (WireDtype::Bf16, Texture::Full),
                (WireDtype::F16, Texture::Small),
                (WireDtype::F16, Texture::Full),
            ] {
                self.reduce(elements, texture, Reduce { wire, algorithm, ..Reduce::SUM });
            }
        }
    }

    fn reduce(&mut self, elements: usize, texture: Texture, reduce: Reduce) {
        let case = Case { texture, seed: elements as u64 + 1, reduce };
        let mut data = input(texture, case.seed, self.group.rank(), elements);
        self.group.all_reduce_with(&mut data, &reduce).expect("an all-reduce");
        let Reduce { reduction, wire, algorithm, .. } = reduce;
        let way = algorithm.map_or("auto", Algorithm::name);
        if self.checks() && (algorithm.is_some() || self.group.algorithm(elements * 4) != Algorithm::Ring) {
            case.check(self.group.world(), elements, 0, &data);
        }
        self.note(format!("={way} {reduction} of {elements} {texture:?} over {wire}"), &data);
    }

    fn reduce_scatter(&mut self, elements: usize) {
        let case = Case {
            texture: Texture::Full,
            seed: 5,
            reduce: Reduce { algorithm: Some(self.two_step()), ..Reduce::SUM },
        };
        let mut data = input(case.texture, case.seed, self.group.rank(), elements);
        let mine = self.group.reduce_scatter(&mut data, Reduction::Sum).expect("a reduce-scatter");
        assert_eq!(mine, segment(elements, self.group.world(), self.group.rank()));
        if self.verify {
            case.check(self.group.world(), elements, mine.start, &data[mine.clone()]);
        }
        self.note(format!("reduce_scatter of {elements}"), &data[mine]);
    }

    fn two_step(&self) -> Algorithm {
        if self.group.algorithm(usize::MAX) == Algorithm::Ring { Algorithm::Ring } else { Algorithm::Mesh }
    }

    fn broadcast(&mut self, elements: usize, root: usize) {
        let mut data = input(Texture::Full, 11, self.group.rank(), elements);
        self.group.broadcast(&mut data, root).expect("a broadcast");
        assert!(!self.verify || data == input(Texture::Full, 11, root, elements), "broadcast from {root}");
        self.note(format!("=broadcast of {elements} from {root}"), &data);
    }

    fn moves(&mut self, elements: usize) {
        let (rank, world) = (self.group.rank(), self.group.world());
        self.reduce_scatter(elements);
        self.broadcast(elements, 0);
        self.broadcast(elements, world - 1);

        let mine = input(Texture::Full, 13, rank, elements);
        let mut all = vec![0.0; elements * world];
        self.group.all_gather(&mine, &mut all).expect("an all-gather");
        let right = (0..world).flat_map(|rank| input(Texture::Full, 13, rank, elements));
        assert!(!self.verify || all.iter().copied().eq(right), "all_gather of {elements}");
        self.note(format!("=all_gather of {elements}"), &all);

        let mut received = vec![0.0; elements * world];
        self.group.all_to_all(&input(Texture::Full, 17, rank, elements * world), &mut received).expect("an all-to-all");
        let block =
            |peer: usize| (rank * elements..(rank + 1) * elements).map(move |i| value(Texture::Full, 17, peer, i));
        assert!(!self.verify || received.iter().copied().eq((0..world).flat_map(block)), "all_to_all of {elements}");
        self.note(format!("all_to_all of {elements}"), &received);

        // Once around by messages: each rank passes on what it got, in u64 for once, and the last
        // one closes the ring.
        let mut passed: Vec<u64> = (0..elements as u64).collect();
        if rank > 0 {
            passed.fill(0);
            self.group.recv(&mut passed, rank - 1).expect("a message from the rank before");
        }
        passed.iter_mut().for_each(|value| *value = value.wrapping_mul(31) + rank as u64);
        self.group.send(&passed, (rank + 1) % world).expect("a message to the next rank");
        if rank == 0 {
            self.group.recv(&mut passed, world - 1).expect("a message from the last rank");
        }
        self.note(format!("messages of {elements}"), &passed);
        self.group.barrier().expect("a barrier");
    }

    /// Several reductions under way, blocking ones between them, results asked for in another
    /// order.
    fn background(&mut self) {
        let rank = self.group.rank();
        let mut pending = Vec::new();
        for (index, elements) in [70_001, 3, 0, 200_003].into_iter().enumerate() {
            let algorithm = [None, Some(Algorithm::Ring), Some(Algorithm::Direct), Some(Algorithm::Mesh)][index];
            let case =
                Case { texture: Texture::Full, seed: 100 + index as u64, reduce: Reduce { algorithm, ..Reduce::SUM } };
            let data = input(case.texture, case.seed, rank, elements);
            pending.push((case, self.group.start_all_reduce(data, case.reduce)));
            self.reduce(10 + index, Texture::Full, Reduce::SUM);
        }
        self.group.barrier().expect("a barrier behind reductions in the background");
        for (index, (case, pending)) in pending.into_iter().enumerate().rev() {
            let data = pending.wait().expect("a reduction in the background");
            if self.checks() && case.reduce.algorithm.is_some() {
                case.check(self.group.world(), data.len(), 0, &data);
            }
            self.note(format!("=in the background {index}"), &data);
        }
    }

    /// Two groups within the group, in the opposite order of ranks, at work at the same time and
    /// between operations of the whole.
    fn parts(&mut self) {
        let (rank, world) = (self.group.rank(), self.group.world());
        let color = (rank % 2) as u64;
        let part = self.group.split(color, (world - rank) as u64).expect("a group within the group");
        let expected: Vec<usize> = (0..world).rev().filter(|other| other % 2 == rank % 2).collect();
        assert_eq!((part.world(), expected[part.rank()]), (expected.len(), rank));
        for (round, elements) in [1, 1000, 70_001].into_iter().enumerate() {
            let mut ranks = vec![0u64; expected.len()];
            part.all_gather(&[rank as u64], &mut ranks).expect("an all-gather in a part");
            assert!(ranks.iter().map(|&rank| rank as usize).eq(expected.iter().copied()));
            for algorithm in [None, Some(Algorithm::Ring)] {
                let seed = 1000 + color + round as u64;
                let case = Case { texture: Texture::Full, seed, reduce: Reduce { algorithm, ..Reduce::SUM } };
                let mut data = input(case.texture, seed, part.rank(), elements);
                part.all_reduce_with(&mut data, &case.reduce).expect("an all-reduce in a part");
                if self.verify && part.rank() == 0 && part.world() > 1 && algorithm.is_some() {
                    case.check(part.world(), elements, 0, &data);
                }
                self.note(format!("in part {color}: {algorithm:?} of {elements}"), &data);
            }
            let mut root = [rank as u64; 3];
            part.broadcast(&mut root, part.world() - 1).expect("a broadcast in a part");
            assert_eq!(root, [*expected.last().expect("somebody") as u64; 3]);
            part.barrier().expect("a barrier in a part");
            self.reduce(100 + round, Texture::Full, Reduce::SUM);
        }
    }

    /// A line from each rank to the next one, around. Messages travel on all of them while the ranks reduce.
    fn lines(&mut self) {
        /// Payloads around the edges of frames.
        const BYTES: [usize; 8] = [0, 1, 4032, 4033, 65_473, 300_001, 0, 8];
        let (rank, world) = (self.group.rank(), self.group.world());
        if world == 1 {
            return;
        }
        let (sender, receiver) = lines::around(self.group, BYTES.len());
        let message = |from: usize, bytes: usize| (0..bytes).map(|at| (at * 31 + from * 7) as u8).collect::<Vec<u8>>();
        for round in 0..3 {
            BYTES.iter().for_each(|&bytes| sender.send(message(rank, bytes)).expect("room for it"));
            self.reduce(1000 + round, Texture::Full, Reduce::SUM);
            for bytes in BYTES {
                let received = receiver.receive(bytes).expect("a message");
                assert!(received == message((rank + world - 1) % world, bytes), "{bytes} bytes to rank {rank}");
            }
        }
        assert_eq!((sender.bytes(), receiver.bytes()), (3 * BYTES.iter().sum::<usize>() as u64, sender.bytes()));
    }
}
