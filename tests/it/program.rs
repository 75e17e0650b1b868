//! `finetune` as a process. It is started with arguments, has a deadline, and its output is kept.

use std::fs::File;
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_finetune");

/// Few processes of these tests work longer than a second or two. The rest is for a machine that is
/// busy with other work.
pub(crate) const DEADLINE: Duration = Duration::from_secs(300);

/// A port of this machine where nobody listens. The system gives higher ones to whoever asks for any, so none of those
/// takes it before it is used.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let own = (std::process::id() % 100) as u16 * 100;
    loop {
        let port = 10_000 + own + NEXT.fetch_add(1, Ordering::Relaxed) % 100;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// How a process ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// `None`: killed by a signal.
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// The process must have ended with this exit code.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Ended {
        assert_eq!(
            self.code,
            Some(code),
            "signal {:?}\n--- stderr\n{}\n--- stdout\n{}",
            self.signal,
            self.stderr,
            self.stdout
        );
        self
    }

    /// stderr must contain this text.
    #[track_caller]
    pub(crate) fn says(self, text: &str) -> Ended {
        assert!(self.stderr.contains(text), "stderr lacks {text:?}:\n{}", self.stderr);
        self
    }

    /// stdout as one JSON object.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {:?}", self.stdout))
    }
}

/// A running process. It is killed when this is dropped.
pub(crate) struct Running {
    child: Child,
    stdout: NamedTempFile,
    stderr: NamedTempFile,
}

/// A command line of `finetune`.
pub(crate) fn finetune<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(BINARY);
    command.args(arguments).env_remove("FINETUNE_FAILPOINT").env_remove("COLUMNS").env("NO_COLOR", "1");
    // No test asks the hub of everybody.
    command.env("HF_HUB_OFFLINE", "1");
    command
}

/// Starts a command with stdout and stderr in files, so that no full pipe can hold it up.
pub(crate) fn start(command: &mut Command) -> Running {
    let stdout = NamedTempFile::new().expect("a temporary file");
    let stderr = NamedTempFile::new().expect("a temporary file");
    let handle = |file: &NamedTempFile| -> File { file.reopen().expect("a second handle") };
    let child = command
        .stdin(Stdio::null())
        .stdout(handle(&stdout))
        .stderr(handle(&stderr))
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    Running { child, stdout, stderr }
}

/// Starts a command and waits for its end.
pub(crate) fn run(command: &mut Command) -> Ended {
    start(command).wait()
}

impl Running {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends TERM, INT or KILL to this process.
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([format!("-{name}"), self.pid().to_string()]).status();
        assert!(status.expect("the kill command").success(), "kill -{name} {}", self.pid());
    }

    /// What it has written to stderr so far.
    pub(crate) fn stderr(&self) -> String {
        read(self.stderr.path())
    }

    /// What it has written to stdout so far.
    pub(crate) fn stdout(&self) -> String {
        read(self.stdout.path())
    }

    /// Waits until `condition` holds of the running process.
    #[track_caller]
    pub(crate) fn wait_until(&mut self, what: &str, mut condition: impl FnMut(&Running) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            if let Some(status) = self.child.try_wait().expect("a child of ours") {
                // It may have come between the two looks.
                assert!(condition(self), "{status} before {what}:\n{}", self.stderr());
                return;
            }
            assert!(start.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}\n{}", self.stderr());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for the end, at most for `time`. False if the process is still running then.
    pub(crate) fn ends_within(&mut self, time: Duration) -> bool {
        let start = Instant::now();
        while self.child.try_wait().expect("a child of ours").is_none() {
            if start.elapsed() >= time {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Waits for the end.
    #[track_caller]
    pub(crate) fn wait(mut self) -> Ended {
        if !self.ends_within(DEADLINE) {
            panic!("still running after {DEADLINE:?}:\n{}", self.stderr());
        }
        let status = self.child.wait().expect("a child of ours");
        Ended {
            code: status.code(),
            signal: status.signal(),
            stdout: read(self.stdout.path()),
            stderr: read(self.stderr.path()),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).expect("an output file")).into_owned()
}
