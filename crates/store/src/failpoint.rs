//! Points where a test can kill this process, as `kill -9` would, or hold one of its threads up.
//!
//! This is a testing aid. `FINETUNE_FAILPOINT=NAME[:COUNT][@LABEL][+SECONDS]` in the environment ends the
//! process at a call of [`hit`] with that name, or lets the calling thread sleep there for so many seconds:
//!
//! - `checkpoint.synced`: at the first call of `hit("checkpoint.synced")`;
//! - `checkpoint.file:3`: at the third call of `hit("checkpoint.file")`;
//! - `train.step:2@1`: only in a process whose label is `1` (see [`set_label`]);
//! - `file.read:200@1+30`: the same, and it is held up for 30 s, as by a disk that does not answer. A line on standard
//!   error says that it is.
//!
//! Without the variable a hit is one comparison.
//!
//! The points of this crate: `checkpoint.begin`, `checkpoint.file` (before each file),
//! `checkpoint.tensor` (before each tensor of those that are written one by one), `checkpoint.written`,
//! `checkpoint.synced`, `checkpoint.renamed`, `checkpoint.done`, `prune.trashed`, `replace.aside` (the old directory
//! has made way, the new one is not there yet), `file.read` (before each part of a file that is read).

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

struct Failpoint {
    name: String,
    /// Which hit kills, from 1.
    at: u64,
    /// The label of the process that it kills. `None`: any.
    label: Option<String>,
    /// For how long it holds the thread up. `None`: it kills.
    sleep: Option<Duration>,
    hits: AtomicU64,
}

static FAILPOINT: OnceLock<Option<Failpoint>> = OnceLock::new();

static LABEL: OnceLock<String> = OnceLock::new();

/// Tells this process from others that have the same environment. The first label counts: letters,
/// digits, `-` and `_`.
pub fn set_label(label: impl Into<String>) {
    // A second label changes nothing.
    let _ = LABEL.set(label.into());
}

/// Passes, unless the environment names this point and this is the hit that it asks for. Then the
/// process ends, or the thread sleeps.
pub fn hit(name: &str) {
    let failpoint = FAILPOINT.get_or_init(|| std::env::var("FINETUNE_FAILPOINT").ok().map(|text| parse(&text)));
    if let Some(failpoint) = failpoint
        && failpoint.name == name
        && failpoint.label.as_ref().is_none_or(|label| LABEL.get() == Some(label))
        && failpoint.hits.fetch_add(1, Ordering::SeqCst) + 1 == failpoint.at
    {
        if let Some(time) = failpoint.sleep {
            // A test waits for the line. Without a standard error nobody does.
            let _ = writeln!(std::io::stderr(), "held up at {name} for {} s", time.as_secs());
            return std::thread::sleep(time);
        }
        // Like SIGKILL for everything on disk: nothing unwinds, no buffer is flushed, no Drop runs.
        std::process::abort();
    }
}

fn parse(text: &str) -> Failpoint {
    let is_label =
        |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    let held_up = text.rsplit_once('+').and_then(|(before, seconds)| Some((before, seconds.parse().ok()?)));
    let (text, sleep) = held_up.map_or((text, None), |(before, seconds)| (before, Some(Duration::from_secs(seconds))));
    let (text, label) = match text.rsplit_once('@') {
        Some((before, label)) if is_label(label) => (before, Some(label.to_owned())),
        _ => (text, None),
    };
    let counted = text.rsplit_once(':').and_then(|(name, at)| Some((name, at.parse().ok()?)));
    let (name, at) = counted.unwrap_or((text, 1));
    Failpoint { name: name.to_string(), at, label, sleep, hits: AtomicU64::new(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (variable, name, count, label, seconds)
    #[test]
    fn reads_a_name_a_count_a_label_and_seconds() {
        for (text, name, at, label, seconds) in [
            ("a.b", "a.b", 1, None, None),
            ("a.b:3", "a.b", 3, None, None),
            ("a:b", "a:b", 1, None, None),
            ("a.b@2", "a.b", 1, Some("2"), None),
            ("a.b:3@0", "a.b", 3, Some("0"), None),
            ("a.b:3@rank-1", "a.b", 3, Some("rank-1"), None),
            ("a@b:2", "a@b", 2, None, None),
            ("a.b:3@1+30", "a.b", 3, Some("1"), Some(30)),
            ("a.b+2", "a.b", 1, None, Some(2)),
            ("a+b", "a+b", 1, None, None),
        ] {
            let failpoint = parse(text);
            let found = (failpoint.name.as_str(), failpoint.at, failpoint.label.as_deref(), failpoint.sleep);
            assert_eq!(found, (name, at, label, seconds.map(Duration::from_secs)), "{text}");
        }
    }
}
