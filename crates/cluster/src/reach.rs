//! Asks our program on several machines at once, and waits for none of them too long.

use std::time::Duration;

use crate::gather::capture;
use crate::workers::Remote;

/// A machine that has not answered by then is taken for unreachable.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs the program with `words` on every machine. What each printed, or why it did not answer.
pub fn all(remotes: &[&Remote], words: impl Fn(&Remote) -> Vec<String> + Sync) -> Vec<Result<String, String>> {
    std::thread::scope(|scope| {
        let ask = |remote: &Remote| ask(remote, &words(remote));
        let asking: Vec<_> = remotes.iter().map(|remote| scope.spawn(move || ask(remote))).collect();
        let answer = |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join().expect("asking does not panic");
        asking.into_iter().map(answer).collect()
    })
}

fn ask(remote: &Remote, words: &[String]) -> Result<String, String> {
    let ran = capture(&mut remote.ssh(&remote.command(words, &[])), None, PATIENCE)
        .map_err(|error| format!("ssh cannot be started: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match ran.status.map(|status| status.code().unwrap_or(255)) {
        Some(0) => Ok(text(&ran.output)),
        Some(127) => Err("there is no such program".to_owned()),
        Some(code) => {
            let why = text(&ran.complaints);
            Err(if why.is_empty() { format!("it answered with exit code {code}") } else { why.replace('\n', "\n    ") })
        }
        None => Err(format!("no answer within {} s", PATIENCE.as_secs())),
    }
}
