//! Which rank computes which shares of a step.
//!
//! The sums of shares are kept apart and added in the order of the shares, so with virtual ranks no bit depends on who computes
//! which: a fast machine can take more of them than a slow one. All ranks deal alike, from times that all of them have.

use std::ops::Range;

use crate::metrics::RankRow;

/// How many shares each rank computes, at least one. Rank 0 has the first ones, rank 1 those after them, and so on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Deal {
    counts: Vec<usize>,
}

impl Deal {
    /// The same number for each; `shares` is a multiple of `world`.
    pub(crate) fn even(shares: usize, world: usize) -> Deal {
        Deal { counts: vec![shares / world; world] }
    }

    /// So that the slowest is done as early as possible, where a rank takes so many seconds for a share. One at a time goes to
    /// the rank that would be done with it first, which for equal shares is the best there is.
    pub(crate) fn by_speed(shares: usize, seconds: &[f64]) -> Deal {
        let mut counts = vec![1usize; seconds.len()];
        for _ in seconds.len()..shares {
            let done = |rank: usize| (counts[rank] + 1) as f64 * seconds[rank];
            let next = (0..seconds.len()).min_by(|&one, &other| done(one).total_cmp(&done(other)));
            counts[next.expect("a rank")] += 1;
        }
        Deal { counts }
    }

    /// The shares of a rank.
    pub(crate) fn of(&self, rank: usize) -> Range<usize> {
        let first = self.counts[..rank].iter().sum();
        first..first + self.counts[rank]
    }

    pub(crate) fn counts(&self) -> &[usize] {
        &self.counts
    }

    pub(crate) fn shares(&self) -> usize {
        self.counts.iter().sum()
    }

    /// Shares of the rank with most.
    pub(crate) fn largest(&self) -> usize {
        self.counts.iter().copied().max().unwrap_or(0)
    }

    /// When the last rank is done.
    fn seconds(&self, per_share: &[f64]) -> f64 {
        self.counts.iter().zip(per_share).map(|(&count, seconds)| count as f64 * seconds).fold(0.0, f64::max)
    }
}

/// Steps that are measured before shares are dealt by speed for the first time. The step before them does not count: it also
/// compiles kernels and touches memory for the first time.
const FIRST_STEPS: u64 = 3;
/// The same later.
const LATER_STEPS: u64 = 32;
/// A new deal has to be better by so much: times are never quite the same.
const WORTH_IT: f64 = 0.9;

/// Measures the ranks, and deals anew between steps.
#[derive(Debug)]
pub(crate) struct Dealer {
    pub(crate) deal: Deal,
    /// `distributed.shares = "measured"`, and more shares than ranks.
    measures: bool,
    warm: bool,
    wanted: u64,
    steps: u64,
    /// Of each rank since it was dealt last.
    seconds: Vec<f64>,
    tokens: Vec<u64>,
}

impl Dealer {
    pub(crate) fn new(deal: Deal, measured: bool) -> Dealer {
        let world = deal.counts.len();
        let measures = measured && world > 1 && deal.shares() > world;
        let (seconds, tokens) = (vec![0.0; world], vec![0; world]);
        Dealer { deal, measures, warm: false, wanted: FIRST_STEPS, steps: 0, seconds, tokens }
    }

    /// Adds a step; true where the next one is dealt otherwise.
    pub(crate) fn watch(&mut self, ranks: &[RankRow]) -> bool {
        if !self.measures || !std::mem::replace(&mut self.warm, true) {
            return false;
        }
        for row in ranks {
            self.seconds[row.rank] += row.seconds;
            self.tokens[row.rank] += row.tokens;
        }
        self.steps += 1;
        if self.steps < self.wanted || self.tokens.contains(&0) {
            return false;
        }
        // Rows differ in length, so shares are measured by their tokens: seconds per token stand for seconds per share.
        let pairs = self.seconds.iter().zip(&self.tokens);
        let per_share: Vec<f64> = pairs.map(|(seconds, &tokens)| seconds / tokens as f64).collect();
        (self.wanted, self.steps) = (LATER_STEPS, 0);
        self.seconds.fill(0.0);
        self.tokens.fill(0);
        let better = Deal::by_speed(self.deal.shares(), &per_share);
        if better.seconds(&per_share) >= WORTH_IT * self.deal.seconds(&per_share) {
            return false;
        }
        self.deal = better;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_speed() {
        let cases: [(usize, &[f64], &[usize]); 6] = [
            (4, &[1.0, 1.0], &[2, 2]),
            (4, &[1.0, 9.0], &[3, 1]),
            (12, &[1.0, 2.0], &[8, 4]),
            (12, &[3.0, 1.0, 1.0], &[2, 5, 5]),
            (3, &[9.0, 1.0, 1.0], &[1, 1, 1]),
            (8, &[0.0, 1.0], &[7, 1]),
        ];
        for (shares, seconds, want) in cases {
            let deal = Deal::by_speed(shares, seconds);
            assert_eq!(deal.counts(), want, "{shares} shares, {seconds:?}");
            let all: Vec<usize> = (0..seconds.len()).flat_map(|rank| deal.of(rank)).collect();
            assert_eq!(all, (0..shares).collect::<Vec<_>>(), "each share once, in order");
        }
    }

    fn step(seconds: [f64; 2], tokens: [u64; 2]) -> Vec<RankRow> {
        let row = |rank: usize| RankRow {
            rank,
            seconds: seconds[rank],
            tokens: tokens[rank],
            sent: 0,
            received: 0,
            waited_for: vec![0.0; 2],
        };
        vec![row(0), row(1)]
    }

    #[test]
    fn dealt_after_a_few_steps_and_only_if_it_pays() {
        let mut dealer = Dealer::new(Deal::even(8, 2), true);
        // The first step is slow for another reason.
        let told: Vec<bool> = [[9.0, 0.1], [0.1, 0.7], [0.1, 0.7], [0.1, 0.7]]
            .into_iter()
            .map(|seconds| dealer.watch(&step(seconds, [40, 40])))
            .collect();
        assert_eq!(told, [false, false, false, true]);
        assert_eq!(dealer.deal.counts(), [7, 1]);
        // As fast as before, each with its new shares: nothing to gain.
        for _ in 0..3 * LATER_STEPS {
            assert!(!dealer.watch(&step([0.175, 0.175], [70, 10])));
        }
        // The slow one is as fast as the other now.
        let changes = (0..LATER_STEPS + 1).filter(|_| dealer.watch(&step([0.175, 0.025], [70, 10]))).count();
        assert_eq!((changes, dealer.deal.counts()), (1, [4, 4].as_slice()));
    }

    #[test]
    fn even_shares_stay_even() {
        for (shares, measured) in [(8, false), (2, true)] {
            let mut dealer = Dealer::new(Deal::even(shares, 2), measured);
            for _ in 0..10 {
                assert!(!dealer.watch(&step([0.1, 0.9], [10, 10])));
            }
        }
    }
}
