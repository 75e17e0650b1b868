//! Which file was opened under a name, and whether it is written to while it is in use.
//!
//! An open file stays what it is when another one takes its name, or when its last name is removed. Only writing into
//! it changes what is read from it, and that changes its length or the time of its last modification. The time of the
//! inode's last change is not looked at: a new name or other permissions change it too, and no byte.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::StoreError;

/// A file as it was when it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenedFile {
    path: PathBuf,
    device: u64,
    inode: u64,
    length: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
}

impl OpenedFile {
    /// The file of this name. `metadata`: of the file that was opened, from before anything of it was read.
    pub fn new(path: &Path, metadata: &Metadata) -> OpenedFile {
        OpenedFile {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }

    /// The name that it was opened under.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// A word that is the same of the same file as long as nothing is written to it, whichever process of this
    /// machine opens it.
    pub fn word(&self) -> String {
        let OpenedFile { device, inode, length, modified: (seconds, nanoseconds), .. } = self;
        format!("{device}.{inode}.{length}.{seconds}.{nanoseconds}")
    }

    /// Checks that nothing was written to it since. `now`: the metadata of the open file.
    ///
    /// # Errors
    /// [`StoreError::Changed`].
    pub(crate) fn expect_unwritten(&self, now: &Metadata) -> Result<(), StoreError> {
        let what = if now.len() != self.length {
            format!("it had {} bytes, and has {} now", self.length, now.len())
        } else if (now.mtime(), now.mtime_nsec()) != self.modified {
            "it was written to, or touched: its time of modification is another".to_owned()
        } else {
            return Ok(());
        };
        Err(StoreError::Changed { path: self.path.clone(), what })
    }

    /// Checks that it still has its name, and that nothing was written to it since. So who opens it by that name
    /// reads the same bytes.
    ///
    /// # Errors
    /// [`StoreError::Changed`], or [`StoreError::Io`] if nothing has the name any more.
    pub fn expect_in_place(&self) -> Result<(), StoreError> {
        let now = self.path.metadata().map_err(|source| StoreError::reading(&self.path, source))?;
        if (now.dev(), now.ino()) != (self.device, self.inode) {
            let what = "another file has its name now".to_owned();
            return Err(StoreError::Changed { path: self.path.clone(), what });
        }
        self.expect_unwritten(&now)
    }
}
