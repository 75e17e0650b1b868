//! Points where a test can kill this process, as `kill -9` would.
//!
//! This is a testing aid. `FINETUNE_FAILPOINT=NAME[:COUNT][@LABEL]` in the environment ends the
//! process at a call of [`hit`] with that name:
//!
//! - `checkpoint.synced`: at the first call of `hit("checkpoint.synced")`;
//! - `checkpoint.file:3`: at the third call of `hit("checkpoint.file")`;
//! - `train.step:2@1`: only in a process whose label is `1` (see [`set_label`]).
//!
//! Without the variable a hit is one comparison.
//!
//! The points of this crate: `checkpoint.begin`, `checkpoint.file` (before each file),
//! `checkpoint.tensor` (before each tensor of those that are written one by one), `checkpoint.written`,
//! `checkpoint.synced`, `checkpoint.renamed`, `checkpoint.done`, `prune.trashed`, `replace.aside` (the old directory
//! has made way, the new one is not there yet).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

struct Failpoint {
    name: String,
    /// Which hit kills, from 1.
    at: u64,
    /// The label of the process that it kills. `None`: any.
    label: Option<String>,
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
/// process ends.
pub fn hit(name: &str) {
    let failpoint = FAILPOINT.get_or_init(|| std::env::var("FINETUNE_FAILPOINT").ok().map(|text| parse(&text)));
    if let Some(failpoint) = failpoint
        && failpoint.name == name
        && failpoint.label.as_ref().is_none_or(|label| LABEL.get() == Some(label))
        && failpoint.hits.fetch_add(1, Ordering::SeqCst) + 1 == failpoint.at
    {
        // Like SIGKILL for everything on disk: nothing unwinds, no buffer is flushed, no Drop runs.
        std::process::abort();
    }
}

fn parse(text: &str) -> Failpoint {
    let is_label =
        |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    let (text, label) = match text.rsplit_once('@') {
        Some((before, label)) if is_label(label) => (before, Some(label.to_owned())),
        _ => (text, None),
    };
    let counted = text.rsplit_once(':').and_then(|(name, at)| Some((name, at.parse().ok()?)));
    let (name, at) = counted.unwrap_or((text, 1));
    Failpoint { name: name.to_string(), at, label, hits: AtomicU64::new(0) }
}

#[cfg(test)]
mod tests {
    use super::parse;

    /// (variable, name, count, label)
    #[test]
    fn reads_a_name_a_count_and_a_label() {
        for (text, name, at, label) in [
            ("a.b", "a.b", 1, None),
            ("a.b:3", "a.b", 3, None),
            ("a:b", "a:b", 1, None),
            ("a.b@2", "a.b", 1, Some("2")),
            ("a.b:3@0", "a.b", 3, Some("0")),
            ("a.b:3@rank-1", "a.b", 3, Some("rank-1")),
            ("a@b:2", "a@b", 2, None),
        ] {
            let failpoint = parse(text);
            let found = (failpoint.name.as_str(), failpoint.at, failpoint.label.as_deref());
            assert_eq!(found, (name, at, label), "{text}");
        }
    }
}
