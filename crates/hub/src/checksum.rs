//! The names that git and the hub give to bytes, computed while the bytes arrive.
//!
//! A listing names each file by git's SHA-1 of it. Of a large file (LFS) it is the SHA-1 of a
//! pointer: three lines that hold the SHA-256 and the size of the file itself. So the listing alone
//! proves the bytes of both kinds, and the cache's name of a blob can be compared with it without
//! reading the blob.

use std::fmt::Write;

use sha1::{Digest as _, Sha1};
use sha2::Sha256;

/// Which of the two a file is named by.
#[derive(Clone)]
pub(crate) enum Checksum {
    /// A file in git itself: SHA-1 of `blob SIZE\0` and the bytes.
    Git(Sha1),
    /// A file in large file storage.
    Large { content: Sha256, size: u64 },
}

impl Checksum {
    pub(crate) fn new(large: bool, size: u64) -> Checksum {
        if large {
            Checksum::Large { content: Sha256::default(), size }
        } else {
            Checksum::Git(Sha1::new_with_prefix(format!("blob {size}\0")))
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Checksum::Git(hash) => hash.update(bytes),
            Checksum::Large { content, .. } => sha2::Digest::update(content, bytes),
        }
    }

    /// The name in the cache (which is the hub's ETag), and the name in the listing.
    pub(crate) fn names(self) -> (String, String) {
        match self {
            Checksum::Git(hash) => {
                let name = hex(&hash.finalize());
                (name.clone(), name)
            }
            Checksum::Large { content, size } => {
                let name = hex(&sha2::Digest::finalize(content));
                let listed = pointer_name(&name, size);
                (name, listed)
            }
        }
    }
}

/// The name in the listing of a large file with this SHA-256.
pub(crate) fn pointer_name(sha256: &str, size: u64) -> String {
    let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n");
    let mut hash = Sha1::new_with_prefix(format!("blob {}\0", pointer.len()));
    hash.update(&pointer);
    hex(&hash.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names are those of `git hash-object` and `sha256sum`.
    #[test]
    fn names_are_those_of_git() {
        for (large, bytes, in_cache, listed) in [
            (false, &b""[..], "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
            (false, b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a", "ce013625030ba8dba906f756967f9e9ca394464a"),
            (
                true,
                b"hello\n",
                "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
                "fa61e1ef71c9908c0926776a4aa3504b3a27f159",
            ),
        ] {
            let mut checksum = Checksum::new(large, bytes.len() as u64);
            bytes.chunks(4).for_each(|piece| checksum.update(piece));
            assert_eq!(checksum.names(), (in_cache.to_owned(), listed.to_owned()));
        }
    }
}
