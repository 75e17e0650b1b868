//! GGUF files, version 3, as llama.cpp reads them.
//!
//! **Owns:** the bytes of a file: header, metadata with typed values, descriptions of tensors,
//! alignment ([`header`]); the numbers of a tensor in the types F32, F16, BF16 and Q8_0
//! ([`TensorType::encode`]); bounded reading of one file ([`File`]) or a split one ([`FileSet`]).
//!
//! **Must never know:** models, adapters, tokenizers, and what a key of the metadata means. What
//! a model's tensors are called in such a file is `finetune-model`'s, and what the codes of a packed
//! block mean is `finetune-packed`'s.
//!
//! **Start reading** in `header.rs`, which has the layout of a file, then `tensor_type.rs`.
//! The reference for both is gguf-py 0.19 (`gguf_writer.py`, `quants.py`). Tests compare with
//! bytes that it wrote (`scripts/make_gguf_golden.py`).

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod error;
mod file;
mod file_set;
mod header;
mod tensor_type;
mod value;

pub use error::GgufError;
pub use file::File;
pub use file_set::FileSet;
pub use header::{ALIGNMENT, MOST_DIMENSIONS, TensorInfo, VERSION, header, padding};
pub use tensor_type::{BLOCK, TensorType};
pub use value::{Metadata, Value, ValueType};
