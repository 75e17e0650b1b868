//! Which way a message goes, from its size, the number of ranks, the cables and the measured figures of the links.
//!
//! What is measured only ever decides between ways that give the same bits (`direct` and `mesh`, see `plan/mesh.rs`); between
//! `mesh` and `ring`, whose sums are ordered differently, the cabling decides, or the user. So two runs on the same machines
//! agree to the bit, however noisy the measurement was.

use crate::frame::Algorithm;

/// Which ranks a transport connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Every pair.
    Pairs,
    /// Each rank and its two neighbours.
    Neighbours,
}

/// What was measured of the links, agreed on by all ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Figures {
    /// Seconds from the first word of one rank to the last rank's having heard it.
    pub(crate) latency: f64,
    /// Bytes per second that one rank sends while it receives as many.
    pub(crate) bandwidth: f64,
}

impl Figures {
    /// Before anything was measured: a good local network.
    pub(crate) const GUESS: Figures = Figures { latency: 50e-6, bandwidth: 1e9 };
}

/// The ways of one transport.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Choice {
    /// Messages up to so many bytes go directly.
    pub(crate) direct_up_to: usize,
    /// Larger ones go this way.
    pub(crate) then: Algorithm,
}

/// Smallest and largest bound for direct messages. Below, a frame's own cost is all there is; above, `direct` has every rank
/// add what one rank could, and its memory traffic costs more than the hop that it saves.
const DIRECT_BOUNDS: (usize, usize) = (4 << 10, 256 << 10);

impl Choice {
    /// `asked` is the user's choice, if there is one.
    pub(crate) fn new(world: usize, reach: Reach, figures: Figures, asked: Option<Algorithm>) -> Choice {
        match (reach, asked) {
            (Reach::Neighbours, _) | (_, Some(Algorithm::Ring)) => Choice { direct_up_to: 0, then: Algorithm::Ring },
            (_, Some(Algorithm::Direct)) => Choice { direct_up_to: usize::MAX, then: Algorithm::Direct },
            (_, Some(Algorithm::Mesh)) => Choice { direct_up_to: 0, then: Algorithm::Mesh },
            (Reach::Pairs, None) => Choice { direct_up_to: direct_up_to(world, figures), then: Algorithm::Mesh },
        }
    }

    /// The way of operations that are one half of a two-step reduction.
    pub(crate) fn two_step(&self) -> Algorithm {
        if self.then == Algorithm::Ring { Algorithm::Ring } else { Algorithm::Mesh }
    }

    /// The way of a message of so many bytes.
    pub(crate) fn way(&self, bytes: usize) -> Algorithm {
        if bytes <= self.direct_up_to && self.then != Algorithm::Ring { Algorithm::Direct } else { self.then }
    }
}

/// Directly, S bytes take α + (N-1)S/β; by way of segments 2α + 2(N-1)/N S/β. They meet at S = αβN / ((N-1)(N-2)).
fn direct_up_to(world: usize, figures: Figures) -> usize {
    let (n, bound) = (world as f64, DIRECT_BOUNDS);
    if world <= 2 {
        return bound.1;
    }
    let meet = figures.latency * figures.bandwidth * n / ((n - 1.0) * (n - 2.0));
    if !meet.is_finite() {
        return bound.0;
    }
    (meet as usize).clamp(bound.0, bound.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_start_favours_direct_messages_and_more_ranks_do_not() {
        let fast = Figures { latency: 10e-6, bandwidth: 5e9 };
        let slow = Figures { latency: 300e-6, bandwidth: 1e8 };
        let cases =
            [(2, fast, 256 << 10), (3, fast, 75_000), (4, fast, 33_333), (16, slow, 4 << 10), (4, slow, 20_000)];
        for (world, figures, expected) in cases {
            let choice = Choice::new(world, Reach::Pairs, figures, None);
            assert_eq!(choice.direct_up_to, expected, "{world} ranks, {figures:?}");
            assert_eq!(choice.way(expected), Algorithm::Direct);
            assert_eq!(choice.way(expected + 1), Algorithm::Mesh);
        }
    }

    #[test]
    fn cables_and_the_user_come_before_the_measurement() {
        let figures = Figures::GUESS;
        for (reach, asked, small, large) in [
            (Reach::Neighbours, None, Algorithm::Ring, Algorithm::Ring),
            (Reach::Neighbours, Some(Algorithm::Mesh), Algorithm::Ring, Algorithm::Ring),
            (Reach::Pairs, Some(Algorithm::Ring), Algorithm::Ring, Algorithm::Ring),
            (Reach::Pairs, Some(Algorithm::Mesh), Algorithm::Mesh, Algorithm::Mesh),
            (Reach::Pairs, Some(Algorithm::Direct), Algorithm::Direct, Algorithm::Direct),
        ] {
            let choice = Choice::new(4, reach, figures, asked);
            assert_eq!((choice.way(0), choice.way(1 << 30)), (small, large), "{reach:?} {asked:?}");
        }
    }

    #[test]
    fn nonsense_measurements_do_no_harm() {
        for (latency, bandwidth) in [(0.0, f64::INFINITY), (f64::NAN, 1.0), (1e9, 1e9)] {
            let choice = Choice::new(5, Reach::Pairs, Figures { latency, bandwidth }, None);
            assert!((DIRECT_BOUNDS.0..=DIRECT_BOUNDS.1).contains(&choice.direct_up_to));
        }
    }
}
