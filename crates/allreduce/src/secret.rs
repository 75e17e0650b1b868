//! The token that all ranks of a run share, and what is made from it. Keyed BLAKE3 throughout.

use std::fmt;

use crate::mutations::{Bug, Mutations};
use crate::random_bytes::KEY_BYTES;

/// The token of a run. A process that holds it may join. It never appears in messages, logs or
/// `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    key: blake3::Hash,
    loopback_only: bool,
}

impl Secret {
    /// From the text of a token, such as the hexadecimal digits that a launcher made. At least 16
    /// bytes after trimming.
    pub fn from_token(token: &str) -> Option<Secret> {
        let token = token.trim();
        (token.len() >= 16).then(|| Secret {
            key: blake3::Hash::from_bytes(blake3::derive_key("finetune allreduce 2026-11 token", token.as_bytes())),
            loopback_only: false,
        })
    }

    /// No secret at all, for tests on one machine: any local user may join. With it a group binds
    /// and connects to loopback addresses only.
    pub fn loopback() -> Secret {
        let key = blake3::derive_key("finetune allreduce 2026-11 loopback", b"");
        Secret { key: blake3::Hash::from_bytes(key), loopback_only: true }
    }

    /// For ranks of one machine and one user: the same in all processes of this user, and no other
    /// user can have it. With it a group binds and connects to loopback addresses only.
    ///
    /// # Errors
    /// If there is no place for a file that only this user can read.
    pub fn of_user() -> std::io::Result<Secret> {
        let token = crate::user_secret::token()?;
        let key = blake3::derive_key("finetune allreduce 2026-11 user", token.trim().as_bytes());
        Ok(Secret { key: blake3::Hash::from_bytes(key), loopback_only: true })
    }

    /// Whether a group with this binds and connects to loopback addresses only.
    pub fn is_loopback_only(&self) -> bool {
        self.loopback_only
    }

    /// A tag over `parts`, bound to its purpose.
    pub(crate) fn tag(&self, purpose: &str, parts: &[&[u8]]) -> Tag {
        Tag(keyed(self.key.as_bytes(), purpose, parts))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Secret(not shown)")
    }
}

/// A message authentication code. Comparing two takes the same time wherever they differ.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tag(blake3::Hash);

impl Tag {
    pub(crate) fn from_bytes(bytes: [u8; KEY_BYTES]) -> Tag {
        Tag(blake3::Hash::from_bytes(bytes))
    }

    pub(crate) fn bytes(&self) -> &[u8; KEY_BYTES] {
        self.0.as_bytes()
    }
}

/// Each part is preceded by its length, so that no two lists of parts look alike.
fn keyed(key: &[u8; KEY_BYTES], purpose: &str, parts: &[&[u8]]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(key);
    for part in [purpose.as_bytes()].iter().chain(parts) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize()
}

/// Seals and opens the messages of one direction of a control connection.
///
/// The count of messages is part of the tag: a message that is replayed, left out or moved does not
/// open.
pub(crate) struct Seal {
    key: [u8; KEY_BYTES],
    count: u64,
    pub(crate) mutations: Mutations,
}

impl Seal {
    pub(crate) fn new(key: &Tag) -> Seal {
        Seal { key: *key.bytes(), count: 0, mutations: Mutations::default() }
    }

    /// The tag of the next message.
    pub(crate) fn next(&mut self, body: &[u8]) -> Tag {
        let tag = Tag(keyed(&self.key, "message", &[&self.count.to_le_bytes(), body]));
        self.count += u64::from(!self.mutations.has(Bug::SealCountKept));
        tag
    }
}
