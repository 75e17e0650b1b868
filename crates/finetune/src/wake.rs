//! Keeps a Mac awake while it trains: a laptop that nobody touches goes to sleep, and the run with it.

/// While it lives, the machine does not sleep for want of a user.
pub(crate) struct Awake(Option<std::process::Child>);

impl Awake {
    /// `caffeinate` holds the assertion and ends with this process, however that ends. Elsewhere schedulers and servers do not
    /// sleep, and nothing is started.
    pub(crate) fn keep() -> Awake {
        if !cfg!(target_os = "macos") {
            return Awake(None);
        }
        let process = std::process::id().to_string();
        let started = std::process::Command::new("/usr/bin/caffeinate").args(["-i", "-w", &process]).spawn();
        Awake(started.ok())
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
