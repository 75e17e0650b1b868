//! All tensors of a model directory, in one file or in shards.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::absent;
use crate::disk::{Disk, RealDisk};
use crate::error::StoreError;
use crate::file_reader::FileReader;
use crate::hash::hex;
use crate::identity::OpenedFile;
use crate::names::SafeName;
use crate::stand_in::{StandIn, json_fault};
use crate::tensors::{TensorFile, TensorView};
use crate::unique_map::UniqueMap;

pub(crate) const SINGLE_NAME: &str = "model.safetensors";
pub(crate) const INDEX_NAME: &str = "model.safetensors.index.json";
/// The most bytes of the index of a model.
pub const MAX_INDEX_BYTES: u64 = 64 << 20;

/// The tensors of one model.
#[derive(Debug)]
pub struct TensorSet {
    files: Vec<TensorFile>,
    paths: Vec<PathBuf>,
    /// Tensor name to the file that has it.
    file_of: BTreeMap<String, usize>,
    unlisted: Vec<String>,
    /// Tensors that are read as several, and what they are read as.
    split: BTreeMap<String, Vec<TensorPart>>,
    /// Name of a part to the tensor that it is of, and its number there.
    part_of: BTreeMap<String, (String, usize)>,
}

/// A part of a tensor, which is read as a tensor of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorPart {
    /// Its name.
    pub name: String,
    /// Its lengths, the outermost dimension first.
    pub shape: Vec<usize>,
    /// The element of the whole tensor that it begins with.
    pub first: usize,
}

#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

