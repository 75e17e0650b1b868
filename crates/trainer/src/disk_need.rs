//! How many bytes a run will write, known before it starts.

use std::path::Path;

use finetune_recipe::{Method, Recipe};
use finetune_store::{RealDisk, numbered};
use serde::Serialize;

use crate::error::TrainError;
use crate::names::CHECKPOINTS;
use crate::names::RESULTS;
use crate::run_directory::{keeps_best, publishes_best};

/// Bytes that a run needs in its directory at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DiskNeed {
    /// One checkpoint: parameters, both moments, text files.
    pub checkpoint: u64,
    /// The most checkpoints at a time: those that are kept, the best, and one being written.
    pub checkpoints: u64,
    /// The result, `adapter/` or `model/`.
    pub result: u64,
    /// Metrics, report and event files.
    pub records: u64,
    /// All of these together.
    pub total: u64,
    /// What the run directory holds already.
    pub there: u64,
    /// Bytes free where the run is written, if they can be told.
    pub free: Option<u64>,
}

/// A manifest, a state, a card, headers, and blocks that are not full.
const SMALL_FILES: u64 = 32 << 10;
/// A row of metrics.jsonl, with room for its point in the report.
const ROW: u64 = 400;
/// The page without points, and what the run says of itself.
const PAGE: u64 = 32 << 10;
/// A row of an event file.
const EVENT: u64 = 220;
/// Bytes of an f32 number.
const FLOAT: u64 = 4;

impl DiskNeed {
    /// `trained`: parameters that are trained. `text`: bytes of the tokenizer's files beside them.
    /// `free`: bytes free on the disk, if they can be told.
    pub(crate) fn new(
        recipe: &Recipe,
        trained: u64,
        steps: u64,
        has_eval: bool,
        text: u64,
        free: Option<u64>,
    ) -> DiskNeed {
        let values = trained.saturating_mul(FLOAT);
        let result = values.saturating_add(text).saturating_add(SMALL_FILES);
        let checkpoint = values.saturating_mul(3).saturating_add(text).saturating_add(SMALL_FILES);
        let best = has_eval && keeps_best(recipe);
        // The most saves that can happen: each `every` steps, at each best evaluation, and at the
        // end.
        let often = |every: u64| steps.checked_div(every).unwrap_or(0);
        let saves = often(recipe.checkpoint.every)
            .saturating_add(if best { often(recipe.eval.every) } else { 0 })
            .saturating_add(1);
        let kept = (recipe.checkpoint.keep_last as u64).saturating_add(u64::from(best));
        let checkpoints = kept.saturating_add(1).min(saves.max(1));
        let row = ROW + if recipe.event_folder().is_some() { EVENT } else { 0 };
        let records = steps.saturating_mul(row).min(1 << 30).saturating_add(PAGE);
        let total = checkpoint.saturating_mul(checkpoints).saturating_add(result).saturating_add(records);
        DiskNeed { checkpoint, checkpoints, result, records, total, there: bytes_there(&recipe.output_dir), free }
    }

    /// Bytes that a rank needs which keeps copies of the checkpoints.
    pub(crate) fn of_copies(&self) -> u64 {
        self.checkpoint.saturating_mul(self.checkpoints).saturating_add(self.records)
    }

    /// Bytes that have to be free for the run now.
    pub fn missing(&self) -> u64 {
        // One checkpoint is written before an older one is removed.
        self.total.saturating_sub(self.there).max(self.checkpoint.min(self.total))
    }

    /// Refuses a run that would end on a full disk.
    pub(crate) fn check(&self, recipe: &Recipe) -> Result<(), TrainError> {
        match self.free {
            Some(free) if free < self.missing() => Err(TrainError::Disk {
                directory: recipe.output_dir.clone(),
                needed: self.missing(),
                free,
                hints: self.hints(recipe, free),
            }),
            _ => Ok(()),
        }
    }

    /// What helps against a full disk.
    fn hints(&self, recipe: &Recipe, free: u64) -> Vec<String> {
        let human = finetune_store::human_bytes;
        let mut hints = Vec::new();
        let least = self.checkpoint.saturating_mul(2).saturating_add(self.result).saturating_add(self.records);
        if recipe.checkpoint.keep_last > 1 && least < self.total {
            hints.push(format!(
                "checkpoint.keep_last = 1 keeps fewer of them: a checkpoint has {}",
                human(self.checkpoint)
            ));
        }
        hints.push(format!(
            "free {} more there (`df -h` shows what is left), or write elsewhere with --output-dir",
            human(self.missing().saturating_sub(free))
        ));
        if recipe.train.method == Method::Full {
            hints.push("train.method = \"lora\" writes a small part of that".to_owned());
        }
        if publishes_best(recipe) && !recipe.checkpoint.keep_best {
            hints.push("checkpoint.result = \"last\" keeps no best checkpoint".to_owned());
        }
        hints
    }
}

