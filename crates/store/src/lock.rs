//! One process per run directory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::fs::OFlags;

use crate::directory::ensure_directory;
use crate::disk::RealDisk;
use crate::error::{Operation, StoreError};

/// How often a lock that is held is tried. [`RunLock::holder`] holds one for an instant.
const TRIES: usize = 4;

/// Time between two tries.
const NAP: Duration = Duration::from_millis(5);

/// The process that works in a run directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockHolder {
    /// Its number.
    pub pid: Option<u32>,
    /// The host that it runs on.
    pub host: Option<String>,
}

/// Held while this process works in a run directory. The operating system lets go of it when the
/// process ends, however it ends, so a lock is never stale.
#[derive(Debug)]
pub struct RunLock {
    file: File,
}

impl RunLock {
    /// Takes `<dir>/.lock`, and creates the directory if need be.
    ///
    /// # Errors
    /// [`StoreError::Locked`] names the process that has it. [`StoreError::ForeignLock`],
    /// [`StoreError::NotADirectory`], or a failure of the disk.
    pub fn acquire(dir: &Path) -> Result<Self, StoreError> {
        if dir.is_file() {
            return Err(StoreError::NotADirectory { path: dir.to_path_buf() });
        }
        ensure_directory(&RealDisk, dir)?;
        let path = dir.join(".lock");
        let failed = |source| StoreError::io(&path, Operation::Lock, 0, source);
        let mut file = open(&path)?;
        match try_lock(&file) {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                let (pid, host) = read_owner(&mut file);
                return Err(StoreError::Locked { path, pid, host });
            }
            Err(std::fs::TryLockError::Error(source)) => return Err(failed(source)),
        }
        if !is_ours(&mut file).map_err(failed)? {
            return Err(foreign(&path, "it holds something else"));
        }
        let owner = format!("{} {}\n", std::process::id(), host_name());
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(owner.as_bytes()))
            .map_err(|source| StoreError::io(&path, Operation::Write, owner.len() as u64, source))?;
        Ok(Self { file })
    }

    /// Who works in a run directory now; `None` if nobody does. Changes nothing there.
    pub fn holder(dir: &Path) -> Option<LockHolder> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let opened = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(dir.join(".lock"));
        let mut file = opened.ok()?;
        // A holder that ends well empties the file. So a lock is seldom taken to find out.
        if file.metadata().is_ok_and(|file| !file.is_file() || file.len() == 0) {
            return None;
        }
        match file.try_lock_shared() {
            Err(std::fs::TryLockError::WouldBlock) => {
                let (pid, host) = read_owner(&mut file);
                Some(LockHolder { pid, host })
            }
            _ => None,
        }
    }
}

/// Takes the lock of a file, or finds it held at each of a few tries.
fn try_lock(file: &File) -> Result<(), std::fs::TryLockError> {
    for _ in 1..TRIES {
        match file.try_lock() {
            Err(std::fs::TryLockError::WouldBlock) => std::thread::sleep(NAP),
            answer => return answer,
        }
    }
    file.try_lock()
}

impl Drop for RunLock {
    fn drop(&mut self) {
        // Nobody may read our name in the instant before the next holder writes its own.
        // The file stays: removing a lock file lets two processes each hold "the" lock.
        let _ = self.file.set_len(0);
    }
}

/// Opens the lock file, and creates it if there is none. A link is not followed. Others who may
/// write to the directory could have put one there, and the file that it leads to would be emptied.
fn open(path: &Path) -> Result<File, StoreError> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).custom_flags(flags.bits() as i32);
    let failed = |source: io::Error| match path.symlink_metadata() {
        Ok(found) if found.is_symlink() => foreign(path, "it is a link"),
        Ok(found) if found.is_dir() => foreign(path, "it is a directory"),
        _ => StoreError::io(path, Operation::Lock, 0, source),
    };
    let file = options.open(path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?;
    match (found.is_file(), found.nlink()) {
        (true, 0 | 1) => Ok(file),
        (true, _) => Err(foreign(path, "it is another name of a file")),
        (false, _) => Err(foreign(path, "it is no regular file")),
    }
}

fn foreign(path: &Path, what: &'static str) -> StoreError {
    StoreError::ForeignLock { path: path.to_path_buf(), what }
}

/// Whether a file that is about to be emptied holds what a lock holds: `<process> <host>`, or
/// nothing.
fn is_ours(file: &mut File) -> io::Result<bool> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.take(4097).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let of_a_process = || {
        let (pid, host) = text.strip_suffix('\n')?.split_once(' ')?;
        Some(pid.parse::<u32>().is_ok() && !host.contains('\n'))
    };
    // A power cut leaves zeros of a file that was written and not synced.
    Ok(bytes.len() <= 4096 && (bytes.iter().all(|&byte| byte == 0) || of_a_process().unwrap_or(false)))
}

