//! The commit protocol: a directory appears under its name complete or not at all, even if the
//! power goes at any point.
//!
//! ```text
//! 1 mkdir   <name>.tmp-<pid>-<nonce>, with the mark `.finetune-unfinished` in it
//! 2 write   each file                 -> sync each
//! 3 write   manifest.json             -> sync
//! 4 remove  the mark, sync the temporary directory: its entries last
//! 5 rename  <name>.tmp-… -> <name>       the name must not exist
//! 6 sync    the parent                   the rename lasts
//! ```
//!
//! The mark shows that a leftover is of this program, whatever its name. A directory with neither
//! the mark nor a manifest may be somebody's, and is never removed.
//!
//! There is no pointer to the latest directory, which could be torn itself. The latest is the one
//! with the highest number whose manifest verifies (`retention.rs`).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::disk::Disk;
use crate::encode::{TensorSpec, check_length, encode_header};
use crate::error::{Operation, StoreError};
use crate::failpoint;
use crate::hash::hex;
use crate::manifest::{FileRecord, MANIFEST_NAME, Manifest};
use crate::names::SafeName;
use crate::own_names::{UNFINISHED, temporary_name};
use crate::tensors::PIECE;

/// A directory that is being written and is not visible yet: begin it, [`Staging::write`] each file,
/// publish. Another writer's files go into [`Staging::directory`], and [`Staging::record`] takes them
/// into the manifest. A `Staging` that is dropped unpublished removes what it wrote.
pub struct Staging<'disk> {
    pub(crate) disk: &'disk dyn Disk,
    pub(crate) parent: PathBuf,
    pub(crate) destination: PathBuf,
    temporary: PathBuf,
    files: Vec<FileRecord>,
    /// What this directory needs as far as it is known, for the message when the disk is full.
    needed_bytes: u64,
    /// The temporary directory, locked while this process writes it. Another process tells by the
    /// lock, not by a process id, whether the directory is a leftover. `None`: the file system has
    /// no such locks.
    _alive: Option<File>,
}

impl<'disk> Staging<'disk> {
    /// Starts `parent/name`, which must not exist. Creates the parent.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`], [`StoreError::UnsafeName`], or a failure of the disk.
    pub fn begin(disk: &'disk dyn Disk, parent: &Path, name: &str) -> Result<Self, StoreError> {
        let name = SafeName::parse(name)?;
        let destination = parent.join(name.as_str());
        refuse_existing(disk, &destination)?;
        Self::begin_any(disk, parent, name.as_str())
    }

    pub(crate) fn begin_any(disk: &'disk dyn Disk, parent: &Path, name: &str) -> Result<Self, StoreError> {
        ensure_directory(disk, parent)?;
        failpoint::hit("checkpoint.begin");
        let temporary = parent.join(temporary_name(name));
        disk.create_dir(&temporary)
            .map_err(|source| StoreError::io(&temporary, Operation::CreateDirectory, 0, source))?;
        let staging = Self {
            disk,
            parent: parent.to_path_buf(),
            destination: parent.join(name),
            _alive: File::open(&temporary).ok().filter(|directory| directory.try_lock().is_ok()),
            temporary,
            files: Vec::new(),
            needed_bytes: 0,
        };
        staging.mark()?;
        Ok(staging)
    }

    /// Leaves the mark before anything else is written, so that every leftover has it.
    fn mark(&self) -> Result<(), StoreError> {
        mark_unfinished(self.disk, &self.temporary)
    }

    /// Where the files are until they are published.
    pub fn directory(&self) -> &Path {
        &self.temporary
    }

