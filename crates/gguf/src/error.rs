//! What can be wrong with a GGUF file.

use std::path::PathBuf;

use finetune_store::StoreError;

/// What can be wrong with a GGUF file, or with what should go into one.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message above a variant says what its fields are")]
pub enum GgufError {
    /// A file cannot be read.
    #[error("{path}: {source}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    /// A file is no GGUF file, or a damaged one.
    #[error("{path}: {what}")]
    Malformed { path: PathBuf, what: String },
    /// Bytes of an open file cannot be read, or were changed since it was opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The format cannot express something.
    #[error("a GGUF file cannot hold {what}")]
    Impossible { what: String },
}
