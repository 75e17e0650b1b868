//! How a run gets on, for whoever asks how long a stop will take.

use std::time::{Duration, Instant};

/// Steps whose times are kept: a change of pace shows soon, one slow step does not.
const KEPT: usize = 9;

/// How long the report may lag behind the run.
const REPORT_EVERY: Duration = Duration::from_secs(30);

/// Times of the last steps, and what a resume would go on from.
#[derive(Debug)]
pub(crate) struct Pace {
    /// The newest saved step, 0 for none.
    pub(crate) saved: u64,
    seconds: Vec<f64>,
    reported: Instant,
}

impl Pace {
    /// `saved`: the step that this process goes on from, which is that of its checkpoint.
    pub(crate) fn new(saved: u64) -> Pace {
        Pace { saved, seconds: Vec::new(), reported: Instant::now() }
    }

    pub(crate) fn add(&mut self, seconds: f64) {
        if self.seconds.len() == KEPT {
            self.seconds.remove(0);
        }
        self.seconds.push(seconds);
    }

    /// The median of the last steps.
    pub(crate) fn seconds(&self) -> Option<f64> {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied()
    }

    /// Whether the report is to be written anew; asked again only after another while.
    pub(crate) fn report_due(&mut self) -> bool {
        let due = self.reported.elapsed() >= REPORT_EVERY;
        if due {
            self.reported = Instant::now();
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_the_last_steps() {
        let mut pace = Pace::new(0);
        assert_eq!(pace.seconds(), None);
        // The first one compiles kernels.
        for seconds in [60.0, 2.0, 1.0] {
            pace.add(seconds);
        }
        assert_eq!(pace.seconds(), Some(2.0));
        for _ in 0..20 {
            pace.add(3.0);
        }
        assert_eq!((pace.seconds(), pace.seconds.len()), (Some(3.0), KEPT));
    }
}
