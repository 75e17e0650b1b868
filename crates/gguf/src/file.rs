//! Reading a file that may be anybody's: every length is held against what is left of the file.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufReader, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use finetune_store::{FileReader, OpenedFile};

use crate::error::GgufError;
use crate::header::{ALIGNMENT, LONGEST_NAME, MAGIC, MOST_DIMENSIONS, TensorInfo, VERSION};
use crate::tensor_type::TensorType;
use crate::value::{Metadata, Value, ValueType};

/// The most bytes of everything before the tensors. Vocabularies take up to about 30 MB.
const LONGEST_HEADER: u64 = 512 << 20;
/// The most tensors and keys.
const MOST_ENTRIES: u64 = 1 << 20;
/// How deep arrays lie in each other at most.
const DEEPEST: usize = 4;
/// The largest alignment that is believed.
const LARGEST_ALIGNMENT: u64 = 1 << 20;

/// A GGUF file whose header has been checked.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    file: FileReader,
    version: u32,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    /// Where each tensor's bytes begin, from the start of the file.
    starts: BTreeMap<String, u64>,
    length: u64,
}

impl File {
    /// Opens a file and reads everything but the numbers of its tensors.
    ///
    /// # Errors
    /// [`GgufError::Unreadable`], or [`GgufError::Malformed`] for a file that is not GGUF, is of
    /// another version than 2 or 3, contradicts itself or ends too early.
    pub fn open(path: &Path) -> Result<File, GgufError> {
        let unreadable = |source| GgufError::Unreadable { path: path.to_owned(), source };
        // Inspected before it is opened: opening a pipe would wait for a writer.
        let metadata = path.metadata().map_err(unreadable)?;
        if !metadata.is_file() {
            return Err(GgufError::Malformed { path: path.to_owned(), what: "it is not a regular file".to_owned() });
        }
        let file = std::fs::File::open(path).map_err(unreadable)?;
        let opened = OpenedFile::new(path, &file.metadata().map_err(unreadable)?);
        let length = opened.length();
        let mut reader = Reader { path, file: BufReader::new(&file), position: 0, end: length.min(LONGEST_HEADER) };
        if reader.array::<4>()? != MAGIC {
            return Err(reader.wrong("it is not a GGUF file: it does not begin with `GGUF`"));
        }
        let version = reader.u32()?;
        if version != VERSION && version != 2 {
            return Err(reader.wrong(&format!("GGUF of version {version}; versions 2 and {VERSION} are read")));
        }
        let (tensors, keys) = (reader.count("tensors")?, reader.count("keys")?);
        let metadata = reader.metadata(keys)?;
        let infos = (0..tensors).map(|_| reader.tensor()).collect::<Result<Vec<_>, _>>()?;
        let alignment = metadata.iter().find(|(key, _)| key == "general.alignment");
        let alignment = alignment.map_or(Some(ALIGNMENT), |(_, value)| value.as_u64());
        let alignment =
            alignment.filter(|&alignment| alignment.is_power_of_two() && (8..=LARGEST_ALIGNMENT).contains(&alignment));
        let alignment = alignment.ok_or_else(|| reader.wrong("general.alignment is no power of two from 8 up"))?;
        let data = reader.position.next_multiple_of(alignment);
        let starts = places(&reader, &infos, data, alignment, length)?;
        let tensors = infos.into_iter().map(|(info, _)| info).collect();
        let file = FileReader::new(file, opened);
        Ok(File { path: path.to_owned(), version, metadata, tensors, starts, length, file })
    }

    /// The version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Keys and values, in the order of the file.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(known, _)| known == key).map(|(_, value)| value)
    }

    /// The tensors, in the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// From now on large tensors are read past the system's cache, where the file system lets it be passed.
    pub fn pass_cache(&mut self) {
        self.file.pass_cache();
    }

    /// The file as it was when it was opened.
    pub fn opened(&self) -> &OpenedFile {
        self.file.opened()
    }

    /// What reads it.
    pub fn reader(&self) -> &FileReader {
        &self.file
    }

    /// Bytes of the whole file.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.starts.contains_key(name).then(|| self.tensors.iter().find(|tensor| tensor.name == name))?
    }

    /// The bytes of a tensor's numbers.
    ///
    /// # Errors
    /// [`GgufError::Impossible`] for a name that the file has not or a type that is not read,
    /// [`GgufError::Store`] if it cannot be read, or was written to or cut since it was opened.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>, GgufError> {
        self.part(name, 0..u64::MAX)
    }

    /// Some of the bytes of a tensor's numbers; less of them if the tensor ends earlier. No others
    /// are read.
    ///
    /// # Errors
    /// As [`File::bytes`].
    pub fn part(&self, name: &str, bytes: Range<u64>) -> Result<Vec<u8>, GgufError> {
        let Some((tensor, &start)) = self.tensor(name).zip(self.starts.get(name)) else {
            return Err(GgufError::Impossible { what: format!("the tensor `{name}`, which it does not name") });
        };
        // `places` has compared the sizes with the length of the file.
        let size = tensor.bytes()?.min(self.length);
        let (first, end) = (bytes.start.min(size), bytes.end.min(size));
        let (start, length) = (start + first, end.saturating_sub(first));
        Ok(self.file.read_vec_at(length as usize, start)?)
    }

    /// The numbers of a tensor.
    ///
    /// # Errors
    /// As [`File::bytes`].
    pub fn values(&self, name: &str) -> Result<Vec<f32>, GgufError> {
        let kind = self.tensors.iter().find(|tensor| tensor.name == name).map(|tensor| tensor.kind);
        kind.unwrap_or(TensorType::F32).decode(&self.bytes(name)?)
    }
}

