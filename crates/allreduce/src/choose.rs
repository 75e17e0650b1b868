//! Which algorithm a message takes: from its size, the number of ranks, the cables and what was
//! measured when the group was made.
//!
//! Measurements only decide between algorithms that give the same bits: `star`, `direct` and `mesh`
//! all sum in rank order, see `plan/mesh.rs`. The cabling or the user decides between these and
//! `ring`, which sums in another order. So two runs on the same machines agree to the bit, however
//! noisy the measurement was.

use crate::frame::Algorithm;

/// Which ranks a transport connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Every pair.
    Pairs,
    /// Each rank and its two neighbours.
    Neighbours,
}

/// The algorithms that sum in rank order; the measurement is of these, in this order.
pub(crate) const RANK_ORDERED: [Algorithm; 3] = [Algorithm::Star, Algorithm::Direct, Algorithm::Mesh];

/// The two sizes that are measured, in bytes.
pub(crate) const MEASURED_BYTES: [usize; 2] = [256, 64 << 10];

/// Above this size messages always go by mesh: it is the only one of the three whose traffic per
/// rank does not grow with the number of ranks.
const ALWAYS_MESH: usize = 256 << 10;

/// What an operation costs, as a straight line over its bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cost {
    /// Seconds of an empty operation.
    pub(crate) start: f64,
    /// Further seconds per byte.
    pub(crate) per_byte: f64,
}

impl Cost {
    /// Through the times at the two measured sizes.
    fn through(times: [f64; 2]) -> Cost {
        let bytes = MEASURED_BYTES.map(|bytes| bytes as f64);
        let per_byte = ((times[1] - times[0]) / (bytes[1] - bytes[0])).max(0.0);
        Cost { start: times[0] - per_byte * bytes[0], per_byte }
    }

    fn seconds(&self, bytes: usize) -> f64 {
        self.start + self.per_byte * bytes as f64
    }
}

/// The algorithms of one transport.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Choice {
    /// One algorithm for everything.
    Always(Algorithm),
    /// The cheapest of [`RANK_ORDERED`].
    Cheapest([Cost; 3]),
}

impl Choice {
    /// `asked` is the user's choice, if there is one. Before anything is measured, a good local
    /// network is assumed.
    pub(crate) fn new(world: usize, reach: Reach, asked: Option<Algorithm>) -> Choice {
        match (reach, asked) {
            (Reach::Neighbours, _) => Choice::Always(Algorithm::Ring),
            (Reach::Pairs, Some(asked)) => Choice::Always(asked),
            (Reach::Pairs, None) => Choice::Cheapest(guess(world)),
        }
    }

    /// With the times, in seconds, of each of [`RANK_ORDERED`] at each of [`MEASURED_BYTES`]; all
    /// ranks pass the same.
    pub(crate) fn measured(self, times: [[f64; 2]; 3]) -> Choice {
        match self {
            Choice::Cheapest(_) if times.iter().flatten().all(|time| time.is_finite()) => {
                Choice::Cheapest(times.map(Cost::through))
            }
            unchanged => unchanged,
        }
    }

    /// The algorithm of a message of `bytes` bytes.
    pub(crate) fn algorithm(&self, bytes: usize) -> Algorithm {
        match self {
            Choice::Always(algorithm) => *algorithm,
            Choice::Cheapest(_) if bytes > ALWAYS_MESH => Algorithm::Mesh,
            Choice::Cheapest(costs) => {
                let costs = costs.iter().map(|cost| cost.seconds(bytes)).zip(RANK_ORDERED);
                costs.min_by(|a, b| a.0.total_cmp(&b.0)).map_or(Algorithm::Mesh, |(_, algorithm)| algorithm)
            }
        }
    }

    /// The algorithm of operations that are one half of a two-step reduction.
    pub(crate) fn two_step(&self) -> Algorithm {
        if *self == Choice::Always(Algorithm::Ring) { Algorithm::Ring } else { Algorithm::Mesh }
    }

    /// Each algorithm and the smallest power of two, in bytes, from which messages take it.
    pub(crate) fn by_size(&self) -> Vec<(usize, Algorithm)> {
        let mut algorithms: Vec<(usize, Algorithm)> = vec![(0, self.algorithm(0))];
        for bytes in (8..=21).map(|power| 1 << power) {
            let algorithm = self.algorithm(bytes);
            if algorithms.last().is_some_and(|(_, last)| *last != algorithm) {
                algorithms.push((bytes, algorithm));
            }
        }
        algorithms
    }
}

/// With hops of 50 µs and links of 1 GB/s.
fn guess(world: usize) -> [Cost; 3] {
    let (hop, link, n) = (50e-6, 1e9, world as f64);
    [
        Cost { start: 2.0 * hop, per_byte: 2.0 * (n - 1.0) / link },
        Cost { start: hop, per_byte: (n - 1.0) / link },
        Cost { start: 2.0 * hop, per_byte: 2.0 * (n - 1.0) / n / link },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use Algorithm::{Direct, Mesh, Ring, Star};

    #[test]
    fn the_cheapest_algorithm_changes_with_the_size() {
        // A star costs little where ranks share cores, and does not scale; direct messages save a
        // hop where they do not.
        let crowded = [[90e-6, 400e-6], [130e-6, 500e-6], [200e-6, 300e-6]];
        let roomy = [[20e-6, 120e-6], [10e-6, 80e-6], [20e-6, 60e-6]];
        for (times, expected) in
            [(crowded, vec![(0, Star), (64 << 10, Mesh)]), (roomy, vec![(0, Direct), (32 << 10, Mesh)])]
        {
            let choice = Choice::new(4, Reach::Pairs, None).measured(times);
            assert_eq!(choice.by_size(), expected, "{times:?}");
            assert_eq!(choice.algorithm(64 << 20), Mesh);
        }
    }

    #[test]
    fn cables_and_the_user_come_before_the_measurement() {
        let times = [[1e-6; 2]; 3];
        for (reach, asked, algorithm, half) in [
            (Reach::Neighbours, None, Ring, Ring),
            (Reach::Neighbours, Some(Mesh), Ring, Ring),
            (Reach::Pairs, Some(Ring), Ring, Ring),
            (Reach::Pairs, Some(Mesh), Mesh, Mesh),
            (Reach::Pairs, Some(Direct), Direct, Mesh),
            (Reach::Pairs, Some(Star), Star, Mesh),
        ] {
            let choice = Choice::new(4, reach, asked).measured(times);
            assert_eq!((choice.algorithm(0), choice.algorithm(1 << 30)), (algorithm, algorithm), "{reach:?} {asked:?}");
            assert_eq!(choice.two_step(), half);
        }
    }

    #[test]
    fn nonsense_measurements_do_no_harm() {
        for nonsense in [f64::NAN, f64::INFINITY, 0.0, -1.0] {
            let choice = Choice::new(5, Reach::Pairs, None).measured([[nonsense; 2]; 3]);
            for bytes in [0, 1 << 10, 1 << 16, 1 << 20] {
                assert!(RANK_ORDERED.contains(&choice.algorithm(bytes)));
            }
            assert_eq!(choice.algorithm(2 << 20), Mesh);
        }
    }
}
