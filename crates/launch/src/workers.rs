//! One process per rank, here or on other hosts. It lives no longer than the process that started
//! it.
//!
//! A worker reads one line of JSON from its standard input, which says which rank it is. Nothing
//! secret stands in its arguments or its environment, where others could read it. On another host
//! the line is sent once the command has said that it is there (`session.rs`). The input stays open
//! for orders (`orders.rs`). When it ends, the launcher is gone, and the worker ends too.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde::Serialize;
use thiserror::Error;

use crate::end::{Fate, end};
use crate::restart::{PEER_LOST, SSH_FAILED};
use crate::session::{self, AGAIN, LOGIN, end_group, new_mark};
use crate::ssh::{Remote, WorkerHost};

mod listening;

use listening::{Ear, Line, Opening, locked};

/// How long the others may take to notice by themselves that a worker has failed.
const GRACE: Duration = Duration::from_secs(8);

/// The same once a worker has ended because it lost another: all others have heard of it by then.
const GRACE_OF_THE_LOST: Duration = Duration::from_secs(3);

/// The same after an order to stop, if there is nothing to save.
const GRACE_OF_THE_IDLE: Duration = Duration::from_secs(3);

/// How long the first rank may take to save for all: a large model on a slow disk.
const GRACE_OF_THE_SAVING: Duration = Duration::from_secs(900);

/// Between two messages about a worker that is waited for.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// Exit code of a worker that lost another one.
const LOST_ANOTHER: i32 = PEER_LOST as i32;

/// Between two looks at the workers while none of them says anything.
const LOOK: Duration = Duration::from_millis(50);

/// After the last worker ended, its output is there at once. A process that it left behind may hold
/// the pipe longer.
const DRAIN: Duration = Duration::from_secs(2);

/// Events that wait to be handled. A worker that says more waits.
const MOST_EVENTS: usize = 256;

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

/// What a worker does.
#[derive(Debug)]
pub enum Event {
    /// A line of its standard output. Bytes that are no UTF-8 are replaced, lines of more than 64
    /// KiB are cut.
    Line(String),
    /// A line of its standard error, likewise.
    ErrorLine(String),
    /// It has closed its standard output.
    Closed,
    /// It still runs so long after it was told to stop.
    StillRunning(Duration),
}

/// How a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerExit {
    /// 0 to 255, or 128 + the signal that ended it.
    pub code: i32,
    /// Time since the start of all workers.
    pub after: Duration,
    /// It did not end by itself after others had, and was killed.
    pub forced: bool,
    /// The number of its process on its host, if it was killed and may still be there.
    pub left: Option<u32>,
}

/// The command that all workers run.
#[derive(Clone, Debug, Default)]
pub struct WorkerCommand {
    /// First arguments of the program.
    pub arguments: Vec<String>,
    /// The arguments after them, unless a [`Remote`] has its own.
    pub words: Vec<String>,
    /// Variables to set.
    pub environment: Vec<(String, String)>,
}

struct Worker {
    child: Child,
    line: Arc<Mutex<Line>>,
    remote: Option<Remote>,
    mark: String,
    /// What is sent to a login that has become another shell.
    command: String,
    sent_again: bool,
    exit: Option<WorkerExit>,
}

/// Running workers. Dropping it ends them.
pub struct Workers {
    workers: Vec<Worker>,
    events: Receiver<(usize, Event)>,
    began: Instant,
}

