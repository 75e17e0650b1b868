//! One process per rank, here or on other hosts, that lives no longer than the one that started it.
//!
//! A worker gets what it needs to know as one line of JSON on its standard input: nothing secret stands in its arguments or
//! its environment, where others could read it. The input stays open; when it ends, whoever started the worker is gone, and
//! the worker ends too. What it has to say it writes as lines of JSON to its standard output.

use std::io::{self, BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// After one worker failed, the others are given so long to notice by themselves.
const GRACE: Duration = Duration::from_secs(8);

/// Longest line that a worker reads or writes.
const LONGEST_LINE: u64 = 1 << 20;

/// Where a worker runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// On this machine.
    Here,
    /// On another one, over the system's ssh.
    Ssh {
        /// What ssh is told; a name that begins with a dash is refused by [`crate::Hostfile`].
        host: String,
        /// The program over there.
        program: PathBuf,
    },
}

/// Workers that could not be started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The system refused to start one.
    #[error("rank {rank} cannot be started ({command}): {error}")]
    Start {
        /// The rank.
        rank: usize,
        /// What was to be run.
        command: String,
        /// The system's words.
        error: io::Error,
    },
    /// This program's own path is unknown.
    #[error("the path of this program cannot be found out: {0}")]
    Program(io::Error),
}

/// Something a worker said, or its end.
#[derive(Debug)]
pub enum Word {
    /// A line of its standard output.
    Line(String),
    /// A line of its standard error.
    Complaint(String),
    /// It has closed its standard output.
    Silent,
}

/// Running workers. Dropping it ends them.
pub struct Workers {
    children: Vec<Child>,
    /// Kept open: their end is the workers' end.
    _life_lines: Vec<ChildStdin>,
    words: Receiver<(usize, Word)>,
    talking: usize,
}

impl Workers {
    /// Starts one worker per place, in rank order, with `arguments`; each gets its line of `assignments`.
    pub fn start<T: Serialize>(
        places: &[Place],
        arguments: &[&str],
        assignments: &[T],
    ) -> Result<Workers, WorkerError> {
        let program = std::env::current_exe().map_err(WorkerError::Program)?;
        let (sender, words) = channel();
        let mut workers = Workers { children: Vec::new(), _life_lines: Vec::new(), words, talking: 0 };
        for (rank, (place, assignment)) in places.iter().zip(assignments).enumerate() {
            let mut command = match place {
                Place::Here => Command::new(&program),
                Place::Ssh { host, program } => {
                    let mut command = Command::new("ssh");
                    command.args(["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5"]);
                    command.arg("--").arg(host).arg(quoted(&program.to_string_lossy()));
                    command
                }
            };
            command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let spawned = command.spawn();
            let start = |error| WorkerError::Start { rank, command: format!("{command:?}"), error };
            let mut child = spawned.map_err(start)?;
            let mut stdin = child.stdin.take().expect("asked for");
            listen(&sender, rank, child.stdout.take().expect("asked for"), child.stderr.take().expect("asked for"));
            workers.children.push(child);
            workers.talking += 1;
            let line = serde_json::to_string(assignment).expect("assignments are plain data");
            // A worker that is gone already says why on its standard error, and by its exit code.
            let _ = writeln!(stdin, "{line}").and_then(|()| stdin.flush());
            workers._life_lines.push(stdin);
        }
        Ok(workers)
    }

    /// Hands every word to `hear` until all workers are silent, then gives their exit codes: 0 to 255, or 128 + the signal.
    /// When one fails, the others get a while to notice, and then a signal.
    pub fn finish(mut self, hear: &mut dyn FnMut(usize, Word)) -> Vec<i32> {
        let mut failed_since: Option<Instant> = None;
        while self.talking > 0 {
            match self.words.recv_timeout(Duration::from_millis(100)) {
                Ok((rank, word)) => {
                    if matches!(word, Word::Silent) {
                        self.talking -= 1;
                    }
                    hear(rank, word);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let failed = |child: &mut Child| matches!(child.try_wait(), Ok(Some(status)) if !status.success());
            if failed_since.is_none() && self.children.iter_mut().any(failed) {
                failed_since = Some(Instant::now());
            }
            if failed_since.is_some_and(|since| since.elapsed() > GRACE) {
                for child in &mut self.children {
                    let _ = child.kill();
                }
            }
        }
        self._life_lines.clear();
        self.children.iter_mut().map(|child| child.wait().map_or(1, code)).collect()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for child in &mut self.children {
            if matches!(child.try_wait(), Ok(None)) {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// For the shell that ssh runs over there.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

fn listen(
    sender: &Sender<(usize, Word)>,
    rank: usize,
    stdout: impl io::Read + Send + 'static,
    stderr: impl io::Read + Send + 'static,
) {
    let complaints = sender.clone();
    let complaining = std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            let _ = complaints.send((rank, Word::Complaint(line)));
        }
    });
    let sender = sender.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let _ = sender.send((rank, Word::Line(line)));
        }
        let _ = complaining.join();
        let _ = sender.send((rank, Word::Silent));
    });
}

/// The worker's side: reads the assignment, and from then on ends this process when the input does.
pub fn assignment<T: DeserializeOwned>(gone: impl FnOnce() + Send + 'static) -> Result<T, String> {
    use std::io::Read;
    let mut line = String::new();
    let mut stdin = BufReader::new(io::stdin().take(LONGEST_LINE));
    stdin.read_line(&mut line).map_err(|error| format!("no assignment on standard input: {error}"))?;
    let assignment = serde_json::from_str(&line).map_err(|error| format!("not an assignment: {error}"))?;
    std::thread::spawn(move || {
        let mut rest = io::stdin();
        let mut bytes = [0; 256];
        while rest.read(&mut bytes).is_ok_and(|read| read > 0) {}
        gone();
    });
    Ok(assignment)
}