fn read_owner(file: &mut File) -> (Option<u32>, Option<String>) {
    // The holder writes its name just after locking, so try again for a moment.
    for _ in 0..20 {
        let mut text = String::new();
        let read = file.rewind().and_then(|()| (&*file).take(4096).read_to_string(&mut text));
        if read.is_ok()
            && let Some((pid, host)) = text.trim_end().split_once(' ')
            && let Ok(pid) = pid.parse()
        {
            return (Some(pid), Some(host.to_string()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    (None, None)
}

fn host_name() -> String {
    let from_kernel = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = from_kernel.or_else(|| {
        // macOS has no such file, and gethostname(2) would need unsafe.
        let output = std::process::Command::new("uname").arg("-n").output().ok()?;
        String::from_utf8(output.stdout).ok()
    });
    let name = name.unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "an unknown host".to_string() } else { name.to_string() }
}

#[cfg(test)]
mod tests {
    use finetune_advice::Advice as _;

    use super::*;

    #[test]
    fn a_second_holder_is_refused_and_told_who_has_it() {
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().join("runs").join("one");
        let held = RunLock::acquire(&run).unwrap();
        let error = RunLock::acquire(&run).unwrap_err();
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        assert!(!error.is_disk());
        match error {
            StoreError::Locked { pid, host, path } => {
                assert_eq!(pid, Some(std::process::id()));
                assert_eq!(host, Some(host_name()));
                assert_eq!(path, run.join(".lock"));
            }
            other => panic!("{other}"),
        }
        drop(held);
        RunLock::acquire(&run).unwrap();
    }

    #[test]
    fn a_holder_is_seen_from_outside() {
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().join("run");
        assert_eq!(RunLock::holder(&run), None, "no directory");
        let held = RunLock::acquire(&run).unwrap();
        let holder = LockHolder { pid: Some(std::process::id()), host: Some(host_name()) };
        assert_eq!(RunLock::holder(&run), Some(holder));
        drop(held);
        assert_eq!(RunLock::holder(&run), None, "ended well");
        write(&run.join(".lock"), "4242 this host\n");
        assert_eq!(RunLock::holder(&run), None, "killed");
        // To look does not get in the way of a run that starts.
        std::thread::scope(|scope| {
            let look = |_| {
                RunLock::holder(&run);
                std::thread::sleep(Duration::from_millis(1));
            };
            let looking = scope.spawn(move || (0..300).for_each(look));
            while !looking.is_finished() {
                write(&run.join(".lock"), "4242 this host\n");
                drop(RunLock::acquire(&run).unwrap());
            }
        });
    }

    /// (what lies at `.lock`, part of the message)
    #[test]
    fn what_is_no_lock_of_ours_is_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let victim = directory.path().join("victim");
        let text = "years of work, 14 of them in one file\n";
        #[expect(clippy::type_complexity, reason = "a table of cases")]
        let cases: [(fn(&Path, &Path), &str); 5] = [
            (|lock, victim| std::os::unix::fs::symlink(victim, lock).unwrap(), "it is a link"),
            (|lock, _| std::os::unix::fs::symlink("nowhere", lock).unwrap(), "it is a link"),
            (|lock, victim| std::fs::hard_link(victim, lock).unwrap(), "another name"),
            (|lock, _| std::fs::create_dir(lock).unwrap(), "it is a directory"),
            (|lock, victim| std::fs::copy(victim, lock).map(drop).unwrap(), "something else"),
        ];
        for (n, (make, says)) in cases.into_iter().enumerate() {
            write(&victim, text);
            let run = directory.path().join(format!("run-{n}"));
            ensure_directory(&RealDisk, &run).unwrap();
            make(&run.join(".lock"), &victim);
            let error = RunLock::acquire(&run).unwrap_err();
            assert!(matches!(error, StoreError::ForeignLock { .. }), "{n}: {error}");
            assert!(error.to_string().contains(says) && !error.hints().is_empty(), "{n}: {error}");
            assert_eq!(std::fs::read_to_string(&victim).unwrap(), text, "{n}");
            assert!(!run.join("nowhere").exists(), "{n}: nothing is made where a link leads");
        }
        let error = RunLock::acquire(&victim).unwrap_err();
        assert!(matches!(error, StoreError::NotADirectory { .. }), "{error}");
        // What another process of ours left, also one that a power cut has blanked, is taken over.
        for left in ["", "4242 another host\n", "\0\0\0\0"] {
            let run = directory.path().join("left");
            ensure_directory(&RealDisk, &run).unwrap();
            write(&run.join(".lock"), left);
            RunLock::acquire(&run).unwrap();
        }
    }

    #[expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]
    fn write(path: &Path, text: &str) {
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn a_race_has_one_winner() {
        let directory = tempfile::tempdir().unwrap();
        for round in 0..100 {
            let run = directory.path().join(format!("run-{round}"));
            let barrier = std::sync::Barrier::new(4);
            let results: Vec<_> = std::thread::scope(|scope| {
                let racers: Vec<_> = (0..4)
                    .map(|_| {
                        scope.spawn(|| {
                            barrier.wait();
                            let result = RunLock::acquire(&run);
                            barrier.wait();
                            result
                        })
                    })
                    .collect();
                racers.into_iter().map(|racer| racer.join().unwrap()).collect()
            });
            let winners = results.iter().filter(|result| result.is_ok()).count();
            assert_eq!(winners, 1, "round {round}: {results:?}");
        }
    }
}
