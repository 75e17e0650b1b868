//! Small text files of a model directory, and bounded reading of any file.

use std::io::Read;
use std::path::Path;

use finetune_store::{START_BYTES, StandIn, StoreError};

use crate::error::ModelError;

/// The text of a small file of a model directory. A file of more than `limit` bytes is refused
/// unread.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, ModelError> {
    let bytes = read_bounded(path, limit)?;
    if let Some(what) = StandIn::of(&bytes[..bytes.len().min(START_BYTES as usize)]) {
        return Err(StoreError::InItsPlace { path: path.to_owned(), what }.into());
    }
    String::from_utf8(bytes)
        .map_err(|_| ModelError::Malformed { path: path.to_owned(), what: "it is not UTF-8".to_owned() })
}

/// The bytes of a file. A file of more than `limit` bytes is refused.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, ModelError> {
    let unreadable = |source| ModelError::Unreadable { path: path.to_owned(), source };
    let malformed = |what: String| ModelError::Malformed { path: path.to_owned(), what };
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if metadata.is_dir() {
        return Err(malformed("it is a directory".to_owned()));
    }
    if metadata.len() > limit {
        return Err(malformed(format!("{} bytes; at most {limit} are read", metadata.len())));
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    // A file without a length, such as a device, is not read forever.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > limit {
        return Err(malformed(format!("more than {limit} bytes")));
    }
    Ok(bytes)
}
