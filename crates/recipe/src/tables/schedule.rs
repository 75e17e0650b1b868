//! `[schedule]`: the learning rate, step by step.

use crate::ScheduleName;
use crate::kind::{Integer, Number, Share, word};

table! {
    [schedule]
    /// The learning rate over the steps of a run.
    pub struct Schedule {
        /// the learning rate after warm-up
        name: ScheduleName = word::<ScheduleName>(), default(ScheduleName::Cosine), Digest, [
            "lr_scheduler", "lr_scheduler_type", "lr_schedule", "scheduler", "lr_decay",
            "schedule.kind", "schedule.type", "schedule._component_",
        ];
        /// How long the learning rate climbs from 0: the one or the other key.
        warmup: Warmup {
            /// optimizer steps in which the learning rate climbs from 0; or `warmup_ratio`
            warmup_steps as Warmup::Steps = Integer(0), default(0), Digest, [
                "warmup" => "optimizer steps; a share of the run is `warmup_ratio`",
                "num_warmup_steps", "lr_warmup_steps", "warmup_iters",
            ];
            /// the same as a share of all steps; instead of `warmup_steps`
            warmup_ratio as Warmup::Ratio = Number(Share), unset("`warmup_steps` counts"), Digest, [
                "warmup_fraction", "warmup_percent" => "divide by 100", "warmup_proportion",
            ];
        };
        /// the last learning rate as a share of the highest
        min_lr_ratio: f64 = Number(Share), default(0.0), Digest, [
            "cosine_min_lr_ratio", "min_lr" => "min_lr_ratio = min_lr / learning_rate",
            "min_learning_rate" => "min_lr_ratio = min_learning_rate / learning_rate",
            "lr_end" => "min_lr_ratio = lr_end / learning_rate", "min_lr_rate",
        ];
    }
}

/// How long the learning rate climbs from 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// Optimizer steps.
    Steps(u64),
    /// A share of all optimizer steps, 0 to 1.
    Ratio(f64),
}
