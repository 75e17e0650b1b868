//! Writing a model that is larger than memory, one tensor at a time, in files of a bounded size.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::disk::Disk;
use crate::encode::{TensorSpec, check_length, encode_header};
use crate::error::{Operation, StoreError};
use crate::header::byte_length;
use crate::tensor_set::{INDEX_NAME, SINGLE_NAME};

/// Writes `tensors` into `directory` in their order and returns the names of the files, all of them
/// synced. If everything fits into `max_shard_bytes` of tensor data, that is `model.safetensors`.
/// Otherwise it is `model-00001-of-0000N.safetensors` and so on, and
/// `model.safetensors.index.json`. A tensor larger than that gets a shard of its own.
///
/// `produce(i)` gives the bytes of `tensors[i]`. It is called once for each, ascending, so that
/// one tensor at a time is in memory. To make the result visible as a whole, write into
/// [`crate::Staging::directory`] and `record` each name.
///
/// # Errors
/// [`StoreError::CannotWrite`], a failure of the disk, or an error of `produce`.
pub fn write_shards<E: From<StoreError>>(
    disk: &dyn Disk,
    directory: &Path,
    tensors: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
    max_shard_bytes: u64,
    mut produce: impl FnMut(usize) -> Result<Vec<u8>, E>,
) -> Result<Vec<String>, E> {
    let sizes = sizes_of(directory, tensors)?;
    let total_bytes = sizes.iter().sum();
    let failed = |operation, path: &Path, source| E::from(StoreError::io(path, operation, total_bytes, source));
    let shards = split_into_shards(&sizes, max_shard_bytes);
    let mut names = Vec::with_capacity(shards.len() + 1);
    let mut weight_map = Map::new();
    for (number, range) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => SINGLE_NAME.to_string(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let path = directory.join(&name);
        let specs = &tensors[range.clone()];
        disk.write_file(&path, &encode_header(&path, specs, metadata)?)
            .map_err(|source| failed(Operation::Write, &path, source))?;
        for (position, spec) in range.clone().zip(specs) {
            let bytes = produce(position)?;
            check_length(&path, spec, &bytes)?;
            disk.append_file(&path, &bytes).map_err(|source| failed(Operation::Write, &path, source))?;
            if weight_map.insert(spec.name.clone(), Value::from(name.as_str())).is_some() {
                let what = format!("tensor name {:?} is taken", spec.name);
                return Err(StoreError::CannotWrite { path, what }.into());
            }
        }
        disk.sync_file(&path).map_err(|source| failed(Operation::Sync, &path, source))?;
        names.push(name);
    }
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": total_bytes}, "weight_map": weight_map});
        let path = directory.join(INDEX_NAME);
        disk.write_file(&path, format!("{index:#}\n").as_bytes())
            .map_err(|source| failed(Operation::Write, &path, source))?;
        disk.sync_file(&path).map_err(|source| failed(Operation::Sync, &path, source))?;
        names.push(INDEX_NAME.to_string());
    }
    disk.sync_dir(directory).map_err(|source| failed(Operation::Sync, directory, source))?;
    Ok(names)
}

fn sizes_of(directory: &Path, tensors: &[TensorSpec]) -> Result<Vec<u64>, StoreError> {
    let mut total = 0_u64;
    let mut sizes = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let size = byte_length(tensor.dtype, &tensor.shape).map(|size| size as u64);
        let sum = size.and_then(|size| total.checked_add(size));
        let (Some(size), Some(sum)) = (size, sum) else {
            let what = format!("tensor {:?} of shape {:?} is too large", tensor.name, tensor.shape);
            return Err(StoreError::CannotWrite { path: directory.to_path_buf(), what });
        };
        total = sum;
        sizes.push(size);
    }
    Ok(sizes)
}

/// Ranges of positions, at least one, each filled in order until the next would not fit.
fn split_into_shards(sizes: &[u64], max_shard_bytes: u64) -> Vec<std::ops::Range<usize>> {
    let mut shards = Vec::new();
    let (mut start, mut filled) = (0, 0_u64);
    for (position, &size) in sizes.iter().enumerate() {
        if position > start && filled.saturating_add(size) > max_shard_bytes {
            shards.push(start..position);
            (start, filled) = (position, 0);
        }
        filled = filled.saturating_add(size);
    }
    shards.push(start..sizes.len());
    shards
}
