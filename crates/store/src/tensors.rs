//! A safetensors file whose tensors are read when they are asked for.
//!
//! The file is read and not mapped into memory. If a mapped file gets shorter or its disk fails,
//! SIGBUS ends the process without a message. A read ends with an error that names the file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::absent;
use crate::dtype::Dtype;
use crate::error::{Operation, StoreError};
use crate::file_reader::FileReader;
use crate::header::{Header, LENGTH_BYTES, MAX_HEADER_BYTES, TensorInfo};
use crate::identity::OpenedFile;
use crate::stand_in::{START_BYTES, StandIn};

/// One tensor of a file. Its bytes are little-endian and row-major.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Its name.
    pub name: &'a str,
    /// The format of its numbers.
    pub dtype: Dtype,
    /// Its lengths, the outermost dimension first.
    pub shape: &'a [usize],
    file: &'a TensorFile,
    /// Where its bytes begin, from the start of the file.
    start: u64,
    size: usize,
}

impl<'a> TensorView<'a> {
    /// Some of its elements as a tensor of their own: those that follow each other from the byte `start`
    /// on.
    ///
    /// # Panics
    /// If the part reaches beyond the tensor.
    pub(crate) fn part(&self, name: &'a str, shape: &'a [usize], start: usize) -> TensorView<'a> {
        let size = shape.iter().product::<usize>() * self.dtype.size();
        assert!(start + size <= self.size, "a part of the tensor");
        TensorView { name, shape, start: self.start + start as u64, size, ..*self }
    }

    /// Bytes that it takes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The file that it is in.
    pub fn path(&self) -> &'a Path {
        &self.file.path
    }

    /// Whether its file is here, and not only the header.
    pub fn is_here(&self) -> bool {
        self.file.is_here()
    }

    /// Reads all of it: [`TensorView::size`] bytes.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Changed`] if the file was written to or cut since it was opened, or
    /// [`StoreError::NoShard`] if only its header is here.
    pub fn bytes(&self) -> Result<Vec<u8>, StoreError> {
        self.file.bytes_at(self.start, self.size)
    }

    /// Reads `size` bytes of it, from byte `start` on.
    ///
    /// # Errors
    /// As [`TensorView::bytes`].
    ///
    /// # Panics
    /// If it has not so many.
    pub fn bytes_at(&self, start: usize, size: usize) -> Result<Vec<u8>, StoreError> {
        assert!(start + size <= self.size, "a part of the tensor");
        self.file.bytes_at(self.start + start as u64, size)
    }

    /// Reads it piece by piece through one buffer. No piece but the last has less than [`PIECE`]
    /// bytes.
    ///
    /// # Errors
    /// As [`TensorView::bytes`], and the errors of `each`.
    pub fn pieces<E: From<StoreError>>(&self, each: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        self.file.pieces(self.start, self.size as u64, each)
    }
}

/// A matrix in a file, whose rows are read when they are asked for. It keeps the file open.
#[derive(Debug)]
pub struct FileRows {
    file: FileReader,
    /// Where row 0 begins, from the start of the file.
    start: u64,
    /// Rows, and bytes of each.
    rows: usize,
    row: usize,
    /// The format of its numbers.
    pub dtype: Dtype,
}

impl TensorView<'_> {
    /// The rows of a matrix, for longer than its file is open here.
    ///
    /// # Errors
    /// [`StoreError::NoShard`] if only the header is here, or [`StoreError::Io`].
    ///
    /// # Panics
    /// If it is no matrix.
    pub fn rows(&self) -> Result<FileRows, StoreError> {
        let &[rows, columns] = self.shape else { panic!("`{}` is no matrix", self.name) };
        let Some(file) = &self.file.file else { return Err(self.file.missing()) };
        let file = file.again()?;
        Ok(FileRows { file, start: self.start, rows, row: columns * self.dtype.size(), dtype: self.dtype })
    }
}

impl FileRows {
    /// The bytes of a row.
    ///
    /// # Errors
    /// As [`TensorView::bytes`].
    ///
    /// # Panics
    /// If there is no such row.
    pub fn read(&self, row: usize) -> Result<Vec<u8>, StoreError> {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let mut bytes = vec![0; self.row];
        self.file.read_exact_at(&mut bytes, self.start + (row * self.row) as u64)?;
        Ok(bytes)
    }

    /// The file that they are in.
    pub fn path(&self) -> &Path {
        self.file.opened().path()
    }
}

/// Bytes of a file or tensor that are read at a time if it need not be in memory as a whole. It is
/// a multiple of the size of every dtype's element.
pub const PIECE: usize = 8 << 20;

/// A safetensors file whose header has been checked.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    /// `None`: only the header is here.
    file: Option<FileReader>,
    length: u64,
    header: Header,
    header_hash: [u8; 32],
}

