//! The part of the time of a run's steps that ranks wait for layers from the disk.

use crate::metrics::StepRow;

/// What steps took, and what each rank has waited in them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReadingShare {
    seconds: f64,
    /// In rank order; `None`: all layers are in memory there.
    waited: Vec<Option<f64>>,
}

impl ReadingShare {
    /// Adds a step.
    pub fn add(&mut self, row: &StepRow) {
        let waited: Vec<Option<f64>> = match row.ranks.is_empty() {
            true => vec![row.reading_seconds],
            false => row.ranks.iter().map(|rank| rank.reading_seconds).collect(),
        };
        self.seconds += row.seconds;
        // A resume may have more ranks than the steps before it.
        self.waited.resize(self.waited.len().max(waited.len()), None);
        for (sum, more) in self.waited.iter_mut().zip(waited) {
            if let Some(more) = more {
                *sum = Some(sum.unwrap_or_default() + more);
            }
        }
    }

    /// The rank that has waited longest, and which part of the time; `None` if no rank reads layers.
    pub fn largest(&self) -> Option<(usize, f64)> {
        let waited = self.waited.iter().enumerate().filter_map(|(rank, waited)| Some((rank, (*waited)?)));
        let (rank, longest) = waited.max_by(|one, other| one.1.total_cmp(&other.1))?;
        (self.seconds > 0.0).then(|| (rank, longest / self.seconds))
    }

    /// `12 % of the time`, with several ranks `12 % of the time (rank 2)`; `None` if no rank reads layers.
    pub fn words(&self) -> Option<String> {
        let (rank, part) = self.largest()?;
        let percent = 100.0 * part;
        let amount = if percent < 1.0 { "less than 1".to_owned() } else { format!("{percent:.0}") };
        let of_rank = if self.waited.len() > 1 { format!(" (rank {rank})") } else { String::new() };
        Some(format!("{amount} % of the time{of_rank}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::RankRow;

    /// A step of two seconds: how long rank 0 has waited, and each of several ranks.
    fn row(reading_seconds: Option<f64>, ranks: &[Option<f64>]) -> StepRow {
        let of_rank = |(rank, &reading_seconds)| RankRow { rank, reading_seconds, ..RankRow::default() };
        let ranks = ranks.iter().enumerate().map(of_rank).collect();
        StepRow { step: 1, seconds: 2.0, reading_seconds, ranks, ..StepRow::default() }
    }

    #[test]
    fn the_rank_that_waits_longest_counts() {
        let alone = |seconds| row(Some(seconds), &[]);
        let together = |reading: &[Option<f64>]| row(Some(0.1), reading);
        for (rows, want) in [
            (vec![], None),
            (vec![row(None, &[])], None),
            (vec![row(None, &[None, None])], None),
            (vec![alone(0.4), alone(0.2)], Some("15 % of the time")),
            (vec![alone(0.0)], Some("less than 1 % of the time")),
            (vec![together(&[Some(0.1), None, Some(1.0)])], Some("50 % of the time (rank 2)")),
            // The first step was made by one rank.
            (vec![alone(1.0), together(&[Some(1.0), Some(1.5)])], Some("50 % of the time (rank 0)")),
        ] {
            let mut share = ReadingShare::default();
            rows.iter().for_each(|row| share.add(row));
            assert_eq!(share.words().as_deref(), want, "{share:?}");
        }
    }
}
