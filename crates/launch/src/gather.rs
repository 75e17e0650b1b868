//! Runs one script or one command at a host, in one ssh round trip, with a deadline.
//!
//! The error of a host that does not answer has ssh's own words. The answer of a host that stops in
//! the middle counts as far as it came.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use finetune_advice::Advice;
use finetune_allreduce::new_token;
use finetune_rendezvous::{is_this_host, name_fault};

use crate::complaint::{hint, one_line};
use crate::restart::SSH_FAILED;
use crate::session::end_group;
use crate::shell;
use crate::ssh::Remote;
use crate::transcript::{MAX_ANSWER_BYTES, Transcript};

#[cfg(test)]
mod tests;

/// More hosts than any cluster of Macs has: each takes a thread and an ssh.
pub const MAX_HOSTS_ASKED: usize = 256;
const MAX_COMPLAINT_BYTES: usize = 64 << 10;
/// After a process ended, its output is there at once. A connection that ssh keeps open for other
/// processes may hold the pipe longer.
const DRAIN: Duration = Duration::from_millis(300);
const NAP: Duration = Duration::from_millis(10);

/// Why nothing is known of a host.
#[derive(Debug, thiserror::Error)]
pub enum GatherError {
    /// The name of a host would be taken for something else.
    #[error("{host:?} {what} and cannot be the name of a host")]
    Name {
        /// The name.
        host: String,
        /// Why, as "is empty".
        what: &'static str,
    },
    /// ssh or a shell cannot be started here.
    #[error("{host}: {program} cannot be started: {source}")]
    Start {
        /// The host.
        host: String,
        /// What cannot be started.
        program: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// ssh itself failed.
    #[error("{host} is not reachable: {words}")]
    Unreachable {
        /// The host.
        host: String,
        /// ssh's own words, on one line.
        words: String,
    },
    /// Nothing of the answer has come in time.
    #[error("{host} did not answer within {} s: {words}", after.as_secs())]
    Deadline {
        /// The host.
        host: String,
        /// How long it was given.
        after: Duration,
        /// What ssh or the host has said, on one line.
        words: String,
    },
    /// Something answered, but not the script.
    #[error("{host} answered with something else than facts: {words}")]
    Answer {
        /// The host.
        host: String,
        /// What has come, on one line.
        words: String,
    },
    /// More hosts than [`MAX_HOSTS_ASKED`].
    #[error("{hosts} hosts are too many to ask at once, the limit is {MAX_HOSTS_ASKED}")]
    TooMany {
        /// Their number.
        hosts: usize,
    },
    /// There are no random numbers for the mark of an answer.
    #[error("the system's random generator failed: {0}")]
    Random(String),
}

impl GatherError {
    /// The host that it is about; none if it is about all of them.
    pub fn host(&self) -> Option<&str> {
        match self {
            Self::Name { host, .. }
            | Self::Start { host, .. }
            | Self::Unreachable { host, .. }
            | Self::Deadline { host, .. }
            | Self::Answer { host, .. } => Some(host),
            Self::TooMany { .. } | Self::Random(_) => None,
        }
    }
}

impl Advice for GatherError {
    fn hints(&self) -> Vec<String> {
        let hint = match self {
            Self::Name { .. } => {
                "a name that `ssh NAME` takes, without options; options belong in ~/.ssh/config".into()
            }
            Self::Start { program, .. } => format!("is {program} installed?"),
            Self::Unreachable { host, words } | Self::Deadline { host, words, .. } if hint(host, words).is_some() => {
                hint(host, words).map(|(_, hint)| hint).unwrap_or_default()
            }
            Self::Unreachable { host, .. } | Self::Deadline { host, .. } => {
                format!("is it awake and on the network? `ssh -o BatchMode=yes {host} true` must succeed")
            }
            Self::Answer { host, .. } => {
                format!("`ssh {host} sh -c true` must print nothing more than a greeting, and needs a POSIX sh there")
            }
            Self::TooMany { .. } => "name fewer".into(),
            Self::Random(_) => return Vec::new(),
        };
        vec![hint]
    }
}

/// Runs a script that frames what it says with the mark that `script` gets. Also returns when the
/// answer began to come, in seconds since 1970.
///
/// # Errors
/// If the host cannot be reached, or nothing of the answer has come before the deadline.
pub fn ask(host: &str, script: &dyn Fn(&str) -> String, deadline: Duration) -> Result<(Transcript, f64), GatherError> {
    let mark = format!("finetune-{}", new_token().map_err(|error| GatherError::Random(error.to_string()))?);
    let words = |bytes: &[u8]| one_line(&String::from_utf8_lossy(bytes));
    let ran = run(host, &mark, &script(&mark), deadline)?;
    let transcript = Transcript::parse(&ran.output, &mark);
    let host = host.to_owned();
    match ran.status {
        // What came before the deadline counts.
        _ if !transcript.is_empty() => Ok((transcript, ran.first_output)),
        None => Err(GatherError::Deadline { host, after: deadline, words: words(&ran.complaints) }),
        // Other codes are the remote shell's.
        Some(status) if status.code() == Some(SSH_FAILED) => {
            Err(GatherError::Unreachable { host, words: words(&ran.complaints) })
        }
        Some(_) => {
            let said = if ran.complaints.is_empty() { &ran.output } else { &ran.complaints };
            Err(GatherError::Answer { host, words: words(said) })
        }
    }
}

/// What a command of the set-up did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Whether its exit code was 0.
    pub succeeded: bool,
    /// Standard output and standard error, each cut after 64 KiB, as one text.
    pub words: String,
}

