//! The files of a base whose layers several ranks hold together: each rank has those of its own layers, and together
//! they have the whole base, by whose digest a run and an adapter know it.

use std::path::{Path, PathBuf};

use finetune_model::{Model, Placement, base_digest_of, base_files};
use finetune_recipe::Recipe;
use finetune_store::{FileDigest, missing_shards, no_shard, read_rate};

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

/// The digest of a base whose files are on several ranks: that of one process with all of them. All ranks call it
/// together. Each file is read by every rank that has it.
///
/// # Errors
/// If the ranks have other files than each other, or a file that none has.
pub(crate) fn digest_together(directory: &Path, ranks: &Ranks) -> Result<String, TrainError> {
    let mine = base_files(directory)?;
    let lines: Vec<String> = mine.iter().map(to_line).collect();
    let all = ranks.gather_texts(&lines.join("\n"))?;
    let all: Vec<Vec<FileDigest>> = all.iter().map(|text| text.lines().filter_map(from_line).collect()).collect();
    let host = |rank: usize| ranks.group().who()[rank].host.clone();
    let files = merged(&all, &host).map_err(|differences| TrainError::Differ { differences })?;
    match base_digest_of(directory, &files)? {
        Some(digest) => Ok(digest),
        None => {
            let absent = files.iter().find(|file| file.content.is_none());
            Err(TrainError::Store(no_shard(directory, absent.map_or("", |file| &file.name))))
        }
    }
}

/// What a rank tells of a file. Its name is the last word: it has no line break, but may have spaces.
fn to_line(file: &FileDigest) -> String {
    let FileDigest { name, length, header, content } = file;
    format!("{length} {header} {} {name}", content.as_deref().unwrap_or("-"))
}

fn from_line(line: &str) -> Option<FileDigest> {
    let mut words = line.splitn(4, ' ');
    let (length, header, content, name) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let content = Some(content).filter(|content| *content != "-").map(str::to_owned);
    Some(FileDigest { name: name.to_owned(), length: length.parse().ok()?, header: header.to_owned(), content })
}

/// The files of all ranks, each with its content if a rank has it. `of_ranks`: what each rank tells; `host`: the name
/// of a rank's host.
///
/// # Errors
/// Who has another file than whom, a line for each.
fn merged(of_ranks: &[Vec<FileDigest>], host: &dyn Fn(usize) -> String) -> Result<Vec<FileDigest>, Vec<String>> {
    let mut files = of_ranks.first().cloned().unwrap_or_default();
    let mut holders: Vec<usize> = vec![0; files.len()];
    let mut differences = Vec::new();
    for (rank, theirs) in of_ranks.iter().enumerate().skip(1) {
        let about = |file: &FileDigest| (file.name.clone(), file.length, file.header.clone());
        if !files.iter().map(about).eq(theirs.iter().map(about)) {
            differences.push(format!("rank {rank} ({}) has another base model (model.path) than rank 0", host(rank)));
            continue;
        }
        for ((file, holder), other) in files.iter_mut().zip(&mut holders).zip(theirs) {
            match (&file.content, &other.content) {
                (Some(known), Some(other)) if known != other => {
                    let name = &file.name;
                    differences.push(format!("rank {rank} ({}) has another {name} than rank {holder}", host(rank)));
                }
                (None, Some(content)) => (file.content, *holder) = (Some(content.clone()), rank),
                _ => {}
            }
        }
    }
    if differences.is_empty() { Ok(files) } else { Err(differences) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `a:1` is file `a` with content 1, `a:-` one whose header alone is there, `a!` one with another header.
    fn files(text: &str) -> Vec<FileDigest> {
        let file = |word: &str| {
            let (name, content) = word.split_once(':').expect("a name and its content");
            let header = if name.ends_with('!') { "other" } else { "header" }.to_owned();
            let content = Some(content).filter(|content| *content != "-").map(str::to_owned);
            FileDigest { name: name.trim_end_matches('!').to_owned(), length: 9, header, content }
        };
        text.split_whitespace().map(file).collect()
    }

    /// (files of each rank, those of all together or who differs)
    #[test]
    fn ranks_have_the_whole_base_together() {
        let cases: [(&[&str], Result<&str, &str>); 7] = [
            (&["a:1 b:2"], Ok("a:1 b:2")),
            (&["a:1 b:-", "a:- b:2"], Ok("a:1 b:2")),
            (&["a:1 b:-", "a:1 b:2", "a:- b:2"], Ok("a:1 b:2")),
            (&["a:1 b:-", "a:- b:-"], Ok("a:1 b:-")),
            (&["a:- b:2", "a:1 b:2", "a:3 b:-"], Err("rank 2 (h2) has another a than rank 1")),
            (&["a:1 b:-", "a!:- b:2"], Err("rank 1 (h1) has another base model (model.path) than rank 0")),
            (&["a:1 b:2", "a:1"], Err("rank 1 (h1) has another base model (model.path) than rank 0")),
        ];
        for (ranks, want) in cases {
            let of_ranks: Vec<Vec<FileDigest>> = ranks.iter().map(|text| files(text)).collect();
            let got = merged(&of_ranks, &|rank| format!("h{rank}"));
            assert_eq!(got, want.map(files).map_err(|line| vec![line.to_owned()]), "{ranks:?}");
        }
    }

    #[test]
    fn what_is_told_of_a_file_is_read_again() {
        let odd = FileDigest { name: "with space.safetensors".to_owned(), ..files("a:-").remove(0) };
        for file in files("a:1 b:-").into_iter().chain([odd]) {
            assert_eq!(from_line(&to_line(&file)), Some(file));
        }
    }
}