impl TensorSet {
    /// Opens `model.safetensors`, or `model.safetensors.index.json` and its shards. Everything that
    /// the index lists has to be there. In the Hugging Face cache the header of a shard suffices: reading from
    /// such a shard is an error.
    ///
    /// # Errors
    /// [`StoreError::NoModel`], [`StoreError::NoShard`], [`StoreError::Mismatch`] for a tensor that is missing,
    /// [`StoreError::Malformed`], [`StoreError::InItsPlace`], [`StoreError::UnsafeName`],
    /// [`StoreError::Io`].
    pub fn open_model(dir: &Path) -> Result<Self, StoreError> {
        let single = dir.join(SINGLE_NAME);
        if single.exists() {
            return Ok(Self::single(TensorFile::open(&single)?));
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
        let map = weight_map(index_path)?;
        let shards: BTreeSet<&str> = map.iter().map(|(_, shard)| shard.as_str()).collect();
        let mut files = Vec::with_capacity(shards.len());
        for shard in &shards {
            // The index is foreign too: no name in it leads out of the directory.
            if let Err(StoreError::UnsafeName { name, what }) = SafeName::parse(shard) {
                return Err(StoreError::malformed(index_path, format!("it names the file {name:?}: {what}")));
            }
            files.push(absent::open(dir, shard)?);
        }
        if files.is_empty() {
            return Err(StoreError::malformed(index_path, "its weight_map is empty"));
        }
        let position = |shard: &str| shards.iter().position(|known| *known == shard).unwrap_or_default();
        let mut file_of = BTreeMap::new();
        for (tensor, shard) in &map {
            let place = position(shard);
            // If the index errs about the shard, a tensor of this name in another shard is taken.
            let found = if files[place].get(tensor).is_some() {
                Some(place)
            } else {
                files.iter().position(|file| file.get(tensor).is_some())
            };
            let Some(found) = found else {
                let what = format!("does not have tensor {tensor:?}, which the index places in it");
                return Err(StoreError::mismatch(dir, shard, what));
            };
            file_of.insert(tensor.clone(), found);
        }
        // Tensors that the index leaves out count too, as in transformers, which takes from an
        // index only which shards there are.
        let listed: BTreeSet<String> = file_of.keys().cloned().collect();
        let mut unlisted = Vec::new();
        for (place, file) in files.iter().enumerate() {
            for name in file.names().filter(|name| !listed.contains(*name)) {
                if file_of.insert(name.to_string(), place).is_some() {
                    let what = format!("tensor {name:?} is in another shard too, and the index has neither");
                    return Err(StoreError::malformed(file.path(), what));
                }
                unlisted.push(name.to_string());
            }
        }
        Ok(Self::new(files, file_of, unlisted))
    }

    fn single(file: TensorFile) -> Self {
        let file_of = file.names().map(|name| (name.to_string(), 0)).collect();
        Self::new(vec![file], file_of, Vec::new())
    }

    fn new(files: Vec<TensorFile>, file_of: BTreeMap<String, usize>, unlisted: Vec<String>) -> Self {
        let paths = files.iter().map(|file| file.path().to_path_buf()).collect();
        Self { files, paths, file_of, unlisted, split: BTreeMap::new(), part_of: BTreeMap::new() }
    }

    /// The same tensors with those split that `parts` says parts of: from now on these have the place of
    /// the whole.
    ///
    /// # Panics
    /// If a part reaches beyond its tensor.
    #[must_use]
    pub fn split_by(mut self, parts: impl Fn(&TensorView<'_>) -> Option<Vec<TensorPart>>) -> Self {
        let views = self.names().filter_map(|name| self.get(name));
        let split: BTreeMap<_, _> = views.filter_map(|view| Some((view.name.to_owned(), parts(&view)?))).collect();
        for (whole, parts) in &split {
            let numbered = parts.iter().enumerate();
            self.part_of.extend(numbered.map(|(number, part)| (part.name.clone(), (whole.clone(), number))));
        }
        self.split = split;
        self
    }

    /// From now on large tensors are read past the system's cache, where the file system lets it be passed: for
    /// files that are read again and again and are larger than the cache.
    pub fn pass_cache(&mut self) {
        self.files.iter_mut().for_each(TensorFile::pass_cache);
    }

    /// Each file as it was when it was opened, ascending by name. `None`: only its header is here.
    pub fn each_opened(&self) -> impl Iterator<Item = Option<&OpenedFile>> {
        self.files.iter().map(TensorFile::opened)
    }

    /// The files that are here, as they were when they were opened.
    pub fn opened(&self) -> impl Iterator<Item = &OpenedFile> {
        self.files.iter().filter_map(TensorFile::opened)
    }

    /// What reads the files that are here.
    pub fn readers(&self) -> impl Iterator<Item = &FileReader> {
        self.files.iter().filter_map(TensorFile::reader)
    }

    /// Each file and its bytes, those too of which only the header is here.
    pub fn lengths(&self) -> impl Iterator<Item = (&Path, u64)> {
        self.files.iter().map(|file| (file.path(), file.length()))
    }

    /// Bytes of all files, with those of which only the header is here.
    pub fn length(&self) -> u64 {
        self.files.iter().map(TensorFile::length).sum()
    }

    /// Names of the tensors that the index leaves out. They can be read like the others.
    pub fn unlisted(&self) -> &[String] {
        &self.unlisted
    }

    /// The names of all tensors, each once: file after file, in the order of the bytes.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let file_of = &self.file_of;
        let files = self.files.iter().enumerate();
        let names =
            files.flat_map(move |(place, file)| file.names().filter(move |name| file_of.get(*name) == Some(&place)));
        names.flat_map(|name| {
            let parts = self.split.get(name);
            let whole = parts.is_none().then_some(name);
            whole.into_iter().chain(parts.into_iter().flatten().map(|part| part.name.as_str()))
        })
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let whole = |name: &str| self.files.get(*self.file_of.get(name)?)?.get(name);
        match self.part_of.get(name) {
            Some((of, number)) => {
                let (part, whole) = (self.split.get(of)?.get(*number)?, whole(of)?);
                Some(whole.part(&part.name, &part.shape, part.first * whole.dtype.size()))
            }
            None if self.split.contains_key(name) => None,
            None => whole(name),
        }
    }

    /// The tensors that are read as none, in the order of their names.
    pub fn left_out(&self) -> impl Iterator<Item = TensorView<'_>> {
        let empty = self.split.iter().filter(|(_, parts)| parts.is_empty());
        empty.filter_map(|(name, _)| self.files.get(*self.file_of.get(name)?)?.get(name))
    }

    /// The tensor that is read as this one alone, under another name.
    pub fn whole_of(&self, name: &str) -> Option<&str> {
        let (of, _) = self.part_of.get(name)?;
        (self.split.get(of)?.len() == 1).then_some(of.as_str())
    }

    /// The tensor that this one is read out of, alone or with others.
    pub fn source_of(&self, name: &str) -> Option<&str> {
        self.part_of.get(name).map(|(of, _)| of.as_str())
    }

    /// Whether a tensor is read from a part of another.
    pub fn is_part(&self, name: &str) -> bool {
        self.part_of.contains_key(name)
    }

