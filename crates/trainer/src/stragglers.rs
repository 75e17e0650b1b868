//! Which rank holds the others up.

use std::time::{Duration, Instant};

use crate::events::Event;
use crate::metrics::RankRow;
use crate::share_assignment::ShareAssignment;

/// How long times are added up before a rank is named again.
const WINDOW: Duration = Duration::from_secs(60);

/// How long they are added up for the first time. A host that is slower than the others is known
/// after a few steps.
const FIRST_WINDOW: Duration = Duration::from_secs(2);
/// The fewest steps in a window, because one slow step is no rank's fault.
const FEWEST_STEPS: u64 = 3;

/// A rank is named if it takes this many times as long as the others.
const WORTH_A_WORD: f64 = 1.3;

/// A step without the rank is mentioned if it would take at most this part of the time. It is only
/// an estimate.
const SHORTER: f64 = 0.9;

/// Seconds that each rank took for its rows since the window began.
#[derive(Debug)]
pub(crate) struct Stragglers {
    began: Instant,
    window: Duration,
    /// Whether the first step is over. It is slow for other reasons, such as compiling kernels.
    warm: bool,
    steps: u64,
    /// Seconds of whole steps.
    total: f64,
    seconds: Vec<f64>,
}

impl Default for Stragglers {
    fn default() -> Stragglers {
        Stragglers {
            began: Instant::now(),
            window: FIRST_WINDOW,
            warm: false,
            steps: 0,
            total: 0.0,
            seconds: Vec::new(),
        }
    }
}

impl Stragglers {
    /// Adds a step that took `seconds`. After each window it names the slowest rank, if the others
    /// wait for it. `assignment`: which rank computed how many shares of the step.
    pub(crate) fn watch(
        &mut self,
        ranks: &[RankRow],
        seconds: f64,
        assignment: &ShareAssignment,
        tell: &mut dyn FnMut(Event<'_>),
    ) {
        if !self.warm {
            *self = Stragglers { warm: true, ..Stragglers::default() };
            return;
        }
        self.seconds.resize(ranks.len(), 0.0);
        for (sum, rank) in self.seconds.iter_mut().zip(ranks) {
            *sum += rank.seconds;
        }
        self.steps += 1;
        self.total += seconds;
        if self.began.elapsed() < self.window || self.steps < FEWEST_STEPS {
            return;
        }
        if let Some((rank, factor)) = slowest(&self.seconds) {
            let step = self.total / self.steps as f64;
            let without = without(rank, &self.seconds, self.total, assignment).map(|total| total / self.steps as f64);
            let without = without.filter(|without| *without < SHORTER * step);
            tell(Event::Straggler { rank, factor, steps: self.steps, seconds: step, without });
        }
        *self = Stragglers { warm: true, window: WINDOW, ..Stragglers::default() };
    }

    /// Forgets the times of another assignment.
    pub(crate) fn forget(&mut self) {
        *self = Stragglers { warm: true, window: self.window, ..Stragglers::default() };
    }
}

/// Seconds that the same steps would take without this rank, its shares spread evenly among the
/// others. The time beside the rows (sums, waiting for the disk) stays as it is.
fn without(rank: usize, seconds: &[f64], total: f64, assignment: &ShareAssignment) -> Option<f64> {
    let beside = (total - seconds.iter().copied().fold(0.0, f64::max)).max(0.0);
    let others = seconds.iter().zip(assignment.counts()).enumerate().filter(|(other, _)| *other != rank);
    let per_share = others.map(|(_, (seconds, &shares))| seconds / shares.max(1) as f64).fold(0.0, f64::max);
    let others = seconds.len().checked_sub(1).filter(|others| *others > 0)?;
    Some(beside + per_share * assignment.shares() as f64 / others as f64)
}

/// The rank that took longest and its time divided by the median of the others', if that is worth
/// naming.
fn slowest(seconds: &[f64]) -> Option<(usize, f64)> {
    let (rank, longest) = seconds.iter().copied().enumerate().max_by(|a, b| a.1.total_cmp(&b.1))?;
    let mut others: Vec<f64> =
        seconds.iter().copied().enumerate().filter(|(n, _)| *n != rank).map(|(_, s)| s).collect();
    others.sort_by(f64::total_cmp);
    let median = *others.get(others.len().saturating_sub(1) / 2)?;
    (median > 0.0 && longest >= WORTH_A_WORD * median).then(|| (rank, longest / median))
}

#[cfg(test)]
mod tests {
    use super::{slowest, without};
    use crate::share_assignment::ShareAssignment;

    #[test]
    fn the_slowest_is_named_with_its_factor() {
        type Case = (&'static [f64], Option<(usize, f64)>);
        let cases: [Case; 6] = [
            (&[], None),
            (&[1.0], None),
            (&[1.0, 1.2], None),
            (&[1.0, 3.0], Some((1, 3.0))),
            (&[2.0, 1.0, 1.0, 1.1], Some((0, 2.0))),
            (&[0.0, 0.0, 5.0], None),
        ];
        for (seconds, expected) in cases {
            assert_eq!(slowest(seconds), expected, "{seconds:?}");
        }
    }

    #[test]
    fn what_a_step_would_take_without_it() {
        #[expect(clippy::type_complexity, reason = "a table of cases")]
        let cases: [(&[f64], f64, ShareAssignment, usize, Option<f64>); 5] = [
            // Two hosts with equal shares: the fast one would have twice as much to do.
            (&[0.5, 4.0], 4.5, ShareAssignment::even(2, 2, 1), 1, Some(1.5)),
            (&[0.5, 4.0], 4.0, ShareAssignment::even(8, 2, 1), 1, Some(1.0)),
            (&[1.0, 1.0, 3.0], 3.0, ShareAssignment::even(3, 3, 1), 2, Some(1.5)),
            // The fast one already has seven shares of eight.
            (&[3.5, 4.0], 4.0, ShareAssignment::by_speed(8, &[0.5, 4.0]), 1, Some(4.0)),
            (&[1.0], 1.0, ShareAssignment::even(1, 1, 1), 0, None),
        ];
        for (seconds, total, assignment, rank, want) in cases {
            assert_eq!(without(rank, seconds, total, &assignment), want, "{seconds:?}");
        }
    }
}
