//! Files that can be made again. They may be lost at any time, and a damaged one counts as missing.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::directory::ensure_directory;
use crate::disk::{Disk, RealDisk};
use crate::own_names::temporary_name;

/// The most bytes of all files of a cache together. Those that were not used for longest go first.
const MOST_BYTES: u64 = 8 << 30;
/// A file that was never finished is a leftover once it is this old.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);
const HASH_BYTES: usize = 32;

/// A folder of this user's cache, for one kind of thing.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
}

/// Held by the process that makes an entry. The others wait for it.
pub struct EntryLock {
    _lock: File,
}

impl Cache {
    /// The folder `kind` in the user's cache. `FINETUNE_CACHE`, `XDG_CACHE_HOME` and the home
    /// directory say where that is, in this order. `None`: none of them does, or
    /// `FINETUNE_CACHE=off`.
    pub fn of_user(kind: &str) -> Option<Cache> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let own = variable("FINETUNE_CACHE");
        if own.as_deref() == Some(Path::new("off")) {
            return None;
        }
        let root = own
            .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("finetune")))
            .or_else(|| variable("HOME").map(|home| home.join(".cache/finetune")))?;
        Some(Cache { folder: root.join(kind) })
    }

    /// A cache in this folder.
    pub fn at(folder: &Path) -> Cache {
        Cache { folder: folder.to_owned() }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(key)
    }

    /// Reads an entry with `read`. `None`: there is none, it is damaged, or `read` fails on it.
    pub fn get<T>(&self, key: &str, read: impl FnOnce(&mut dyn Read) -> io::Result<T>) -> Option<T> {
        let path = self.path(key);
        let file = File::open(&path).ok()?;
        let length = file.metadata().ok()?.len().checked_sub(HASH_BYTES as u64)?;
        let mut content =
            Hashing { inner: BufReader::with_capacity(1 << 20, file).take(length), hasher: blake3::Hasher::new() };
        let value = read(&mut content).ok()?;
        io::copy(&mut content, &mut io::sink()).ok()?;
        let Hashing { inner, hasher } = content;
        let mut written = [0; HASH_BYTES];
        inner.into_inner().read_exact(&mut written).ok()?;
        if *hasher.finalize().as_bytes() != written {
            return None;
        }
        // It was used, so others are removed before it.
        let _ = File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        Some(value)
    }

    /// Writes an entry with `write`. Failures are ignored, since no entry is needed.
    pub fn put(&self, key: &str, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) {
        let temporary = self.path(&temporary_name(key));
        if self.write(&temporary, write).is_err() || RealDisk.rename(&temporary, &self.path(key)).is_err() {
            let _ = RealDisk.remove_file(&temporary);
        }
        self.sweep();
    }

    fn write(&self, path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        ensure_directory(&RealDisk, &self.folder).map_err(io::Error::other)?;
        // Rows may be confidential, so other users may not read them.
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        let mut content = Hashing { inner: BufWriter::with_capacity(1 << 20, file), hasher: blake3::Hasher::new() };
        write(&mut content)?;
        let Hashing { mut inner, hasher } = content;
        inner.write_all(hasher.finalize().as_bytes())?;
        inner.flush()
    }

    /// Waits until no other process makes this entry, and takes the lock to make it. `waiting` is
    /// called now and then, and says whether to go on waiting. `None`: it says no, or the cache
    /// cannot be written to.
    pub fn make(&self, key: &str, waiting: &dyn Fn() -> bool) -> Option<EntryLock> {
        use std::os::unix::fs::OpenOptionsExt;
        ensure_directory(&RealDisk, &self.folder).ok()?;
        let path = self.path(&format!("{key}.lock"));
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).ok()?;
        loop {
            match lock.try_lock() {
                Ok(()) => return Some(EntryLock { _lock: lock }),
                Err(std::fs::TryLockError::WouldBlock) if waiting() => std::thread::sleep(Duration::from_millis(20)),
                Err(_) => return None,
            }
        }
    }

    /// Removes the oldest entries beyond what the cache may hold, and what processes left that
    /// ended while they wrote.
    fn sweep(&self) {
        let mut entries: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for name in RealDisk.list(&self.folder).unwrap_or_default() {
            let path = self.path(&name);
            let Ok(about) = std::fs::symlink_metadata(&path) else { continue };
            let Ok(time) = about.modified() else { continue };
            let old = time.elapsed().is_ok_and(|age| age > ABANDONED);
            if name.contains(".tmp-") || name.ends_with(".lock") {
                if old {
                    let _ = RealDisk.remove_file(&path);
                }
            } else if about.is_file() {
                entries.push((time, about.len(), path));
            }
        }
        entries.sort();
        let mut bytes: u64 = entries.iter().map(|(_, length, _)| length).sum();
        for (_, length, path) in entries {
            if bytes <= MOST_BYTES {
                return;
            }
            let _ = RealDisk.remove_file(&path);
            bytes -= length;
        }
    }
}

/// A reader or writer that hashes what goes through it.
struct Hashing<T> {
    inner: T,
    hasher: blake3::Hasher,
}

impl<T: Read> Read for Hashing<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(content: &mut dyn Read) -> io::Result<String> {
        let mut text = String::new();
        content.read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn an_entry_comes_back_whole_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(&directory.path().join("a/b"));
        assert_eq!(cache.get("one", text), None);
        cache.put("one", |content| content.write_all(b"words"));
        assert_eq!(cache.get("one", text).as_deref(), Some("words"));
        let path = directory.path().join("a/b/one");
        let whole = std::fs::read(&path).unwrap();
        for damaged in [whole[..whole.len() - 1].to_vec(), whole[1..].to_vec(), Vec::new(), b"x".repeat(200)] {
            RealDisk.remove_file(&path).unwrap();
            RealDisk.write_file(&path, &damaged).unwrap();
            assert_eq!(cache.get("one", text), None, "{damaged:?}");
        }
        for place in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[place] ^= 1;
            RealDisk.remove_file(&path).unwrap();
            RealDisk.write_file(&path, &bytes).unwrap();
            assert_eq!(cache.get("one", text), None, "{place}");
        }
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        cache.put("one", |_| Err(io::ErrorKind::Other.into()));
        assert_eq!(RealDisk.list(directory.path()).unwrap(), Vec::<String>::new());
        // A folder that cannot be made is no error either.
        RealDisk.write_file(&directory.path().join("file"), b"").unwrap();
        let nowhere = Cache::at(&directory.path().join("file/below"));
        nowhere.put("one", |content| content.write_all(b"words"));
        assert_eq!(nowhere.get("one", text), None);
        assert!(nowhere.make("one", &|| true).is_none());
    }

    #[test]
    fn one_makes_it_and_the_others_wait() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let making = cache.make("one", &|| true).unwrap();
        assert!(cache.make("one", &|| false).is_none());
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                let _lock = cache.make("one", &|| true).unwrap();
                cache.get("one", text)
            });
            std::thread::sleep(Duration::from_millis(50));
            cache.put("one", |content| content.write_all(b"made"));
            drop(making);
            assert_eq!(other.join().unwrap().as_deref(), Some("made"));
        });
    }
}