    /// Writes and syncs one file.
    ///
    /// # Errors
    /// [`StoreError::UnsafeName`], [`StoreError::CannotWrite`] for a name that is taken, or a
    /// failure of the disk.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        failpoint::hit("checkpoint.file");
        let name = self.new_name(name)?;
        let size = bytes.len() as u64;
        let before: u64 = self.files.iter().map(|file| file.size).sum();
        self.needed_bytes = self.needed_bytes.max(before.saturating_add(size));
        self.write_synced(name.as_str(), bytes)?;
        let blake3 = blake3::hash(bytes).to_hex().to_string();
        self.files.push(FileRecord { name: name.to_string(), size, blake3 });
        Ok(())
    }

    /// Says how many bytes the whole directory will take, for the message when the disk is full.
    pub fn expect_bytes(&mut self, bytes: u64) {
        self.needed_bytes = bytes;
    }

    /// Writes and syncs a safetensors file, one tensor at a time. `produce(n)` gives the bytes of the `n`th of
    /// `tensors`; it is called once for each, ascending.
    ///
    /// # Errors
    /// As [`Staging::write`], [`StoreError::CannotWrite`] for bytes that do not fit the shape, or an error of
    /// `produce`.
    pub fn write_tensors<E: From<StoreError>>(
        &mut self,
        name: &str,
        tensors: &[TensorSpec],
        metadata: &BTreeMap<String, String>,
        mut produce: impl FnMut(usize) -> Result<Vec<u8>, E>,
    ) -> Result<(), E> {
        failpoint::hit("checkpoint.file");
        let name = self.new_name(name)?;
        let path = self.temporary.join(name.as_str());
        let failed = |operation| {
            let (path, needed) = (&path, self.needed_bytes);
            move |source| StoreError::io(path, operation, needed, source)
        };
        let (mut hasher, mut size) = (blake3::Hasher::new(), 0);
        let mut append = |bytes: &[u8]| {
            hasher.update(bytes);
            size += bytes.len() as u64;
            match bytes.is_empty() {
                true => Ok(()),
                false => self.disk.append_file(&path, bytes).map_err(failed(Operation::Write)),
            }
        };
        let mut begun = encode_header(&path, tensors, metadata)?;
        self.disk.write_file(&path, &[]).map_err(failed(Operation::Write))?;
        for (n, spec) in tensors.iter().enumerate() {
            failpoint::hit("checkpoint.tensor");
            let bytes = produce(n)?;
            check_length(&path, spec, &bytes)?;
            // Small ones are written together.
            if begun.len() + bytes.len() > PIECE {
                append(&begun)?;
                begun.clear();
            }
            if bytes.len() > PIECE { append(&bytes)? } else { begun.extend_from_slice(&bytes) }
        }
        append(&begun)?;
        self.disk.sync_file(&path).map_err(failed(Operation::Sync))?;
        let blake3 = hasher.finalize().to_hex().to_string();
        self.files.push(FileRecord { name: name.to_string(), size, blake3 });
        Ok(())
    }

    /// Takes a file that the caller wrote into [`Staging::directory`] into the manifest: syncs it
    /// and reads it again for its hash.
    ///
    /// # Errors
    /// As [`Staging::write`].
    pub fn record(&mut self, name: &str) -> Result<(), StoreError> {
        failpoint::hit("checkpoint.file");
        let name = self.new_name(name)?;
        let path = self.temporary.join(name.as_str());
        self.disk.sync_file(&path).map_err(|source| self.failed(Operation::Sync, &path, source))?;
        let reading = |source| StoreError::reading(&path, source);
        let size = self.disk.length(&path).map_err(reading)?;
        let blake3 = hex(&self.disk.hash(&path).map_err(reading)?);
        self.files.push(FileRecord { name: name.to_string(), size, blake3 });
        Ok(())
    }

    /// Writes the manifest and makes the directory visible under its name, which must still not exist.
    /// Returns its path. Once this has returned `Ok`, the directory survives a power cut.
    ///
    /// `about` is a JSON object with the text `kind`; the rest of it comes back as
    /// [`Manifest::fields`].
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`], [`StoreError::CannotWrite`] if `about` is no object with a
    /// `kind`, or a failure of the disk.
    pub fn publish(self, about: &serde_json::Value) -> Result<PathBuf, StoreError> {
        self.finish_files(about)?;
        refuse_existing(self.disk, &self.destination)?;
        self.rename_to_destination()?;
        self.sync_parent()?;
        Ok(self.destination.clone())
    }

    /// Steps 3 and 4: from here on the temporary directory is complete on disk.
    pub(crate) fn finish_files(&self, about: &serde_json::Value) -> Result<(), StoreError> {
        let manifest = Manifest::new(&self.destination, about, self.files.clone())?;
        self.write_synced(MANIFEST_NAME, &manifest.encode(&self.destination)?)?;
        failpoint::hit("checkpoint.written");
        let mark = self.temporary.join(UNFINISHED);
        self.disk.remove_file(&mark).map_err(|source| self.failed(Operation::Remove, &mark, source))?;
        self.disk.sync_dir(&self.temporary).map_err(|source| self.failed(Operation::Sync, &self.temporary, source))?;
        failpoint::hit("checkpoint.synced");
        Ok(())
    }

    pub(crate) fn rename_to_destination(&self) -> Result<(), StoreError> {
        self.disk
            .rename(&self.temporary, &self.destination)
            .map_err(|source| self.failed(Operation::Rename, &self.destination, source))?;
        failpoint::hit("checkpoint.renamed");
        Ok(())
    }

    pub(crate) fn sync_parent(&self) -> Result<(), StoreError> {
        self.disk.sync_dir(&self.parent).map_err(|source| self.failed(Operation::Sync, &self.parent, source))?;
        failpoint::hit("checkpoint.done");
        Ok(())
    }

    fn new_name(&self, name: &str) -> Result<SafeName, StoreError> {
        let safe = SafeName::parse(name)?;
        // Without case: on a Mac's disk names that differ in case are one file.
        let same = |other: &str| other.eq_ignore_ascii_case(name);
        if same(MANIFEST_NAME) || self.files.iter().any(|file| same(&file.name)) {
            return Err(StoreError::CannotWrite {
                path: self.destination.clone(),
                what: format!("it would have two files named {name}"),
            });
        }
        Ok(safe)
    }

    fn write_synced(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.temporary.join(name);
        self.disk.write_file(&path, bytes).map_err(|source| self.failed(Operation::Write, &path, source))?;
        self.disk.sync_file(&path).map_err(|source| self.failed(Operation::Sync, &path, source))
    }

    fn failed(&self, operation: Operation, path: &Path, source: io::Error) -> StoreError {
        StoreError::io(path, operation, self.needed_bytes, source)
    }
}

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        // After publishing, nothing has this name any more. On a failing disk the removal may fail
        // too. Then `sweep` of the next process finds the leftover by its name.
        if self.disk.exists(&self.temporary).unwrap_or(false) {
            let _ = self.disk.remove_dir_all(&self.temporary);
        }
    }
}

/// Leaves the mark in a directory and syncs it, before anything else is written there.
pub(crate) fn mark_unfinished(disk: &dyn Disk, directory: &Path) -> Result<(), StoreError> {
    let mark = directory.join(UNFINISHED);
    let text = format!("{} of finetune {}\n", std::process::id(), env!("CARGO_PKG_VERSION"));
    disk.write_file(&mark, text.as_bytes())
        .map_err(|source| StoreError::io(&mark, Operation::Write, text.len() as u64, source))?;
    disk.sync_dir(directory).map_err(|source| StoreError::io(directory, Operation::Sync, 0, source))
}

/// Creates a directory and those above it that are missing. Each survives a power cut.
///
/// # Errors
/// A failure of the disk.
pub fn ensure_directory(disk: &dyn Disk, path: &Path) -> Result<(), StoreError> {
    if path.as_os_str().is_empty() {
        return Ok(()); // the current directory
    }
    let inspect = |source| StoreError::io(path, Operation::Inspect, 0, source);
    if disk.exists(path).map_err(inspect)? {
        return Ok(());
    }
    let parent = path.parent().unwrap_or(Path::new(""));
    ensure_directory(disk, parent)?;
    match disk.create_dir(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {} // another was faster
        Err(source) => return Err(StoreError::io(path, Operation::CreateDirectory, 0, source)),
    }
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    disk.sync_dir(parent).map_err(|source| StoreError::io(parent, Operation::Sync, 0, source))
}

fn refuse_existing(disk: &dyn Disk, path: &Path) -> Result<(), StoreError> {
    match disk.exists(path) {
        Ok(false) => Ok(()),
        Ok(true) => Err(StoreError::AlreadyExists { path: path.to_path_buf() }),
        Err(source) => Err(StoreError::io(path, Operation::Inspect, 0, source)),
    }
}