    /// The shape of a tensor as the file has it.
    pub fn shape_of_whole(&self, name: &str) -> Option<&[usize]> {
        Some(self.files.get(*self.file_of.get(name)?)?.get(name)?.shape)
    }

    /// The files with tensors in them, ascending by name.
    pub fn files(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Hash over the name, size and bytes of all files: 64 hexadecimal digits that are equal
    /// exactly if two hosts have the same model. Reads everything, on all cores.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Changed`] for a file that was written to meanwhile, or [`StoreError::NoShard`].
    pub fn digest(&self) -> Result<String, StoreError> {
        let contents = self.files.iter().map(content_of).collect::<Result<Vec<_>, _>>()?;
        let contents = self.files.iter().zip(contents);
        Ok(digest_of(contents.map(|(file, content)| (name_of(file), file.length(), content))))
    }

    /// What identifies each file, ascending by name. Reads those that are here and that `wanted` accepts by their
    /// names, on all cores.
    ///
    /// # Errors
    /// [`StoreError::Io`], or [`StoreError::Changed`] for a file that was written to meanwhile.
    pub fn file_digests(&self, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<FileDigest>, StoreError> {
        let digest = |file: &TensorFile| {
            let (name, header) = (String::from_utf8_lossy(name_of(file)).into_owned(), hex(&file.header_hash()));
            let content = (file.is_here() && wanted(&name)).then(|| content_of(file)).transpose()?;
            Ok(FileDigest { name, length: file.length(), header, content: content.map(|hash| hex(hash.as_bytes())) })
        };
        self.files.iter().map(digest).collect()
    }
}

/// What identifies a file of weights, which may be on another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileDigest {
    /// Its name, without the directory.
    pub name: String,
    /// Its bytes.
    pub length: u64,
    /// The hash of its header, as hexadecimal digits.
    pub header: String,
    /// The hash of all of its bytes, as hexadecimal digits. `None`: it was not read, or only its header is here.
    pub content: Option<String>,
}

impl FileDigest {
    /// [`TensorSet::digest`] of a model with these files. `None`: the content of one is not known.
    pub fn of_all(files: &[FileDigest]) -> Option<String> {
        let contents = files.iter().map(FileDigest::content_hash).collect::<Option<Vec<_>>>()?;
        let files = files.iter().zip(contents);
        Some(digest_of(files.map(|(file, content)| (file.name.as_bytes(), file.length, content.into()))))
    }

    /// The hash of all of its bytes, if it is known.
    pub fn content_hash(&self) -> Option<[u8; 32]> {
        blake3::Hash::from_hex(self.content.as_deref()?).ok().map(Into::into)
    }
}

/// The hash over the name, size and content of files.
fn digest_of<'a>(files: impl Iterator<Item = (&'a [u8], u64, blake3::Hash)>) -> String {
    let mut digest = blake3::Hasher::new();
    for (name, length, content) in files {
        digest.update(&(name.len() as u64).to_le_bytes()).update(name);
        digest.update(&length.to_le_bytes()).update(content.as_bytes());
    }
    hex(digest.finalize().as_bytes())
}

fn name_of(file: &TensorFile) -> &[u8] {
    file.path().file_name().unwrap_or_default().as_encoded_bytes()
}

/// The hash of all bytes of a file.
fn content_of(file: &TensorFile) -> Result<blake3::Hash, StoreError> {
    let mut hasher = blake3::Hasher::new();
    file.pieces(0, file.length(), |piece| -> Result<(), StoreError> {
        hasher.update_rayon(piece);
        Ok(())
    })?;
    Ok(hasher.finalize())
}

/// The tensors that an index lists, and the file of each.
pub(crate) fn weight_map(index_path: &Path) -> Result<Vec<(String, String)>, StoreError> {
    let mut bytes = Vec::new();
    File::open(index_path)
        .and_then(|file| file.take(MAX_INDEX_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|source| StoreError::reading(index_path, source))?;
    if bytes.len() as u64 > MAX_INDEX_BYTES {
        return Err(StoreError::malformed(index_path, "it has more than 64 MiB"));
    }
    let index: Index = serde_json::from_slice(&bytes).map_err(|error| match StandIn::of(&bytes) {
        Some(what) => StoreError::InItsPlace { path: index_path.to_path_buf(), what },
        None => StoreError::malformed(index_path, json_fault(&bytes, &error)),
    })?;
    Ok(index.weight_map.0)
}
