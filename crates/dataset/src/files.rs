//! Which files the rows are in.

use std::path::{Path, PathBuf};

use finetune_recipe::{Data, is_hub_rows};
use glob::{MatchOptions, Pattern, glob_with};

use crate::error::DatasetError;
use crate::kinds::FileKind;
use crate::splits;

/// Names of splits that people keep held-back rows in. The first is the one that is looked for in a
/// training directory.
const HELD_BACK: [&str; 6] = ["valid", "validation", "val", "dev", "eval", "test"];

/// Directories and patterns in `train` and `eval` become files: (training files, evaluation files).
///
/// A training directory gives its split `train` (`splits.rs`). If `eval` is empty, its split
/// `valid` is evaluated, if it has one. A directory that `eval` names may have its rows under
/// another usual name. A pattern gives the files that it hits, sorted by name.
///
/// # Errors
/// [`DatasetError::NoTrainFile`], [`DatasetError::SeveralFiles`], [`DatasetError::MissingShard`],
/// [`DatasetError::Pattern`], [`DatasetError::NotFetched`], [`DatasetError::Unreadable`],
/// [`DatasetError::OtherKind`], [`DatasetError::Damaged`].
pub fn resolve_files(train: &[PathBuf], eval: &[PathBuf]) -> Result<(Vec<PathBuf>, Vec<PathBuf>), DatasetError> {
    let (mut train_files, mut eval_files) = (Vec::new(), Vec::new());
    for path in train {
        train_files.extend(training_files(path)?);
        if eval.is_empty() && path.is_dir() {
            eval_files.extend(splits::files(path, HELD_BACK[0])?);
        }
    }
    for path in eval {
        eval_files.extend(if path.is_dir() { held_back(path)? } else { matched(path)? });
    }
    for path in train_files.iter().chain(&eval_files) {
        readable(path)?;
        FileKind::of(path)?;
    }
    Ok((train_files, eval_files))
}

/// The files of one entry of `data.train`.
fn training_files(path: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    if !path.is_dir() {
        return matched(path);
    }
    let files = splits::files(path, "train")?;
    if files.is_empty() { Err(DatasetError::NoTrainFile { path: path.to_owned() }) } else { Ok(files) }
}

/// The held-back rows of a directory. If it has none, the name that the first of them would have.
fn held_back(path: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    for split in HELD_BACK {
        let files = splits::files(path, split)?;
        if !files.is_empty() {
            return Ok(files);
        }
    }
    Ok(vec![path.join(format!("{}.jsonl", HELD_BACK[0]))])
}

/// The files that a pattern hits, or the path itself if it is none. A file whose own name has the
/// characters of a pattern is that file.
///
/// # Errors
/// [`DatasetError::Pattern`], [`DatasetError::NotFetched`].
pub fn matched(path: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    if is_hub_rows(path) {
        return Err(DatasetError::NotFetched { entry: path.display().to_string() });
    }
    let shown = path.display().to_string();
    if path.exists() || !shown.contains(['*', '?', '[']) {
        return Ok(vec![path.to_owned()]);
    }
    let fault = |reason: String| DatasetError::Pattern { pattern: shown.clone(), reason };
    // Directories that exist stand for themselves, whatever their names look like.
    let (mut there, mut pattern) = (PathBuf::new(), PathBuf::new());
    for part in path.components() {
        there.push(part);
        match there.exists() {
            true => pattern.push(Pattern::escape(&part.as_os_str().to_string_lossy())),
            false => pattern.push(part),
        }
    }
    let options =
        MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };
    let found = glob_with(&pattern.to_string_lossy(), options).map_err(|error| fault(error.to_string()))?;
    let mut files = Vec::new();
    for path in found {
        let path = path.map_err(|error| fault(error.to_string()))?;
        if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() { Err(fault("no file has such a name".to_owned())) } else { Ok(files) }
}

/// A notice for each training directory with files that look like held-back rows and are not used.
pub fn unused_files(train: &[PathBuf], eval: &[PathBuf]) -> Vec<String> {
    if !eval.is_empty() {
        return Vec::new();
    }
    let split = |path: &PathBuf, split: &'static str| splits::files(path, split).unwrap_or_default();
    let without_valid = train.iter().filter(|path| path.is_dir() && split(path, HELD_BACK[0]).is_empty());
    let files = without_valid.filter_map(|path| HELD_BACK.iter().find_map(|name| split(path, name).into_iter().next()));
    files.map(|file| format!("{} is not used: to evaluate on its rows, name it in data.eval", file.display())).collect()
}

/// The weight of each of the files that `data.train` became (`data.weights`). Empty without
/// weights.
pub(crate) fn weights(data: &Data, files: &[PathBuf]) -> Vec<f64> {
    if data.weights.is_empty() {
        return Vec::new();
    }
    let mut known: Vec<(PathBuf, f64)> = Vec::new();
    for (path, weight) in data.train.iter().zip(&data.weights) {
        known.extend(training_files(path).unwrap_or_default().into_iter().map(|file| (file, *weight)));
    }
    if known.len() == files.len() && known.iter().zip(files).all(|((path, _), file)| path == file) {
        return known.into_iter().map(|(_, weight)| weight).collect();
    }
    let weight = |file: &PathBuf| known.iter().find(|(path, _)| path == file).map_or(1.0, |(_, weight)| *weight);
    files.iter().map(weight).collect()
}

fn readable(path: &Path) -> Result<(), DatasetError> {
    match std::fs::File::open(path) {
        Ok(_) => Ok(()),
        Err(source) => Err(DatasetError::Unreadable { path: path.to_owned(), source }),
    }
}
