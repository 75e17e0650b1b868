//! Points where a test can kill this process, as `kill -9` would.
//!
//! A testing aid: with `FINETUNE_FAILPOINT=checkpoint.synced` in the environment, the process ends
//! at its first call of `hit("checkpoint.synced")`; with `checkpoint.file:3`, at the third call of
//! `hit("checkpoint.file")`. Without the variable a hit is one comparison.
//!
//! The points of this crate: `checkpoint.begin`, `checkpoint.file` (before each file),
//! `checkpoint.written`, `checkpoint.synced`, `checkpoint.renamed`, `checkpoint.done`,
//! `prune.trashed`, `replace.aside` (the old directory has made way, the new one is not there yet).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

struct Failpoint {
    name: String,
    /// Which hit kills, from 1.
    at: u64,
    hits: AtomicU64,
}

static FAILPOINT: OnceLock<Option<Failpoint>> = OnceLock::new();

/// Passes, unless the environment names this point and this is the hit that it asks for.
pub fn hit(name: &str) {
    let failpoint = FAILPOINT.get_or_init(|| std::env::var("FINETUNE_FAILPOINT").ok().map(|text| parse(&text)));
    if let Some(failpoint) = failpoint
        && failpoint.name == name
        && failpoint.hits.fetch_add(1, Ordering::SeqCst) + 1 == failpoint.at
    {
        // Like SIGKILL for everything on disk: nothing unwinds, no buffer is flushed, no Drop runs.
        std::process::abort();
    }
}

fn parse(text: &str) -> Failpoint {
    let (name, at) = match text.rsplit_once(':') {
        Some((name, count)) => match count.parse() {
            Ok(at) => (name, at),
            Err(_) => (text, 1),
        },
        None => (text, 1),
    };
    Failpoint { name: name.to_string(), at, hits: AtomicU64::new(0) }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn reads_a_name_and_a_count() {
        for (text, name, at) in [("a.b", "a.b", 1), ("a.b:3", "a.b", 3), ("a:b", "a:b", 1)] {
            let failpoint = parse(text);
            assert_eq!((failpoint.name.as_str(), failpoint.at), (name, at), "{text}");
        }
    }
}
