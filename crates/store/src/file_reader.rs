//! A file that is read in parts, through the system's cache or past it.
//!
//! The cache keeps what was read last. Where a file that it cannot hold is read from start to end, again and again,
//! each byte is gone before it is wanted again, and whatever else the cache held goes with it. Reads past it go from
//! the disk to a buffer of ours. The disk asks that their places, lengths and memory are aligned. So a part is read in
//! pieces, each rounded outwards, and what was asked for is copied out of them.
//!
//! A file that is written to while it is in use would give bytes of two files. So each read is followed by a look at
//! its length and its time of modification (`identity.rs`), which takes less than a microsecond. It comes behind the
//! read: systems set the time before they take the bytes of a write.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::error::StoreError;
use crate::failpoint;
use crate::identity::OpenedFile;

#[cfg(test)]
mod tests;

/// Bytes of a piece at most: enough for the rate of the disk with a few at a time, and little memory for each thread.
const AT_ONCE: usize = 1 << 20;
/// What is smaller goes through the cache, which reads ahead: a row of a matrix is followed by the next one.
const LEAST: usize = 64 << 10;
/// What disks ask for at most, if the system does not say: the page of memory and of file systems.
const PAGE: usize = 4 << 10;

thread_local! {
    /// Where pieces are read to: one and what rounding adds, for each thread that reads.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// An open file, of which parts are read.
#[derive(Debug)]
pub struct FileReader {
    file: File,
    opened: OpenedFile,
    past_cache: Option<PastCache>,
    /// The same for all readers of the open file: who waits for one of them looks at any.
    reads: Arc<Reads>,
}

/// What whoever waits for a read may look at.
#[derive(Debug, Default)]
struct Reads {
    /// Bytes that have come so far.
    bytes: AtomicU64,
    under_way: AtomicUsize,
}

/// Counts a read as long as it is there.
struct UnderWay<'a>(&'a Reads);

