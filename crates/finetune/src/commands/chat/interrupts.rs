//! Ctrl-C and SIGTERM while the program waits, reads or answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level;

use crate::exit::Exit;
use crate::failure::Failure;
use crate::stderr::complain;

/// How long the line editor has to let go of the terminal.
const LETTING_GO: Duration = Duration::from_secs(2);
/// How often it is asked to.
const AGAIN: Duration = Duration::from_millis(50);

/// What the program is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doing {
    /// Between a line and its answer.
    Nothing = 0,
    /// Waiting for a line of the terminal.
    Editing = 1,
    /// Waiting for a line of a file or pipe.
    Reading = 2,
    Answering = 3,
}

/// What signals have asked for.
pub(super) struct Interrupts {
    doing: AtomicU8,
    stop: AtomicBool,
    /// The number of the signal that ends the program, 0 until then.
    ended: AtomicI32,
    /// Ctrl-C during this answer.
    presses: AtomicUsize,
    /// Ctrl-C stops an answer, and does not end the program.
    by_hand: bool,
}

impl Interrupts {
    /// Listens on a thread of its own, from now to the end of the process. `by_hand`: a person
    /// types at a terminal.
    pub(super) fn listen(by_hand: bool) -> Result<Arc<Interrupts>, Failure> {
        let interrupts = Arc::new(Interrupts {
            doing: AtomicU8::new(Doing::Nothing as u8),
            stop: AtomicBool::new(false),
            ended: AtomicI32::new(0),
            presses: AtomicUsize::new(0),
            by_hand,
        });
        let mut arriving = Signals::new([SIGINT, SIGTERM]).map_err(|error| Failure::deaf(&error))?;
        let listener = Arc::clone(&interrupts);
        let listening = std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for signal in arriving.forever() {
                listener.receive(signal);
            }
        });
        listening.map_err(|error| Failure::deaf(&error))?;
        Ok(interrupts)
    }

    /// Does something that signals may interrupt.
    pub(super) fn during<R>(&self, doing: Doing, work: impl FnOnce() -> R) -> R {
        self.stop.store(false, Ordering::SeqCst);
        self.presses.store(0, Ordering::SeqCst);
        self.doing.store(doing as u8, Ordering::SeqCst);
        let result = work();
        self.doing.store(Doing::Nothing as u8, Ordering::SeqCst);
        result
    }

    /// Whether the answer is to stop.
    pub(super) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst) || self.ended().is_some()
    }

    /// The signal that ends the program.
    pub(super) fn ended(&self) -> Option<i32> {
        Some(self.ended.load(Ordering::SeqCst)).filter(|signal| *signal != 0)
    }

    fn is(&self, doing: Doing) -> bool {
        self.doing.load(Ordering::SeqCst) == doing as u8
    }

    fn receive(&self, signal: i32) {
        if signal == SIGINT && self.by_hand {
            self.pressed();
            return;
        }
        // A second one waits for nothing.
        if self.ended.swap(signal, Ordering::SeqCst) != 0 || self.is(Doing::Reading) {
            low_level::exit(i32::from(Exit::Stopped(signal).number()));
        }
        if self.is(Doing::Editing) {
            self.wake_editor(signal);
        }
    }

    /// Ctrl-C. The line editor hears it itself, as a key.
    fn pressed(&self) {
        if !self.is(Doing::Answering) {
            return;
        }
        self.stop.store(true, Ordering::SeqCst);
        match self.presses.fetch_add(1, Ordering::SeqCst) {
            0 => {}
            1 => complain!("the model is in the middle of a step; Ctrl-C once more leaves at once"),
            _ => low_level::exit(i32::from(Exit::Stopped(SIGINT).number())),
        }
    }

    /// Ends the waiting of the line editor, which sets the terminal right again: it takes SIGINT
    /// for Ctrl-C. The main thread sees then that the program ends.
    fn wake_editor(&self, signal: i32) {
        let tries = LETTING_GO.as_millis() / AGAIN.as_millis();
        for _ in 0..tries {
            if !self.is(Doing::Editing) {
                return;
            }
            let _ = low_level::raise(SIGINT);
            std::thread::sleep(AGAIN);
        }
        low_level::exit(i32::from(Exit::Stopped(signal).number()));
    }
}
