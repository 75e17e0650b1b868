//! A safetensors file, mapped into memory: the only unsafe code of this crate.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Operation, StoreError};
use crate::header::{Header, TensorInfo};

/// The number formats of safetensors that fill whole bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(non_camel_case_types, reason = "the names in the files")]
pub enum Dtype {
    BOOL,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    F8_E8M0,
    F8_E4M3FNUZ,
    F8_E5M2FNUZ,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    C64,
    F64,
    I64,
    U64,
}

const DTYPES: [(Dtype, &str, usize); 19] = [
    (Dtype::BOOL, "BOOL", 1),
    (Dtype::U8, "U8", 1),
    (Dtype::I8, "I8", 1),
    (Dtype::F8_E5M2, "F8_E5M2", 1),
    (Dtype::F8_E4M3, "F8_E4M3", 1),
    (Dtype::F8_E8M0, "F8_E8M0", 1),
    (Dtype::F8_E4M3FNUZ, "F8_E4M3FNUZ", 1),
    (Dtype::F8_E5M2FNUZ, "F8_E5M2FNUZ", 1),
    (Dtype::I16, "I16", 2),
    (Dtype::U16, "U16", 2),
    (Dtype::F16, "F16", 2),
    (Dtype::BF16, "BF16", 2),
    (Dtype::I32, "I32", 4),
    (Dtype::U32, "U32", 4),
    (Dtype::F32, "F32", 4),
    (Dtype::C64, "C64", 8),
    (Dtype::F64, "F64", 8),
    (Dtype::I64, "I64", 8),
    (Dtype::U64, "U64", 8),
];

impl Dtype {
    pub fn parse(name: &str) -> Option<Self> {
        DTYPES.iter().find(|(_, known, _)| *known == name).map(|(dtype, _, _)| *dtype)
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        DTYPES[self as usize].2
    }

    /// The name in the file, such as `BF16`.
    pub fn name(self) -> &'static str {
        DTYPES[self as usize].1
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// One tensor of a mapped file. The bytes are little-endian, row-major and need not be aligned.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

/// A safetensors file whose header has been checked. Bytes are read when they are looked at.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    header: Header,
}

impl TensorFile {
    /// Maps the file and checks its header. Links are followed: the Hugging Face cache has them.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let file = File::open(path).map_err(|source| StoreError::reading(path, source))?;
        let failed = |operation| move |source| StoreError::io(path, operation, 0, source);
        if !file.metadata().map_err(failed(Operation::Inspect))?.is_file() {
            return Err(StoreError::malformed(path, "it is not a regular file"));
        }
        // SAFETY: the map is read-only and private to this struct, which outlives every slice of
        // it. What no program can rule out is that another one changes or cuts the file meanwhile
        // (then the bytes change, or the process gets SIGBUS): model files are written once, under
        // another name, and renamed into place, by us and by the Hugging Face cache alike. Bytes
        // that change are only ever read as numbers; the header is parsed once and kept.
        let map = unsafe { Mmap::map(&file) }.map_err(failed(Operation::Map))?;
        let header = Header::parse(&map).map_err(|what| StoreError::malformed(path, what))?;
        Ok(Self { path: path.to_path_buf(), map, header })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// In the order of the tensors' bytes in the file.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.iter().map(|tensor| tensor.name.as_str())
    }

    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let TensorInfo { name, dtype, shape, begin, end } = self.header.get(name)?;
        let bytes = self.map.get(self.header.data_start..)?.get(*begin..*end)?;
        Some(TensorView { name, dtype: *dtype, shape, bytes })
    }

    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// The blake3 hash of the header: which tensors there are, not what is in them.
    pub fn header_hash(&self) -> [u8; 32] {
        let end = self.header.data_start.min(self.map.len());
        *blake3::hash(&self.map[..end]).as_bytes()
    }

    /// The whole file.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Lets go of the pages of some of the file's bytes: they count as this process's memory until then, and are read again
    /// when they are looked at again.
    pub(crate) fn release(&self, bytes: &[u8]) {
        const PAGE: usize = 1 << 16;
        let start = (bytes.as_ptr() as usize - self.map.as_ptr() as usize).next_multiple_of(PAGE);
        let end = (bytes.as_ptr() as usize - self.map.as_ptr() as usize + bytes.len()) / PAGE * PAGE;
        if start < end {
            // SAFETY: the map is read-only and of a file, so pages that are let go come back with the same bytes.
            let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_dtypes_is_in_the_order_of_the_enum() {
        for (position, (dtype, name, _)) in DTYPES.iter().enumerate() {
            assert_eq!(*dtype as usize, position, "{name}");
            assert_eq!(Dtype::parse(dtype.name()), Some(*dtype));
            assert_eq!(format!("{dtype:?}"), *name);
        }
    }
}
