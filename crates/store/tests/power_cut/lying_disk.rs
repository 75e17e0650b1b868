//! The planted bugs: a disk that turns the right protocol into a wrong one.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use finetune_store::Disk;
use finetune_store::fault::FaultDisk;

/// A disk around a [`FaultDisk`], or a [`FaultDisk`] itself.
pub(crate) trait Wrapped {
    fn inner(&self) -> &FaultDisk;
    fn as_disk(&self) -> &dyn Disk;
}

impl Wrapped for FaultDisk {
    fn inner(&self) -> &FaultDisk {
        self
    }
    fn as_disk(&self) -> &dyn Disk {
        self
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Lie {
    ForgetFileSync,
    ForgetDirectorySync,
    RenameFirst,
}

/// A disk that turns the right protocol into a wrong one.
pub(crate) struct LyingDisk {
    inner: FaultDisk,
    lie: Lie,
    renamed: AtomicBool,
}

impl LyingDisk {
    pub(crate) fn new(inner: FaultDisk, lie: Lie) -> Self {
        Self { inner, lie, renamed: AtomicBool::new(false) }
    }
}

impl Wrapped for LyingDisk {
    fn inner(&self) -> &FaultDisk {
        &self.inner
    }
    fn as_disk(&self) -> &dyn Disk {
        self
    }
}

impl Disk for LyingDisk {
    fn sync_file(&self, path: &Path) -> io::Result<()> {
        match self.lie {
            Lie::ForgetDirectorySync => self.inner.sync_file(path),
            Lie::ForgetFileSync | Lie::RenameFirst => Ok(()),
        }
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        match self.lie {
            Lie::ForgetFileSync => self.inner.sync_dir(path),
            Lie::ForgetDirectorySync => Ok(()),
            // All syncs come after the rename: first the parent's, then, later, the rest.
            Lie::RenameFirst if self.renamed.load(Ordering::SeqCst) => {
                self.inner.sync_dir(path)?;
                self.inner.create_dir(Path::new("/later"))?;
                self.inner.settle();
                Ok(())
            }
            Lie::RenameFirst => Ok(()),
        }
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.renamed.store(true, Ordering::SeqCst);
        self.inner.rename(from, to)
    }
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        self.inner.exchange(one, other)
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.inner.create_dir(path)
    }
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.inner.create_dir_all(path)
    }
    fn write_file(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.inner.write_file(path, bytes)
    }
    fn append_file(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.inner.append_file(path, bytes)
    }
    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_dir_all(path)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_file(path)
    }
    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.inner.exists(path)
    }
    fn is_directory(&self, path: &Path) -> io::Result<bool> {
        self.inner.is_directory(path)
    }
    fn length(&self, path: &Path) -> io::Result<u64> {
        self.inner.length(path)
    }
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.inner.read(path)
    }
    fn hash(&self, path: &Path) -> io::Result<[u8; 32]> {
        self.inner.hash(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.inner.list(path)
    }
}
