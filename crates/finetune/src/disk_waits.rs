//! How long a run waits for layers from its disks: said at its end, and before if it is much. A disk that brings
//! nothing is said at once, by the rank that waits for it.

use finetune_trainer::{Event, ReadingShare};

use crate::progress::Verbosity;
use crate::stderr::complain;

/// Waiting for more than this part of the time is said while the run goes on.
const MUCH: f64 = 0.1;

/// Steps after which it may be said. The first one does not count: it may fill the system's cache.
const STEPS: u64 = 4;

/// From now on this process says if a disk brings nothing of a layer that it waits for. `rank`: its own, if there are
/// others.
pub(crate) fn say_silence(rank: Option<usize>, verbosity: Verbosity) {
    if verbosity > Verbosity::Quiet {
        let who = rank.map_or_else(|| "this process".to_owned(), |rank| format!("rank {rank}"));
        finetune_model::tell_of_disk_waits(move |wait| complain!("{who} {wait}"));
    }
}

/// The waits of this process's steps.
#[derive(Debug, Default)]
pub(crate) struct DiskWaits {
    all: ReadingShare,
    but_the_first: ReadingShare,
    steps: u64,
    is_said: bool,
}

impl DiskWaits {
    /// Takes an event in. Returns what the user should know, once.
    pub(crate) fn see(&mut self, event: &Event<'_>) -> Option<String> {
        let Event::Step { row, .. } = event else { return None };
        self.all.add(row);
        self.steps += 1;
        if self.steps > 1 {
            self.but_the_first.add(row);
        }
        let (_, part) = self.but_the_first.largest()?;
        if self.is_said || self.steps < STEPS || part < MUCH {
            return None;
        }
        self.is_said = true;
        let amount = self.but_the_first.words()?;
        Some(format!(
            "steps wait for the disk {amount}: more rows a step (train.global_batch_size; where experts are read one by \
             one, train.micro_batch_size) compute more for the same reads, a packed base (`finetune quantize`) has less \
             to read, and `finetune plan` says what else fits"
        ))
    }

    /// The end of the last line of a run; empty if no layers are read from the disk.
    pub(crate) fn ending(&self) -> String {
        self.all.words().map_or(String::new(), |amount| format!(", waiting for the disk {amount}"))
    }
}

#[cfg(test)]
mod tests {
    use finetune_trainer::StepRow;

    use super::*;

    fn step(step: u64, reading_seconds: Option<f64>) -> StepRow {
        StepRow { step, seconds: 10.0, reading_seconds, ..StepRow::default() }
    }

    /// Seconds waited in each step of 10 s; the step after which that is said; the end of the last line.
    #[test]
    fn much_waiting_is_said_once() {
        for (waited, said, ending) in [
            (&[None; 6][..], None, ""),
            (&[Some(9.0), Some(0.1), Some(0.1), Some(0.1)], None, ", waiting for the disk 23 % of the time"),
            (&[Some(0.0), Some(2.0), Some(2.0)], None, ", waiting for the disk 13 % of the time"),
            (&[Some(2.0); 9], Some(4), ", waiting for the disk 20 % of the time"),
            (
                &[Some(0.0), Some(0.0), Some(0.0), Some(0.0), Some(5.0)],
                Some(5),
                ", waiting for the disk 10 % of the time",
            ),
        ] {
            let mut waits = DiskWaits::default();
            let mut notices = Vec::new();
            for (n, seconds) in (1..).zip(waited) {
                let notice = waits.see(&Event::Step { row: &step(n, *seconds), steps: 9 });
                notices.extend(notice.map(|notice| (n, notice)));
            }
            let steps: Vec<u64> = notices.iter().map(|(n, _)| *n).collect();
            assert_eq!(steps, Vec::from_iter(said), "{waited:?}: {notices:?}");
            assert!(notices.iter().all(|(_, notice)| notice.starts_with("steps wait for the disk ")), "{notices:?}");
            assert_eq!(waits.ending(), ending, "{waited:?}");
        }
    }
}
