//! Models and adapters as llama.cpp's GGUF files.
//!
//! The reference is llama.cpp's converters (`convert_hf_to_gguf.py`, `conversion/*.py`,
//! `convert_lora_to_gguf.py`) and what its loader asks for. `place.rs` has what a family is called
//! there and where each tensor goes, `metadata.rs` the keys, `write.rs` the files. Tokenizers and
//! templates come from the caller, as metadata. `read.rs` reads a model as a base, `read_config.rs`
//! its keys; `architecture.rs` has what is read, which is more than what is written.

mod architecture;
mod metadata;
mod place;
pub(crate) mod read;
mod read_config;
mod write;

pub use finetune_gguf::{File, GgufError, Metadata, TensorType, Value};

pub use self::place::{Destination, destination};
pub use self::read::gguf_file;
pub use self::write::{AdapterFile, ModelFile, write_adapter, write_model};
