//! A model in one file, or split into several as llama.cpp's `llama-gguf-split` does:
//! `NAME-00001-of-00003.gguf`. The first file has the metadata, and each file some of the tensors.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use finetune_store::{FileReader, OpenedFile};

use crate::error::GgufError;
use crate::file::File;
use crate::header::TensorInfo;
use crate::tensor_type::TensorType;
use crate::value::{Metadata, Value};

/// The files of a model, whose headers have been checked.
#[derive(Debug)]
pub struct FileSet {
    files: Vec<File>,
}

/// The names of all files of the split model that a file such as `NAME-00002-of-00003.gguf` belongs
/// to, in order. Empty for a file that is not split.
fn parts(name: &str) -> Vec<String> {
    let digits = |text: &str| -> Option<usize> {
        (text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok())?
    };
    let split = || {
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let (number, count) = (digits(number)?, digits(count)?);
        (1..=count).contains(&number).then_some((stem, count))
    };
    let Some((stem, count)) = split() else { return Vec::new() };
    (1..=count).map(|number| format!("{stem}-{number:05}-of-{count:05}.gguf")).collect()
}

impl FileSet {
    /// Opens a file, and if its name is that of a part of a split model, all parts.
    ///
    /// # Errors
    /// As [`File::open`] for each file. [`GgufError::Malformed`] if the files are not those of one
    /// model.
    pub fn open(path: &Path) -> Result<FileSet, GgufError> {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let names = parts(&name);
        if names.is_empty() {
            let file = File::open(path)?;
            let count = file.get("split.count").and_then(Value::as_u64).unwrap_or(1);
            if count > 1 {
                let what =
                    format!("it is one of {count} files, and its name does not end in `-00001-of-{count:05}.gguf`");
                return Err(GgufError::Malformed { path: path.to_owned(), what });
            }
            return Ok(FileSet { files: vec![file] });
        }
        let files = names.iter().map(|name| File::open(&path.with_file_name(name))).collect::<Result<Vec<_>, _>>()?;
        let set = FileSet { files };
        set.check()?;
        Ok(set)
    }

    /// The GGUF files of a directory by name: each split model once, by its first file.
    ///
    /// # Errors
    /// [`GgufError::Unreadable`].
    pub fn in_directory(directory: &Path) -> Result<Vec<PathBuf>, GgufError> {
        let unreadable = |source| GgufError::Unreadable { path: directory.to_owned(), source };
        let mut names = BTreeSet::new();
        for entry in std::fs::read_dir(directory).map_err(unreadable)? {
            // Names that are not UTF-8 are nobody's models.
            let Ok(name) = entry.map_err(unreadable)?.file_name().into_string() else { continue };
            if name.ends_with(".gguf") && !name.starts_with('.') && directory.join(&name).is_file() {
                names.insert(name);
            }
        }
        // A part of a split model counts if its first file is missing, so that this is said.
        let is_later = |name: &String| parts(name).first().is_some_and(|first| first != name && names.contains(first));
        Ok(names.iter().filter(|name| !is_later(name)).map(|name| directory.join(name)).collect())
    }

    /// Compares what the files say about the whole.
    fn check(&self) -> Result<(), GgufError> {
        let count = self.files.len() as u64;
        let mut names = BTreeSet::new();
        for (number, file) in self.files.iter().enumerate() {
            let wrong = |what: String| Err(GgufError::Malformed { path: file.path().to_owned(), what });
            let says = |key: &str| file.get(key).and_then(Value::as_u64);
            if says("split.count").unwrap_or(1) != count || says("split.no").unwrap_or(0) != number as u64 {
                let (no, of) = (says("split.no").unwrap_or(0) + 1, says("split.count").unwrap_or(1));
                return wrong(format!("its name says part {} of {count}, its metadata part {no} of {of}", number + 1));
            }
            if let Some(twice) = file.tensors().iter().find(|tensor| !names.insert(tensor.name.as_str())) {
                return wrong(format!("the tensor `{}` is in an earlier part already", twice.name));
            }
        }
        let expected = self.files.first().and_then(|file| file.get("split.tensors.count")).and_then(Value::as_u64);
        match (expected, self.files.first()) {
            (Some(expected), Some(first)) if expected != names.len() as u64 => Err(GgufError::Malformed {
                path: first.path().to_owned(),
                what: format!("it says that all parts together have {expected} tensors; they have {}", names.len()),
            }),
            _ => Ok(()),
        }
    }

    /// The first file, which has the metadata.
    fn first(&self) -> &File {
        // `open` makes no empty set.
        &self.files[0]
    }

    /// Where the files are, in order.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(File::path)
    }

    /// From now on large tensors are read past the system's cache, where the file system lets it be passed: for
    /// files that are read again and again and are larger than the cache.
    pub fn pass_cache(&mut self) {
        self.files.iter_mut().for_each(File::pass_cache);
    }

    /// The files as they were when they were opened.
    pub fn opened(&self) -> impl Iterator<Item = &OpenedFile> {
        self.files.iter().map(File::opened)
    }

    /// What reads them.
    pub fn readers(&self) -> impl Iterator<Item = &FileReader> {
        self.files.iter().map(File::reader)
    }

    /// Bytes of all files.
    pub fn length(&self) -> u64 {
        self.files.iter().map(File::length).sum()
    }

    /// The file that has a tensor; the first if none has.
    fn holder(&self, name: &str) -> &File {
        self.files.iter().find(|file| file.tensor(name).is_some()).unwrap_or(self.first())
    }

    /// The path of the file that has a tensor; the first if none has.
    pub fn path_of(&self, name: &str) -> &Path {
        self.holder(name).path()
    }

    /// Keys and values, in the order of the first file.
    pub fn metadata(&self) -> &Metadata {
        self.first().metadata()
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.first().get(key)
    }

    /// All tensors, in the order of the files.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.files.iter().flat_map(File::tensors)
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.files.iter().find_map(|file| file.tensor(name))
    }

    /// The bytes of a tensor's numbers.
    ///
    /// # Errors
    /// As [`File::bytes`].
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>, GgufError> {
        self.holder(name).bytes(name)
    }

    /// Some of the bytes of a tensor's numbers, as [`File::part`].
    ///
    /// # Errors
    /// As [`File::bytes`].
    pub fn part(&self, name: &str, bytes: Range<u64>) -> Result<Vec<u8>, GgufError> {
        self.holder(name).part(name, bytes)
    }

    /// The number type of a tensor.
    pub fn kind(&self, name: &str) -> Option<TensorType> {
        self.tensor(name).map(|tensor| tensor.kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts() {
        let split = ["m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf"];
        assert_eq!(parts(split[0]), split);
        assert_eq!(parts(split[1]), split);
        for whole in ["m.gguf", "m-1-of-2.gguf", "m-00003-of-00002.gguf", "m-00000-of-00002.gguf", "m-00001-of-00002"] {
            assert_eq!(parts(whole), Vec::<String>::new(), "{whole}");
        }
    }
}
