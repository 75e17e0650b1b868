//! The last operations of a failed rank, in one small file of a folder of this user's. It helps to
//! find out how the ranks came apart.
//!
//! A run that ends well removes the files of its earlier attempts. Only the newest few stay in any
//! case.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use finetune_allreduce::GroupError;
use finetune_store::{Disk, RealDisk, replace_file};

/// The most records that stay.
const KEPT: usize = 32;

/// The folder that this process's run writes to, once it is known.
static RUN: OnceLock<PathBuf> = OnceLock::new();

/// Says which run the records of this process belong to.
pub(crate) fn belong_to(run: &Path) {
    let _ = RUN.set(run.to_owned());
}

/// The folder of the records.
fn folder() -> PathBuf {
    std::env::temp_dir().join(format!("finetune-flight-{}", rustix::process::geteuid().as_raw()))
}

/// Whether the folder exists, is no link and belongs to this user alone. Makes it if it does not
/// exist.
fn is_ours(folder: &Path) -> bool {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt};
    let _ = std::fs::DirBuilder::new().mode(0o700).create(folder);
    let own = rustix::process::geteuid().as_raw();
    std::fs::symlink_metadata(folder).is_ok_and(|it| it.is_dir() && it.uid() == own && it.mode() & 0o022 == 0)
}

/// What the names of a run's records begin with: the same for all attempts.
fn mark(run: &Path) -> String {
    let run = std::path::absolute(run).unwrap_or_else(|_| run.to_owned());
    let hash = finetune_store::hash_of(run.as_os_str().as_encoded_bytes());
    finetune_store::hex(&hash)[..12].to_owned()
}

/// Writes the record of a failed rank, and returns a hint with its path. Returns no hint if it
/// cannot be written: the error of the rank is what matters.
pub(crate) fn keep(error: &GroupError) -> Vec<String> {
    keep_in(&folder(), error.rank, &lines(error), RUN.get().map(PathBuf::as_path))
}

fn lines(error: &GroupError) -> Vec<String> {
    error.flight.iter().filter_map(|entry| serde_json::to_string(entry).ok()).collect()
}

fn keep_in(folder: &Path, rank: usize, lines: &[String], run: Option<&Path>) -> Vec<String> {
    if !is_ours(folder) {
        return Vec::new();
    }
    let mark = run.map_or("other".to_owned(), mark);
    let path = folder.join(format!("{mark}-rank-{rank}-process-{}.jsonl", std::process::id()));
    let text = lines.join("\n") + "\n";
    if replace_file(&RealDisk, &path, text.as_bytes()).is_err() {
        return Vec::new();
    }
    remove(oldest(folder));
    vec![format!("{} has the last operations of this rank ({})", path.display(), lines.len())]
}

/// Removes what earlier attempts at a run left, now that it is done.
pub(crate) fn forget() {
    if let Some(run) = RUN.get() {
        forget_in(&folder(), run);
    }
}

fn forget_in(folder: &Path, run: &Path) {
    if is_ours(folder) {
        let mark = mark(run);
        remove(records(folder).filter(|path| name(path).starts_with(&mark)).collect());
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn records(folder: &Path) -> impl Iterator<Item = PathBuf> + '_ {
    let names = RealDisk.list(folder).unwrap_or_default().into_iter();
    names.filter(|name| name.contains("-rank-") && name.ends_with(".jsonl")).map(|name| folder.join(name))
}

/// All but the newest few.
fn oldest(folder: &Path) -> Vec<PathBuf> {
    let age = |path: &PathBuf| std::fs::metadata(path).and_then(|it| it.modified()).ok();
    let mut all: Vec<PathBuf> = records(folder).collect();
    all.sort_by_key(age);
    all.truncate(all.len().saturating_sub(KEPT));
    all
}

fn remove(paths: Vec<PathBuf>) {
    for path in paths {
        let _ = RealDisk.remove_file(&path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_do_not_pile_up_and_go_with_a_success() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let folder = directory.path().join("flight");
        let (one, other) = (Path::new("runs/one"), Path::new("runs/other"));
        for rank in 0..KEPT + 5 {
            assert_eq!(keep_in(&folder, rank, &["{}".to_owned()], Some(one)).len(), 1);
        }
        assert_eq!(records(&folder).count(), KEPT);
        keep_in(&folder, 0, &[], Some(other));
        forget_in(&folder, one);
        assert_eq!(records(&folder).count(), 1);
        forget_in(&folder, other);
        assert_eq!(records(&folder).count(), 0);
    }

    #[test]
    fn a_folder_that_is_a_link_is_left_alone() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let elsewhere = directory.path().join("elsewhere");
        std::fs::create_dir(&elsewhere).expect("a folder");
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&elsewhere, &link).expect("a link");
        assert!(keep_in(&link, 0, &[], None).is_empty());
        assert_eq!(std::fs::read_dir(&elsewhere).expect("a folder").count(), 0);
    }
}
