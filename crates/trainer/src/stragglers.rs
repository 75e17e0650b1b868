//! Who holds the others up.

use std::time::{Duration, Instant};

use crate::events::Event;
use crate::metrics::RankRow;

/// How long times are added up before anybody is named, so that one slow step is nobody's fault.
const WINDOW: Duration = Duration::from_secs(60);

/// A rank that takes so many times as long as the others is worth a word.
const WORTH_A_WORD: f64 = 1.3;

/// Seconds that each rank took for its rows since the window began.
#[derive(Debug)]
pub(crate) struct Stragglers {
    began: Instant,
    seconds: Vec<f64>,
}

impl Default for Stragglers {
    fn default() -> Stragglers {
        Stragglers { began: Instant::now(), seconds: Vec::new() }
    }
}

impl Stragglers {
    /// Adds a step, and once a minute names the slowest rank if the others wait for it.
    pub(crate) fn watch(&mut self, ranks: &[RankRow], tell: &mut dyn FnMut(Event<'_>)) {
        self.seconds.resize(ranks.len(), 0.0);
        for (sum, rank) in self.seconds.iter_mut().zip(ranks) {
            *sum += rank.seconds;
        }
        if self.began.elapsed() < WINDOW {
            return;
        }
        if let Some((rank, factor)) = slowest(&self.seconds) {
            tell(Event::Straggler { rank, factor });
        }
        *self = Stragglers::default();
    }
}

/// The rank that took longest and its time over the median of the others', if that is worth a word.
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
    use super::slowest;

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
}
