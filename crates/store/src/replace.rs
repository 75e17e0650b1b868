//! Putting something new in the place of something old, for what is not numbered: small files and
//! exports.

use std::io;
use std::path::{Path, PathBuf};

use crate::directory::{NewFile, Staging, ensure_directory, nonce, temporary_name};
use crate::disk::Disk;
use crate::error::{Operation, StoreError};
use crate::failpoint;
use crate::manifest::{MANIFEST_NAME, read_manifest};

/// In the name of a replaced directory until the new one is in its place. [`crate::sweep`] puts it
/// back if the power went between the two renames.
pub(crate) const REPLACED: &str = ".replaced-";

/// Writes a small file anew: afterwards, and after a power cut, it has its old bytes or its new
/// ones. Creates the directory above it.
pub fn replace_file(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let (parent, name) = split(path)?;
    ensure_directory(disk, &parent)?;
    let temporary = parent.join(temporary_name(name));
    let steps = || -> Result<(), (Operation, io::Error)> {
        disk.write_file(&temporary, bytes).map_err(|error| (Operation::Write, error))?;
        disk.sync_file(&temporary).map_err(|error| (Operation::Sync, error))?;
        disk.rename(&temporary, path).map_err(|error| (Operation::Rename, error))?;
        disk.sync_dir(&parent).map_err(|error| (Operation::Sync, error))
    };
    steps().map_err(|(operation, source)| {
        if disk.exists(&temporary).unwrap_or(false) {
            let _ = disk.remove_file(&temporary);
        }
        StoreError::io(path, operation, bytes.len() as u64, source)
    })
}

/// Like [`crate::commit_directory`], but what stands at `path` makes way once the new directory is
/// complete. Only a directory that this program wrote, or an empty one, makes way: everything in
/// it must be in its manifest (names with a leading dot, such as `.DS_Store`, excepted).
pub fn replace_directory(
    disk: &dyn Disk,
    path: &Path,
    files: &[NewFile],
    about: &serde_json::Value,
) -> Result<PathBuf, StoreError> {
    let mut staging = Staging::begin_replacing(disk, path)?;
    staging.write_all(files)?;
    staging.publish_replacing(about)
}

impl<'disk> Staging<'disk> {
    /// Starts a directory that will take the place of what is at `path`, if anything is.
    pub fn begin_replacing(disk: &'disk dyn Disk, path: &Path) -> Result<Self, StoreError> {
        let (parent, name) = split(path)?;
        // Asked before anything is written as well as after: better now than in an hour.
        may_make_way(disk, path)?;
        Self::begin_any(disk, &parent, name)
    }

    /// Makes the directory visible under its name, in the place of the one that had it.
    pub fn publish_replacing(self, about: &serde_json::Value) -> Result<PathBuf, StoreError> {
        self.finish_files(about)?;
        if !may_make_way(self.disk, &self.destination)? {
            self.rename_to_destination()?;
            self.sync_parent()?;
            return Ok(self.destination.clone());
        }
        let (_, name) = split(&self.destination)?;
        let old = self.parent.join(format!("{REPLACED}{name}-{}", nonce()));
        self.disk
            .rename(&self.destination, &old)
            .map_err(|source| StoreError::io(&self.destination, Operation::Rename, 0, source))?;
        failpoint::hit("replace.aside");
        if let Err(error) = self.rename_to_destination() {
            let _ = self.disk.rename(&old, &self.destination);
            return Err(error);
        }
        self.sync_parent()?;
        self.disk.remove_dir_all(&old).map_err(|source| StoreError::io(&old, Operation::Remove, 0, source))?;
        Ok(self.destination.clone())
    }
}

/// An error if [`replace_directory`] would refuse to replace what is at `path`.
pub fn check_replaceable(disk: &dyn Disk, path: &Path) -> Result<(), StoreError> {
    may_make_way(disk, path).map(|_| ())
}

/// False when nothing is there, true when what is there may be removed.
fn may_make_way(disk: &dyn Disk, path: &Path) -> Result<bool, StoreError> {
    let failed = |operation| move |source| StoreError::io(path, operation, 0, source);
    if !disk.exists(path).map_err(failed(Operation::Inspect))? {
        return Ok(false);
    }
    let not_ours = |what: String| StoreError::NotOurs { path: path.to_path_buf(), what };
    if !disk.is_directory(path).map_err(failed(Operation::Inspect))? {
        return Err(not_ours("it is not a directory".to_string()));
    }
    let mut names = disk.list(path).map_err(failed(Operation::List))?;
    if names.is_empty() {
        return Ok(true);
    }
    let manifest = read_manifest(disk, path).map_err(|error| not_ours(error.to_string()))?;
    names.retain(|name| {
        !name.starts_with('.') && name != MANIFEST_NAME && !manifest.files.iter().any(|file| file.name == *name)
    });
    match names.first() {
        None => Ok(true),
        Some(name) => Err(not_ours(format!("it also has {name}"))),
    }
}

fn split(path: &Path) -> Result<(PathBuf, &str), StoreError> {
    let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(|| StoreError::UnsafeName {
        name: path.display().to_string(),
        what: "it does not end in a file name that is UTF-8",
    })?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    Ok((parent.to_path_buf(), name))
}