impl<'a> UnderWay<'a> {
    fn new(reads: &'a Reads) -> UnderWay<'a> {
        reads.under_way.fetch_add(1, Ordering::Relaxed);
        UnderWay(reads)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The same file, opened to be read past the cache.
#[derive(Debug)]
struct PastCache {
    file: File,
    /// What places, lengths and memory have to be multiples of: a power of two, at most a piece.
    alignment: usize,
    /// Whether such a read has failed: no other is tried.
    has_failed: AtomicBool,
}

impl FileReader {
    /// Reads through the system's cache. `opened`: the file as it was before anything of it was read.
    pub fn new(file: File, opened: OpenedFile) -> FileReader {
        FileReader { file, opened, past_cache: None, reads: Arc::default() }
    }

    /// A second reader of the open file, whatever has its name by now. It reads through the system's cache.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the system has no more open files to give.
    pub(crate) fn again(&self) -> Result<FileReader, StoreError> {
        let file = self.file.try_clone().map_err(|source| StoreError::reading(self.opened.path(), source))?;
        Ok(FileReader { reads: self.reads.clone(), ..FileReader::new(file, self.opened.clone()) })
    }

    /// The file as it was when it was opened.
    pub fn opened(&self) -> &OpenedFile {
        &self.opened
    }

    /// Bytes that all reads have brought so far, piece by piece, those of a second reader too.
    pub fn bytes_read(&self) -> u64 {
        self.reads.bytes.load(Ordering::Relaxed)
    }

    /// Whether a read is under way, of this reader or a second one.
    pub fn is_reading(&self) -> bool {
        self.reads.under_way.load(Ordering::Relaxed) > 0
    }

    /// From now on large parts are read past the system's cache, if the file system lets it be passed.
    pub fn pass_cache(&mut self) {
        let opened = open_past_cache(&self.file).filter(|(_, alignment)| AT_ONCE.is_multiple_of(*alignment));
        self.past_cache =
            opened.map(|(file, alignment)| PastCache { file, alignment, has_failed: AtomicBool::new(false) });
    }

    /// Fills the buffer with the bytes from `start` on. Past the cache they come piece by piece, so it takes
    /// several threads to keep a disk busy.
    ///
    /// # Errors
    /// [`StoreError::Changed`] if the file was written to or cut since it was opened, [`StoreError::Malformed`] if it
    /// never had so many bytes, [`StoreError::Io`].
    pub fn read_exact_at(&self, buffer: &mut [u8], start: u64) -> Result<(), StoreError> {
        self.checked(buffer.len(), start, || self.fill(buffer, start))
    }

    /// So many bytes from `start` on. Memory that they come to is not filled with zeros as a whole before.
    ///
    /// # Errors
    /// As [`FileReader::read_exact_at`].
    pub fn read_vec_at(&self, length: usize, start: u64) -> Result<Vec<u8>, StoreError> {
        let mut bytes = Vec::with_capacity(length);
        self.checked(length, start, || self.append(&mut bytes, length, start))?;
        Ok(bytes)
    }

    /// Reads, and looks at the file behind it.
    fn checked(&self, length: usize, start: u64, read: impl FnOnce() -> io::Result<()>) -> Result<(), StoreError> {
        let _under_way = UnderWay::new(&self.reads);
        failpoint::hit("file.read");
        let path = self.opened.path();
        let read = read();
        let now = self.file.metadata().map_err(|source| StoreError::reading(path, source))?;
        self.opened.expect_unwritten(&now)?;
        read.map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => {
                StoreError::malformed(path, format!("{length} bytes from {start} on are not all there"))
            }
            _ => StoreError::reading(path, source),
        })
    }

    /// [`io::ErrorKind::UnexpectedEof`]: the file has not so many bytes.
    fn fill(&self, mut rest: &mut [u8], start: u64) -> io::Result<()> {
        let past_cache = self.way_past_cache(rest.len());
        for (start, length) in pieces(rest.len(), start) {
            let (piece, behind) = rest.split_at_mut(length);
            // What does not come past the cache comes through it, or with the error that says why not.
            if !past_cache.is_some_and(|past| past.read(start, length, |bytes| piece.copy_from_slice(bytes))) {
                self.file.read_exact_at(piece, start)?;
            }
            self.reads.bytes.fetch_add(length as u64, Ordering::Relaxed);
            rest = behind;
        }
        Ok(())
    }

    /// As [`FileReader::fill`], behind what is there.
    fn append(&self, bytes: &mut Vec<u8>, length: usize, start: u64) -> io::Result<()> {
        let past_cache = self.way_past_cache(length);
        for (start, length) in pieces(length, start) {
            if !past_cache.is_some_and(|past| past.read(start, length, |piece| bytes.extend_from_slice(piece))) {
                // A piece of zeros is still in the processor's cache when the bytes come.
                let before = bytes.len();
                bytes.resize(before + length, 0);
                self.file.read_exact_at(&mut bytes[before..], start)?;
            }
            self.reads.bytes.fetch_add(length as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// How so many bytes are read past the cache, if they are.
    fn way_past_cache(&self, length: usize) -> Option<&PastCache> {
        self.past_cache.as_ref().filter(|_| length >= LEAST)
    }
}

impl PastCache {
    /// Hands over the `length` bytes of a piece from `start` on. `false`: they do not come so, or the file has ended.
    fn read(&self, start: u64, length: usize, take: impl FnOnce(&[u8])) -> bool {
        if self.has_failed.load(Ordering::Relaxed) {
            return false;
        }
        let before = (start % self.alignment as u64) as usize;
        let wanted = before..before + length;
        let rounded = wanted.end.next_multiple_of(self.alignment);
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < rounded + self.alignment {
                buffer.resize(AT_ONCE.max(rounded) + self.alignment, 0);
            }
            let aligned = buffer.as_ptr().align_offset(self.alignment);
            let Some(bytes) = buffer.get_mut(aligned..).and_then(|bytes| bytes.get_mut(..rounded)) else {
                return false;
            };
            match self.file.read_at(bytes, start - before as u64) {
                Ok(read) if read >= wanted.end => take(&bytes[wanted]),
                Ok(_) => return false,
                // Some file systems open a file so, and refuse only to read it.
                Err(error) => {
                    if error.kind() != io::ErrorKind::Interrupted {
                        self.has_failed.store(true, Ordering::Relaxed);
                    }
                    return false;
                }
            }
            true
        })
    }
}

/// The pieces of so many bytes from `start` on: where each begins, and its length. All but the first begin at multiples
/// of [`AT_ONCE`]: no block of the disk is read twice.
fn pieces(mut rest: usize, mut start: u64) -> impl Iterator<Item = (u64, usize)> {
    std::iter::from_fn(move || {
        let (begin, length) = (start, (AT_ONCE - (start % AT_ONCE as u64) as usize).min(rest));
        (rest, start) = (rest - length, start + length as u64);
        (length > 0).then_some((begin, length))
    })
}

/// The same file opened with O_DIRECT, and the alignment that it asks for. `None`: the file system has no such reads.
#[cfg(target_os = "linux")]
fn open_past_cache(file: &File) -> Option<(File, usize)> {
    use std::fs::OpenOptions;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;

    use rustix::fs::{AtFlags, OFlags, StatxFlags, statx};

    // Not by its path, where another file may lie by now.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let opened = OpenOptions::new().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path).ok()?;
    // Linux says it since 6.1.
    let told = statx(&opened, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    let told = told.filter(|told| told.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    let Some(told) = told else { return Some((opened, PAGE)) };
    let alignment = PAGE.max(told.stx_dio_mem_align as usize).max(told.stx_dio_offset_align as usize);
    (told.stx_dio_offset_align > 0).then_some((opened, alignment))
}

/// The same file with the cache off (fcntl's F_NOCACHE), and a page of memory of Apple's processors.
#[cfg(target_vendor = "apple")]
fn open_past_cache(file: &File) -> Option<(File, usize)> {
    let opened = file.try_clone().ok()?;
    rustix::fs::fcntl_nocache(&opened, true).ok()?;
    Some((opened, 4 * PAGE))
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
fn open_past_cache(_file: &File) -> Option<(File, usize)> {
    None
}
