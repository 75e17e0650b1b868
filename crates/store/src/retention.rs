//! Which numbered directories there are, which of them is the newest that can be trusted, and how
//! old ones are removed.

use std::path::{Path, PathBuf};

use crate::directory::mark_unfinished;
use crate::disk::Disk;
use crate::error::{Operation, StoreError};
use crate::failpoint;
use crate::manifest::{MANIFEST_NAME, Manifest, verify_directory};
use crate::own_names::{REPLACED, TRASH, UNFINISHED, is_ours, nonce, set_apart, temporary_of};

/// A directory that was passed over because it does not verify.
#[derive(Debug)]
pub struct Rejected {
    /// The directory.
    pub path: PathBuf,
    /// What is wrong with it.
    pub why: StoreError,
}

/// The directory `<prefix><number>` with the highest number that verifies, and those above it that
/// do not. A parent that does not exist has none.
///
/// # Errors
/// [`StoreError::Io`] if the parent cannot be listed.
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
///
/// # Errors
/// [`StoreError::Io`] if the parent cannot be listed.
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

/// Removes a directory. Its name is free at once, however long the removal takes.
///
/// # Errors
/// A failure of the disk.
pub fn remove_directory(disk: &dyn Disk, path: &Path) -> Result<(), StoreError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let trash = parent.join(format!("{TRASH}{name}-{}", nonce()));
    disk.rename(path, &trash).map_err(|source| StoreError::io(path, Operation::Rename, 0, source))?;
    // Otherwise a power cut could bring the old name back with half of its files.
    disk.sync_dir(parent).map_err(|source| StoreError::io(parent, Operation::Sync, 0, source))?;
    failpoint::hit("prune.trashed");
    remove_marked(disk, &trash)
}

/// Removes a directory of this program. The mark or manifest goes last, so that the next process
/// can recognize what a killed one leaves.
pub(crate) fn remove_marked(disk: &dyn Disk, path: &Path) -> Result<(), StoreError> {
    let failed = |operation: Operation| move |source| StoreError::io(path, operation, 0, source);
    let names = list(disk, path)?;
    let is_mark = |name: &str| name == MANIFEST_NAME || name == UNFINISHED;
    if !names.is_empty() && !names.iter().any(|name| is_mark(name)) {
        mark_unfinished(disk, path)?;
    }
    for name in names.iter().filter(|name| !is_mark(name)) {
        remove_any(disk, &path.join(name))?;
    }
    disk.sync_dir(path).map_err(failed(Operation::Sync))?;
    disk.remove_dir_all(path).map_err(failed(Operation::Remove))
}

/// Takes a directory out of the numbered ones without removing it: `step-000006` becomes
/// `aside-step-000006`, in the place of an earlier one of that name. Returns the new path.
///
/// # Errors
/// A failure of the disk.
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

/// Removes what killed processes left in `parent`: directories that were being removed, and
/// directories and files that were never finished. A directory that was being replaced is put back
/// if the new one is not in its place.
///
/// Call it only under the [`crate::RunLock`] of `parent`. Then everything that this process did not
/// start itself is a leftover. A directory counts as one of this program by its name and by what
/// lies in it: the mark of an unfinished one, or a manifest. An empty one counts too, since nothing
/// is lost.
///
/// # Errors
/// A failure of the disk.
pub fn sweep(disk: &dyn Disk, parent: &Path) -> Result<(), StoreError> {
    for name in list(disk, parent)? {
        let path = parent.join(&name);
        if let Some(original) = set_apart(&name, REPLACED) {
            if !is_directory(disk, &path)? || !is_marked(disk, &path)? {
                continue;
            }
            if !restored(disk, parent, &path, original)? {
                remove_marked(disk, &path)?;
            }
        } else if set_apart(&name, TRASH).is_some() || (temporary_of(&name).is_some() && !is_ours(&name)) {
            match is_directory(disk, &path)? {
                true if is_marked(disk, &path)? => remove_marked(disk, &path)?,
                // A directory of somebody else, with a name like ours.
                true => {}
                // A file has no room for a mark. Its name, with 20 digits that nobody types, is
                // enough.
                false if temporary_of(&name).is_some() => remove_any(disk, &path)?,
                false => {}
            }
        }
    }
    Ok(())
}

/// Removes what processes that have ended left beside `parent/name`, as [`sweep`] does. The parent
/// need not be locked, as that of an export. Whatever cannot be removed is left.
pub(crate) fn sweep_beside(disk: &dyn Disk, parent: &Path, name: &str) {
    for found in list(disk, parent).unwrap_or_default() {
        let path = parent.join(&found);
        let replaced = set_apart(&found, REPLACED) == Some(name);
        let ours = temporary_of(&found) == Some(name) || replaced;
        // An empty directory may belong to a process that is about to lock it.
        let is_empty = list(disk, &path).is_ok_and(|names| names.is_empty());
        if !ours || is_empty || is_ours(&found) || !is_abandoned(&path) || !is_marked(disk, &path).unwrap_or(false) {
            continue;
        }
        if !replaced || !restored(disk, parent, &path, name).unwrap_or(true) {
            let _ = remove_marked(disk, &path);
        }
    }
}

/// Whether the process that wrote this directory has ended. A process holds a lock on its directory
/// as long as it lives.
fn is_abandoned(path: &Path) -> bool {
    let is_directory = std::fs::symlink_metadata(path).is_ok_and(|found| found.is_dir());
    is_directory && std::fs::File::open(path).is_ok_and(|directory| directory.try_lock().is_ok())
}

/// Whether what lies in a directory shows that this program wrote it. An empty directory counts.
fn is_marked(disk: &dyn Disk, path: &Path) -> Result<bool, StoreError> {
    let names = list(disk, path)?;
    Ok(names.is_empty() || names.iter().any(|name| name == MANIFEST_NAME || name == UNFINISHED))
}

fn is_directory(disk: &dyn Disk, path: &Path) -> Result<bool, StoreError> {
    disk.is_directory(path).map_err(|source| StoreError::io(path, Operation::Inspect, 0, source))
}

/// Puts a replaced directory back under its name. Returns false if the name is taken, or the
/// directory does not verify.
fn restored(disk: &dyn Disk, parent: &Path, old: &Path, name: &str) -> Result<bool, StoreError> {
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
    let removed = if is_directory(disk, path)? { disk.remove_dir_all(path) } else { disk.remove_file(path) };
    removed.map_err(|source| StoreError::io(path, Operation::Remove, 0, source))
}

fn list(disk: &dyn Disk, parent: &Path) -> Result<Vec<String>, StoreError> {
    match disk.list(parent) {
        Ok(names) => Ok(names),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(StoreError::io(parent, Operation::List, 0, source)),
    }
}
