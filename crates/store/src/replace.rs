//! Putting something new in the place of something old. This is for what is not numbered: small
//! files and exports.

use std::io;
use std::path::{Path, PathBuf};

use crate::directory::{Staging, ensure_directory};
use crate::disk::Disk;
use crate::error::{Operation, StoreError};
use crate::failpoint;
use crate::manifest::{MANIFEST_NAME, Manifest, read_manifest};
use crate::own_names::{REPLACED, nonce, temporary_name};
use crate::retention::{remove_marked, sweep_beside};

/// Writes a small file anew. After a power cut it has either its old bytes or its new ones. Creates
/// the directory above it.
///
/// # Errors
/// A failure of the disk, or [`StoreError::UnsafeName`] for a path without a name.
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

impl<'disk> Staging<'disk> {
    /// Starts a directory of this kind that will take the place of what is at `path`, if anything
    /// is. Removes what killed processes left beside it.
    ///
    /// Only an empty directory is replaced, or one of the same kind that this program wrote.
    /// Everything in it must be in its manifest, except names with a leading dot, such as `.DS_Store`.
    ///
    /// # Errors
    /// [`StoreError::NotOurs`], [`StoreError::OtherKind`], or as [`Staging::begin`].
    pub fn begin_replacing(disk: &'disk dyn Disk, path: &Path, kind: &str) -> Result<Self, StoreError> {
        let (parent, name) = split(path)?;
        sweep_beside(disk, &parent, name);
        // Checked before and after writing. A refusal should come now and not in an hour.
        may_make_way(disk, path, Some(kind))?;
        Self::begin_any(disk, &parent, name)
    }

    /// Makes the directory visible under its name, in the place of the one that had it. `about` as in
    /// [`Staging::publish`].
    ///
    /// # Errors
    /// As [`Staging::begin_replacing`] and [`Staging::publish`].
    pub fn publish_replacing(self, about: &serde_json::Value) -> Result<PathBuf, StoreError> {
        let kind = about.get("kind").and_then(serde_json::Value::as_str).unwrap_or_default();
        self.finish_files(about)?;
        if !may_make_way(self.disk, &self.destination, Some(kind))? {
            self.rename_to_destination()?;
            self.sync_parent()?;
            return Ok(self.destination.clone());
        }
        match self.disk.exchange(self.directory(), &self.destination) {
            Ok(()) => {
                failpoint::hit("replace.aside");
                self.sync_parent()?;
                remove_marked(self.disk, self.directory())?;
                return Ok(self.destination.clone());
            }
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(source) => return Err(StoreError::io(&self.destination, Operation::Rename, 0, source)),
        }
        self.replace_in_two_steps()
    }

    /// Replaces without exchanging names, for file systems that cannot. Between the two renames
    /// nothing has the name. If the power goes then, [`crate::sweep`] or the next export puts the
    /// old directory back.
    fn replace_in_two_steps(self) -> Result<PathBuf, StoreError> {
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
        remove_marked(self.disk, &old)?;
        Ok(self.destination.clone())
    }
}

/// Refuses a path that [`Staging::begin_replacing`] would refuse, whatever its kind: this program did
/// not write what is there, or there is more in it.
///
/// # Errors
/// [`StoreError::NotOurs`], [`StoreError::Io`].
pub fn check_replaceable(disk: &dyn Disk, path: &Path) -> Result<(), StoreError> {
    may_make_way(disk, path, None).map(|_| ())
}

/// The manifest of a directory. The files that it lists are not verified. `None`: there is no
/// manifest, or none that can be read.
pub fn manifest_of(disk: &dyn Disk, path: &Path) -> Option<Manifest> {
    read_manifest(disk, path).ok()
}

/// Whether something is at `path`. An error if it must not be removed: if `kind` is given, it must
/// be a directory of this kind.
fn may_make_way(disk: &dyn Disk, path: &Path, kind: Option<&str>) -> Result<bool, StoreError> {
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
    if let Some(kind) = kind.filter(|kind| *kind != manifest.kind) {
        let (found, wanted) = (manifest.kind, kind.to_owned());
        return Err(StoreError::OtherKind { path: path.to_path_buf(), found, wanted });
    }
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
