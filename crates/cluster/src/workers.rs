//! One process per rank, here or on other hosts, that lives no longer than the one that started it.
//!
//! A worker gets what it needs to know as one line of JSON on its standard input: nothing secret stands in its arguments or
//! its environment, where others could read it. The input stays open for orders; when it ends, whoever started the worker is
//! gone, and the worker ends too.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// After one worker failed, the others are given so long to notice by themselves.
const GRACE: Duration = Duration::from_secs(8);

/// The same once a worker has said that it lost another: all that still can have heard of it then.
const GRACE_OF_THE_LOST: Duration = Duration::from_secs(3);

/// The exit code that says so.
const LOST_ANOTHER: i32 = 3;

/// Between two looks at the workers while nobody says anything.
const LOOK: Duration = Duration::from_millis(50);

/// Longest line that a worker reads or writes.
const LONGEST_LINE: u64 = 1 << 20;

/// Where a worker runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// On this machine.
    Here,
    /// On another one, over the system's ssh.
    Ssh(Remote),
}

/// How a worker is started on another machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remote {
    /// What ssh is told; a name that begins with a dash is refused by [`crate::Hostfile`].
    pub host: String,
    /// The program over there.
    pub program: PathBuf,
    /// The folder that it starts in; the home directory if none.
    pub directory: Option<PathBuf>,
    /// A configuration file for ssh, instead of the user's.
    pub config: Option<PathBuf>,
    /// Words of its own, instead of those of [`Call::words`].
    pub words: Option<Vec<String>>,
}

impl Remote {
    /// `ssh`, told to run `command` over there; it never asks anybody anything.
    pub fn ssh(&self, command: &str) -> Command {
        let mut ssh = Command::new("ssh");
        if let Some(config) = &self.config {
            ssh.arg("-F").arg(config);
        }
        ssh.args(["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5"]);
        ssh.arg("--").arg(&self.host).arg(command);
        ssh
    }

    /// What the shell over there is to run.
    pub(crate) fn command(&self, arguments: &[String], environment: &[(String, String)]) -> String {
        let mut words: Vec<String> = Vec::new();
        if let Some(directory) = &self.directory {
            words.extend(["cd".into(), quoted(&directory.to_string_lossy()), "&&".into()]);
        }
        if !environment.is_empty() {
            words.push("env".into());
            words.extend(environment.iter().map(|(name, value)| quoted(&format!("{name}={value}"))));
        }
        words.push(quoted(&self.program.to_string_lossy()));
        words.extend(arguments.iter().map(|argument| quoted(argument)));
        // A shell that waits for the program says which signal ended it; one that became it would not.
        words.join(" ") + "; exit $?"
    }
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

/// How a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// 0 to 255, or 128 + the signal that ended it.
    pub code: i32,
    /// How long after the start.
    pub after: Duration,
    /// It did not end by itself when others had, and was ended.
    pub forced: bool,
}

/// What all workers are started with.
#[derive(Clone, Debug, Default)]
pub struct Call {
    /// First arguments of the program.
    pub arguments: Vec<String>,
    /// Those after them, except where a [`Remote`] has its own.
    pub words: Vec<String>,
    /// Variables to set.
    pub environment: Vec<(String, String)>,
}

/// Running workers. Dropping it ends them.
pub struct Workers {
    children: Vec<Child>,
    /// Kept open: their end is the workers' end.
    life_lines: Vec<ChildStdin>,
    words: Receiver<(usize, Word)>,
    began: Instant,
}

impl Workers {
    /// Starts one worker per place, in rank order; each gets its line of `assignments`.
    pub fn start<T: Serialize>(places: &[Place], call: &Call, assignments: &[T]) -> Result<Workers, WorkerError> {
        let here = std::env::current_exe().map_err(WorkerError::Program)?;
        let (sender, words) = channel();
        let mut workers = Workers { children: Vec::new(), life_lines: Vec::new(), words, began: Instant::now() };
        for (rank, (place, assignment)) in places.iter().zip(assignments).enumerate() {
            let mut command = match place {
                Place::Here => {
                    let mut command = Command::new(&here);
                    command
                        .args(&call.arguments)
                        .args(&call.words)
                        .envs(call.environment.iter().map(|(name, value)| (name, value)));
                    command
                }
                Place::Ssh(remote) => {
                    let words = remote.words.as_ref().unwrap_or(&call.words);
                    remote.ssh(&remote.command(&[call.arguments.as_slice(), words].concat(), &call.environment))
                }
            };
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            // A Ctrl-C in the terminal is for us: we tell the workers, also those on other machines.
            command.process_group(0);
            let spawned = command.spawn();
            let start = |error| WorkerError::Start { rank, command: format!("{command:?}"), error };
            let mut child = spawned.map_err(start)?;
            let mut stdin = child.stdin.take().expect("asked for");
            listen(&sender, rank, child.stdout.take().expect("asked for"), child.stderr.take().expect("asked for"));
            workers.children.push(child);
            let line = serde_json::to_string(assignment).expect("assignments are plain data");
            // A worker that is gone already says why on its standard error, and by its exit code.
            let _ = writeln!(stdin, "{line}").and_then(|()| stdin.flush());
            workers.life_lines.push(stdin);
        }
        Ok(workers)
    }

