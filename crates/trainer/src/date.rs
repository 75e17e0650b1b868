//! The day that a chat template calls today. It is fixed when a run starts, and is the same on all
//! ranks and after every resume.

use std::path::{Path, PathBuf};

use chrono::NaiveDateTime;
use finetune_dataset::clock;
use finetune_recipe::Recipe;
use finetune_store::{MANIFEST_NAME, RealDisk, numbered};

use crate::error::TrainError;
use crate::names::RECIPE_FILE;
use crate::names::{CHECKPOINTS, COPIES};
use crate::ranks::Ranks;
use crate::resume::Resume;
use crate::state::StateFile;

/// YYYY-MM-DD: the recipe's date, otherwise the date that the run was started with, otherwise
/// today. Rank 0 decides, whatever the time zones of the others are.
pub(crate) fn agree(recipe: &Recipe, resume: &Resume, ranks: &Ranks) -> Result<String, TrainError> {
    let mine = if ranks.is_first() { choose(recipe, resume) } else { String::new() };
    let all = ranks.gather_texts(&mine)?;
    Ok(all.into_iter().next().unwrap_or(mine))
}

/// The date of a run that starts or goes on here.
pub(crate) fn choose(recipe: &Recipe, resume: &Resume) -> String {
    let recorded = || if *resume == Resume::No { None } else { recorded(&recipe.output_dir, resume) };
    recipe.data.date.clone().or_else(recorded).unwrap_or_else(|| day(clock::now()))
}

/// The date that the run to be resumed has written down. If a version without dates started it, the
/// day of its oldest checkpoint is the best guess.
fn recorded(output_dir: &Path, resume: &Resume) -> Option<String> {
    let run = match resume {
        Resume::From(path) => run_of(path),
        Resume::No | Resume::Newest => output_dir.to_owned(),
    };
    let newest = match resume {
        Resume::From(path) if path.join(MANIFEST_NAME).is_file() => Some(path.clone()),
        _ => checkpoints(&run).pop(),
    };
    let of_state = || StateFile::read(newest.as_deref()?).ok()?.date;
    let of_recipe = || Recipe::load(&run.join(RECIPE_FILE), &[], None).ok()?.data.date;
    let of_file = || {
        let oldest = checkpoints(&run).into_iter().next().or(newest.clone())?;
        let written = std::fs::metadata(oldest.join(MANIFEST_NAME)).ok()?.modified().ok()?;
        Some(day(clock::local(written)))
    };
    of_state().or_else(of_recipe).or_else(of_file)
}

/// The run directory that a path given to `--resume` belongs to.
fn run_of(path: &Path) -> PathBuf {
    let holds = |folder: &&Path| folder.join(CHECKPOINTS).is_dir();
    path.ancestors().take(3).find(holds).unwrap_or(path).to_owned()
}

/// The checkpoints of a run, oldest first.
fn checkpoints(run: &Path) -> Vec<PathBuf> {
    // If the run's own host was lost, the copies that this host has kept.
    let of = |folder: &str| numbered(&RealDisk, &run.join(folder), "step-").unwrap_or_default();
    let (own, copies) = (of(CHECKPOINTS), of(COPIES));
    let found = if own.is_empty() { copies } else { own };
    found.into_iter().map(|(_, path)| path).collect()
}

/// A day as YYYY-MM-DD.
fn day(time: NaiveDateTime) -> String {
    time.format("%Y-%m-%d").to_string()
}

#[cfg(test)]
mod tests {
    use finetune_store::replace_file;

    use super::*;

    fn recipe(output: &Path, date: Option<&str>) -> Recipe {
        let date = date.map_or(String::new(), |date| format!("date = {date:?}\n"));
        let text = format!("output_dir = {output:?}\n[model]\npath = \"m\"\n[data]\ntrain = \"rows.jsonl\"\n{date}");
        Recipe::parse(&text, Path::new("r.toml"), &[], None).expect("a recipe")
    }

    /// The recipe's date comes before the recorded one, and that before today. A fresh start does
    /// not look back.
    #[test]
    fn the_first_date_counts() {
        let folder = tempfile::tempdir().expect("a directory");
        let run = folder.path().join("run");
        let today = day(clock::now());
        assert_eq!(choose(&recipe(&run, None), &Resume::Newest), today, "nothing there yet");
        let written = recipe(&run, Some("2024-02-29")).to_toml();
        replace_file(&RealDisk, &run.join(RECIPE_FILE), written.as_bytes()).expect("a recipe of a run");
        let step = run.join(CHECKPOINTS).join("step-000004");
        replace_file(&RealDisk, &step.join(MANIFEST_NAME), b"{}").expect("a file");
        for (date, resume, want) in [
            (None, Resume::Newest, "2024-02-29"),
            (None, Resume::From(step.clone()), "2024-02-29"),
            (None, Resume::From(run.clone()), "2024-02-29"),
            (None, Resume::No, today.as_str()),
            (Some("2025-01-31"), Resume::Newest, "2025-01-31"),
        ] {
            assert_eq!(choose(&recipe(&run, date), &resume), want, "{date:?} {resume:?}");
        }
        // A run of a version that wrote no date has the day of its checkpoint.
        replace_file(&RealDisk, &run.join(RECIPE_FILE), recipe(&run, None).to_toml().as_bytes()).expect("a recipe");
        assert_eq!(choose(&recipe(&run, None), &Resume::Newest), today);
    }
}