/// Bytes of the checkpoints and results in a run directory.
fn bytes_there(directory: &Path) -> u64 {
    let checkpoints = numbered(&RealDisk, &directory.join(CHECKPOINTS), "step-").unwrap_or_default();
    let results = RESULTS.iter().map(|name| directory.join(name));
    checkpoints.into_iter().map(|(_, path)| path).chain(results).map(|path| bytes_of(&path)).sum()
}

/// Bytes of the files in a directory, without its folders.
fn bytes_of(directory: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(directory) else { return 0 };
    entries
        .flatten()
        .filter_map(|entry| entry.metadata().ok())
        .filter(|file| file.is_file())
        .map(|file| file.len())
        .sum()
}

#[cfg(test)]
mod tests {
    use finetune_advice::Advice as _;

    use super::*;

    fn recipe(output: &Path, more: &str) -> Recipe {
        let text = format!(
            "output_dir = {output:?}\n[model]\npath = \"m\"\n[data]\ntrain = \"rows.jsonl\"\neval = \"eval.jsonl\"\n{more}"
        );
        Recipe::parse(&text, Path::new("r.toml"), &[], None).unwrap_or_else(|error| panic!("{error}"))
    }

    /// (keys, steps, checkpoints at a time): no more than there can be saves, and the best one if
    /// it is kept.
    #[test]
    fn checkpoints_that_lie_there_at_once() {
        let cases = [
            ("[checkpoint]\nevery = 10\nkeep_last = 3\nkeep_best = false\n", 1000, 4),
            ("[checkpoint]\nevery = 10\nkeep_last = 3\n[eval]\nevery = 10\n", 1000, 5),
            ("[checkpoint]\nevery = 100\nkeep_last = 3\nkeep_best = false\n", 50, 1),
            ("[checkpoint]\nevery = 0\nkeep_last = 9\nkeep_best = false\n", 1000, 1),
            (
                "[checkpoint]\nevery = 10\nkeep_last = 1\nkeep_best = false\n[eval]\nevery = 10\nearly_stopping_patience = 2\n",
                1000,
                3,
            ),
            ("[checkpoint]\nevery = 1\nkeep_last = 9223372036854775807\nkeep_best = false\n", 12, 13),
        ];
        let folder = tempfile::tempdir().expect("a directory");
        for (keys, steps, checkpoints) in cases {
            let need = DiskNeed::new(&recipe(folder.path(), keys), 1_000_000, steps, true, 500, None);
            assert_eq!(need.checkpoints, checkpoints, "{keys}");
            assert!(need.checkpoint > 12_000_500 && need.result > 4_000_500, "{need:?}");
            assert_eq!(need.total, need.checkpoint * checkpoints + need.result + need.records, "{keys}");
        }
    }

    #[test]
    fn what_is_there_already_need_not_be_free() {
        let folder = tempfile::tempdir().expect("a directory");
        let run = folder.path().join("run");
        let small = recipe(&run, "[checkpoint]\nevery = 10\nkeep_last = 3\nkeep_best = false\n");
        let before = DiskNeed::new(&small, 1000, 100, false, 0, None);
        assert_eq!(before.missing(), before.total);
        let file = run.join("checkpoints/step-000010/optimizer.safetensors");
        finetune_store::replace_file(&RealDisk, &file, &[0; 8000]).expect("a file");
        let after = DiskNeed::new(&small, 1000, 100, false, 0, None);
        assert_eq!(after.missing(), before.total - 8000);
        for (free, fits) in [(after.missing(), true), (after.missing() - 1, false), (0, false)] {
            let checked = DiskNeed { free: Some(free), ..after }.check(&small);
            assert_eq!(checked.is_ok(), fits, "{free}");
            if let Err(error) = checked {
                assert_eq!(error.fault(), crate::Fault::DiskOrMemory);
                assert!(error.hints()[0].contains("checkpoint.keep_last = 1"), "{:?}", error.hints());
            }
        }
    }
}
