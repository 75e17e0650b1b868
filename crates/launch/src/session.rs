//! A command at another host, from the login to its end.
//!
//! A login file may print, wait, read standard input or become another shell before the command
//! runs. So nothing is sent until the command has said that it is there, in a line with a random
//! mark. What came before that line is the login's output. No login file, other shell or terminal
//! is ever sent a secret.
//!
//! A login file that has become another shell takes its input as commands. So a command that is
//! silent for a few seconds is sent again as a line of input. A command that has begun by then
//! ignores the line.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant, SystemTime};

use finetune_allreduce::new_token;
use rustix::process::{Pid, Signal};

use crate::restart::SSH_FAILED;
use crate::shell;
use crate::ssh::Remote;
use crate::unanswered::Unanswered;

#[cfg(test)]
mod tests;

/// Longest time of a login. Shared disks and login files with large environments take 10 s and
/// more.
pub(crate) const LOGIN: Duration = Duration::from_secs(40);
/// After this the command is sent as input too.
pub(crate) const AGAIN: Duration = Duration::from_secs(3);
/// After this a second connection tries whether the login is slow, or waits for input.
const PROBE: Duration = Duration::from_secs(8);
/// If a login that began later is done so much earlier, the first one waits for input.
const OVERTAKEN: Duration = Duration::from_secs(1);
/// After a process ended, its output is there at once. A connection that ssh keeps open for other
/// processes may hold the pipe longer.
const DRAIN: Duration = Duration::from_millis(300);
const LOOK: Duration = Duration::from_millis(20);
const PIECE: usize = 64 << 10;
const MOST_COMPLAINTS: usize = 64 << 10;
/// Bytes of a greeting that are kept, to show what a login has said.
const MOST_GREETING: usize = 8 << 10;

/// Exit code of a command that was not told to begin: what it is sent does not reach it.
const NOT_TOLD: i32 = 96;

/// Runs before every command: it says that it is there, and waits until it is told to begin. `$1`
/// is the mark.
const OPENING: &str = r#"if [ -t 0 ]; then printf '\n%s terminal\n' "$1"; exit 96; fi
printf '\n%s ready %s\n' "$1" "$$"
while IFS= read -r line; do
    case $line in "$1 begin") break ;; esac
    line=
done
[ "$line" = "$1 begin" ] || exit 96
unset line
"#;

/// A random word.
pub(crate) fn new_mark() -> Result<String, Unanswered> {
    let token = new_token().map_err(|error| Unanswered::Random(error.to_string()))?;
    Ok(format!("finetune-{token}"))
}

/// The line that starts `script` at a host, after the opening.
pub(crate) fn line(mark: &str, script: &str) -> String {
    shell::line(mark, &format!("{OPENING}{script}\n"))
}

/// The line that tells an opened command to begin.
pub(crate) fn begin(mark: &str) -> String {
    format!("{mark} begin\n")
}

/// What a command says of itself when it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    Ready { process: u32 },
    Terminal,
}

/// Looks for the line of the opening in the output of a login.
pub(crate) struct Greeting {
    mark: String,
    /// The last bytes that came.
    pub(crate) heard: Vec<u8>,
}

impl Greeting {
    pub(crate) fn new(mark: &str) -> Greeting {
        Greeting { mark: mark.to_owned(), heard: Vec::new() }
    }

    /// Takes the next bytes. Once the line is there: what it says, and the bytes after it.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Option<(Opened, Vec<u8>)> {
        self.heard.extend_from_slice(bytes);
        let mut from = 0;
        while let Some(start) = find(&self.heard[from..], self.mark.as_bytes()).map(|start| from + start) {
            let rest = &self.heard[start + self.mark.len()..];
            // The rest of the line is still on its way.
            let end = rest.iter().position(|&byte| byte == b'\n')?;
            if let Some(opened) = opened(&rest[..end]) {
                return Some((opened, rest[end + 1..].to_vec()));
            }
            from = start + self.mark.len();
        }
        // The rest may hold the first part of a mark.
        let excess = self.heard.len().saturating_sub(MOST_GREETING);
        self.heard.drain(..excess);
        None
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.heard).into_owned()
    }
}

fn opened(rest: &[u8]) -> Option<Opened> {
    let words = std::str::from_utf8(rest).ok()?;
    match words.split_whitespace().collect::<Vec<_>>()[..] {
        ["ready", process] => Some(Opened::Ready { process: process.parse().ok()? }),
        ["terminal"] => Some(Opened::Terminal),
        _ => None,
    }
}