/// Runs one shell command at a host, without ssh if it is this one.
///
/// # Errors
/// If the host cannot be reached or the command does not end in time. One that fails is an
/// [`Output`].
pub fn run_command(host: &str, command: &str, deadline: Duration) -> Result<Output, GatherError> {
    let ran = run(host, "finetune", command, deadline)?;
    let mut said = ran.output;
    said.truncate(MAX_COMPLAINT_BYTES);
    said.extend_from_slice(&ran.complaints);
    let words = String::from_utf8_lossy(&said).trim().to_owned();
    let Some(status) = ran.status else {
        return Err(GatherError::Deadline { host: host.to_owned(), after: deadline, words: one_line(&words) });
    };
    if status.code() == Some(SSH_FAILED) && !is_this_host(host) {
        return Err(GatherError::Unreachable { host: host.to_owned(), words: one_line(&words) });
    }
    Ok(Output { succeeded: status.success(), words })
}

pub(crate) struct Ran {
    /// `None`: it was ended at the deadline.
    pub(crate) status: Option<ExitStatus>,
    pub(crate) output: Vec<u8>,
    pub(crate) complaints: Vec<u8>,
    /// When its first output came, in seconds since 1970 by this machine's clock; the end of the
    /// wait if none came.
    first_output: f64,
}

/// What a pipe has given so far.
#[derive(Default)]
struct Heard {
    bytes: Vec<u8>,
    first: Option<SystemTime>,
    ended: bool,
}

/// Runs a script at a host.
fn run(host: &str, mark: &str, script: &str, deadline: Duration) -> Result<Ran, GatherError> {
    if let Some(what) = name_fault(host) {
        return Err(GatherError::Name { host: host.to_owned(), what });
    }
    let (mut command, program, input) = if is_this_host(host) {
        let mut shell = Command::new("sh");
        shell.args(["-c", script, "finetune", mark]);
        (shell, "sh", None)
    } else {
        let line = shell::line(mark, script);
        // A login file that has become another shell takes it as input.
        let input = format!("exec {line}\n");
        (Remote { host: host.to_owned(), ..Remote::default() }.ssh(&line), "ssh", Some(input))
    };
    capture(&mut command, input.as_deref(), deadline).map_err(|source| GatherError::Start {
        host: host.to_owned(),
        program,
        source,
    })
}

/// Runs a command to its end or the deadline, and keeps what it says.
pub(crate) fn capture(command: &mut Command, input: Option<&str>, deadline: Duration) -> io::Result<Ran> {
    // A group of its own: at the deadline its children end with it, or they would hold the pipes.
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let (output, complaints) = (Arc::new(Mutex::new(Heard::default())), Arc::new(Mutex::new(Heard::default())));
    listen(child.stdout.take().expect("asked for"), &output, MAX_ANSWER_BYTES);
    listen(child.stderr.take().expect("asked for"), &complaints, MAX_COMPLAINT_BYTES);
    let mut stdin = child.stdin.take().expect("asked for");
    let input = input.unwrap_or_default().to_owned();
    // In a thread: a host that reads nothing must not hold us. Its failure shows in what the child
    // says.
    thread::spawn(move || {
        let _ = stdin.write_all(input.as_bytes());
    });
    let status = wait(&mut child, deadline)?;
    let patience = Instant::now() + DRAIN;
    while Instant::now() < patience && !(locked(&output).ended && locked(&complaints).ended) {
        thread::sleep(NAP);
    }
    let (mut output, mut complaints) = (locked(&output), locked(&complaints));
    let first = output.first.unwrap_or_else(SystemTime::now);
    Ok(Ran {
        status,
        output: std::mem::take(&mut output.bytes),
        complaints: std::mem::take(&mut complaints.bytes),
        first_output: first.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()),
    })
}

/// Its exit status, or `None` if it had to be ended.
fn wait(child: &mut Child, deadline: Duration) -> io::Result<Option<ExitStatus>> {
    let until = Instant::now() + deadline;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= until {
            end_group(child);
            return Ok(None);
        }
        thread::sleep(NAP);
    }
}

/// Reads a pipe to its end and keeps the first `most` bytes.
fn listen(mut pipe: impl Read + Send + 'static, heard: &Arc<Mutex<Heard>>, most: usize) {
    let heard = Arc::clone(heard);
    thread::spawn(move || {
        let mut bytes = [0; 16 << 10];
        while let Ok(count @ 1..) = pipe.read(&mut bytes) {
            let mut heard = locked(&heard);
            heard.first.get_or_insert_with(SystemTime::now);
            let room = most - heard.bytes.len();
            heard.bytes.extend_from_slice(&bytes[..count.min(room)]);
        }
        locked(&heard).ended = true;
    });
}

fn locked(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}
