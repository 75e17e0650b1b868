//! Points where a test can kill this process, as `kill -9` would.
//!
//! A testing aid: with `FINETUNE_FAILPOINT=checkpoint.synced` in the environment, the process ends
//! at its first call of `hit("checkpoint.synced")`; with `checkpoint.file:3`, at the third call of
//! `hit("checkpoint.file")`; with `train.step:2@1`, only rank 1 of several does. Without the
//! variable a hit is one comparison.
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
    /// Which rank it kills; any if none.
    rank: Option<u64>,
    hits: AtomicU64,
}

static FAILPOINT: OnceLock<Option<Failpoint>> = OnceLock::new();

static RANK: AtomicU64 = AtomicU64::new(0);

/// Says which rank this process is.
pub fn set_rank(rank: usize) {
    RANK.store(rank as u64, Ordering::SeqCst);
}

/// Passes, unless the environment names this point and this is the hit that it asks for.
pub fn hit(name: &str) {
    let failpoint = FAILPOINT.get_or_init(|| std::env::var("FINETUNE_FAILPOINT").ok().map(|text| parse(&text)));
    if let Some(failpoint) = failpoint
        && failpoint.name == name
        && failpoint.rank.is_none_or(|rank| rank == RANK.load(Ordering::SeqCst))
        && failpoint.hits.fetch_add(1, Ordering::SeqCst) + 1 == failpoint.at
    {
        // Like SIGKILL for everything on disk: nothing unwinds, no buffer is flushed, no Drop runs.
        std::process::abort();
    }
}

fn parse(text: &str) -> Failpoint {
    let number = |text: &str, mark: char| -> Option<(usize, u64)> {
        let (before, number) = text.rsplit_once(mark)?;
        Some((before.len(), number.parse().ok()?))
    };
    let (text, rank) = number(text, '@').map_or((text, None), |(end, rank)| (&text[..end], Some(rank)));
    let (name, at) = number(text, ':').map_or((text, 1), |(end, at)| (&text[..end], at));
    Failpoint { name: name.to_string(), at, rank, hits: AtomicU64::new(0) }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn reads_a_name_a_count_and_a_rank() {
        for (text, name, at, rank) in [
            ("a.b", "a.b", 1, None),
            ("a.b:3", "a.b", 3, None),
            ("a:b", "a:b", 1, None),
            ("a.b@2", "a.b", 1, Some(2)),
            ("a.b:3@0", "a.b", 3, Some(0)),
            ("a@b:2", "a@b", 2, None),
        ] {
            let failpoint = parse(text);
            assert_eq!((failpoint.name.as_str(), failpoint.at, failpoint.rank), (name, at, rank), "{text}");
        }
    }
}
