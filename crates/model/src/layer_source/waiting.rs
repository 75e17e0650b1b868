//! The wait for a layer, or for rows of a matrix, from a disk that may hang: a network file system whose server is gone, a disk behind a loose
//! cable. Its reads neither end nor fail, so the wait has an end of its own.
//!
//! Only silence counts: time in which a read is under way and no byte of any file comes. A slow disk is waited for as
//! long as it brings something.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use crate::error::ModelError;

/// Silence that is said.
const SAID: Duration = Duration::from_secs(10);

/// Silence that ends the wait. It outlasts a restart of a file server and the tries of drivers, most of which give up
/// after some minutes.
const LONGEST: Duration = Duration::from_secs(300);

/// The variable that says it otherwise, in seconds: some file systems are meant to wait for a server for hours.
const VARIABLE: &str = "FINETUNE_DISK_TIMEOUT";

/// A layer, or rows of a matrix, that is waited for while its disk brings nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskWait {
    /// What is waited for, such as `layer 7`.
    pub what: String,
    /// The files that are being read.
    pub files: BTreeSet<PathBuf>,
    /// How long no byte has come.
    pub silence: Duration,
    /// After how much of it the wait ends with an error.
    pub longest: Duration,
}

impl DiskWait {
    fn names(&self) -> String {
        let names: Vec<String> = self.files.iter().map(|file| file.display().to_string()).collect();
        names.join(" and ")
    }
}

impl fmt::Display for DiskWait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, silence, longest, .. } = self;
        write!(
            f,
            "has waited {} s for {what} from {}: no byte of it comes; after {} s this is an error",
            silence.as_secs(),
            self.names(),
            longest.as_secs()
        )
    }
}

type Told = Box<dyn Fn(&DiskWait) + Send + Sync>;

/// Who is told. One for the process, as panics have: a wait is the business of whoever started it, and not of the
/// code between.
static TOLD: OnceLock<Told> = OnceLock::new();

/// From now on `told` hears of whatever is waited for while its disk brings nothing for 10 s. The first call
/// counts.
pub fn tell_of_disk_waits(told: impl Fn(&DiskWait) + Send + Sync + 'static) {
    // A second listener changes nothing.
    let _ = TOLD.set(Box::new(told));
}

/// What the files say of their reads.
#[derive(Clone, Debug, Default)]
pub(crate) struct DiskProgress {
    /// Bytes that have come so far.
    pub(crate) bytes: u64,
    /// The files that are being read.
    pub(crate) files: BTreeSet<PathBuf>,
}

/// How long is waited for a disk that brings nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    said: Duration,
    longest: Duration,
    /// Between two looks.
    look: Duration,
}

impl Patience {
    /// As the user wants it.
    ///
    /// # Errors
    /// If `FINETUNE_DISK_TIMEOUT` is no number of seconds.
    pub(super) fn of_environment() -> Result<Patience, ModelError> {
        let longest = match std::env::var_os(VARIABLE) {
            None => LONGEST,
            Some(text) => seconds(&text.to_string_lossy()).map_err(|what| ModelError::Layers { what })?,
        };
        Ok(Patience { said: SAID, longest, look: Duration::from_secs(1) })
    }

    /// For a process that ends and wants nothing more of what it reads.
    pub(super) fn at_the_end(self) -> Patience {
        Patience { longest: self.longest.min(SAID), ..self }
    }

    /// What comes over the channel. `what` it is, for people; `reading`: what the files say; `tell` hears once of a
    /// silence that is worth a line.
    ///
    /// # Errors
    /// [`ModelError::DiskHangs`], or [`ModelError::Layers`] if whoever reads has ended.
    pub(super) fn receive<T>(
        self,
        read: &Receiver<T>,
        what: &str,
        reading: &dyn Fn() -> DiskProgress,
        tell: &dyn Fn(&DiskWait),
    ) -> Result<T, ModelError> {
        let (mut bytes, mut silence, mut is_said) = (reading().bytes, Duration::ZERO, false);
        loop {
            match read.recv_timeout(self.look) {
                Ok(read) => return Ok(read),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(ModelError::Layers { what: format!("the thread that reads {what} has ended") });
                }
            }
            let now = reading();
            if now.bytes != bytes || now.files.is_empty() {
                (bytes, silence) = (now.bytes, Duration::ZERO);
                continue;
            }
            // Looks are counted, and not the clock: a process that was stopped meanwhile has not looked.
            silence += self.look;
            let wait = DiskWait { what: what.to_owned(), files: now.files, silence, longest: self.longest };
            if silence >= self.longest {
                let files = wait.names();
                return Err(ModelError::DiskHangs { what: wait.what, files, seconds: silence.as_secs() });
            }
            if silence >= self.said && !is_said {
                is_said = true;
                tell(&wait);
            }
        }
    }
}

