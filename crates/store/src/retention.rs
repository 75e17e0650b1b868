//! Which numbered directories there are, which of them is the newest that can be trusted, and how
//! the old ones go.

use std::path::{Path, PathBuf};

use crate::directory::{is_ours, nonce};
use crate::disk::Disk;
use crate::error::{Operation, StoreError};
use crate::failpoint;
use crate::manifest::{Manifest, verify_directory};
use crate::replace::REPLACED;

const TRASH: &str = ".trash-";

/// A directory that was passed over because it does not verify.
#[derive(Debug)]
pub struct Rejected {
    pub path: PathBuf,
    pub why: StoreError,
}

/// The directory `<prefix><number>` with the highest number that verifies, and those above it that
/// do not. A parent that does not exist has none.
#[expect(clippy::type_complexity, reason = "three things that are used once, together")]
pub fn newest_verified(
    disk: &dyn Disk,
    parent: &Path,
    prefix: &str,
) -> Result<(Option<(u64, PathBuf, Manifest)>, Vec<Rejected>), StoreError> {
    let mut rejected = Vec::new();
    for (number, path) in numbered(disk, parent, prefix)?.into_iter().rev() {
        match verify_directory(disk, &path) {
            Ok(manifest) => return Ok((Some((number, path, manifest)), rejected)),
            Err(why) => rejected.push(Rejected { path, why }),
        }
    }
    Ok((None, rejected))
}

/// All `<prefix><number>`, ascending, verified or not. Leftovers of unfinished work do not count.
pub fn numbered(disk: &dyn Disk, parent: &Path, prefix: &str) -> Result<Vec<(u64, PathBuf)>, StoreError> {
    let mut found = Vec::new();
    for name in list(disk, parent)? {
        let Some(digits) = name.strip_prefix(prefix) else {
            continue;
        };
        // `parse` alone would take a leading plus sign.
        if digits.bytes().all(|byte| byte.is_ascii_digit())
            && let Ok(number) = digits.parse()
        {
            found.push((number, parent.join(&name)));
        }
    }
    found.sort();
    Ok(found)
}

/// Removes a directory so that it is gone from its name at once, however long the deleting takes.
pub fn remove_directory(disk: &dyn Disk, path: &Path) -> Result<(), StoreError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let trash = parent.join(format!("{TRASH}{name}-{}", nonce()));
    disk.rename(path, &trash).map_err(|source| StoreError::io(path, Operation::Rename, 0, source))?;
    // Otherwise the old name could come back after a power cut, with half of its files.
    disk.sync_dir(parent).map_err(|source| StoreError::io(parent, Operation::Sync, 0, source))?;
    failpoint::hit("prune.trashed");
    disk.remove_dir_all(&trash).map_err(|source| StoreError::io(&trash, Operation::Remove, 0, source))
}

/// Takes a directory out of the numbered ones without deleting it: `step-000006` becomes
/// `aside-step-000006`, in the place of an earlier one of that name.
pub fn set_aside(disk: &dyn Disk, path: &Path) -> Result<PathBuf, StoreError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!("aside-{name}"));
    if disk.exists(&aside).map_err(|source| StoreError::io(&aside, Operation::Inspect, 0, source))? {
        remove_directory(disk, &aside)?;
    }
    disk.rename(path, &aside).map_err(|source| StoreError::io(path, Operation::Rename, 0, source))?;
    let parent = path.parent().unwrap_or(Path::new("."));
    disk.sync_dir(parent).map_err(|source| StoreError::io(parent, Operation::Sync, 0, source))?;
    Ok(aside)
}

/// Removes what killed processes left in `parent`: directories on their way out and directories
/// and files that were never finished. A directory that was being replaced is put back if the new
/// one did not make it to its place. Only to be called under the [`crate::RunLock`] of `parent`:
/// then whatever this process did not start itself is a leftover.
pub fn sweep(disk: &dyn Disk, parent: &Path) -> Result<(), StoreError> {
    for name in list(disk, parent)? {
        let path = parent.join(&name);
        if let Some(rest) = name.strip_prefix(REPLACED) {
            if !restored(disk, parent, &path, rest)? {
                remove_any(disk, &path)?;
            }
        } else if name.starts_with(TRASH) || (is_temporary(&name) && !is_ours(&name)) {
            remove_any(disk, &path)?;
        }
    }
    Ok(())
}

/// `<anything>.tmp-<pid>-<nonce>`, and nothing that a user might have named so by hand.
fn is_temporary(name: &str) -> bool {
    let Some((_, mark)) = name.rsplit_once(".tmp-") else {
        return false;
    };
    let Some((pid, nonce)) = mark.split_once('-') else {
        return false;
    };
    pid.parse::<u32>().is_ok() && !nonce.is_empty() && nonce.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn restored(disk: &dyn Disk, parent: &Path, old: &Path, name_and_nonce: &str) -> Result<bool, StoreError> {
    let Some((name, _)) = name_and_nonce.rsplit_once('-') else {
        return Ok(false);
    };
    let destination = parent.join(name);
    let is_taken =
        disk.exists(&destination).map_err(|source| StoreError::io(&destination, Operation::Inspect, 0, source))?;
    if is_taken || verify_directory(disk, old).is_err() {
        return Ok(false);
    }
    disk.rename(old, &destination).map_err(|source| StoreError::io(&destination, Operation::Rename, 0, source))?;
    disk.sync_dir(parent).map_err(|source| StoreError::io(parent, Operation::Sync, 0, source))?;
    Ok(true)
}

fn remove_any(disk: &dyn Disk, path: &Path) -> Result<(), StoreError> {
    let is_directory = disk.is_directory(path).map_err(|source| StoreError::io(path, Operation::Inspect, 0, source))?;
    let removed = if is_directory { disk.remove_dir_all(path) } else { disk.remove_file(path) };
    removed.map_err(|source| StoreError::io(path, Operation::Remove, 0, source))
}

fn list(disk: &dyn Disk, parent: &Path) -> Result<Vec<String>, StoreError> {
    match disk.list(parent) {
        Ok(names) => Ok(names),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(StoreError::io(parent, Operation::List, 0, source)),
    }
}