impl TensorFile {
    /// Opens the file and checks its header. Links are followed, since the Hugging Face cache has
    /// them.
    ///
    /// # Errors
    /// [`StoreError::Malformed`], [`StoreError::InItsPlace`] for a file of another format,
    /// [`StoreError::Io`].
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        // Inspected before it is opened: opening a pipe would wait for a writer.
        let metadata = path.metadata().map_err(|source| StoreError::reading(path, source))?;
        if !metadata.is_file() {
            return Err(StoreError::malformed(path, "it is not a regular file"));
        }
        let file = File::open(path).map_err(|source| StoreError::reading(path, source))?;
        let metadata = file.metadata().map_err(|source| StoreError::io(path, Operation::Inspect, 0, source))?;
        let length = metadata.len();
        let start = read_at(&file, path, 0, length.min(START_BYTES))?;
        let wrong = |what: String| match StandIn::of(&start) {
            Some(what) => StoreError::InItsPlace { path: path.to_path_buf(), what },
            None => StoreError::malformed(path, what),
        };
        let json_length = Header::json_length(&start, length).map_err(wrong)?;
        let bytes = read_at(&file, path, 0, (LENGTH_BYTES + json_length) as u64)?;
        let data_length = length - bytes.len() as u64;
        let header = usize::try_from(data_length)
            .map_err(|_| "it is too large for this machine".to_string())
            .and_then(|data_length| Header::parse_json(&bytes[LENGTH_BYTES..], data_length))
            .map_err(wrong)?;
        let header_hash = *blake3::hash(&bytes).as_bytes();
        let file = Some(FileReader::new(file, OpenedFile::new(path, &metadata)));
        Ok(Self { path: path.to_path_buf(), file, length, header, header_hash })
    }

    /// A file that is not here, by its header that is kept at `kept` (`absent.rs`).
    pub(crate) fn open_header(path: &Path, kept: &Path) -> Result<Self, StoreError> {
        let failed = |source| StoreError::reading(kept, source);
        let file = File::open(kept).map_err(failed)?;
        let bytes_kept = file.metadata().map_err(failed)?.len();
        let most = (2 * LENGTH_BYTES + MAX_HEADER_BYTES) as u64;
        let bytes = read_at(&file, kept, 0, bytes_kept.min(most))?;
        let Some((length, start)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
            return Err(StoreError::malformed(kept, "it has no length"));
        };
        let length = u64::from_le_bytes(*length);
        let header = absent::parse(start, length).map_err(|what| StoreError::malformed(kept, what))?;
        Ok(Self { path: path.to_path_buf(), file: None, length, header, header_hash: *blake3::hash(start).as_bytes() })
    }

    /// Whether the file is here, and not only its header.
    pub fn is_here(&self) -> bool {
        self.file.is_some()
    }

    /// The error for a file of which only the header is here.
    fn missing(&self) -> StoreError {
        absent::no_file(&self.path, self.names())
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of its tensors, in the order of their bytes in the file.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.iter().map(|tensor| tensor.name.as_str())
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let TensorInfo { name, dtype, shape, begin, end } = self.header.get(name)?;
        let start = (self.header.data_start + begin) as u64;
        Some(TensorView { name, dtype: *dtype, shape, file: self, start, size: end - begin })
    }

    /// The texts of the header's `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// The blake3 hash of the header. It tells which tensors there are, not what is in them.
    pub fn header_hash(&self) -> [u8; 32] {
        self.header_hash
    }

    /// From now on its large parts are read past the system's cache.
    pub(crate) fn pass_cache(&mut self) {
        self.file.iter_mut().for_each(FileReader::pass_cache);
    }

    /// The file as it was when it was opened. `None`: only its header is here.
    pub(crate) fn opened(&self) -> Option<&OpenedFile> {
        self.file.as_ref().map(FileReader::opened)
    }

    /// What reads it. `None`: only its header is here.
    pub(crate) fn reader(&self) -> Option<&FileReader> {
        self.file.as_ref()
    }

    /// Bytes of the whole file.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Reads `length` bytes from `start` on, a piece at a time.
    pub(crate) fn pieces<E: From<StoreError>>(
        &self,
        start: u64,
        length: u64,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut buffer = vec![0; length.min(PIECE as u64) as usize];
        let mut done = 0;
        while done < length {
            let now = (length - done).min(PIECE as u64) as usize;
            self.read_at(&mut buffer[..now], start + done)?;
            each(&buffer[..now])?;
            done += now as u64;
        }
        Ok(())
    }

    fn bytes_at(&self, start: u64, length: usize) -> Result<Vec<u8>, StoreError> {
        let Some(file) = &self.file else { return Err(self.missing()) };
        file.read_vec_at(length, start)
    }

    fn read_at(&self, buffer: &mut [u8], start: u64) -> Result<(), StoreError> {
        let Some(file) = &self.file else { return Err(self.missing()) };
        file.read_exact_at(buffer, start)
    }
}

fn read_at(file: &File, path: &Path, start: u64, length: u64) -> Result<Vec<u8>, StoreError> {
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, start).map_err(|source| cut_or_failed(path, start, length, source))?;
    Ok(bytes)
}

/// The error of a read from a file that was just opened. If it ends too early it has been cut since.
fn cut_or_failed(path: &Path, start: u64, length: u64, source: io::Error) -> StoreError {
    match source.kind() {
        io::ErrorKind::UnexpectedEof => {
            let what = "it became shorter while it was being read";
            StoreError::malformed(path, format!("{what}: {length} bytes from {start} on are not all there"))
        }
        _ => StoreError::reading(path, source),
    }
}