/// Tells whoever asked for it.
pub(super) fn tell(wait: &DiskWait) {
    if let Some(told) = TOLD.get() {
        told(wait);
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.trim().parse::<u64>().ok().filter(|&seconds| seconds > 0);
    let wrong = || format!("{VARIABLE} = {text:?} is no number of seconds, such as 300");
    seconds.map(Duration::from_secs).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    const PATIENCE: Patience = Patience {
        said: Duration::from_millis(40),
        longest: Duration::from_millis(200),
        look: Duration::from_millis(10),
    };

    /// Waits for something that comes after so many looks; what files say at each look. Returns how it ended, and
    /// the lines that were said.
    fn wait(comes_after: u32, says: impl Fn(u64) -> DiskProgress) -> (Result<u32, ModelError>, Vec<String>) {
        let (done, read) = channel();
        let (looks, lines) = (RefCell::new(0), RefCell::new(Vec::new()));
        let reading = || {
            *looks.borrow_mut() += 1;
            if *looks.borrow() == u64::from(comes_after) {
                done.send(comes_after).expect("it is waited for");
            }
            says(*looks.borrow())
        };
        let outcome = PATIENCE.receive(&read, "layer 7", &reading, &|wait| lines.borrow_mut().push(wait.to_string()));
        (outcome, lines.into_inner())
    }

    fn of_file(bytes: u64) -> DiskProgress {
        DiskProgress { bytes, files: BTreeSet::from([PathBuf::from("base/model.safetensors")]) }
    }

    #[test]
    fn a_disk_that_hangs_is_said_once_and_ends_the_wait_by_name() {
        let (outcome, lines) = wait(u32::MAX, |_| of_file(5));
        let error = outcome.expect_err("nothing comes");
        assert!(matches!(&error, ModelError::DiskHangs { what, .. } if what == "layer 7"), "{error}");
        assert!(error.to_string().contains("base/model.safetensors"), "{error}");
        assert_eq!(
            lines,
            ["has waited 0 s for layer 7 from base/model.safetensors: no byte of it comes; after 0 s this is an error"]
        );
    }

    #[test]
    fn a_slow_disk_that_brings_something_is_waited_for() {
        // A byte at each third look: far longer than a silence may take, and never silent for long.
        let (outcome, lines) = wait(60, |look| of_file(look / 3));
        assert_eq!((outcome.expect("it comes"), lines), (60, Vec::new()));
    }

    #[test]
    fn what_is_computed_of_a_layer_is_no_silence_of_the_disk() {
        let (outcome, lines) = wait(60, |_| DiskProgress { bytes: 5, ..DiskProgress::default() });
        assert_eq!((outcome.expect("it comes"), lines), (60, Vec::new()));
    }

    #[test]
    fn a_disk_that_goes_on_after_a_line_is_waited_for() {
        let (outcome, lines) = wait(30, |look| of_file(look / 8));
        assert_eq!((outcome.expect("it comes"), lines.len()), (30, 1));
    }

    #[test]
    fn a_thread_that_has_ended_is_an_error_at_once() {
        let (done, read) = channel::<u32>();
        thread::spawn(|| drop(done)).join().expect("no panic");
        let outcome = PATIENCE.receive(&read, "layer 7", &|| of_file(5), &|_| panic!("nothing is said"));
        assert!(matches!(outcome, Err(ModelError::Layers { .. })));
    }

    /// (the variable, its seconds)
    #[test]
    fn seconds_are_whole_and_more_than_none() {
        for (text, want) in [("300", Some(300)), (" 7 ", Some(7)), ("0", None), ("-1", None), ("5m", None), ("", None)]
        {
            let found = seconds(text);
            assert_eq!(found.clone().ok(), want.map(Duration::from_secs), "{text:?}");
            assert!(found.err().is_none_or(|what| what.contains("FINETUNE_DISK_TIMEOUT")), "{text:?}");
        }
    }
}
