//! `[checkpoint]`: what is saved.

use crate::ResultChoice;
use crate::kind::{Count, Integer, Switch, word};

table! {
    [checkpoint]
    /// What is saved, and how often.
    pub struct Checkpoint {
        /// optimizer steps between checkpoints; 0: at the end only
        every: u64 = Integer(0), default(100), Shared, [
            "save_steps", "save_every", "saves_per_epoch" => "ours counts optimizer steps",
            "save_strategy" => "ours counts optimizer steps", "save_interval",
            "checkpointing_steps", "save_every_n_steps", "checkpoint.steps", "checkpoint.interval",
        ];
        /// how many of the newest checkpoints stay
        keep_last: usize = Count(1), default(3), Shared, [
            "save_total_limit", "keep_last_n", "keep_last_n_checkpoints", "max_checkpoints",
            "checkpoint.keep",
        ];
        /// also keeps the checkpoint with the lowest evaluation loss
        keep_best: bool = Switch, default(true), Shared, [
            "save_best", "save_best_checkpoint",
            "metric_for_best_model" => "it is the evaluation loss",
        ];
        /// which checkpoint becomes the result (`adapter/`): that with the lowest evaluation loss,
        /// or the last
        result: Option<ResultChoice> = word::<ResultChoice>(),
            unset("`best` with early stopping, else `last`"), Shared, [
            "load_best_model_at_end" => r#"true is result = "best""#, "checkpoint.adapter",
        ];
        /// hosts besides the first that keep the newest checkpoint, so that a restart can go on
        /// without the first
        copies: Option<usize> = Count(0),
            unset("1 where there are several hosts, else 0"), Shared, [
            "checkpoint.replicas",
        ];
    }
}
