//! Keeps a Mac awake while it trains. A laptop that is not used goes to sleep, and the run stops
//! with it.

/// While this value lives, a Mac does not sleep because it is not used.
pub(crate) struct SleepInhibitor(Option<std::process::Child>);

impl SleepInhibitor {
    /// Starts `caffeinate`, which holds the assertion and ends with this process, however that
    /// ends. On other systems nothing is started: servers do not go to sleep.
    pub(crate) fn start() -> SleepInhibitor {
        if !cfg!(target_os = "macos") {
            return SleepInhibitor(None);
        }
        let process = std::process::id().to_string();
        let started = std::process::Command::new("/usr/bin/caffeinate").args(["-i", "-w", &process]).spawn();
        SleepInhibitor(started.ok())
    }
}

impl Drop for SleepInhibitor {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
