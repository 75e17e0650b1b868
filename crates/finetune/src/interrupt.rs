//! Commands that leave nothing behind when they are interrupted: what they have written so far goes first.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use finetune_store::{Staging, StoreError};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::exit::Exit;

/// How often a directory is removed anew that another thread is still writing into.
const TRIES: usize = 50;

/// Removes what is unfinished at the first SIGINT, SIGTERM or SIGHUP, and ends the program with 128 and its number.
pub(crate) struct Unfinished(Arc<Mutex<Option<PathBuf>>>);

impl Unfinished {
    pub(crate) fn watch() -> io::Result<Unfinished> {
        let mut wanted = vec![SIGINT, SIGTERM];
        if !is_ignored(SIGHUP) {
            wanted.push(SIGHUP);
        }
        let mut signals = Signals::new(wanted)?;
        let directory: Arc<Mutex<Option<PathBuf>>> = Arc::default();
        let watched = Arc::clone(&directory);
        std::thread::Builder::new().name("interrupt".to_owned()).spawn(move || {
            if let Some(signal) = signals.forever().next() {
                // Held until the end: what is being published is published, what is not never will be.
                let unfinished = lock(&watched);
                if let Some(directory) = &*unfinished {
                    remove(directory);
                }
                crate::stderr::complain!("interrupted; nothing unfinished is left behind");
                Exit::Stopped(signal).end();
            }
        })?;
        Ok(Unfinished(directory))
    }

    /// Begins a directory. A signal is heard before or after, never between.
    pub(crate) fn begin<'disk>(
        &self,
        begin: impl FnOnce() -> Result<Staging<'disk>, StoreError>,
    ) -> Result<Staging<'disk>, StoreError> {
        let mut unfinished = lock(&self.0);
        let staging = begin()?;
        *unfinished = Some(staging.directory().to_owned());
        Ok(staging)
    }

    /// Nothing is removed any more, and no signal ends the program while the answer lives. Where a signal has come, this waits
    /// for the end of the program.
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

/// Whether whoever started this process wants it to outlive this signal, as `nohup` does. Linux says so; elsewhere it is
/// not asked.
fn is_ignored(signal: i32) -> bool {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = text.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
