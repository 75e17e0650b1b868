//! How far a run is: what a stop would wait for, and what a resume would go on from.

use std::time::{Duration, Instant};

/// Steps whose times are kept: few enough to show a change of speed soon, enough to hide one slow
/// step.
const KEPT: usize = 9;

/// How long the report may lag behind the run.
const REPORT_EVERY: Duration = Duration::from_secs(30);

/// Times of the last steps, the newest saved step, and when the report was written last.
#[derive(Debug)]
pub(crate) struct Progress {
    /// The newest saved step, 0 for none.
    pub(crate) saved: u64,
    /// Seconds of the last [`KEPT`] steps, oldest first.
    seconds: Vec<f64>,
    /// When the report was last due.
    reported: Instant,
}

impl Progress {
    /// `saved`: the step of the checkpoint that this process goes on from, 0 for none.
    pub(crate) fn new(saved: u64) -> Progress {
        Progress { saved, seconds: Vec::new(), reported: Instant::now() }
    }

    /// Adds the seconds of a step.
    pub(crate) fn add(&mut self, seconds: f64) {
        if self.seconds.len() == KEPT {
            self.seconds.remove(0);
        }
        self.seconds.push(seconds);
    }

    /// The median of the last steps, in seconds; `None` before the first.
    pub(crate) fn seconds(&self) -> Option<f64> {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied()
    }

    /// Whether the report is to be written anew. If so, it is not due again for [`REPORT_EVERY`].
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
        let mut progress = Progress::new(0);
        assert_eq!(progress.seconds(), None);
        // The first step compiles kernels.
        for seconds in [60.0, 2.0, 1.0] {
            progress.add(seconds);
        }
        assert_eq!(progress.seconds(), Some(2.0));
        for _ in 0..20 {
            progress.add(3.0);
        }
        assert_eq!((progress.seconds(), progress.seconds.len()), (Some(3.0), KEPT));
    }
}
