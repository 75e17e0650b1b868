//! Values of a recipe that no run can have, although each is a number of the right kind. They are
//! checked before anything else.

use std::time::Duration;

use finetune_model::LoraTargets;
use finetune_recipe::Recipe;

use crate::error::TrainError;

/// The most rows of a step, and of a forward pass.
const MOST_ROWS: usize = 1 << 24;
/// The most virtual ranks: each needs gradients of its own.
const MOST_VIRTUAL_RANKS: usize = 4096;
/// The highest rank of a branch.
const HIGHEST_RANK: usize = 1 << 16;
/// With a shorter timeout a slow rank cannot be told from a lost one. The group refuses it too.
const SHORTEST_TIMEOUT: Duration = Duration::from_millis(500);

/// Refuses values that would end a run with an error about something else, or hang it.
pub(crate) fn check(recipe: &Recipe) -> Result<(), TrainError> {
    let beyond = |key: &'static str, value: String, what: String| Err(TrainError::Beyond { key, value, what });
    let (train, distributed) = (&recipe.train, &recipe.distributed);
    let virtual_ranks = distributed.virtual_ranks.unwrap_or(1);
    for (key, value, most) in [
        ("train.global_batch_size", train.global_batch_size, MOST_ROWS),
        ("train.micro_batch_size", train.micro_batch_size, MOST_ROWS),
        ("distributed.virtual_ranks", virtual_ranks, MOST_VIRTUAL_RANKS),
        ("lora.rank", recipe.lora.rank, HIGHEST_RANK),
    ] {
        if value > most {
            return beyond(key, value.to_string(), format!("at most {most} can be had"));
        }
    }
    if let Some((module, rank)) = recipe.lora.rank_pattern.iter().find(|(_, rank)| **rank > HIGHEST_RANK) {
        let what = format!("at most {HIGHEST_RANK} can be had");
        return beyond("lora.rank_pattern", format!("{{ {module} = {rank} }}"), what);
    }
    if distributed.timeout < SHORTEST_TIMEOUT {
        let what = "too short to tell a slow rank from a lost one; use 1s or more".to_owned();
        return beyond("distributed.timeout", format!("{:?}", distributed.timeout), what);
    }
    let rate = recipe.optimizer.learning_rate;
    if !(rate as f32).is_finite() {
        return beyond("optimizer.learning_rate", format!("{rate:?}"), "it is beyond the numbers of f32".to_owned());
    }
    Ok(())
}

/// Refuses branches whose rank or scale cannot be computed with.
pub(crate) fn check_targets(targets: &LoraTargets) -> Result<(), TrainError> {
    if let Some(rank) = targets.iter().map(|target| target.rank).find(|rank| *rank > HIGHEST_RANK) {
        // The words are those of `check`.
        let what = format!("at most {HIGHEST_RANK} can be had");
        return Err(TrainError::Beyond { key: "lora.rank", value: rank.to_string(), what });
    }
    match targets.iter().find(|target| !target.scale().is_finite()) {
        Some(target) => Err(TrainError::Beyond {
            key: "lora.alpha",
            value: format!("{:?}", target.alpha),
            what: format!("alpha / rank of {} is beyond the numbers of f32", target.module),
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn values_that_no_run_can_have() {
        for (set, key) in [
            ("train.global_batch_size=9223372036854775807", Some("train.global_batch_size")),
            ("train.micro_batch_size=9223372036854775807", Some("train.micro_batch_size")),
            ("distributed.virtual_ranks=9223372036854775807", Some("distributed.virtual_ranks")),
            ("lora.rank=9223372036854775807", Some("lora.rank")),
            ("lora.rank_pattern={ q_proj = 9223372036854775807 }", Some("lora.rank_pattern")),
            ("distributed.timeout=1ms", Some("distributed.timeout")),
            ("optimizer.learning_rate=1e300", Some("optimizer.learning_rate")),
            ("optimizer.learning_rate=1e30", None),
            ("train.global_batch_size=1000000", None),
            ("lora.rank=4096", None),
            ("distributed.timeout=500ms", None),
            ("train.max_steps=9223372036854775807", None),
        ] {
            let text = "[model]\npath = \"m\"\n[data]\ntrain = \"rows.jsonl\"\n";
            let recipe = Recipe::parse(text, Path::new("r.toml"), &[set.to_owned()], None).expect("a recipe");
            match (check(&recipe), key) {
                (Ok(()), None) => {}
                (Err(TrainError::Beyond { key: found, .. }), Some(key)) => assert_eq!(found, key, "{set}"),
                (checked, _) => panic!("{set}: {checked:?}"),
            }
        }
    }
}
