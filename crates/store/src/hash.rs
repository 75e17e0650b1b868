//! Hashes of files, with blake3.

use std::path::Path;

use crate::disk::{Disk, RealDisk};
use crate::error::StoreError;

/// The blake3 hash of a whole file. Links are followed, since the Hugging Face cache is made of
/// them. Memory use does not grow with the file.
///
/// # Errors
/// [`StoreError::Io`].
pub fn content_hash(path: &Path) -> Result<[u8; 32], StoreError> {
    RealDisk.hash(path).map_err(|source| StoreError::reading(path, source))
}

/// The blake3 hash of some bytes.
pub fn hash_of(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}

/// A hash as 64 lowercase hexadecimal digits.
pub fn hex(hash: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}

/// [`content_hash`] of a large file, on all cores. `progress` is called with the number of bytes of
/// each piece that was read.
///
/// # Errors
/// [`StoreError::Io`].
pub fn content_hash_of(path: &Path, progress: &mut dyn FnMut(u64)) -> Result<[u8; 32], StoreError> {
    const PIECE: usize = 4 << 20;
    let failed = |source| StoreError::reading(path, source);
    let (mut file, mut hasher) = (std::fs::File::open(path).map_err(failed)?, blake3::Hasher::new());
    let mut bytes = vec![0; PIECE];
    loop {
        let count = std::io::Read::read(&mut file, &mut bytes).map_err(failed)?;
        if count == 0 {
            return Ok(*hasher.finalize().as_bytes());
        }
        hasher.update_rayon(&bytes[..count]);
        progress(count as u64);
    }
}
