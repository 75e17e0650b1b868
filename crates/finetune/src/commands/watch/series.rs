//! The numbers of a run as points of a chart.

use finetune_trainer::{RunRecord, StepRow, thinned};

/// What a chart shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quantity {
    Loss,
    LearningRate,
    GradNorm,
    Speed,
}

impl Quantity {
    pub(super) fn name(self) -> &'static str {
        match self {
            Quantity::Loss => "loss",
            Quantity::LearningRate => "learning rate",
            Quantity::GradNorm => "gradient norm",
            Quantity::Speed => "tokens/s",
        }
    }

    pub(super) fn next(self) -> Quantity {
        match self {
            Quantity::Loss => Quantity::LearningRate,
            Quantity::LearningRate => Quantity::GradNorm,
            Quantity::GradNorm => Quantity::Speed,
            Quantity::Speed => Quantity::Loss,
        }
    }

    /// The lowest and the highest value of all runs.
    pub(super) fn range<'a>(self, records: impl Iterator<Item = &'a RunRecord>) -> (f64, f64) {
        let values = records.flat_map(RunRecord::steps).map(|row| self.of(row)).filter(|value| value.is_finite());
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
    }

    fn of(self, row: &StepRow) -> f64 {
        match self {
            Quantity::Loss => row.loss,
            Quantity::LearningRate => row.learning_rate,
            Quantity::GradNorm => row.grad_norm,
            Quantity::Speed => row.tokens_per_second,
        }
    }
}

/// What is shown of each run, and how.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    pub(super) quantity: Quantity,
    pub(super) logarithmic: bool,
    /// The share of the mean so far in each point, 0 to 1.
    pub(super) smoothing: f64,
    /// The first step that is shown.
    pub(super) from: u64,
    /// The most points of a line.
    pub(super) most: usize,
}

/// The largest value that is drawn: that of f32, in which runs compute. A line beyond the range of
/// f64 would never be drawn to its end.
const LARGEST: f64 = f32::MAX as f64;

/// The lines of a run: steps and values, or their logarithms to base 10.
#[derive(Debug, Default)]
pub(super) struct Series {
    /// Each step.
    pub(super) raw: Vec<(f64, f64)>,
    /// The running mean; empty without smoothing.
    pub(super) smooth: Vec<(f64, f64)>,
    /// Evaluations.
    pub(super) evals: Vec<(f64, f64)>,
}

impl Series {
    pub(super) fn new(record: &RunRecord, look: Look) -> Series {
        let scaled = |value: f64| if look.logarithmic { value.log10() } else { value };
        let shown = |&(step, value): &(f64, f64)| step >= look.from as f64 && value.abs() <= LARGEST;
        let point = |(step, value): (u64, f64)| (step as f64, scaled(value));
        let values = || record.steps().iter().map(|row| (row.step, look.quantity.of(row)));
        let raw: Vec<(f64, f64)> = values().map(point).filter(shown).collect();
        // The mean goes over all steps, also those before the first that is shown.
        let smooth = if look.smoothing > 0.0 { mean(values(), look.smoothing) } else { Vec::new() };
        let smooth: Vec<(f64, f64)> = smooth.into_iter().map(point).filter(shown).collect();
        let evals = if look.quantity == Quantity::Loss { record.evals() } else { &[] };
        let evals = evals.iter().map(|row| point((row.step, row.eval_loss))).filter(shown).collect();
        Series { raw: thinned(raw, look.most), smooth: thinned(smooth, look.most), evals }
    }

    pub(super) fn points(&self) -> impl Iterator<Item = &(f64, f64)> {
        self.raw.iter().chain(&self.smooth).chain(&self.evals)
    }
}

/// The exponential mean so far, corrected for its beginning as Adam's moments are.
fn mean(values: impl Iterator<Item = (u64, f64)>, smoothing: f64) -> Vec<(u64, f64)> {
    let (mut sum, mut weight) = (0.0, 0.0);
    let means = values.filter(|(_, value)| value.is_finite()).map(|(step, value)| {
        sum = smoothing * sum + (1.0 - smoothing) * value;
        weight = smoothing * weight + (1.0 - smoothing);
        (step, sum / weight)
    });
    means.collect()
}

#[cfg(test)]
mod tests {
    use super::super::once::tests::{line, record};
    use super::*;

    const LOOK: Look = Look { quantity: Quantity::Loss, logarithmic: false, smoothing: 0.0, from: 0, most: 1000 };

    #[test]
    fn lines_are_scaled_cut_and_thinned() {
        let record = record(20);
        let all = Series::new(&record, LOOK);
        assert_eq!((all.raw.len(), all.smooth.len(), all.evals.len()), (20, 0, 2));
        assert_eq!(all.raw[9], (10.0, 4.0));
        let late = Series::new(&record, Look { from: 11, logarithmic: true, ..LOOK });
        assert_eq!((late.raw.len(), late.evals.len()), (10, 1));
        assert!((late.raw[9].1 - 2f64.log10()).abs() < 1e-12);
        assert_eq!(Series::new(&record, Look { most: 8, ..LOOK }).raw.len(), 8);
        let rate = Series::new(&record, Look { quantity: Quantity::LearningRate, ..LOOK });
        assert!(rate.evals.is_empty() && rate.raw.iter().all(|point| point.1 == 2e-4));
    }

    #[test]
    fn values_that_no_run_computes_are_not_drawn() {
        let mut bad = record(3);
        bad.push(line(4, 1e308).as_bytes());
        assert_eq!(bad.steps().len(), 4);
        assert_eq!(Series::new(&bad, LOOK).raw.len(), 3);
    }

    /// A constant stays what it is from the first point on.
    #[test]
    fn the_mean_begins_at_the_first_value() {
        let means = mean((1..=5).map(|step| (step, 3.0)), 0.9);
        assert!(means.iter().all(|(_, mean)| (mean - 3.0).abs() < 1e-12), "{means:?}");
        let means = mean([(1, 0.0), (2, 1.0)].into_iter(), 0.5);
        assert!((means[1].1 - 2.0 / 3.0).abs() < 1e-12, "{means:?}");
    }
}
