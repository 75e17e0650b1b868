//! The files of a base whose layers several ranks hold together: each rank has those of its own layers.

use std::path::{Path, PathBuf};

use finetune_model::{Model, Placement};
use finetune_recipe::Recipe;
use finetune_store::{missing_shards, read_rate};

use crate::device_plan::ThisHost;
use crate::error::TrainError;
use crate::ranks::Ranks;

/// Fetches the files of this rank's layers that are not here, if the host can fetch. All ranks call it together.
///
/// # Errors
/// If a file cannot be fetched.
pub(crate) fn fetch_missing(
    recipe: &Recipe,
    directory: &Path,
    placement: &Placement,
    host: &ThisHost,
    ranks: &Ranks,
) -> Result<(), TrainError> {
    let Some(fetch) = host.fetch else { return Ok(()) };
    let mut missing = missing_shards(directory);
    if !missing.is_empty() {
        let files = Model::files_of(directory, placement)?;
        missing.retain(|name| files.contains(name));
    }
    if !missing.is_empty() {
        fetch(recipe, &missing).map_err(TrainError::NotFetched)?;
    }
    // Whoever cannot have its files says so before the others load theirs.
    if ranks.group().world() > 1 {
        ranks.group().barrier()?;
    }
    Ok(())
}

/// Bytes per second of the disk that a base is on, measured on its largest file. `None`: that is too small, or not here
/// yet.
pub(crate) fn disk_rate(base: &Path) -> Option<f64> {
    if base.is_file() {
        return read_rate(base);
    }
    let is_weights = |path: &PathBuf| path.extension().is_some_and(|end| end == "safetensors" || end == "gguf");
    let files = std::fs::read_dir(base).ok()?.filter_map(|entry| Some(entry.ok()?.path())).filter(is_weights);
    read_rate(&files.max_by_key(|path| path.metadata().map_or(0, |found| found.len()))?)
}
