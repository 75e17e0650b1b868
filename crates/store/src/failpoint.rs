//! Points where a test can kill this process, as `kill -9` would, or hold one of its threads up.
//!
//! This is a testing aid. `FINETUNE_FAILPOINT=NAME[:COUNT][@LABELS][+FILE]` in the environment ends the
//! process at a call of [`hit`] with that name, or holds the calling thread up there until the file exists:
//!
//! - `checkpoint.synced`: at the first call of `hit("checkpoint.synced")`;
//! - `checkpoint.file:3`: at the third call of `hit("checkpoint.file")`;
//! - `train.step:2@1`: only in a process whose label is `1` (see [`set_label`]), `@1,2`: `1` or `2`;
//! - `file.read:200@1+/tmp/go`: the same, and it is held up until somebody makes `/tmp/go`, as by a disk that does not
//!   answer. A line on standard error says that it is.
//!
//! Without the variable a hit is one comparison.
//!
//! The points of this crate: `checkpoint.begin`, `checkpoint.file` (before each file),
//! `checkpoint.tensor` (before each tensor of those that are written one by one), `checkpoint.written`,
//! `checkpoint.synced`, `checkpoint.renamed`, `checkpoint.done`, `prune.trashed`, `replace.aside` (the old directory
//! has made way, the new one is not there yet), `file.read` (before each part of a file that is read).

use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Time between two looks for the file.
const LOOK: Duration = Duration::from_millis(5);

struct Failpoint {
    name: String,
    /// Which hit kills, from 1.
    at: u64,
    /// The labels of the processes that it kills, with commas between them. `None`: any.
    labels: Option<String>,
    /// The file until whose existence it holds the thread up. `None`: it kills.
    until: Option<PathBuf>,
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
/// process ends, or the thread waits.
pub fn hit(name: &str) {
    let failpoint = FAILPOINT.get_or_init(|| std::env::var("FINETUNE_FAILPOINT").ok().map(|text| parse(&text)));
    if let Some(failpoint) = failpoint
        && failpoint.name == name
        && failpoint.labels.as_ref().is_none_or(|labels| LABEL.get().is_some_and(|own| has(labels, own)))
        && failpoint.hits.fetch_add(1, Ordering::SeqCst) + 1 == failpoint.at
    {
        if let Some(file) = &failpoint.until {
            // A test waits for the line. Without a standard error nobody does.
            let _ = writeln!(std::io::stderr(), "held up at {name} until there is {}", file.display());
            while !file.exists() {
                std::thread::sleep(LOOK);
            }
            return;
        }
        // Like SIGKILL for everything on disk: nothing unwinds, no buffer is flushed, no Drop runs.
        std::process::abort();
    }
}

fn has(labels: &str, label: &str) -> bool {
    labels.split(',').any(|one| one == label)
}

fn parse(text: &str) -> Failpoint {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || b"-_,".contains(&byte);
    let are_labels = |text: &str| !text.is_empty() && text.bytes().all(is_letter);
    let held_up = text.split_once('+');
    let (text, until) = held_up.map_or((text, None), |(before, file)| (before, Some(PathBuf::from(file))));
    let (text, labels) = match text.rsplit_once('@') {
        Some((before, labels)) if are_labels(labels) => (before, Some(labels.to_owned())),
        _ => (text, None),
    };
    let counted = text.rsplit_once(':').and_then(|(name, at)| Some((name, at.parse().ok()?)));
    let (name, at) = counted.unwrap_or((text, 1));
    Failpoint { name: name.to_string(), at, labels, until, hits: AtomicU64::new(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (variable, name, count, labels, file)
    #[test]
    fn reads_a_name_a_count_labels_and_a_file() {
        for (text, name, at, labels, file) in [
            ("a.b", "a.b", 1, None, None),
            ("a.b:3", "a.b", 3, None, None),
            ("a:b", "a:b", 1, None, None),
            ("a.b@2", "a.b", 1, Some("2"), None),
            ("a.b:3@0", "a.b", 3, Some("0"), None),
            ("a.b:3@rank-1", "a.b", 3, Some("rank-1"), None),
            ("a@b:2", "a@b", 2, None, None),
            ("a.b:3@1,12", "a.b", 3, Some("1,12"), None),
            ("a.b:3@1+/tmp/go", "a.b", 3, Some("1"), Some("/tmp/go")),
            ("a.b+/tmp/a+b:2@1", "a.b", 1, None, Some("/tmp/a+b:2@1")),
        ] {
            let failpoint = parse(text);
            let found = (failpoint.name.as_str(), failpoint.at, failpoint.labels.as_deref());
            assert_eq!(found, (name, at, labels), "{text}");
            assert_eq!(failpoint.until, file.map(PathBuf::from), "{text}");
        }
        assert!(has("1,12", "12") && has("1", "1") && !has("1,12", "2"));
    }
}
