//! Models, adapters and rows from and to the Hugging Face hub.
//!
//! **Owns:** which files of a repository are wanted, their way into the Hugging Face cache (resumed,
//! with sizes and hashes checked), what is in the cache already, uploads, and what to do if the hub
//! says no. The requests themselves are made by the `hf-hub` crate.
//!
//! **Must never know:** what is in the files, what they are for, how progress is drawn.
//!
//! **Start reading** at [`Hub`], then `download.rs` (a snapshot) and `file.rs` (one file of it).
//! `cache.rs` has the layout on disk, which Python's `huggingface_hub` shares.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod cache;
mod checksum;
mod dataset;
mod download;
mod error;
mod file;
mod headers;
mod hub;
mod lock;
mod news;
mod repository;
mod selection;
mod upload;

pub use dataset::{DatasetFiles, DatasetName};
pub use download::Snapshot;
pub use error::{Fault, HubError};
pub use hub::{Hub, Patience};
pub use news::{Listener, News};
pub use repository::Kind;
pub use selection::Need;
pub use upload::{Upload, Uploaded};
