//! Which files the rows are in.

use std::path::{Path, PathBuf};

use crate::error::DatasetError;
use crate::other_kinds;

/// Names under which people keep the rows that are held back. The first is the one that is looked
/// for in a training directory.
const HELD_BACK: [&str; 6] = ["valid.jsonl", "validation.jsonl", "val.jsonl", "dev.jsonl", "eval.jsonl", "test.jsonl"];

/// Directories in `train` and `eval` become the files in them: (training files, evaluation files).
///
/// A training directory gives its `train.jsonl`. If `eval` is empty, its `valid.jsonl` is
/// evaluated, if it has one. A directory that `eval` names may have its rows under another usual
/// name.
///
/// # Errors
/// [`DatasetError::NoTrainFile`], [`DatasetError::Unreadable`], [`DatasetError::OtherKind`].
pub fn resolve_files(train: &[PathBuf], eval: &[PathBuf]) -> Result<(Vec<PathBuf>, Vec<PathBuf>), DatasetError> {
    let (mut train_files, mut eval_files) = (Vec::new(), Vec::new());
    for path in train {
        if !path.is_dir() {
            train_files.push(path.clone());
            continue;
        }
        let (file, valid) = (path.join("train.jsonl"), path.join(HELD_BACK[0]));
        if !file.is_file() {
            return Err(DatasetError::NoTrainFile { path: path.clone() });
        }
        train_files.push(file);
        if eval.is_empty() && valid.is_file() {
            eval_files.push(valid);
        }
    }
    let held_back = |path: &PathBuf| {
        let there = HELD_BACK.iter().map(|name| path.join(name)).find(|file| file.is_file());
        there.unwrap_or_else(|| path.join(HELD_BACK[0]))
    };
    eval_files.extend(eval.iter().map(|path| if path.is_dir() { held_back(path) } else { path.clone() }));
    for path in train_files.iter().chain(&eval_files) {
        readable(path)?;
        other_kinds::refuse(path)?;
    }
    Ok((train_files, eval_files))
}

/// A notice for each training directory with a file that looks like held-back rows and is not used.
pub fn unused_files(train: &[PathBuf], eval: &[PathBuf]) -> Vec<String> {
    if !eval.is_empty() {
        return Vec::new();
    }
    let without_valid = train.iter().filter(|path| path.is_dir() && !path.join(HELD_BACK[0]).is_file());
    let files = without_valid.filter_map(|path| HELD_BACK.iter().map(|name| path.join(name)).find(|it| it.is_file()));
    files.map(|file| format!("{} is not used: to evaluate on its rows, name it in data.eval", file.display())).collect()
}

fn readable(path: &Path) -> Result<(), DatasetError> {
    match std::fs::File::open(path) {
        Ok(_) => Ok(()),
        Err(source) => Err(DatasetError::Unreadable { path: path.to_owned(), source }),
    }
}
