//! SIGINT and SIGTERM. Before training there is nothing to save: they end the program at once. During
//! training the first asks the run to stop after the current step, a second one ends it at once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};

/// How long a rank without a launcher goes on: no process is to be left over after ten seconds.
const LAST_WORK: Duration = Duration::from_secs(8);

/// What signals have asked for.
pub(crate) struct Signals {
    /// The number of the signal that asked to stop, 0 until then.
    pub(crate) stop: Arc<AtomicI32>,
    /// Whether the next signal ends the program.
    at_once: Arc<AtomicBool>,
}

impl Signals {
    pub(crate) fn listen() -> io::Result<Signals> {
        let stop = Arc::new(AtomicI32::new(0));
        let at_once = Arc::new(AtomicBool::new(true));
        for signal in [SIGINT, SIGTERM] {
            // Handlers run in the order of their registration: this one sees the flag as it was before the signal.
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, at_once.clone())?;
            signal_hook::flag::register(signal, at_once.clone())?;
            let stop = stop.clone();
            #[expect(unsafe_code, reason = "a signal handler may only do what is safe in one")]
            // SAFETY: the handler stores to an atomic, which is async-signal-safe.
            unsafe {
                signal_hook::low_level::register(signal, move || stop.store(signal, Ordering::SeqCst))?;
            }
        }
        Ok(Signals { stop, at_once })
    }

    /// The same for a signal that came another way.
    pub(crate) fn receive(&self, signal: i32) {
        if self.at_once.swap(true, Ordering::SeqCst) {
            std::process::exit(128 + signal);
        }
        self.stop.store(signal, Ordering::SeqCst);
    }

    /// Whoever started this process is gone. It finishes its step if that does not take long: nobody waits for it any more.
    pub(crate) fn abandoned(&self) {
        self.receive(SIGTERM);
        std::thread::sleep(LAST_WORK);
        std::process::exit(128 + SIGTERM);
    }

    /// From now on there is work to save.
    pub(crate) fn finish_steps(&self) {
        self.at_once.store(false, Ordering::SeqCst);
    }
}
