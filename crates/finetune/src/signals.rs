//! SIGINT and SIGTERM: the first asks the run to stop after the current step, a second one ends it at once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

/// Holds the number of the signal that asked to stop, 0 until then.
pub(crate) fn stop_flag() -> io::Result<Arc<AtomicI32>> {
    let stop = Arc::new(AtomicI32::new(0));
    let asked = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // Registered first, so that it sees the flag only from the second signal on.
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, asked.clone())?;
        signal_hook::flag::register(signal, asked.clone())?;
        let stop = stop.clone();
        #[expect(unsafe_code, reason = "a signal handler may only do what is safe in one")]
        // SAFETY: the handler stores to an atomic, which is async-signal-safe.
        unsafe {
            signal_hook::low_level::register(signal, move || stop.store(signal, Ordering::SeqCst))?;
        }
    }
    Ok(stop)
}
