//! A run whose curve is held against one of torch.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicI32;

use finetune_recipe::Recipe;
use finetune_trainer::{Event, Outcome, Ranks, Resume, StepRow, ThisHost, prepare, train};
use serde_json::Value;

pub(crate) fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).expect("a golden file")).expect("JSON")
}

pub(crate) fn alone() -> Arc<Ranks> {
    Arc::new(Ranks::alone(None).expect("one rank"))
}

/// The rows of a run of one rank, and how it ended.
pub(crate) fn run(recipe: Recipe) -> (Vec<StepRow>, Outcome) {
    let mut prepared =
        prepare(recipe, &Resume::No, &alone(), &ThisHost::default(), &|_| {}).unwrap_or_else(|error| panic!("{error}"));
    let mut rows = Vec::new();
    let outcome = train(&mut prepared.run, &AtomicI32::new(0), &mut |event| {
        if let Event::Step { row, .. } = event {
            rows.push(row.clone());
        }
    });
    (rows, outcome.unwrap_or_else(|error| panic!("{error}")))
}

/// The keys of a recipe that torch's curve was made with.
pub(crate) fn variant_sets(curves: &Value, variant: &Value) -> Vec<String> {
    vec![
        format!("train.max_steps={}", variant["steps"]),
        format!("train.global_batch_size={}", curves["global_batch_size"]),
        format!("train.micro_batch_size={}", curves["micro_batch_size"]),
        format!("train.max_grad_norm={}", variant["max_grad_norm"]),
        format!("optimizer.learning_rate={}", variant["learning_rate"]),
        format!("optimizer.weight_decay={}", variant["weight_decay"]),
        format!("schedule.name={}", variant["schedule"]),
        format!("schedule.warmup_steps={}", variant["warmup_steps"]),
        format!("schedule.min_lr_ratio={}", variant["min_lr_ratio"]),
    ]
}
