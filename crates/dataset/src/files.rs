//! Which files the rows are in.

use std::io;
use std::path::{Path, PathBuf};

use finetune_recipe::{Data, HUB_ROWS, is_hub_rows};
use glob::{MatchOptions, Pattern, glob_with};

use crate::error::DatasetError;
use crate::kinds::{self, FileKind};
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
    let (mut there, mut pattern, mut base) = (PathBuf::new(), PathBuf::new(), PathBuf::new());
    for part in path.components() {
        there.push(part);
        match there.exists() {
            true => {
                pattern.push(Pattern::escape(&part.as_os_str().to_string_lossy()));
                base.push(part);
            }
            false => pattern.push(part),
        }
    }
    let mut files = Vec::new();
    if shown.contains("**") {
        let pattern = Pattern::new(&pattern.to_string_lossy()).map_err(|error| fault(error.to_string()))?;
        files = spanning(&pattern, base, shown.contains("/.")).map_err(fault)?;
    } else {
        let found = glob_with(&pattern.to_string_lossy(), OPTIONS).map_err(|error| fault(error.to_string()))?;
        for path in found {
            files.push(path.map_err(|error| fault(error.to_string()))?);
        }
        files.retain(|path| path.is_file());
    }
    files.sort();
    if files.is_empty() { Err(fault("no file has such a name".to_owned())) } else { Ok(files) }
}

const OPTIONS: MatchOptions =
    MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

/// The most names that are looked at for a pattern with `**`: some seconds.
const MOST_NAMES: usize = 1_000_000;

/// The files that a pattern with `**` hits below a folder. Links to folders are not followed: one
/// that leads back would hit each file again and again. `hidden`: folders whose names begin with a
/// dot, too.
fn spanning(pattern: &Pattern, base: PathBuf, hidden: bool) -> Result<Vec<PathBuf>, String> {
    let (mut folders, mut files, mut names) = (vec![base], Vec::new(), 0);
    while let Some(folder) = folders.pop() {
        let here = if folder.as_os_str().is_empty() { Path::new(".") } else { folder.as_path() };
        let unreadable = |error: std::io::Error| format!("{}: {error}", here.display());
        for entry in std::fs::read_dir(here).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            names += 1;
            if names > MOST_NAMES {
                return Err(format!("more than {MOST_NAMES} names lie there: begin with a folder nearer to the rows"));
            }
            let path = folder.join(entry.file_name());
            if entry.file_type().map_err(unreadable)?.is_dir() {
                if hidden || !entry.file_name().to_string_lossy().starts_with('.') {
                    folders.push(path);
                }
            } else if pattern.matches_path_with(&path, OPTIONS) && path.is_file() {
                files.push(path);
            }
        }
    }
    Ok(files)
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

/// What to say of a file that cannot be read.
pub(crate) fn unreadable(path: &Path, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => format!("there is no {}", path.display()),
        _ => format!("cannot read {}: {error}", path.display()),
    }
}

/// What to do about it. A path of two names may be meant as a dataset of the hub.
pub(crate) fn unreadable_hints(path: &Path, error: &io::Error) -> Vec<String> {
    if error.kind() == io::ErrorKind::TimedOut && kinds::is_pipe(path) {
        return vec!["start the program that writes the rows before, or name a file of rows".to_owned()];
    }
    if error.kind() == io::ErrorKind::PermissionDenied {
        return vec![format!("check who may read it: ls -l {}", path.display())];
    }
    let text = path.to_string_lossy();
    let relative = text.strip_prefix("./").unwrap_or(&text);
    let parts = relative.split('/').filter(|part| !part.is_empty()).count();
    let mut hints = vec!["paths in a recipe are relative to the recipe file".to_owned()];
    if parts == 2 && path.is_relative() && path.extension().is_none() {
        hints.push(format!("a data set of the hub is written {HUB_ROWS}{relative}"));
    }
    hints
}

fn readable(path: &Path) -> Result<(), DatasetError> {
    // A pipe that is opened and closed again is broken for the program that writes to it.
    if kinds::is_pipe(path) {
        return Ok(());
    }
    match std::fs::File::open(path) {
        Ok(_) => Ok(()),
        Err(source) => Err(DatasetError::Unreadable { path: path.to_owned(), source }),
    }
}
