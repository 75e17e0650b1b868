//! Names that this program gives to directories and files on their way in and out, by which a later
//! process knows leftovers again.

use std::hash::{BuildHasher, Hasher};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The mark in a directory that is being written or removed: a file of this name. It shows that the
/// directory is of this program, and is a leftover once its process has ended.
pub(crate) const UNFINISHED: &str = ".finetune-unfinished";

/// Begins the name of a replaced directory until the new one is in its place. `sweep` puts it
/// back if the power went between the two renames.
pub(crate) const REPLACED: &str = ".replaced-";

/// Begins the name of a directory that is being removed.
pub(crate) const TRASH: &str = ".trash-";

/// `<name>` of `<prefix><name>-<nonce>`: what a directory was called before it was set apart.
pub(crate) fn set_apart<'a>(name: &'a str, prefix: &str) -> Option<&'a str> {
    let (original, nonce) = name.strip_prefix(prefix)?.rsplit_once('-')?;
    is_nonce(nonce).then_some(original)
}

/// A name that no other process uses, and that [`is_ours`] recognizes as one of this process.
pub(crate) fn temporary_name(name: &str) -> String {
    format!("{name}{}{}", own_mark(), next_number())
}

/// Whether [`temporary_name`] gave this name in this process.
pub(crate) fn is_ours(temporary_name: &str) -> bool {
    temporary_name.contains(&own_mark())
}

/// `<anything>` of `<anything>.tmp-<pid>-<nonce>`, the form that [`temporary_name`] gives. `None`
/// for names that a user might have given by hand.
pub(crate) fn temporary_of(name: &str) -> Option<&str> {
    let (before, mark) = name.rsplit_once(".tmp-")?;
    let (pid, nonce) = mark.split_once('-')?;
    (pid.parse::<u32>().is_ok() && is_nonce(nonce)).then_some(before)
}

/// Whether this is what [`nonce`] gives: 16 hexadecimal digits and a number of at least four.
pub(crate) fn is_nonce(text: &str) -> bool {
    text.len() >= 20 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// A text that is different for each call in each process.
pub(crate) fn nonce() -> String {
    format!("{:016x}{}", process_nonce(), next_number())
}

fn own_mark() -> String {
    format!(".tmp-{}-{:016x}", std::process::id(), process_nonce())
}

fn next_number() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{:04x}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A random number of this process. The process id alone repeats: in a container every run may be
/// process 1.
fn process_nonce() -> u64 {
    static NONCE: OnceLock<u64> = OnceLock::new();
    *NONCE.get_or_init(|| std::hash::RandomState::new().build_hasher().finish())
}
