//! The learning rate of each step, by the formulas of transformers' schedules.

use finetune_recipe::{self as recipe, ScheduleName, Warmup};

/// Learning rates as a function of the step.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    name: ScheduleName,
    peak: f64,
    warmup: u64,
    total: u64,
    min_ratio: f64,
}

impl Schedule {
    /// `peak`: the highest rate. `total`: all steps of the run, warm-up included.
    pub fn new(schedule: &recipe::Schedule, peak: f64, total: u64) -> Schedule {
        let warmup = match schedule.warmup {
            Warmup::Steps(steps) => steps,
            // Rounded as in transformers.
            Warmup::Ratio(ratio) => (ratio * total as f64).ceil() as u64,
        };
        Schedule { name: schedule.name, peak, warmup, total, min_ratio: schedule.min_lr_ratio }
    }

    /// Steps of the warm-up. They may be more than the run has.
    pub(crate) fn warmup(&self) -> u64 {
        self.warmup
    }

    /// The highest rate, if the warm-up ends.
    pub(crate) fn peak(&self) -> f64 {
        self.peak
    }

    /// The rate of step `step`, which counts from 0. The first rate of a warm-up is 0.
    pub fn at(&self, step: u64) -> f64 {
        self.peak * self.factor(step)
    }

    /// The rate of a step, divided by the peak.
    fn factor(&self, step: u64) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup.max(1) as f64;
        }
        let progress = (step - self.warmup) as f64 / (self.total.saturating_sub(self.warmup)).max(1) as f64;
        let falling = match self.name {
            ScheduleName::Constant => return 1.0,
            ScheduleName::Linear => (1.0 - progress).max(0.0),
            ScheduleName::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()),
        };
        self.min_ratio + (1.0 - self.min_ratio) * falling
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_peak_and_end() {
        let settings = |name, warmup, min_lr_ratio| recipe::Schedule { name, warmup, min_lr_ratio };
        let cases = [
            // name, warm-up, minimum ratio, step, factor
            (ScheduleName::Constant, Warmup::Steps(0), 0.0, 0, 1.0),
            (ScheduleName::Constant, Warmup::Steps(4), 0.0, 1, 0.25),
            (ScheduleName::Linear, Warmup::Steps(2), 0.0, 2, 1.0),
            (ScheduleName::Linear, Warmup::Steps(2), 0.0, 6, 0.5),
            (ScheduleName::Linear, Warmup::Steps(2), 0.2, 10, 0.2),
            (ScheduleName::Cosine, Warmup::Ratio(0.2), 0.0, 2, 1.0),
            (ScheduleName::Cosine, Warmup::Ratio(0.2), 0.0, 6, 0.5),
            (ScheduleName::Cosine, Warmup::Ratio(0.2), 0.1, 10, 0.1),
            (ScheduleName::Cosine, Warmup::Ratio(0.11), 0.1, 1, 0.5),
        ];
        for (name, warmup, minimum, step, want) in cases {
            let got = Schedule::new(&settings(name, warmup, minimum), 2.0, 10).at(step);
            assert!((got - 2.0 * want).abs() < 1e-12, "{name:?} {warmup:?} {minimum} at {step}: {got}");
        }
    }
}