    /// Hands every word to `hear` until all workers have ended. When one fails, the others get a while to notice, and then
    /// are ended. A signal number in `stop` is passed on as an order to finish.
    pub fn finish(mut self, stop: &AtomicI32, hear: &mut dyn FnMut(usize, Word)) -> Vec<Ending> {
        let mut endings: Vec<Option<Ending>> = vec![None; self.children.len()];
        let mut talking = self.children.len();
        let (mut failed_since, mut told, mut killed): (Option<Instant>, _, _) = (None, false, false);
        while talking > 0 || endings.contains(&None) {
            match self.words.recv_timeout(LOOK) {
                Ok((rank, word)) => {
                    talking -= usize::from(matches!(word, Word::Silent));
                    hear(rank, word);
                }
                Err(RecvTimeoutError::Timeout) => {}
                // Everybody is silent.
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(LOOK),
            }
            for (child, ending) in self.children.iter_mut().zip(&mut endings).filter(|(_, ending)| ending.is_none()) {
                if let Ok(Some(status)) = child.try_wait() {
                    *ending = Some(Ending { code: code(status), after: self.began.elapsed(), forced: killed });
                }
            }
            let signal = stop.load(Ordering::SeqCst);
            if signal != 0 && !told {
                told = true;
                self.order(Order::Stop(signal));
                self.wake();
            }
            // A rank that stopped as it was told has not failed, and the others may still be saving.
            let failed =
                |ending: &Option<Ending>| ending.is_some_and(|ending| ending.code != 0 && ending.code != 128 + signal);
            if failed_since.is_none() && endings.iter().any(failed) {
                failed_since = Some(Instant::now());
            }
            let lost = endings.iter().any(|ending| ending.is_some_and(|ending| ending.code == LOST_ANOTHER));
            let grace = if lost { GRACE_OF_THE_LOST } else { GRACE };
            if failed_since.is_some_and(|since| since.elapsed() > grace) && !killed {
                killed = true;
                self.order(Order::Gone);
                self.children.iter_mut().zip(&endings).filter(|(_, ending)| ending.is_none()).for_each(|(child, _)| {
                    let _ = child.kill();
                });
            }
        }
        endings.into_iter().flatten().collect()
    }

    /// A frozen rank hears no order: where it has no peers to miss it, nobody else would end it.
    fn wake(&mut self) {
        for child in &mut self.children {
            // The number of one that has ended may be another process's by now.
            if matches!(child.try_wait(), Ok(None)) {
                let _ = rustix::process::kill_process(Pid::from_child(child), Signal::CONT);
            }
        }
    }

    fn order(&mut self, order: Order) {
        for stdin in &mut self.life_lines {
            // Whoever does not hear it has ended.
            let _ = match order {
                Order::Stop(signal) => writeln!(stdin, "stop {signal}"),
                Order::Gone => writeln!(stdin, "end"),
            };
            let _ = stdin.flush();
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.life_lines.clear();
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
pub(crate) fn quoted(text: &str) -> String {
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

/// What a worker is told after its assignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// To finish what it does, as after this signal.
    Stop(i32),
    /// Whoever started it is gone or wants it to end.
    Gone,
}

/// The worker's side: reads the assignment. Orders that come later go to `hear`, the last of them [`Order::Gone`].
pub fn assignment<T: DeserializeOwned>(mut hear: impl FnMut(Order) + Send + 'static) -> Result<T, String> {
    let mut line = String::new();
    let mut stdin = BufReader::new(io::stdin());
    let mut first = (&mut stdin).take(LONGEST_LINE);
    first.read_line(&mut line).map_err(|error| format!("no assignment on standard input: {error}"))?;
    let assignment = serde_json::from_str(&line).map_err(|error| format!("not an assignment: {error}"))?;
    std::thread::spawn(move || {
        let mut line = String::new();
        while stdin.by_ref().take(LONGEST_LINE).read_line(&mut line).is_ok_and(|read| read > 0) {
            match line.trim().split_once(' ') {
                Some(("stop", signal)) => signal.parse().into_iter().for_each(|signal| hear(Order::Stop(signal))),
                _ => break,
            }
            line.clear();
        }
        hear(Order::Gone);
    });
    Ok(assignment)
}
