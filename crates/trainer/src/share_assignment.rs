//! Which rank computes which shares of a step.
//!
//! The sums of shares are kept apart and added in the order of the shares. So with virtual ranks no
//! bit depends on which rank computes which share. A fast host can take more of them than a slow
//! one. All ranks assign alike, from times that all of them have.

use std::ops::Range;

use crate::metrics::RankRow;

/// How many shares each rank computes, at least one. Rank 0 has the first ones, rank 1 those after
/// them, and so on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ShareAssignment {
    /// Of each rank, or of each model that ranks hold together.
    counts: Vec<usize>,
    /// Ranks that hold one model together.
    stages: usize,
}

impl ShareAssignment {
    /// The same number for each of `replicas` models, which `stages` ranks hold together; `shares` is a multiple
    /// of `replicas`.
    pub(crate) fn even(shares: usize, replicas: usize, stages: usize) -> ShareAssignment {
        ShareAssignment { counts: vec![shares / replicas; replicas], stages }
    }

    /// The assignment with which the slowest rank is done as early as possible. `seconds`: what
    /// each rank takes for a share. One share after the other goes to the rank that would be done
    /// with it first, which is optimal for equal shares.
    pub(crate) fn by_speed(shares: usize, seconds: &[f64]) -> ShareAssignment {
        let mut counts = vec![1usize; seconds.len()];
        for _ in seconds.len()..shares {
            let done = |rank: usize| (counts[rank] + 1) as f64 * seconds[rank];
            let next = (0..seconds.len()).min_by(|&one, &other| done(one).total_cmp(&done(other)));
            counts[next.expect("a rank")] += 1;
        }
        ShareAssignment { counts, stages: 1 }
    }

    /// The numbers of a rank's shares.
    pub(crate) fn shares_of(&self, rank: usize) -> Range<usize> {
        let replica = rank / self.stages;
        let first = self.counts[..replica].iter().sum();
        first..first + self.counts[replica]
    }

    /// How many shares a rank has.
    pub(crate) fn count_of(&self, rank: usize) -> usize {
        self.counts[rank / self.stages]
    }

    /// The number of shares of each model, which is held by one rank or by several.
    pub(crate) fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// The number of all shares.
    pub(crate) fn shares(&self) -> usize {
        self.counts.iter().sum()
    }

    /// The largest number of shares that a rank has.
    pub(crate) fn largest(&self) -> usize {
        self.counts.iter().copied().max().unwrap_or(0)
    }

    /// Seconds until the last rank is done.
    fn seconds(&self, per_share: &[f64]) -> f64 {
        self.counts.iter().zip(per_share).map(|(&count, seconds)| count as f64 * seconds).fold(0.0, f64::max)
    }
}

/// Steps that are measured before shares are assigned by speed for the first time. The step before
/// them does not count: it also compiles kernels and touches memory for the first time.
const FIRST_STEPS: u64 = 3;
/// Steps that are measured before each later assignment.
const LATER_STEPS: u64 = 32;
/// A new assignment has to take at most this part of the old one's time: times vary from step to
/// step.
const WORTH_IT: f64 = 0.9;

/// Measures the ranks, and assigns their shares anew between steps.
#[derive(Debug)]
pub(crate) struct ShareBalancer {
    pub(crate) assignment: ShareAssignment,
    /// `distributed.shares = "measured"`, and more shares than ranks.
    measures: bool,
    /// Whether the first step, which does not count, is done.
    warm: bool,
    /// Steps to measure before the next assignment.
    wanted: u64,
    /// Steps measured since the last one.
    steps: u64,
    /// Seconds of each rank since then.
    seconds: Vec<f64>,
    /// Tokens of each rank since then.
    tokens: Vec<u64>,
}

impl ShareBalancer {
    pub(crate) fn new(assignment: ShareAssignment, measured: bool) -> ShareBalancer {
        let world = assignment.counts.len();
        let measures = measured && world > 1 && assignment.stages == 1 && assignment.shares() > world;
        let (seconds, tokens) = (vec![0.0; world], vec![0; world]);
        ShareBalancer { assignment, measures, warm: false, wanted: FIRST_STEPS, steps: 0, seconds, tokens }
    }

    /// Adds a step. Returns whether the next step has another assignment.
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
        // Rows differ in length, so seconds per token stand for seconds per share.
        let pairs = self.seconds.iter().zip(&self.tokens);
        let per_share: Vec<f64> = pairs.map(|(seconds, &tokens)| seconds / tokens as f64).collect();
        (self.wanted, self.steps) = (LATER_STEPS, 0);
        self.seconds.fill(0.0);
        self.tokens.fill(0);
        let better = ShareAssignment::by_speed(self.assignment.shares(), &per_share);
        if better.seconds(&per_share) >= WORTH_IT * self.assignment.seconds(&per_share) {
            return false;
        }
        self.assignment = better;
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
            let assignment = ShareAssignment::by_speed(shares, seconds);
            assert_eq!(assignment.counts(), want, "{shares} shares, {seconds:?}");
            let all: Vec<usize> = (0..seconds.len()).flat_map(|rank| assignment.shares_of(rank)).collect();
            assert_eq!(all, (0..shares).collect::<Vec<_>>(), "each share once, in order");
        }
    }

    fn step(seconds: [f64; 2], tokens: [u64; 2]) -> Vec<RankRow> {
        let row = |rank: usize| RankRow {
            rank,
            seconds: seconds[rank],
            tokens: tokens[rank],
            reading_seconds: None,
            sent: 0,
            received: 0,
            waited_for: vec![0.0; 2],
        };
        vec![row(0), row(1)]
    }

    #[test]
    fn shares_move_after_a_few_steps_and_only_if_it_pays() {
        let mut balancer = ShareBalancer::new(ShareAssignment::even(8, 2, 1), true);
        // The first step is slow for another reason.
        let told: Vec<bool> = [[9.0, 0.1], [0.1, 0.7], [0.1, 0.7], [0.1, 0.7]]
            .into_iter()
            .map(|seconds| balancer.watch(&step(seconds, [40, 40])))
            .collect();
        assert_eq!(told, [false, false, false, true]);
        assert_eq!(balancer.assignment.counts(), [7, 1]);
        // Each is as fast as before, with its new shares: nothing can be gained.
        for _ in 0..3 * LATER_STEPS {
            assert!(!balancer.watch(&step([0.175, 0.175], [70, 10])));
        }
        // The slow rank is now as fast as the other.
        let changes = (0..LATER_STEPS + 1).filter(|_| balancer.watch(&step([0.175, 0.025], [70, 10]))).count();
        assert_eq!((changes, balancer.assignment.counts()), (1, [4, 4].as_slice()));
    }

    #[test]
    fn even_shares_stay_even() {
        for (shares, measured) in [(8, false), (2, true)] {
            let mut balancer = ShareBalancer::new(ShareAssignment::even(shares, 2, 1), measured);
            for _ in 0..10 {
                assert!(!balancer.watch(&step([0.1, 0.9], [10, 10])));
            }
        }
    }
}
