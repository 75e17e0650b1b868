//! Asks our program on several hosts at once. A host that says something from time to time is
//! waited for.

use std::sync::atomic::AtomicI32;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::lines::Lines;
use crate::session::{Next, Session, ended};
use crate::ssh::Remote;
use crate::unanswered::Unanswered;

/// A program that is silent for so long counts as dead. A program that works says so every few
/// seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// Number of lines of an answer that are kept: the last ones.
const MOST_LINES: usize = 1000;

/// What a program printed, and when.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// When it was told to begin, in seconds since 1970 by this host's clock.
    pub asked: f64,
    /// Its lines, each with the time at which it came.
    pub lines: Vec<(f64, String)>,
}

/// Runs the program with `words` on every host. Its standard input is the line `question`, and
/// stays open until the answer is there. A signal number in `stop` ends all.
///
/// # Errors
/// Per host, if it gives no answer.
pub fn all(
    remotes: &[&Remote],
    words: impl Fn(&Remote) -> Vec<String> + Sync,
    question: &str,
    stop: &AtomicI32,
) -> Vec<Result<Answer, Unanswered>> {
    std::thread::scope(|scope| {
        let ask = |remote: &Remote| ask(remote, &words(remote), question, stop);
        let asking: Vec<_> = remotes.iter().map(|remote| scope.spawn(move || ask(remote))).collect();
        let answer = |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join().expect("asking does not panic");
        asking.into_iter().map(answer).collect()
    })
}

fn ask(remote: &Remote, words: &[String], question: &str, stop: &AtomicI32) -> Result<Answer, Unanswered> {
    let mut session = Session::open(remote, &remote.script(words, &[]), stop)?;
    session.say(&format!("{question}\n"));
    let mut answer = Answer { asked: seconds(session.began), lines: Vec::new() };
    let mut lines = Lines::default();
    loop {
        let next = session.next(stop, PATIENCE, &|| 0)?;
        let now = seconds(SystemTime::now());
        let mut keep = |line| answer.lines.push((now, line));
        match next {
            Next::Output(bytes) => lines.push(&bytes, &mut keep),
            Next::Ended(code) => {
                lines.finish(&mut keep);
                return match code {
                    0 => Ok(answer),
                    127 => Err(Unanswered::NoProgram { program: remote.program.clone() }),
                    code => Err(ended(code, session.words())),
                };
            }
        }
        let excess = answer.lines.len().saturating_sub(MOST_LINES);
        answer.lines.drain(..excess);
    }
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
