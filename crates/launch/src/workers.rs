//! One process per rank, here or on other hosts, that lives no longer than the one that started it.
//!
//! A worker gets what it needs to know as one line of JSON on its standard input: nothing secret stands in its arguments or
//! its environment, where others could read it. On another host it gets the line once its command has said that it is there
//! (`session.rs`). The input stays open for orders; when it ends, whoever started the worker is gone, and the worker ends too.

use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::end::{Fate, end};
use crate::session::{self, AGAIN, LOGIN, end_group, new_mark};
use crate::shell::{path_word, quoted};

mod listening;
#[cfg(test)]
mod tests;

use listening::{Ear, Line, Opening, locked};

/// After one worker failed, the others are given so long to notice by themselves.
const GRACE: Duration = Duration::from_secs(8);

/// The same once a worker has said that it lost another: all that still can have heard of it then.
const GRACE_OF_THE_LOST: Duration = Duration::from_secs(3);

/// The same after an order to stop, where there is nothing to save.
const GRACE_OF_THE_IDLE: Duration = Duration::from_secs(3);

/// The first rank saves for all: it is given the time to write a large model to a slow disk.
const GRACE_OF_THE_SAVING: Duration = Duration::from_secs(900);

/// Between two words about who is waited for.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// The exit code that says so.
const LOST_ANOTHER: i32 = 3;

/// ssh's own: also of a worker that has ended before it began.
const NOT_REACHED: i32 = 255;

/// Between two looks at the workers while nobody says anything.
const LOOK: Duration = Duration::from_millis(50);

/// After the last worker ended, what it wrote is there at once; what it left behind may hold the pipe.
const DRAIN: Duration = Duration::from_secs(2);

/// Longest line that a worker reads.
const LONGEST_LINE: u64 = 1 << 20;

/// Words on their way; who says more waits until some are heard.
const MOST_WORDS: usize = 256;

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
    /// What ssh is told; a name that begins with a dash is refused by [`finetune_rendezvous::Hostfile`].
    pub host: String,
    /// The program over there.
    pub program: PathBuf,
    /// The folder that it starts in; the home directory if none.
    pub directory: Option<PathBuf>,
    /// A configuration file for ssh, instead of the user's.
    pub config: Option<PathBuf>,
    /// Words of its own, instead of those of [`Call::words`]: where the program is a copy.
    pub words: Option<Vec<String>>,
}

/// Whatever the user's configuration says: no questions, no terminal, which would echo what it is sent; no command and no ports
/// that are meant for people; no connection that stays and holds our pipes.
pub(crate) const SSH: [&str; 15] = [
    "-T",
    "-o",
    "RequestTTY=no",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=10",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ControlMaster=no",
    "-o",
    "ClearAllForwardings=yes",
    "-o",
    "RemoteCommand=none",
];

impl Remote {
    /// `ssh`, told to run `command` over there; it never asks anybody anything.
    pub fn ssh(&self, command: &str) -> Command {
        let mut ssh = Command::new("ssh");
        if let Some(config) = &self.config {
            ssh.arg("-F").arg(config);
        }
        ssh.args(SSH).arg("--").arg(&self.host).arg(command);
        ssh
    }

