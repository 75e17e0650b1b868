//! The files of a directory that hold one split of a data set: `train.jsonl`, or the same name with
//! another extension, or numbered files as the hub keeps them (`train-00000-of-00005.parquet`, there
//! or in `data`), or all files of rows in a directory `train`.

use std::path::{Path, PathBuf};

use crate::error::DatasetError;
use crate::kinds::{EXTENSIONS, PACKED};

/// The files of a split, in order. None if the directory has none.
///
/// # Errors
/// [`DatasetError::SeveralFiles`], [`DatasetError::MissingShard`].
pub(crate) fn files(directory: &Path, split: &'static str) -> Result<Vec<PathBuf>, DatasetError> {
    let usual = directory.join(format!("{split}.jsonl"));
    if usual.is_file() {
        return Ok(vec![usual]);
    }
    for place in [directory.to_owned(), directory.join("data")] {
        let names = names(&place);
        let whole: Vec<&String> = names.iter().filter(|name| stem(name) == Some(split)).collect();
        match whole.as_slice() {
            [] => {}
            [name] => return Ok(vec![place.join(name)]),
            several => {
                let found = several.iter().map(|name| (*name).clone()).collect();
                return Err(DatasetError::SeveralFiles { path: place, split, found });
            }
        }
        let numbered = numbered(&place, split, &names)?;
        if !numbered.is_empty() {
            return Ok(numbered);
        }
    }
    let within = directory.join(split);
    Ok(names(&within).into_iter().map(|name| within.join(name)).collect())
}

/// Files of rows in a directory, by name, sorted.
fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
    let files = entries.filter(|entry| entry.path().is_file());
    let mut names: Vec<String> = files.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| !name.starts_with('.') && stem(name).is_some());
    names.sort();
    names
}

/// The name of a file of rows without its extensions. `None`: it is named as another kind.
fn stem(name: &str) -> Option<&str> {
    let packed = PACKED.iter().find_map(|packed| name.strip_suffix(packed)?.strip_suffix('.'));
    let name = packed.unwrap_or(name);
    EXTENSIONS.iter().find_map(|extension| name.strip_suffix(extension)?.strip_suffix('.'))
}

/// The files of a split that are numbered: `train-00000-of-00005`.
fn numbered(place: &Path, split: &'static str, names: &[String]) -> Result<Vec<PathBuf>, DatasetError> {
    let numbers = |name: &str| -> Option<(usize, usize)> {
        let (number, wanted) = stem(name)?.strip_prefix(split)?.strip_prefix('-')?.split_once("-of-")?;
        Some((number.parse().ok()?, wanted.parse().ok()?))
    };
    let mut found: Vec<(usize, usize, &String)> =
        names.iter().filter_map(|name| numbers(name).map(|(number, wanted)| (number, wanted, name))).collect();
    found.sort();
    let Some(&(first, wanted, like)) = found.first() else { return Ok(Vec::new()) };
    let is_other = |&(_, other, _): &(usize, usize, &String)| other != wanted;
    if found.iter().any(is_other) || found.windows(2).any(|two| two[0].0 == two[1].0) {
        let found = found.iter().map(|(.., name)| (*name).clone()).collect();
        return Err(DatasetError::SeveralFiles { path: place.to_owned(), split, found });
    }
    // Some programs count from 1.
    let from = usize::from(first != 0 && found.len() == wanted);
    let gap = (from..from + wanted).zip(found.iter().map(|(number, ..)| *number)).find(|(want, is)| want != is);
    if found.len() != wanted || gap.is_some() {
        let number = gap.map_or(from + found.len(), |(want, _)| want);
        let missing = like.replacen(&format!("{first:05}"), &format!("{number:05}"), 1);
        let (path, there) = (place.to_owned(), found.len());
        return Err(DatasetError::MissingShard { path, split, there, wanted, missing });
    }
    Ok(found.into_iter().map(|(.., name)| place.join(name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[&str]) -> String {
        let directory = tempfile::tempdir().expect("a directory");
        for name in names {
            let path = directory.path().join(name);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            finetune_store::replace_file(&finetune_store::RealDisk, &path, b"").expect("a file");
        }
        match files(directory.path(), "train") {
            Ok(files) => {
                let names =
                    files.iter().map(|file| file.strip_prefix(directory.path()).expect("inside").display().to_string());
                names.collect::<Vec<_>>().join(" ")
            }
            Err(error) => error.to_string().replace(&directory.path().display().to_string(), "d"),
        }
    }

    #[test]
    fn splits_are_found_under_their_usual_names() {
        for (names, expected) in [
            (&["train.jsonl", "train.csv", "valid.jsonl"][..], "train.jsonl"),
            (&["train.csv.zst", "training.csv", "train.txt"], "train.csv.zst"),
            (&["train.parquet", "test.parquet"], "train.parquet"),
            (&["train.csv", "train.json"], "d has the rows of train in several files: train.csv, train.json"),
            (
                &["train-00001-of-00002.parquet", "train-00000-of-00002.parquet", "test-00000-of-00001.parquet"],
                "train-00000-of-00002.parquet train-00001-of-00002.parquet",
            ),
            (&["data/train-00000-of-00001.parquet", "README.md"], "data/train-00000-of-00001.parquet"),
            (
                &["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"],
                "d has 2 of 3 files of train: train-00001-of-00003.parquet is missing",
            ),
            (&["train-00000-of-00002.parquet"], "d has 1 of 2 files of train: train-00001-of-00002.parquet is missing"),
            (
                &["train/0001.parquet", "train/0000.parquet", "train/.x.parquet", "train/a.md"],
                "train/0000.parquet train/0001.parquet",
            ),
            (&["rows.jsonl"], ""),
        ] {
            assert_eq!(found(names), expected, "{names:?}");
        }
    }
}