impl Workers {
    /// Starts one worker per host, in rank order. Each gets its element of `assignments` as its
    /// first line.
    ///
    /// # Errors
    /// If a process cannot be started. Those that were started already are ended.
    pub fn start<T: Serialize>(
        hosts: &[WorkerHost],
        command: &WorkerCommand,
        assignments: &[T],
    ) -> Result<Workers, WorkerError> {
        let here = std::env::current_exe().map_err(WorkerError::Program)?;
        let (sender, events) = sync_channel(MOST_EVENTS);
        let mut workers = Workers { workers: Vec::new(), events, began: Instant::now() };
        let WorkerCommand { arguments, words, environment } = command;
        for (rank, (host, assignment)) in hosts.iter().zip(assignments).enumerate() {
            let mark = new_mark().map_err(|error| WorkerError::Mark(error.to_string()))?;
            let (mut command, line, remote) = match host {
                WorkerHost::Local => {
                    let mut command = Command::new(&here);
                    let variables = environment.iter().map(|(name, value)| (name, value));
                    command.args(arguments).args(words).envs(variables);
                    (command, String::new(), None)
                }
                WorkerHost::Ssh(remote) => {
                    let words = remote.words.as_ref().unwrap_or(words);
                    let script = remote.script(&[arguments.as_slice(), words].concat(), environment);
                    let line = session::line(&mark, &script);
                    (remote.ssh(&line), line, Some(remote.clone()))
                }
            };
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            // A Ctrl-C in the terminal reaches the launcher alone, which tells the workers, also
            // those on other hosts.
            command.process_group(0);
            let spawned = command.spawn();
            let start = |error| WorkerError::Start { rank, command: format!("{command:?}"), error };
            let mut child = spawned.map_err(start)?;
            let opening = remote.is_some().then(Opening::default);
            let way = Arc::new(Mutex::new(Line { stdin: child.stdin.take(), opening }));
            let assignment = serde_json::to_string(assignment).expect("assignments are plain data") + "\n";
            if remote.is_none() {
                // A worker that has ended already says why on its standard error, and by its exit
                // code.
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
                exit: None,
            });
        }
        Ok(workers)
    }

    /// Hands every event to `hear` until all workers have ended. After one has failed, the others
    /// get a while to notice, and then are killed. A signal number in `stop` is passed on as an
    /// order to finish. While `working` is false there is nothing to save, and workers that are
    /// slow to follow the order are killed. Later that holds for all but the first one, which
    /// saves.
    pub fn finish(
        mut self,
        stop: &AtomicI32,
        working: &AtomicBool,
        hear: &mut dyn FnMut(usize, Event),
    ) -> Vec<WorkerExit> {
        let mut talking = self.workers.len();
        let (mut failed_since, mut told, mut ended_since): (Option<Instant>, Option<Instant>, Option<Instant>) =
            (None, None, None);
        let (mut asked, mut ended_all) = (Instant::now(), None);
        while talking > 0 || self.workers.iter().any(|worker| worker.exit.is_none()) {
            match self.events.recv_timeout(LOOK) {
                Ok((rank, event)) => {
                    talking -= usize::from(matches!(event, Event::Closed));
                    hear(rank, event);
                }
                Err(RecvTimeoutError::Timeout) => {}
                // All workers have closed their outputs.
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(LOOK),
            }
            self.look(hear);
            let signal = stop.load(Ordering::SeqCst);
            if signal != 0 && told.is_none() {
                (told, asked) = (Some(Instant::now()), Instant::now());
                self.stop(signal);
            }
            // A rank that stopped as it was told has not failed, and the others may still be
            // saving.
            let exits = || self.workers.iter().filter_map(|worker| worker.exit);
            if failed_since.is_none() && exits().any(|exit| exit.code != 0 && exit.code != 128 + signal) {
                failed_since = Some(Instant::now());
            }
            if told.is_some() && ended_since.is_none() && exits().next().is_some() {
                ended_since = Some(Instant::now());
            }
            let lost = exits().any(|exit| exit.code == LOST_ANOTHER);
            let past = |since: Option<Instant>, grace| since.is_some_and(|since| since.elapsed() > grace);
            let idle = !working.load(Ordering::SeqCst);
            // A rank that waits for others to join does not learn that one has failed.
            let all = past(failed_since, if lost || idle { GRACE_OF_THE_LOST } else { GRACE })
                || (idle && past(told, GRACE_OF_THE_IDLE))
                || past(ended_since, GRACE_OF_THE_SAVING);
            let others = past(ended_since, GRACE);
            if all || others {
                // A worker without anything to save was stopped, as it was told: nothing is lost by its end.
                let stopped = idle && signal != 0;
                self.force(if all { 0 } else { 1 }, if stopped { signal } else { Signal::KILL.as_raw() });
            }
            if told.is_some() && asked.elapsed() > TELL_EVERY {
                asked = Instant::now();
                for (rank, _) in self.workers.iter().enumerate().filter(|(_, worker)| worker.exit.is_none()) {
                    hear(rank, Event::StillRunning(told.map_or(Duration::ZERO, |told| told.elapsed())));
                }
            }
            if self.workers.iter().all(|worker| worker.exit.is_some()) {
                let since = *ended_all.get_or_insert_with(Instant::now);
                if since.elapsed() > DRAIN {
                    break;
                }
            }
        }
        self.workers.iter().filter_map(|worker| worker.exit).collect()
    }

    /// Notes which workers have ended, and ends those that do not begin.
    fn look(&mut self, hear: &mut dyn FnMut(usize, Event)) {
        let after = self.began.elapsed();
        for (rank, worker) in self.workers.iter_mut().enumerate().filter(|(_, worker)| worker.exit.is_none()) {
            let mut line = locked(&worker.line);
            if let Ok(Some(status)) = worker.child.try_wait() {
                let mut code = code(status);
                if !line.has_begun() {
                    let greeting = line.opening.as_ref().map_or("", |opening| opening.greeting.trim());
                    greeting.lines().for_each(|text| hear(rank, Event::ErrorLine(text.to_owned())));
                    code = if code == 0 { SSH_FAILED } else { code };
                }
                worker.exit = Some(WorkerExit { code, after, forced: false, left: None });
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
                hear(rank, Event::ErrorLine(why));
                line.stdin = None;
                end_group(&mut worker.child);
                worker.exit = Some(WorkerExit { code: SSH_FAILED, after, forced: false, left: None });
            }
        }
    }

    /// Tells all workers to finish what they do. A worker that has not begun is ended.
    fn stop(&mut self, signal: i32) {
        let after = self.began.elapsed();
        for worker in self.workers.iter_mut().filter(|worker| worker.exit.is_none()) {
            let mut line = locked(&worker.line);
            if line.has_begun() {
                line.say(&format!("stop {signal}\n"));
                // A stopped process does not read the order, and a rank without peers is not missed
                // by others. So the process is continued. The number of a process that has ended
                // may be another process's by now.
                if matches!(worker.child.try_wait(), Ok(None)) {
                    let _ = rustix::process::kill_process(Pid::from_child(&worker.child), Signal::CONT);
                }
                continue;
            }
            line.stdin = None;
            end_group(&mut worker.child);
            worker.exit = Some(WorkerExit { code: 128 + signal, after, forced: false, left: None });
        }
    }

    /// Kills the workers that still run, from rank `from` on: also stopped ones, and on other
    /// hosts. They count as ended by `signal`.
    fn force(&mut self, from: usize, signal: i32) {
        let after = self.began.elapsed();
        std::thread::scope(|scope| {
            for worker in self.workers.iter_mut().skip(from).filter(|worker| worker.exit.is_none()) {
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
                    let code = 128 + signal;
                    worker.exit = Some(WorkerExit { code, after, forced: true, left });
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
        for worker in self.workers.iter_mut().filter(|worker| worker.exit.is_none()) {
            end_group(&mut worker.child);
        }
    }
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