fn find(text: &[u8], word: &[u8]) -> Option<usize> {
    text.windows(word.len()).position(|window| window == word)
}

enum Heard {
    Output(Vec<u8>),
    Complaint(Vec<u8>),
}

/// What an open session does next.
#[derive(Debug)]
pub(crate) enum Next {
    Output(Vec<u8>),
    /// It has ended, with this exit code.
    Ended(i32),
}

/// A command that runs at a host. Dropping it ends its ssh, and with it the command.
pub(crate) struct Session {
    child: Child,
    /// The caller that feeds the command takes it. The command ends when it is closed.
    pub(crate) stdin: Option<ChildStdin>,
    heard: Receiver<Heard>,
    complaints: Vec<u8>,
    first: Option<Vec<u8>>,
    /// When it was told to begin.
    pub(crate) began: SystemTime,
}

impl Session {
    /// Starts `script` at a host, and returns once it was told to begin. A signal number in `stop`
    /// ends the attempt.
    ///
    /// # Errors
    /// If the login fails, takes too long, reads the input or has a terminal.
    pub(crate) fn open(remote: &Remote, script: &str, stop: &AtomicI32) -> Result<Session, Unanswered> {
        Session::open_by(&|line| remote.ssh(line), script, stop)
    }

    /// The same with another program than ssh: `login` makes the process that runs a line.
    pub(crate) fn open_by(
        login: &dyn Fn(&str) -> Command,
        script: &str,
        stop: &AtomicI32,
    ) -> Result<Session, Unanswered> {
        let mark = new_mark()?;
        let line = line(&mark, script);
        let mut session = Session::start(&mut login(&line))?;
        let (start, mut greeting, mut again) = (Instant::now(), Greeting::new(&mark), false);
        let (mut probe, mut through): (Option<Result<Probe, Unanswered>>, Option<Instant>) = (None, None);
        loop {
            match session.listen(stop)? {
                None => {}
                Some(Next::Output(bytes)) => match greeting.push(&bytes) {
                    None => {}
                    Some((Opened::Terminal, _)) => return Err(Unanswered::Terminal),
                    Some((Opened::Ready { .. }, rest)) => {
                        session.first = Some(rest);
                        session.began = SystemTime::now();
                        session.say(&begin(&mark));
                        return Ok(session);
                    }
                },
                Some(Next::Ended(code)) => {
                    let mut words = session.words();
                    if words.trim().is_empty() {
                        words = greeting.text();
                    }
                    return Err(match code {
                        SSH_FAILED => Unanswered::Ssh { words },
                        code => Unanswered::Login { code, words },
                    });
                }
            }
            if start.elapsed() > AGAIN && !again {
                again = true;
                session.say(&format!("exec {line}\n"));
            }
            if start.elapsed() > PROBE {
                let probe = probe.get_or_insert_with(|| Probe::start(login));
                if through.is_none() && probe.as_ref().is_ok_and(Probe::is_through) {
                    through = Some(Instant::now());
                }
            }
            if through.is_some_and(|through| through.elapsed() > OVERTAKEN) {
                return Err(Unanswered::ReadsInput);
            }
            if start.elapsed() > LOGIN {
                return Err(Unanswered::Silent { seconds: LOGIN.as_secs(), words: session.words() });
            }
        }
    }

    fn start(command: &mut Command) -> Result<Session, Unanswered> {
        // A group of its own: its children end with it, or they would hold the pipes.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(Unanswered::Start)?;
        let (sender, heard) = sync_channel(16);
        let complaints = sender.clone();
        pass_on(child.stdout.take().expect("asked for"), sender, Heard::Output);
        pass_on(child.stderr.take().expect("asked for"), complaints, Heard::Complaint);
        let stdin = child.stdin.take();
        Ok(Session { child, stdin, heard, complaints: Vec::new(), first: None, began: SystemTime::now() })
    }

