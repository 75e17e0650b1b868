//! All tensors of a model directory, in one file or in shards.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::disk::{Disk, RealDisk};
use crate::error::StoreError;
use crate::hash::hex;
use crate::names::SafeName;
use crate::tensors::{TensorFile, TensorView};
use crate::unique_map::UniqueMap;

pub(crate) const SINGLE_NAME: &str = "model.safetensors";
pub(crate) const INDEX_NAME: &str = "model.safetensors.index.json";
pub const MAX_INDEX_BYTES: u64 = 64 << 20;

/// The tensors of one model.
#[derive(Debug)]
pub struct TensorSet {
    files: Vec<TensorFile>,
    paths: Vec<PathBuf>,
    /// Tensor name to the file that has it.
    file_of: BTreeMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

/// Bytes that are hashed at a time, on all cores.
const PIECE: usize = 32 << 20;

impl TensorSet {
    /// Opens `model.safetensors`, or `model.safetensors.index.json` and its shards. With an index,
    /// each shard has to have exactly the tensors that the index gives it.
    pub fn open_model(dir: &Path) -> Result<Self, StoreError> {
        let single = dir.join(SINGLE_NAME);
        if single.exists() {
            return Self::from_files(vec![TensorFile::open(&single)?]);
        }
        let index = dir.join(INDEX_NAME);
        if index.exists() {
            return Self::from_index(dir, &index);
        }
        let names = RealDisk.list(dir).map_err(|source| StoreError::reading(dir, source))?;
        let only_pickle = names.iter().any(|name| name.starts_with("pytorch_model"));
        let found = match names.len() {
            0 => "nothing".to_string(),
            1..=12 => names.join(", "),
            count => format!("{} and {} more", names[..12].join(", "), count - 12),
        };
        Err(StoreError::NoModel { path: dir.to_path_buf(), found, only_pickle })
    }

    fn from_index(dir: &Path, index_path: &Path) -> Result<Self, StoreError> {
        let mut bytes = Vec::new();
        File::open(index_path)
            .and_then(|file| file.take(MAX_INDEX_BYTES + 1).read_to_end(&mut bytes))
            .map_err(|source| StoreError::reading(index_path, source))?;
        if bytes.len() as u64 > MAX_INDEX_BYTES {
            return Err(StoreError::malformed(index_path, "it has more than 64 MiB"));
        }
        let index: Index =
            serde_json::from_slice(&bytes).map_err(|error| StoreError::malformed(index_path, error.to_string()))?;
        let mut names_of: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in &index.weight_map.0 {
            names_of.entry(shard).or_default().push(tensor);
        }
        let mut files = Vec::with_capacity(names_of.len());
        for (shard, tensors) in names_of {
            let file = TensorFile::open(&dir.join(SafeName::parse(shard)?.as_str()))?;
            if let Some(missing) = tensors.iter().find(|name| file.get(name).is_none()) {
                let what = format!("does not have tensor {missing:?}, which the index places in it");
                return Err(StoreError::mismatch(dir, shard, what));
            }
            // The names of an index are distinct, so as many as the file has are the same ones.
            if file.names().count() != tensors.len() {
                let extra = file.names().find(|name| !tensors.contains(name)).unwrap_or_default();
                let what = format!("has tensor {extra:?}, which the index does not place in it");
                return Err(StoreError::mismatch(dir, shard, what));
            }
            files.push(file);
        }
        if files.is_empty() {
            return Err(StoreError::malformed(index_path, "its weight_map is empty"));
        }
        Self::from_files(files)
    }

    fn from_files(files: Vec<TensorFile>) -> Result<Self, StoreError> {
        let mut file_of = BTreeMap::new();
        for (position, file) in files.iter().enumerate() {
            for name in file.names() {
                if file_of.insert(name.to_string(), position).is_some() {
                    let what = format!("tensor {name:?} is in another shard too");
                    return Err(StoreError::malformed(file.path(), what));
                }
            }
        }
        let paths = files.iter().map(|file| file.path().to_path_buf()).collect();
        Ok(Self { files, paths, file_of })
    }

    /// File after file, in the order of the bytes.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.iter().flat_map(TensorFile::names)
    }

    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.files.get(*self.file_of.get(name)?)?.get(name)
    }

    /// A copy of a tensor's bytes. Those of the file are let go as they are copied, so that both are never there at once.
    pub fn copy(&self, name: &str) -> Option<Vec<u8>> {
        let file = self.files.get(*self.file_of.get(name)?)?;
        let view = file.get(name)?;
        let mut bytes = Vec::with_capacity(view.bytes.len());
        for piece in view.bytes.chunks(PIECE / 4) {
            bytes.extend_from_slice(piece);
            file.release(piece);
        }
        Some(bytes)
    }

    /// Says that a tensor's bytes have been read and are not needed again: they need no memory any more.
    pub fn release(&self, name: &str) {
        let file = self.file_of.get(name).and_then(|&position| self.files.get(position));
        if let Some((file, view)) = file.and_then(|file| Some((file, file.get(name)?))) {
            file.release(view.bytes);
        }
    }

    /// The files with tensors in them, ascending by name.
    pub fn files(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Hash over the name, size and bytes of all files: 64 hexadecimal digits that are equal
    /// exactly when two machines have the same model. Reads everything, on all cores.
    pub fn digest(&self) -> String {
        let mut digest = blake3::Hasher::new();
        for file in &self.files {
            let mut hasher = blake3::Hasher::new();
            for piece in file.bytes().chunks(PIECE) {
                hasher.update_rayon(piece);
                file.release(piece);
            }
            let hash = hasher.finalize();
            let name = file.path().file_name().unwrap_or_default().as_encoded_bytes();
            digest.update(&(name.len() as u64).to_le_bytes()).update(name);
            digest.update(&(file.bytes().len() as u64).to_le_bytes()).update(hash.as_bytes());
        }
        hex(digest.finalize().as_bytes())
    }
}
