//! Interrupted commands leave nothing behind: what they have written so far is removed.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use finetune_store::{Staging, StoreError};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::exit::Exit;
use crate::failure::Failure;

/// How often removing a directory is tried while another thread still writes into it.
const TRIES: usize = 50;

/// Removes unfinished work at the first SIGINT, SIGTERM or SIGHUP. Then it ends the program with
/// 128 plus the signal's number.
pub(crate) struct Unfinished(Arc<Mutex<Option<PathBuf>>>);

impl Unfinished {
    pub(crate) fn watch() -> Result<Unfinished, Failure> {
        let mut wanted = vec![SIGINT, SIGTERM];
        if !is_ignored(SIGHUP) {
            wanted.push(SIGHUP);
        }
        let mut signals = Signals::new(wanted).map_err(|error| Failure::deaf(&error))?;
        let directory: Arc<Mutex<Option<PathBuf>>> = Arc::default();
        let watched = Arc::clone(&directory);
        let listening = std::thread::Builder::new().name("interrupt".to_owned()).spawn(move || {
            if let Some(signal) = signals.forever().next() {
                // The lock is held until the end: a directory that is being published is published
                // whole, and no other one will be.
                let unfinished = lock(&watched);
                if let Some(directory) = &*unfinished {
                    remove(directory);
                }
                crate::stderr::complain!("interrupted; nothing unfinished is left behind");
                Exit::Stopped(signal).end();
            }
        });
        listening.map_err(|error| Failure::deaf(&error))?;
        Ok(Unfinished(directory))
    }

    /// Begins a directory. A signal acts before or after that, never between.
    pub(crate) fn begin<'disk>(
        &self,
        begin: impl FnOnce() -> Result<Staging<'disk>, StoreError>,
    ) -> Result<Staging<'disk>, StoreError> {
        let mut unfinished = lock(&self.0);
        let staging = begin()?;
        *unfinished = Some(staging.directory().to_owned());
        Ok(staging)
    }

    /// From now on nothing is removed. No signal ends the program while the returned guard lives.
    /// If a signal has come already, this waits for the end of the program.
    pub(crate) fn publishing(&self) -> MutexGuard<'_, Option<PathBuf>> {
        let mut unfinished = lock(&self.0);
        *unfinished = None;
        unfinished
    }
}

fn lock(unfinished: &Mutex<Option<PathBuf>>) -> MutexGuard<'_, Option<PathBuf>> {
    unfinished.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remove(directory: &Path) {
    for _ in 0..TRIES {
        match std::fs::remove_dir_all(directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            _ => return,
        }
    }
}

/// Whether this process was started to outlive the signal, as by `nohup`. Only Linux tells;
/// elsewhere the answer is no.
fn is_ignored(signal: i32) -> bool {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = text.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
