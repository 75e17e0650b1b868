//! One process per run directory.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::Duration;

use crate::directory::ensure_directory;
use crate::disk::RealDisk;
use crate::error::{Operation, StoreError};

/// Held while this process works in a run directory. The operating system lets go of it when the
/// process ends, however it ends, so a lock is never stale.
#[derive(Debug)]
pub struct RunLock {
    file: File,
}

impl RunLock {
    /// Takes `<dir>/.lock`, creating the directory if need be. [`StoreError::Locked`] names the
    /// process that has it.
    pub fn acquire(dir: &Path) -> Result<Self, StoreError> {
        ensure_directory(&RealDisk, dir)?;
        let path = dir.join(".lock");
        let failed = |source| StoreError::io(&path, Operation::Lock, 0, source);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                let (pid, host) = read_owner(&mut file);
                return Err(StoreError::Locked { path, pid, host });
            }
            Err(std::fs::TryLockError::Error(source)) => return Err(failed(source)),
        }
        let owner = format!("{} {}\n", std::process::id(), host_name());
        file.set_len(0)
            .and_then(|()| file.write_all(owner.as_bytes()))
            .map_err(|source| StoreError::io(&path, Operation::Write, owner.len() as u64, source))?;
        Ok(Self { file })
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        // The next holder must not be taken for us in the instant before it writes its name.
        // The file stays: removing a lock file lets two processes each hold "the" lock.
        let _ = self.file.set_len(0);
    }
}

fn read_owner(file: &mut File) -> (Option<u32>, Option<String>) {
    // The holder writes its name just after locking; give it that instant.
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
