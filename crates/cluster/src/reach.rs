//! Asks several machines at once, and waits for none of them too long.

use std::io::Read;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::workers::Remote;

/// A machine that has not answered by then is taken for unreachable.
const PATIENCE: Duration = Duration::from_secs(30);

/// Most of an answer that is read.
const LONGEST_ANSWER: u64 = 1 << 20;

/// Runs the program with `words` on every machine. What each printed, or why it did not answer.
pub fn all(remotes: &[&Remote], words: impl Fn(&Remote) -> Vec<String> + Sync) -> Vec<Result<String, String>> {
    std::thread::scope(|scope| {
        let ask = |remote: &Remote| ask(remote, &words(remote));
        let asking: Vec<_> = remotes.iter().map(|remote| scope.spawn(move || ask(remote))).collect();
        asking
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err("it could not be asked".to_owned())))
            .collect()
    })
}

fn ask(remote: &Remote, words: &[String]) -> Result<String, String> {
    let mut command = remote.ssh(&remote.command(words, &[]));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| format!("ssh cannot be started: {error}"))?;
    let read = |stream: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut text = String::new();
            // What is not text is no answer of ours.
            let _ = stream.map(|stream| stream.take(LONGEST_ANSWER).read_to_string(&mut text));
            text
        })
    };
    let stdout = read(child.stdout.take().map(|stream| Box::new(stream) as _));
    let stderr = read(child.stderr.take().map(|stream| Box::new(stream) as _));
    let ended = wait(&mut child);
    let text = |thread: std::thread::JoinHandle<String>| thread.join().unwrap_or_default();
    match ended {
        Some(0) => Ok(text(stdout)),
        Some(127) => Err("there is no such program".to_owned()),
        Some(code) => {
            let why = text(stderr);
            let why = why.trim();
            Err(if why.is_empty() { format!("it answered with exit code {code}") } else { why.replace('\n', "\n    ") })
        }
        None => Err(format!("no answer within {} s", PATIENCE.as_secs())),
    }
}

/// The exit code; none if it had to be ended.
fn wait(child: &mut Child) -> Option<i32> {
    let began = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status.code().unwrap_or(255)),
            Ok(None) if began.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(10)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
        }
    }
}