    /// Sends lines. An error is ignored: the end of the command is noticed elsewhere.
    pub(crate) fn say(&mut self, text: &str) {
        if let Some(stdin) = &mut self.stdin {
            let _ = stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush());
        }
    }

    /// Waits for what comes next. The command may be silent for `patience`, or for longer while
    /// `progress` changes.
    pub(crate) fn next(
        &mut self,
        stop: &AtomicI32,
        patience: Duration,
        progress: &dyn Fn() -> u64,
    ) -> Result<Next, Unanswered> {
        if let Some(first) = self.first.take().filter(|first| !first.is_empty()) {
            return Ok(Next::Output(first));
        }
        let (mut since, mut before) = (Instant::now(), progress());
        loop {
            if let Some(next) = self.listen(stop)? {
                return Ok(next);
            }
            let now = progress();
            if now != before {
                (since, before) = (Instant::now(), now);
            }
            if since.elapsed() > patience {
                return Err(Unanswered::Silent { seconds: patience.as_secs(), words: self.words() });
            }
        }
    }

    /// Looks once; `None` if there is nothing new.
    pub(crate) fn listen(&mut self, stop: &AtomicI32) -> Result<Option<Next>, Unanswered> {
        if stop.load(Ordering::SeqCst) != 0 {
            return Err(Unanswered::Stopped);
        }
        match self.heard.recv_timeout(LOOK) {
            Ok(Heard::Output(bytes)) => return Ok(Some(Next::Output(bytes))),
            Ok(Heard::Complaint(bytes)) => {
                let room = MOST_COMPLAINTS.saturating_sub(self.complaints.len()).min(bytes.len());
                self.complaints.extend_from_slice(&bytes[..room]);
                return Ok(None);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(LOOK),
        }
        let Some(status) = self.child.try_wait().map_err(Unanswered::Start)? else { return Ok(None) };
        // It may have written something after the last look.
        let patience = Instant::now() + DRAIN;
        while let Some(left) = patience.checked_duration_since(Instant::now()) {
            match self.heard.recv_timeout(left) {
                Ok(Heard::Output(bytes)) => return Ok(Some(Next::Output(bytes))),
                Ok(Heard::Complaint(bytes)) => {
                    let room = MOST_COMPLAINTS.saturating_sub(self.complaints.len()).min(bytes.len());
                    self.complaints.extend_from_slice(&bytes[..room]);
                }
                Err(_) => break,
            }
        }
        Ok(Some(Next::Ended(status.code().unwrap_or(SSH_FAILED))))
    }

    /// Its standard error so far.
    pub(crate) fn words(&self) -> String {
        String::from_utf8_lossy(&self.complaints).into_owned()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stdin = None;
        end_group(&mut self.child);
    }
}

/// The error of a command that ended with `code` without an answer.
pub(crate) fn ended(code: i32, words: String) -> Unanswered {
    match code {
        // Every other code is the remote shell's or the program's.
        SSH_FAILED => Unanswered::Ssh { words },
        NOT_TOLD => Unanswered::ReadsInput,
        code => Unanswered::Failed { code, words },
    }
}

/// Ends a child process together with its group.
pub(crate) fn end_group(child: &mut Child) {
    if matches!(child.try_wait(), Ok(None)) {
        let _ = rustix::process::kill_process_group(Pid::from_child(child), Signal::KILL);
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn pass_on(mut pipe: impl Read + Send + 'static, to: SyncSender<Heard>, kind: fn(Vec<u8>) -> Heard) {
    std::thread::spawn(move || {
        let mut bytes = vec![0; PIECE];
        while let Ok(count @ 1..) = pipe.read(&mut bytes) {
            if to.send(kind(bytes[..count].to_vec())).is_err() {
                return;
            }
        }
    });
}

/// A second connection, whose input ends at once. If its command gets through and the first one
/// does not, the login reads the input.
struct Probe {
    child: Child,
    through: Receiver<()>,
}

impl Probe {
    fn start(login: &dyn Fn(&str) -> Command) -> Result<Probe, Unanswered> {
        let mark = new_mark()?;
        let line = line(&mark, "");
        let mut command = login(&line);
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(Unanswered::Start)?;
        if let Some(mut stdin) = child.stdin.take() {
            let _ = writeln!(stdin, "exec {line}");
        }
        let (sender, through) = sync_channel(1);
        let mut stdout = child.stdout.take().expect("asked for");
        std::thread::spawn(move || {
            let (mut greeting, mut bytes) = (Greeting::new(&mark), [0; 1 << 10]);
            while let Ok(count @ 1..) = stdout.read(&mut bytes) {
                if greeting.push(&bytes[..count]).is_some() {
                    let _ = sender.send(());
                    return;
                }
            }
        });
        Ok(Probe { child, through })
    }

    fn is_through(&self) -> bool {
        self.through.try_recv().is_ok()
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        end_group(&mut self.child);
    }
}
