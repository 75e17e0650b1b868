//! Signals that ask to stop: Ctrl-C, `kill`, a closed terminal, a scheduler's warning.
//!
//! Before training there is nothing to save, and a signal ends the program at once. During training
//! the first signal asks the run to stop after the current step. A second one ends it at once. Both
//! are answered with a line.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU};

use crate::exit::Exit;
use crate::failure::Failure;
use crate::stderr::complain;

/// How long a rank goes on whose launcher is gone. After ten seconds no process may be left over.
const LAST_WORK: Duration = Duration::from_secs(8);

/// Which of the signals is heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It asks to stop.
    First,
    /// It ends the program.
    Second,
}

type Words = Box<dyn Fn(Heard) -> String + Send>;

/// What signals have asked for, and how the next one is answered.
pub(crate) struct Signals {
    /// The number of the signal that asked to stop, 0 until then.
    pub(crate) stop: Arc<AtomicI32>,
    /// Whether the next signal ends the program.
    at_once: AtomicBool,
    /// Makes the line that answers a signal. `None` if there is nothing to lose.
    words: Mutex<Option<Words>>,
}

impl Signals {
    /// Listens on a thread of its own, from now to the end of the process.
    pub(crate) fn listen() -> Result<Arc<Signals>, Failure> {
        let signals = Arc::new(Signals {
            stop: Arc::new(AtomicI32::new(0)),
            at_once: AtomicBool::new(true),
            words: Mutex::new(None),
        });
        // Slurm sends USR1 or USR2 before the time is up (`--signal`). XCPU comes at a limit on
        // processor time.
        let mut wanted = vec![SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU];
        // Under nohup the program outlives its terminal.
        if !is_ignored(SIGHUP) {
            wanted.push(SIGHUP);
        }
        let arriving = signal_hook::iterator::Signals::new(wanted);
        let mut arriving = arriving.map_err(|error| Failure::deaf(&error))?;
        let listener = Arc::clone(&signals);
        let listening = std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for signal in arriving.forever() {
                listener.receive(signal);
            }
        });
        listening.map_err(|error| Failure::deaf(&error))?;
        Ok(signals)
    }

    /// Handles a signal, or an order that means the same.
    pub(crate) fn receive(&self, signal: i32) {
        let heard = if self.at_once.swap(true, Ordering::SeqCst) { Heard::Second } else { Heard::First };
        if let Some(words) = &*self.words.lock().unwrap_or_else(PoisonError::into_inner) {
            complain!("{}", words(heard));
        }
        if heard == Heard::Second {
            // Wait for nothing of this process: not for a device's driver, not for other threads.
            signal_hook::low_level::exit(i32::from(Exit::Stopped(signal).number()));
        }
        self.stop.store(signal, Ordering::SeqCst);
    }

    /// Stops a rank whose launcher is gone. It finishes its step if that does not take long, since
    /// no one waits for it any more.
    pub(crate) fn abandoned(&self) {
        self.receive(SIGTERM);
        std::thread::sleep(LAST_WORK);
        Exit::Stopped(SIGTERM).end();
    }

    /// From now on there is work to save. `words` makes the line that answers a signal.
    pub(crate) fn finish_steps(&self, words: impl Fn(Heard) -> String + Send + 'static) {
        *self.words.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(words));
        self.at_once.store(false, Ordering::SeqCst);
    }

    /// Waits until the line that answers a signal is printed. For a program that its own answer ends.
    pub(crate) fn said(&self) {
        drop(self.words.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The same as [`Signals::finish_steps`] without a line: another process says it.
    pub(crate) fn finish_steps_silently(&self) {
        self.at_once.store(false, Ordering::SeqCst);
    }
}

#[expect(unsafe_code, reason = "sigaction is a C function")]
fn is_ignored(signal: i32) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: without a new action the call only fills the struct that it is given. If it fails,
    // the struct is zero, which is a valid value.
    let action = unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}

/// Makes a file that reaches the limit on sizes an error of the write ("no space"), and no signal
/// that kills.
#[expect(unsafe_code, reason = "signal is a C function")]
pub(crate) fn ignore_file_size_limit() {
    // SAFETY: no handler is set, the signal is only ignored.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}
