//! Writing safetensors. The same tensors give the same bytes: the format's own crate keeps the
//! metadata in a hash map, whose order changes from run to run.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::dtype::Dtype;
use crate::error::StoreError;
use crate::header::{LENGTH_BYTES, MAX_HEADER_BYTES, MAX_TENSORS, byte_length};

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// The format of its numbers.
    pub dtype: Dtype,
    /// Its lengths, the outermost dimension first.
    pub shape: Vec<usize>,
}

/// The bytes of a safetensors file with these tensors (name, dtype, shape, little-endian bytes) in
/// this order. PyTorch and PEFT want `{"format": "pt"}` in the metadata.
///
/// # Errors
/// [`StoreError::CannotWrite`] for a name that comes twice, bytes that do not fit the shape, or too
/// many tensors.
#[expect(clippy::type_complexity, reason = "what the caller has at hand, once")]
pub fn encode_tensors(
    tensors: &[(String, Dtype, Vec<usize>, Cow<[u8]>)],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, StoreError> {
    let path = Path::new("the safetensors file");
    let specs: Vec<_> = tensors
        .iter()
        .map(|(name, dtype, shape, _)| TensorSpec { name: name.clone(), dtype: *dtype, shape: shape.clone() })
        .collect();
    let mut file = encode_header(path, &specs, metadata)?;
    file.reserve(tensors.iter().map(|(_, _, _, bytes)| bytes.len()).sum());
    for (spec, (_, _, _, bytes)) in specs.iter().zip(tensors) {
        check_length(path, spec, bytes)?;
        file.extend_from_slice(bytes);
    }
    Ok(file)
}

/// Bytes of a safetensors file with these tensors: those of its header, and of the tensors.
///
/// # Errors
/// As [`encode_tensors`].
pub fn bytes_of_tensors(tensors: &[TensorSpec], metadata: &BTreeMap<String, String>) -> Result<u64, StoreError> {
    let header = encode_header(Path::new("the safetensors file"), tensors, metadata)?.len();
    let sizes = tensors.iter().filter_map(|tensor| byte_length(tensor.dtype, &tensor.shape));
    Ok((header + sizes.sum::<usize>()) as u64)
}

/// Length and header, padded so that the first tensor lies at a multiple of 8.
pub(crate) fn encode_header(
    path: &Path,
    tensors: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, StoreError> {
    let cannot = |what: String| StoreError::CannotWrite { path: path.to_path_buf(), what };
    if tensors.len() > MAX_TENSORS {
        return Err(cannot(format!("{} tensors are more than {MAX_TENSORS}", tensors.len())));
    }
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".to_string(), json!(metadata));
    }
    let mut names = BTreeSet::new();
    let mut begin = 0_usize;
    for tensor in tensors {
        let TensorSpec { name, dtype, shape } = tensor;
        if name == "__metadata__" || !names.insert(name) {
            return Err(cannot(format!("tensor name {name:?} is taken")));
        }
        let end = byte_length(*dtype, shape)
            .and_then(|size| begin.checked_add(size))
            .ok_or_else(|| cannot(format!("tensor {name:?} of shape {shape:?} is too large")))?;
        let entry: Value = json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [begin, end]});
        header.insert(name.clone(), entry);
        begin = end;
    }
    let mut json = serde_json::to_vec(&header).map_err(|error| cannot(error.to_string()))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    if json.len() > MAX_HEADER_BYTES {
        return Err(cannot(format!("its header would have {} bytes", json.len())));
    }
    let mut bytes = Vec::with_capacity(LENGTH_BYTES + json.len());
    bytes.extend_from_slice(&(json.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&json);
    Ok(bytes)
}

pub(crate) fn check_length(path: &Path, tensor: &TensorSpec, bytes: &[u8]) -> Result<(), StoreError> {
    if byte_length(tensor.dtype, &tensor.shape) == Some(bytes.len()) {
        return Ok(());
    }
    let TensorSpec { name, dtype, shape } = tensor;
    let what = format!("tensor {name:?} of {dtype} and shape {shape:?} was given {} bytes", bytes.len());
    Err(StoreError::CannotWrite { path: path.to_path_buf(), what })
}