    /// What the POSIX shell over there is to run.
    pub(crate) fn script(&self, arguments: &[String], environment: &[(String, String)]) -> String {
        // What is made beside a copy is the user's alone, as the copy is.
        let mut script = if self.words.is_some() { "umask 077\n".to_owned() } else { String::new() };
        if let Some(directory) = &self.directory {
            if directory.is_relative() {
                // Below the home directory, wherever login files have gone.
                script += "cd || exit 2\n";
            }
            // Another folder of that name must not be found elsewhere, nor named on standard output.
            script += &format!("CDPATH= cd -- {} >/dev/null || exit 2\n", path_word(directory));
        }
        for (name, value) in environment {
            script += &format!("export {}\n", quoted(&format!("{name}={value}")));
        }
        let words: Vec<String> =
            [path_word(&self.program)].into_iter().chain(arguments.iter().map(|word| quoted(word))).collect();
        // A shell that waits for the program says which signal ended it; one that became it would not.
        script + &words.join(" ") + "\nexit $?"
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
    /// There is no random word for a command.
    #[error("{0}")]
    Mark(String),
}

/// Something a worker said, or its end.
#[derive(Debug)]
pub enum Word {
    /// A line of its standard output. Bytes that are no UTF-8 are replaced, lines of more than 64 KiB cut.
    Line(String),
    /// A line of its standard error, likewise.
    Complaint(String),
    /// It has closed its standard output.
    Silent,
    /// It is still there so long after it was told to stop; the others wait.
    Waited(Duration),
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
    /// It was ended and may still be there: the number of its process on its host, 0 if that is not known.
    pub left: Option<u32>,
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

struct Worker {
    child: Child,
    line: Arc<Mutex<Line>>,
    remote: Option<Remote>,
    mark: String,
    /// What a login that has become another shell is sent.
    command: String,
    sent_again: bool,
    ending: Option<Ending>,
}

/// Running workers. Dropping it ends them.
pub struct Workers {
    workers: Vec<Worker>,
    words: Receiver<(usize, Word)>,
    began: Instant,
}

impl Workers {
    /// Starts one worker per place, in rank order; each gets its line of `assignments`.
    pub fn start<T: Serialize>(places: &[Place], call: &Call, assignments: &[T]) -> Result<Workers, WorkerError> {
        let here = std::env::current_exe().map_err(WorkerError::Program)?;
        let (sender, words) = sync_channel(MOST_WORDS);
        let mut workers = Workers { workers: Vec::new(), words, began: Instant::now() };
        for (rank, (place, assignment)) in places.iter().zip(assignments).enumerate() {
            let mark = new_mark().map_err(|error| WorkerError::Mark(error.to_string()))?;
            let (mut command, line, remote) = match place {
                Place::Here => {
                    let mut command = Command::new(&here);
                    command
                        .args(&call.arguments)
                        .args(&call.words)
                        .envs(call.environment.iter().map(|(name, value)| (name, value)));
                    (command, String::new(), None)
                }
                Place::Ssh(remote) => {
                    let words = remote.words.as_ref().unwrap_or(&call.words);
                    let script = remote.script(&[call.arguments.as_slice(), words].concat(), &call.environment);
                    let line = session::line(&mark, &script);
                    (remote.ssh(&line), line, Some(remote.clone()))
                }
            };
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            // A Ctrl-C in the terminal is for us: we tell the workers, also those on other machines.
            command.process_group(0);
            let spawned = command.spawn();
            let start = |error| WorkerError::Start { rank, command: format!("{command:?}"), error };
            let mut child = spawned.map_err(start)?;
            let opening = remote.is_some().then(Opening::default);
            let way = Arc::new(Mutex::new(Line { stdin: child.stdin.take(), opening }));
            let assignment = serde_json::to_string(assignment).expect("assignments are plain data") + "\n";
            if remote.is_none() {
                // A worker that is gone already says why on its standard error, and by its exit code.
                locked(&way).say(&assignment);
            }
            let ear = Ear { rank, to: sender.clone(), line: Arc::clone(&way), mark: mark.clone(), assignment };
            ear.listen(child.stdout.take().expect("asked for"), child.stderr.take().expect("asked for"));
            workers.workers.push(Worker {
                child,
                line: way,
                remote,
                mark,
                command: line,
                sent_again: false,
                ending: None,
            });
        }
        Ok(workers)
    }

    /// Hands every word to `hear` until all workers have ended. When one fails, the others get a while to notice, and then
    /// are ended. A signal number in `stop` is passed on as an order to finish: workers that have nothing to save, as long as
    /// `working` is false, are ended if they are slow to follow it; later the others are, but not the first one, which saves.
    pub fn finish(mut self, stop: &AtomicI32, working: &AtomicBool, hear: &mut dyn FnMut(usize, Word)) -> Vec<Ending> {
        let mut talking = self.workers.len();
        let (mut failed_since, mut told, mut ended_since): (Option<Instant>, Option<Instant>, Option<Instant>) =
            (None, None, None);
        let (mut asked, mut ended_all) = (Instant::now(), None);
        while talking > 0 || self.workers.iter().any(|worker| worker.ending.is_none()) {
            match self.words.recv_timeout(LOOK) {
                Ok((rank, word)) => {
                    talking -= usize::from(matches!(word, Word::Silent));
                    hear(rank, word);
                }
                Err(RecvTimeoutError::Timeout) => {}
                // Everybody is silent.
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(LOOK),
            }
            self.look(hear);
            let signal = stop.load(Ordering::SeqCst);
            if signal != 0 && told.is_none() {
                (told, asked) = (Some(Instant::now()), Instant::now());
                self.stop(signal);
            }
            // A rank that stopped as it was told has not failed, and the others may still be saving.
            let endings = || self.workers.iter().filter_map(|worker| worker.ending);
            if failed_since.is_none() && endings().any(|ending| ending.code != 0 && ending.code != 128 + signal) {
                failed_since = Some(Instant::now());
            }
            if told.is_some() && ended_since.is_none() && endings().next().is_some() {
                ended_since = Some(Instant::now());
            }
            let lost = endings().any(|ending| ending.code == LOST_ANOTHER);
            let past = |since: Option<Instant>, grace| since.is_some_and(|since| since.elapsed() > grace);
            let idle = !working.load(Ordering::SeqCst);
            // Whoever waits for others to join hears nothing of one that has failed.
            let all = past(failed_since, if lost || idle { GRACE_OF_THE_LOST } else { GRACE })
                || (idle && past(told, GRACE_OF_THE_IDLE))
                || past(ended_since, GRACE_OF_THE_SAVING);
            let others = past(ended_since, GRACE);
            if all || others {
                self.force(if all { 0 } else { 1 });
            }
            if told.is_some() && asked.elapsed() > TELL_EVERY {
                asked = Instant::now();
                for (rank, _) in self.workers.iter().enumerate().filter(|(_, worker)| worker.ending.is_none()) {
                    hear(rank, Word::Waited(told.map_or(Duration::ZERO, |told| told.elapsed())));
                }
            }
            if self.workers.iter().all(|worker| worker.ending.is_some()) {
                let since = *ended_all.get_or_insert_with(Instant::now);
                if since.elapsed() > DRAIN {
                    break;
                }
            }
        }
        self.workers.iter().filter_map(|worker| worker.ending).collect()
    }

