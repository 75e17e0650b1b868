//! Signals that ask to stop: Ctrl-C, `kill`, a closed terminal, a scheduler's warning. Before training there is nothing to
//! save: they end the program at once. During training the first asks the run to stop after the current step, a second one
//! ends it at once; both say so.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU};

use crate::exit::Exit;
use crate::stderr::complain;

/// How long a rank without a launcher goes on: no process is to be left over after ten seconds.
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

/// What signals have asked for.
pub(crate) struct Signals {
    /// The number of the signal that asked to stop, 0 until then.
    pub(crate) stop: Arc<AtomicI32>,
    /// Whether the next signal ends the program.
    at_once: AtomicBool,
    /// What to say of them; nothing where there is nothing to lose.
    words: Mutex<Option<Words>>,
}

impl Signals {
    /// Listens on a thread of its own, from now to the end of the process.
    pub(crate) fn listen() -> io::Result<Arc<Signals>> {
        let signals = Arc::new(Signals {
            stop: Arc::new(AtomicI32::new(0)),
            at_once: AtomicBool::new(true),
            words: Mutex::new(None),
        });
        // USR1 and USR2 are what Slurm sends before the time is up (`--signal`), XCPU where processor time is.
        let mut wanted = vec![SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU];
        // Under nohup a closed terminal is to be survived.
        if !is_ignored(SIGHUP) {
            wanted.push(SIGHUP);
        }
        let mut arriving = signal_hook::iterator::Signals::new(wanted)?;
        let listener = Arc::clone(&signals);
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for signal in arriving.forever() {
                listener.receive(signal);
            }
        })?;
        Ok(signals)
    }

    /// A signal, or an order that means the same.
    pub(crate) fn receive(&self, signal: i32) {
        let heard = if self.at_once.swap(true, Ordering::SeqCst) { Heard::Second } else { Heard::First };
        if let Some(words) = &*self.words.lock().unwrap_or_else(PoisonError::into_inner) {
            complain!("{}", words(heard));
        }
        if heard == Heard::Second {
            // Nothing of this process is waited for: not a device's driver, not other threads.
            signal_hook::low_level::exit(Exit::Stopped(signal).number().into());
        }
        self.stop.store(signal, Ordering::SeqCst);
    }

    /// Whoever started this process is gone. It finishes its step if that does not take long: nobody waits for it any more.
    pub(crate) fn abandoned(&self) {
        self.receive(SIGTERM);
        std::thread::sleep(LAST_WORK);
        Exit::Stopped(SIGTERM).end();
    }

    /// From now on there is work to save. `words` says what a signal does to it.
    pub(crate) fn finish_steps(&self, words: impl Fn(Heard) -> String + Send + 'static) {
        *self.words.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(words));
        self.at_once.store(false, Ordering::SeqCst);
    }

    /// The same where another process says it.
    pub(crate) fn finish_steps_silently(&self) {
        self.at_once.store(false, Ordering::SeqCst);
    }
}

#[expect(unsafe_code, reason = "sigaction is a C function")]
fn is_ignored(signal: i32) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: without a new action the call only fills the struct it is given; zeroes are a valid value should it fail.
    let action = unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}

/// A file larger than the limit on files is then an error of the write, which says "no space", and no signal that kills.
#[expect(unsafe_code, reason = "signal is a C function")]
pub(crate) fn ignore_file_size_limit() {
    // SAFETY: no handler is set, the signal is only ignored.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}
