//! The header of a safetensors file, read as if an attacker had written it.
//!
//! ```text
//! 8 bytes  length N of the header, little-endian
//! N bytes  JSON {"__metadata__": {text: text},
//!                name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
//! the rest the tensors' bytes; offsets count from here
//! ```
//! (huggingface/safetensors, README.md, "Format".)

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};

use crate::dtype::Dtype;
use crate::unique_map::UniqueMap;

/// The most bytes of a header. Real shards have far fewer (a tensor takes about 120), and so many
/// do no harm.
pub const MAX_HEADER_BYTES: usize = 16 << 20;
/// The most tensors of a file.
pub const MAX_TENSORS: usize = 100_000;
/// The most dimensions of a tensor, as in PyTorch.
const MAX_DIMENSIONS: usize = 64;
const METADATA_KEY: &str = "__metadata__";
pub(crate) const LENGTH_BYTES: usize = 8;

/// What a header says of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// The format of its numbers.
    pub dtype: Dtype,
    /// Its lengths, the outermost dimension first.
    pub shape: Vec<usize>,
    /// Where its bytes begin, counted from [`Header::data_start`].
    pub begin: usize,
    /// Where its bytes end, counted from [`Header::data_start`].
    pub end: usize,
}

/// A checked header: every tensor lies inside the file, no two overlap, and every byte belongs to
/// one.
#[derive(Debug)]
pub struct Header {
    /// The texts of `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// The tensors, in the order of their bytes in the file.
    pub tensors: Vec<TensorInfo>,
    /// Where the header ends and the tensors' bytes begin, from the start of the file.
    pub data_start: usize,
    by_name: BTreeMap<String, usize>,
}

impl Header {
    /// Reads the header of a whole file's bytes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(file: &[u8]) -> Result<Self, String> {
        let length = Self::json_length(file, file.len() as u64)?;
        let (json, data) = file[LENGTH_BYTES..].split_at(length);
        Self::parse_json(json, data.len())
    }

    /// Bytes of the header's JSON in a file of `file_length` bytes that begins like `start`: at
    /// most [`MAX_HEADER_BYTES`], and inside the file.
    pub(crate) fn json_length(start: &[u8], file_length: u64) -> Result<usize, String> {
        let Some((length, _)) = start.split_first_chunk::<LENGTH_BYTES>() else {
            return Err(format!("{} bytes is too short for a safetensors file", start.len()));
        };
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER_BYTES as u64 {
            return Err(format!("its header would have {length} bytes, more than 16 MiB"));
        }
        if length > file_length.saturating_sub(LENGTH_BYTES as u64) {
            return Err(format!("its header would have {length} bytes, the file ends before"));
        }
        Ok(length as usize)
    }

    /// Reads the header's JSON; `data_length` bytes of tensors follow it.
    pub(crate) fn parse_json(json: &[u8], data_length: usize) -> Result<Self, String> {
        // The format allows no white space first, so that a file has one header only.
        if json.first() != Some(&b'{') {
            return Err("its header does not start with '{'".to_string());
        }
        let raw: RawHeader = serde_json::from_slice(json)
            .map_err(|error| format!("its header is not what the format asks for: {error}"))?;
        let mut tensors = Vec::with_capacity(raw.tensors.len());
        for (name, tensor) in raw.tensors {
            tensors.push(check(name, tensor, data_length)?);
        }
        tensors.sort_by_key(|tensor| (tensor.begin, tensor.end));
        check_layout(&tensors, data_length)?;
        let mut by_name = BTreeMap::new();
        for (position, tensor) in tensors.iter().enumerate() {
            if by_name.insert(tensor.name.clone(), position).is_some() {
                return Err(format!("tensor {:?} comes twice", tensor.name));
            }
        }
        let data_start = LENGTH_BYTES + json.len();
        Ok(Self { metadata: raw.metadata, tensors, data_start, by_name })
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(*self.by_name.get(name)?)
    }
}

/// How many bytes a tensor takes. `None`: more than a number can hold.
pub(crate) fn byte_length(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(dtype.size(), |product, &length| product.checked_mul(length))
}

fn check(name: String, raw: RawTensor, data_length: usize) -> Result<TensorInfo, String> {
    let Some(dtype) = Dtype::parse(&raw.dtype) else {
        let dtype: String = raw.dtype.chars().take(32).collect();
        return Err(format!("tensor {name:?} has dtype {dtype:?}, which is not known"));
    };
    if raw.shape.len() > MAX_DIMENSIONS {
        return Err(format!("tensor {name:?} has {} dimensions", raw.shape.len()));
    }
    let (begin, end) = raw.data_offsets;
    if begin > end || end > data_length {
        return Err(format!("tensor {name:?} lies at bytes {begin} to {end}, outside the file's {data_length}"));
    }
    let Some(size) = byte_length(dtype, &raw.shape) else {
        return Err(format!("tensor {name:?} of shape {:?} is too large", raw.shape));
    };
    if size != end - begin {
        return Err(format!(
            "tensor {name:?} of {dtype} and shape {:?} needs {size} bytes but has {}",
            raw.shape,
            end - begin
        ));
    }
    Ok(TensorInfo { name, dtype, shape: raw.shape, begin, end })
}

/// Refuses tensors that overlap, and bytes that belong to none. `tensors` are in the order of their
/// bytes.
fn check_layout(tensors: &[TensorInfo], data_length: usize) -> Result<(), String> {
    let mut covered = 0;
    for tensor in tensors {
        let (name, begin) = (&tensor.name, tensor.begin);
        if begin < covered {
            return Err(format!("tensor {name:?} at byte {begin} overlaps the one before it"));
        }
        if begin > covered {
            return Err(format!("bytes {covered} to {begin}, before {name:?}, belong to no tensor"));
        }
        covered = tensor.end;
    }
    if covered < data_length {
        return Err(format!("{} bytes at its end belong to no tensor", data_length - covered));
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

#[derive(Default)]
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawTensor)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader::default();
                let mut has_metadata = false;
                while let Some(key) = map.next_key::<String>()? {
                    if key == METADATA_KEY {
                        if std::mem::replace(&mut has_metadata, true) {
                            return Err(A::Error::custom("\"__metadata__\" comes twice"));
                        }
                        // MLX writes null if there are no texts.
                        let entries: Option<UniqueMap<String>> = map.next_value()?;
                        header.metadata = entries.into_iter().flat_map(|entries| entries.0).collect();
                    } else if header.tensors.len() == MAX_TENSORS {
                        return Err(A::Error::custom("more than 100000 tensors"));
                    } else {
                        header.tensors.push((key, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }

        deserializer.deserialize_map(HeaderVisitor)
    }
}
