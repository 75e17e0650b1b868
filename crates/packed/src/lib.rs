//! Matrices of a frozen base in a few bits an element, as they are published: their codes, what a
//! code means, and how a 16-bit matrix becomes one.
//!
//! Owns: the one internal form ([`PackedMatrix`]) and its decoded value, products with a row of it,
//! the quantizers, the layouts of the formats in safetensors files.
//! Must never know: models, devices, recipes.
//! Start reading at [`PackedMatrix::value`], which defines every decoded value.

#![warn(missing_docs)]

#[cfg(test)]
mod all_forms;
mod check;
mod codes;
mod decode;
pub mod dot;
mod error;
pub mod files;
pub mod gguf;
mod join;
mod kept;
mod matrix;
mod numbers;
mod part;
mod quantize;
mod simd;
mod values;

pub use codes::{Codes, NibbleOrder};
pub use error::PackedError;
pub use kept::Kept;
pub use matrix::{Decoder, Groups, PackedMatrix, Rounding, Zeros};
pub use numbers::Numbers;
pub use quantize::{Scheme, Stored, applies, config_entry, file_bytes, file_tensors, memory, quantize};
pub use simd::InstructionSet;