/// Where tensors begin. They must be aligned and lie inside the file; of types that are not known
/// only the beginning can be checked.
fn places(
    reader: &Reader<'_>,
    infos: &[(TensorInfo, u64)],
    data: u64,
    alignment: u64,
    length: u64,
) -> Result<BTreeMap<String, u64>, GgufError> {
    let mut starts = BTreeMap::new();
    for (info, offset) in infos {
        let size = match info.kind {
            TensorType::Other(_) => 0,
            _ => info.bytes().map_err(|error| reader.wrong(&error.to_string()))?,
        };
        let start = data.checked_add(*offset);
        let end = start.and_then(|start| start.checked_add(size)).filter(|&end| end <= length);
        let (Some(start), Some(_)) = (start, end) else {
            return Err(reader.wrong(&format!("the tensor `{}` lies beyond the end of the file", info.name)));
        };
        if !offset.is_multiple_of(alignment) {
            return Err(reader.wrong(&format!("the tensor `{}` is not aligned to {alignment} bytes", info.name)));
        }
        if starts.insert(info.name.clone(), start).is_some() {
            return Err(reader.wrong(&format!("the tensor `{}` is there twice", info.name)));
        }
    }
    Ok(starts)
}

struct Reader<'a> {
    path: &'a Path,
    file: BufReader<&'a std::fs::File>,
    position: u64,
    /// Nothing is read beyond it.
    end: u64,
}

impl Reader<'_> {
    fn wrong(&self, what: &str) -> GgufError {
        GgufError::Malformed { path: self.path.to_owned(), what: what.to_owned() }
    }

    fn left(&self) -> u64 {
        self.end - self.position
    }

    /// Refuses what would go beyond the end, before memory is taken for it.
    fn expect(&self, bytes: u64) -> Result<(), GgufError> {
        if bytes <= self.left() {
            return Ok(());
        }
        Err(self.wrong(&format!("it ends too early: {bytes} bytes at {} are not there", self.position)))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        self.expect(N as u64)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), GgufError> {
        let unreadable = |source| GgufError::Unreadable { path: self.path.to_owned(), source };
        self.file.read_exact(bytes).map_err(unreadable)?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn count(&mut self, of: &str) -> Result<u64, GgufError> {
        let count = self.u64()?;
        if count > MOST_ENTRIES {
            return Err(self.wrong(&format!("it says that it has {count} {of}")));
        }
        Ok(count)
    }

    fn text(&mut self) -> Result<String, GgufError> {
        let length = self.u64()?;
        self.expect(length)?;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| self.wrong(&format!("the text before {} is not UTF-8", self.position)))
    }

    fn value_type(&mut self) -> Result<ValueType, GgufError> {
        let code = self.u32()?;
        ValueType::of_code(code).ok_or_else(|| self.wrong(&format!("{code} is no type of a value")))
    }

    fn value(&mut self, kind: ValueType, depth: usize) -> Result<Value, GgufError> {
        Ok(match kind {
            ValueType::U8 => Value::U8(self.array::<1>()?[0]),
            ValueType::I8 => Value::I8(i8::from_le_bytes(self.array()?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.array()?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.array()?)),
            ValueType::U32 => Value::U32(self.u32()?),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.array()?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.array()?)),
            ValueType::Bool => Value::Bool(self.array::<1>()?[0] != 0),
            ValueType::String => Value::String(self.text()?),
            ValueType::U64 => Value::U64(self.u64()?),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.array()?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.array()?)),
            ValueType::Array => {
                let of = self.value_type()?;
                let count = self.u64()?;
                self.expect(count.saturating_mul(of.least_bytes()))?;
                if depth == DEEPEST {
                    return Err(self.wrong("its arrays lie too deep in each other"));
                }
                let values = (0..count).map(|_| self.value(of, depth + 1));
                Value::Array(values.collect::<Result<Vec<_>, _>>()?)
            }
        })
    }

    fn metadata(&mut self, keys: u64) -> Result<Metadata, GgufError> {
        let (mut metadata, mut known) = (Metadata::new(), BTreeSet::new());
        for _ in 0..keys {
            let key = self.text()?;
            if !known.insert(key.clone()) {
                return Err(self.wrong(&format!("the key `{key}` is there twice")));
            }
            let kind = self.value_type()?;
            metadata.push((key, self.value(kind, 0)?));
        }
        Ok(metadata)
    }

    /// A tensor and its offset.
    fn tensor(&mut self) -> Result<(TensorInfo, u64), GgufError> {
        let name = self.text()?;
        let dimensions = self.u32()? as usize;
        if name.len() > LONGEST_NAME || dimensions == 0 || dimensions > MOST_DIMENSIONS {
            return Err(self.wrong(&format!("the tensor `{name}` has {dimensions} dimensions")));
        }
        let mut shape = (0..dimensions)
            .map(|_| Ok(usize::try_from(self.u64()?).unwrap_or(usize::MAX)))
            .collect::<Result<Vec<_>, GgufError>>()?;
        shape.reverse();
        let kind = TensorType::of_code(self.u32()?);
        Ok((TensorInfo { name, shape, kind }, self.u64()?))
    }
}
