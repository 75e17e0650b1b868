//! Bytes on disk that can be trusted.
//!
//! **Owns:** directories that appear whole or not at all ([`Staging`]), manifests with
//! the hash of every file, the lock of a run directory, bounded reading and deterministic writing
//! of safetensors, names that cannot leave their directory, the kind of what lies at a path
//! ([`recognize`]), the user's caches.
//!
//! **Must never know:** steps, optimizers, ranks, and what the numbers of a tensor mean. A
//! "checkpoint" is here a directory with a number in its name; what is in it is the caller's. Of
//! models, adapters and runs the crate knows the names of their files, to tell them apart
//! (`recognition.rs`) and to find them (`tensor_set.rs`, `hub.rs`).
//!
//! **Start reading** in `directory.rs` (the commit protocol, in the order in which it happens),
//! then `disk.rs` (the calls it makes) and `fault.rs` (the disk that loses power at each of them).
//! For model files: `header.rs`, then `tensors.rs` and `tensor_set.rs`, whose bytes come by `file_reader.rs`.
//! `identity.rs` tells whether a file changes while it is in use.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod absent;
mod cache;
mod directory;
mod disk;
mod dtype;
mod encode;
mod error;
pub mod failpoint;
pub mod fault;
mod file_reader;
mod hash;
mod header;
mod holding;
mod hub;
mod identity;
mod lock;
mod manifest;
mod names;
mod own_names;
mod read_rate;
mod recognition;
mod replace;
mod retention;
mod shards;
mod size;
mod stand_in;
mod tensor_set;
mod tensors;
mod unique_map;

pub use absent::{has_header, header_bytes, keep_header, missing_shards, no_shard};
pub use cache::{Cache, EntryLock};
pub use directory::{Staging, ensure_directory};
pub use disk::{Disk, RealDisk};
pub use dtype::Dtype;
pub use encode::{TensorSpec, bytes_of_tensors, encode_tensors};
pub use error::{Operation, StoreError};
pub use file_reader::FileReader;
pub use hash::{content_hash, content_hash_of, hash_of, hex};
pub use header::{Header, MAX_HEADER_BYTES, MAX_TENSORS, TensorInfo};
pub use holding::Holding;
pub use hub::{HubId, cached_snapshot, has_all_weights, has_gguf, hub_cache};
pub use identity::OpenedFile;
pub use lock::{LockHolder, RunLock};
pub use manifest::{FileRecord, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, verify_directory};
pub use names::{SafeName, inside, stays_inside};
pub use read_rate::read_rate;
pub use recognition::{recognize, recognize_content, refuse_links_out, refuse_stand_ins};
pub use replace::{check_replaceable, manifest_of, replace_file};
pub use retention::{Rejected, newest_verified, numbered, remove_directory, set_aside, sweep};
pub use shards::write_shards;
pub use size::human_bytes;
pub use stand_in::{START_BYTES, StandIn, json_fault};
pub use tensor_set::{FileDigest, MAX_INDEX_BYTES, TensorPart, TensorSet};
pub use tensors::{FileRows, PIECE, TensorFile, TensorView};