    /// Takes note of those that have ended, and of those that do not begin.
    fn look(&mut self, hear: &mut dyn FnMut(usize, Word)) {
        let after = self.began.elapsed();
        for (rank, worker) in self.workers.iter_mut().enumerate().filter(|(_, worker)| worker.ending.is_none()) {
            let mut line = locked(&worker.line);
            if let Ok(Some(status)) = worker.child.try_wait() {
                let mut code = code(status);
                if !line.has_begun() {
                    let greeting = line.opening.as_ref().map_or("", |opening| opening.greeting.trim());
                    greeting.lines().for_each(|text| hear(rank, Word::Complaint(text.to_owned())));
                    code = if code == 0 { NOT_REACHED } else { code };
                }
                worker.ending = Some(Ending { code, after, forced: false, left: None });
                continue;
            }
            if line.has_begun() {
                continue;
            }
            if after > AGAIN && !worker.sent_again {
                worker.sent_again = true;
                line.say(&format!("exec {}\n", worker.command));
            }
            let terminal = line.opening.as_ref().is_some_and(|opening| opening.terminal);
            if terminal || after > LOGIN {
                let why = if terminal {
                    "it gives programs a terminal, which would show the secret of the run: take RequestTTY and -t out of what starts ssh".to_owned()
                } else {
                    format!(
                        "nothing was heard for {} s: does a login file there read its input, or wait for something?",
                        LOGIN.as_secs()
                    )
                };
                hear(rank, Word::Complaint(why));
                line.stdin = None;
                end_group(&mut worker.child);
                worker.ending = Some(Ending { code: NOT_REACHED, after, forced: false, left: None });
            }
        }
    }

    /// Tells all to finish what they do. One that has not begun has nothing to finish.
    fn stop(&mut self, signal: i32) {
        let after = self.began.elapsed();
        for worker in self.workers.iter_mut().filter(|worker| worker.ending.is_none()) {
            let mut line = locked(&worker.line);
            if line.has_begun() {
                line.say(&format!("stop {signal}\n"));
                // A frozen rank hears no order: where it has no peers to miss it, nobody else would end it.
                // The number of one that has ended may be another process's by now.
                if matches!(worker.child.try_wait(), Ok(None)) {
                    let _ = rustix::process::kill_process(Pid::from_child(&worker.child), Signal::CONT);
                }
                continue;
            }
            line.stdin = None;
            end_group(&mut worker.child);
            worker.ending = Some(Ending { code: 128 + signal, after, forced: false, left: None });
        }
    }

    /// Ends those that are still there, from this rank on: also where they are stopped, and on other hosts.
    fn force(&mut self, from: usize) {
        let after = self.began.elapsed();
        std::thread::scope(|scope| {
            for worker in self.workers.iter_mut().skip(from).filter(|worker| worker.ending.is_none()) {
                scope.spawn(move || {
                    let process = {
                        let mut line = locked(&worker.line);
                        line.say("end\n");
                        line.stdin = None;
                        line.opening.as_ref().and_then(|opening| opening.process)
                    };
                    end_group(&mut worker.child);
                    let left = match (&worker.remote, process) {
                        (None, _) => None,
                        (Some(remote), Some(process)) => match end(remote, &worker.mark, process) {
                            Fate::Ended => None,
                            Fate::Unknown => Some(process),
                        },
                        (Some(_), None) => None,
                    };
                    let code = 128 + Signal::KILL.as_raw();
                    worker.ending = Some(Ending { code, after, forced: true, left });
                });
            }
        });
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            locked(&worker.line).stdin = None;
        }
        for worker in self.workers.iter_mut().filter(|worker| worker.ending.is_none()) {
            end_group(&mut worker.child);
        }
    }
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
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
