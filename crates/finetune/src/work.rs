//! What a run is doing, for the answer to a signal: what is being finished, how long that takes,
//! and what would be lost.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use finetune_trainer::Event;

use crate::progress::about;
use crate::signals::Heard;

/// The state of a run, as its events tell it. Clones share it.
#[derive(Clone)]
pub(crate) struct Work(Arc<Mutex<Doing>>);

struct Doing {
    phase: Phase,
    /// The step that is being worked on, from 1.
    step: u64,
    /// The last step, and the steps that ranks make alone before they have a common state, which can be saved.
    last: u64,
    alone: u64,
    since: Instant,
    /// What the last step took.
    seconds: Option<f64>,
    /// The step of the newest checkpoint; 0: there is none.
    saved: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Step,
    Evaluation,
    Answers,
    /// All steps are done.
    End,
}

impl Work {
    pub(crate) fn new() -> Work {
        let doing =
            Doing { phase: Phase::Answers, step: 1, last: 1, alone: 1, since: Instant::now(), seconds: None, saved: 0 };
        Work(Arc::new(Mutex::new(doing)))
    }

    fn doing(&self) -> MutexGuard<'_, Doing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn see(&self, event: &Event<'_>) {
        let doing = &mut *self.doing();
        match event {
            Event::Begin { from, to, alone, .. } => {
                (doing.last, doing.alone) = (*to, *alone);
                (doing.step, doing.saved, doing.since) = (from + 1, *from, Instant::now());
                doing.phase = if from < to { Phase::Step } else { Phase::End };
            }
            Event::Step { row, steps } => {
                (doing.step, doing.seconds, doing.since) = (row.step + 1, Some(row.seconds), Instant::now());
                doing.phase = if row.step < *steps { Phase::Step } else { Phase::End };
            }
            Event::Evaluating { .. } => doing.phase = Phase::Evaluation,
            Event::Evaluated { .. } => (doing.phase, doing.since) = (Phase::Step, Instant::now()),
            Event::Answering { .. } => doing.phase = Phase::Answers,
            Event::Saved { step, .. } => (doing.saved, doing.since) = (*step, Instant::now()),
            _ => {}
        }
    }

    /// What a signal does to the run, in words.
    pub(crate) fn words(&self, heard: Heard) -> String {
        let Doing { phase, step, last, alone, since, seconds, saved } = &*self.doing();
        if heard == Heard::Second {
            return match saved {
                0 => "stopped at once: nothing was saved".to_owned(),
                saved => format!("stopped at once: step {saved} is saved, --resume goes on from it"),
            };
        }
        let lost = match (saved + 1, *step) {
            (first, last) if first < last => format!("loses steps {first} to {last}"),
            (_, last) => format!("loses step {last}"),
        };
        match phase {
            Phase::Step => {
                let end = step.next_multiple_of(*alone).min(*last);
                let all = |seconds: f64| seconds * (end - step + 1) as f64 - since.elapsed().as_secs_f64();
                // A step that takes longer than the last one ends nobody knows when.
                let left = seconds.map(all).filter(|left| *left > 0.0);
                let about = left.map_or(String::new(), |left| format!(" ({})", about(left)));
                let what = match end == *step {
                    true => format!("step {step}"),
                    false => format!("steps {step} to {end}, after which ranks have a common state"),
                };
                format!("finishing {what}, then saving{about}; a second signal stops at once and {lost}")
            }
            Phase::Evaluation => {
                format!("giving up the evaluation and saving; a second signal stops at once and {lost}")
            }
            Phase::Answers => "giving up the answers to held-back rows; a second signal stops at once".to_owned(),
            Phase::End => "all steps are done: finishing; a second signal stops at once".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use finetune_trainer::StepRow;

    use super::*;

    fn step_row(step: u64, seconds: f64) -> StepRow {
        StepRow { step, seconds, ..StepRow::default() }
    }

    #[test]
    fn a_signal_is_told_what_it_does() {
        let work = Work::new();
        assert!(work.words(Heard::First).contains("answers"), "{}", work.words(Heard::First));
        work.see(&Event::Begin { from: 0, to: 9, alone: 1, trained_parameters: 1 });
        let first = work.words(Heard::First);
        assert!(first.starts_with("finishing step 1, then saving;") && first.ends_with("loses step 1"), "{first}");
        assert_eq!(work.words(Heard::Second), "stopped at once: nothing was saved");
        work.see(&Event::Step { row: &step_row(1, 300.0), steps: 9 });
        work.see(&Event::Step { row: &step_row(2, 300.0), steps: 9 });
        let first = work.words(Heard::First);
        assert!(first.contains("finishing step 3") && first.contains("about 5m00s"), "{first}");
        assert!(first.ends_with("loses steps 1 to 3"), "{first}");
        work.see(&Event::Step { row: &step_row(2, 0.0), steps: 9 });
        let overdue = work.words(Heard::First);
        assert!(overdue.starts_with("finishing step 3, then saving; a second"), "{overdue}");
        work.see(&Event::Saved { step: 2, path: PathBuf::new() });
        assert!(work.words(Heard::First).ends_with("loses step 3"));
        assert_eq!(work.words(Heard::Second), "stopped at once: step 2 is saved, --resume goes on from it");
        work.see(&Event::Evaluating { rows: 3 });
        assert!(work.words(Heard::First).starts_with("giving up the evaluation"));
    }

    /// Between two averages there is nothing that could be saved.
    #[test]
    fn steps_that_ranks_make_alone_are_finished_together() {
        let work = Work::new();
        work.see(&Event::Begin { from: 0, to: 9, alone: 4, trained_parameters: 1 });
        work.see(&Event::Step { row: &step_row(1, 300.0), steps: 9 });
        let first = work.words(Heard::First);
        assert!(first.contains("finishing steps 2 to 4, after") && first.contains("about 15m00s"), "{first}");
        work.see(&Event::Step { row: &step_row(8, 300.0), steps: 9 });
        assert!(work.words(Heard::First).contains("finishing step 9, then"), "{}", work.words(Heard::First));
    }
}
