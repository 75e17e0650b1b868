//! `[eval]`: what is measured on held-back rows.

use crate::kind::{Count, Integer};

table! {
    [eval]
    /// What is measured on held-back rows, and how often.
    pub struct Eval {
        /// optimizer steps between evaluations; 0: at the end only
        every: u64 = Integer(0), default(100), Shared, [
            "eval_steps", "eval_every", "steps_per_eval",
            "evals_per_epoch" => "ours counts optimizer steps",
            "eval_strategy" => "ours counts optimizer steps",
            "evaluation_strategy" => "ours counts optimizer steps", "eval_interval",
            "run_val_every_n_steps", "eval.steps", "eval.interval",
        ];
        /// stops after this many evaluations in a row without a new best
        early_stopping_patience: Option<u64> = Integer(1), unset("never stops early"), Digest, [
            "early_stopping", "patience", "early_stopping_steps" => "ours counts evaluations",
        ];
        /// held-back rows whose answers are generated before and after training and shown
        samples: usize = Count(0), default(0), Shared, [
            "num_samples", "num_generations", "eval_samples",
        ];
        /// held-back rows answered greedily and scored by exact match before and after; 0: off
        exact_match: usize = Count(0), default(0), Shared, [
            "eval.accuracy", "predict_with_generate" => "ours is a number of rows",
            "eval_table_size" => "ours is a number of rows",
        ];
        /// longest generated answer, in tokens
        max_new_tokens: usize = Count(1), default(64), Shared, [
            "generation_max_length", "eval_max_new_tokens", "max_completion_length",
            "eval.max_tokens",
        ];
    }
}
