//! Models and adapters as llama.cpp's GGUF files.
//!
//! The reference is llama.cpp's converters (`convert_hf_to_gguf.py`, `conversion/*.py`,
//! `convert_lora_to_gguf.py`) and what its loader asks for. `architecture.rs` has what families and their
//! tensors are called there, `making.rs` what of a tensor lies where; both are for reading and writing.
//! `metadata.rs` has the keys, `place.rs` what is not written, `agreement.rs` whether llama.cpp takes the keys as
//! they are meant, `write.rs` the files. Tokenizers and templates come from the caller, as metadata. `read.rs`
//! reads a model as a base, `read_config.rs` its keys.

mod agreement;
mod architecture;
mod making;
mod metadata;
mod place;
pub(crate) mod read;
mod read_config;
mod write;

pub use finetune_gguf::{File, GgufError, Metadata, TensorType, Value};

pub use self::read::gguf_file;
pub use self::write::{AdapterFile, ModelFile, write_adapter, write_model};
