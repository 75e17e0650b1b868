//! Everything of a file before the numbers of its tensors.
//!
//! ```text
//! "GGUF"  version u32  tensors u64  keys u64
//! keys     × (key, type u32, value)                      texts: length u64, bytes
//! tensors  × (name, dimensions u32, lengths u64 …, type u32, offset u64)
//! zeros up to a multiple of the alignment
//! tensors  × (bytes, zeros up to a multiple of the alignment)
//! ```
//!
//! Numbers are little-endian. The lengths of a tensor begin with the innermost dimension. An offset
//! counts from the first tensor's bytes.

use std::collections::BTreeSet;

use crate::error::GgufError;
use crate::tensor_type::TensorType;
use crate::value::{Metadata, write_text};

/// The version of the format that is written.
pub const VERSION: u32 = 3;
/// Tensors begin at multiples of this, in bytes, unless the metadata says otherwise.
pub const ALIGNMENT: u64 = 32;
/// The most dimensions of a tensor.
pub const MOST_DIMENSIONS: usize = 4;
/// The longest name of a tensor in bytes: ggml keeps names in 64 bytes with a zero at the end.
pub(crate) const LONGEST_NAME: usize = 63;

pub(crate) const MAGIC: [u8; 4] = *b"GGUF";

/// A tensor as the header describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its lengths, the outermost dimension first.
    pub shape: Vec<usize>,
    /// The type of its numbers.
    pub kind: TensorType,
}

impl TensorInfo {
    /// Bytes of its numbers.
    ///
    /// # Errors
    /// [`GgufError::Impossible`] for a type that is not written, rows that are no whole blocks, or
    /// a size beyond 64 bits.
    pub fn bytes(&self) -> Result<u64, GgufError> {
        self.kind.bytes(&self.shape).ok_or_else(|| GgufError::Impossible {
            what: format!("the tensor `{}` of shape {:?} as {}", self.name, self.shape, self.kind.name()),
        })
    }
}

/// Zeros that follow this many bytes of a tensor.
pub fn padding(bytes: u64) -> usize {
    (bytes.next_multiple_of(ALIGNMENT) - bytes) as usize
}

/// The bytes of a file up to its first tensor. Behind them belong the bytes of each tensor in this
/// order, each with its [`padding`].
///
/// # Errors
/// [`GgufError::Impossible`] for two keys or tensors of one name, a tensor without a size, with too
/// many dimensions or a name that is too long, and arrays that have no type.
pub fn header(metadata: &Metadata, tensors: &[TensorInfo]) -> Result<Vec<u8>, GgufError> {
    let impossible = |what: String| GgufError::Impossible { what };
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    let mut names = BTreeSet::new();
    for (key, value) in metadata {
        if !names.insert(key.as_str()) {
            return Err(impossible(format!("the key `{key}` twice")));
        }
        write_text(key, &mut bytes);
        bytes.extend((value.value_type() as u32).to_le_bytes());
        value.write(&mut bytes)?;
    }
    names.clear();
    let mut offset = 0_u64;
    for tensor in tensors {
        let TensorInfo { name, shape, kind } = tensor;
        if !names.insert(name.as_str()) {
            return Err(impossible(format!("the tensor `{name}` twice")));
        }
        if name.len() > LONGEST_NAME || shape.is_empty() || shape.len() > MOST_DIMENSIONS {
            return Err(impossible(format!("the tensor `{name}` of {} dimensions", shape.len())));
        }
        write_text(name, &mut bytes);
        bytes.extend((shape.len() as u32).to_le_bytes());
        bytes.extend(shape.iter().rev().flat_map(|&length| (length as u64).to_le_bytes()));
        bytes.extend(kind.code().to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        let end = offset.checked_add(tensor.bytes()?).and_then(|end| end.checked_next_multiple_of(ALIGNMENT));
        offset = end.ok_or_else(|| impossible("tensors of more than 2^64 bytes".to_owned()))?;
    }
    bytes.resize(bytes.len() + padding(bytes.len() as u64), 0);
    Ok(bytes)
}
