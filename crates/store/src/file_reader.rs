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
        let _under_way = UnderWay::new(&self.reads);
        failpoint::hit("file.read");
        let (path, length) = (self.opened.path(), buffer.len());
        let read = self.read(buffer, start);
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
    fn read(&self, buffer: &mut [u8], start: u64) -> io::Result<()> {
        let past_cache = self.past_cache.as_ref().filter(|_| buffer.len() >= LEAST);
        pieces(buffer, start).try_for_each(|(start, piece)| {
            // What does not come past the cache comes through it, or with the error that says why not.
            if !past_cache.is_some_and(|past_cache| past_cache.read(piece, start)) {
                self.file.read_exact_at(piece, start)?;
            }
            self.reads.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
            Ok(())
        })
    }
}

impl PastCache {
    /// Fills a piece with the bytes from `start` on. `false`: they do not come so, or the file has ended.
    fn read(&self, piece: &mut [u8], start: u64) -> bool {
        if self.has_failed.load(Ordering::Relaxed) {
            return false;
        }
        let before = (start % self.alignment as u64) as usize;
        let wanted = before..before + piece.len();
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
                Ok(read) if read >= wanted.end => piece.copy_from_slice(&bytes[wanted]),
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

/// The pieces of a part from `start` on, and where each begins. All but the first begin at multiples of [`AT_ONCE`]: no
/// block of the disk is read twice.
fn pieces(mut part: &mut [u8], mut start: u64) -> impl Iterator<Item = (u64, &mut [u8])> {
    std::iter::from_fn(move || {
        let length = (AT_ONCE - (start % AT_ONCE as u64) as usize).min(part.len());
        let piece = part.split_off_mut(..length).filter(|piece| !piece.is_empty())?;
        let begin = start;
        start += length as u64;
        Some((begin, piece))
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

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::path::Path;
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::disk::RealDisk;
    use crate::replace::replace_file;

    const LENGTH: usize = 3 * AT_ONCE + 12_345;

    /// Bytes that no two places nearby have alike.
    fn content() -> Vec<u8> {
        (0..LENGTH as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    }

    /// A file, and the readers of it by name: one for each way that its bytes may come.
    fn readers(path: &Path) -> Vec<(&'static str, FileReader)> {
        let open = || File::open(path).expect("the file");
        let opened = OpenedFile::new(path, &path.metadata().expect("the file"));
        let mut past_cache = FileReader::new(open(), opened.clone());
        past_cache.pass_cache();
        // No read of a file that is open for writing alone succeeds.
        let unreadable = OpenOptions::new().append(true).open(path).expect("the file");
        let refused = PastCache { file: unreadable, alignment: PAGE, has_failed: AtomicBool::new(false) };
        // Most disks refuse it.
        let direct = open_past_cache(&open()).map_or_else(open, |(file, _)| file);
        let barely_aligned = PastCache { file: direct, alignment: 2, has_failed: AtomicBool::new(false) };
        let with = |past_cache| FileReader {
            file: open(),
            opened: opened.clone(),
            past_cache: Some(past_cache),
            reads: Arc::default(),
        };
        let again = FileReader::new(open(), opened.clone()).again().expect("a second reader");
        vec![
            ("through the cache", FileReader::new(open(), opened.clone())),
            ("a second reader", again),
            ("past the cache", past_cache),
            ("refused", with(refused)),
            ("barely aligned", with(barely_aligned)),
        ]
    }

    #[test]
    fn every_way_gives_the_same_bytes() {
        let directory = tempfile::tempdir().expect("a directory");
        let (path, content) = (directory.path().join("file"), content());
        replace_file(&RealDisk, &path, &content).expect("a file");
        for (name, reader) in readers(&path) {
            for (start, length) in [
                (0, 0),
                (0, LENGTH),
                (0, AT_ONCE),
                (0, LEAST - 1),
                (0, LEAST),
                (1, LEAST),
                (PAGE - 1, LEAST + 2),
                (PAGE, AT_ONCE),
                (8, AT_ONCE - 8),
                (8, AT_ONCE),
                (AT_ONCE - 1, AT_ONCE + 2),
                (AT_ONCE + 511, 2 * AT_ONCE),
                (LENGTH - LEAST, LEAST),
                (LENGTH - 2 * AT_ONCE - 7, 2 * AT_ONCE + 7),
                (LENGTH, 0),
            ] {
                let (mut bytes, read_before) = (vec![0; length], reader.bytes_read());
                reader
                    .read_exact_at(&mut bytes, start as u64)
                    .unwrap_or_else(|e| panic!("{name} {start} {length}: {e}"));
                assert!(bytes == content[start..start + length], "{name}: {length} bytes from {start} on");
                assert!(!reader.is_reading() && reader.bytes_read() == read_before + length as u64, "{name} {length}");
            }
        }
    }

    /// Who waits for rows of a matrix, which have a reader of their own, looks at the reader of the file.
    #[test]
    fn reads_of_a_second_reader_are_seen() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        replace_file(&RealDisk, &path, &content()).expect("a file");
        let opened = OpenedFile::new(&path, &path.metadata().expect("the file"));
        let reader = FileReader::new(File::open(&path).expect("the file"), opened);
        let again = reader.again().expect("a second reader");
        again.read_exact_at(&mut [0; 100], 7).expect("bytes");
        reader.read_exact_at(&mut [0; 10], 7).expect("bytes");
        assert_eq!((reader.bytes_read(), again.bytes_read()), (110, 110));
        let _under_way = UnderWay::new(&again.reads);
        assert!(reader.is_reading());
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        replace_file(&RealDisk, &path, &content()).expect("a file");
        let readers = readers(&path);
        let expect_end = |start: usize, length: usize| {
            for (name, reader) in &readers {
                let error = reader.read(&mut vec![0; length], start as u64).expect_err("an end");
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{name}: {length} bytes from {start} on");
            }
        };
        expect_end(LENGTH - LEAST, LEAST + 1);
        expect_end(LENGTH + 5, AT_ONCE);
        // It is cut while it is open: inside of a page, and at its end.
        for length in [2 * AT_ONCE + 100, AT_ONCE] {
            let file = OpenOptions::new().write(true).open(&path).expect("the file");
            file.set_len(length as u64).expect("a shorter file");
            expect_end(0, LENGTH);
            expect_end(length - LEAST, LEAST + 1);
            for (name, reader) in &readers {
                reader.read(&mut vec![0; LEAST], (length - LEAST) as u64).unwrap_or_else(|e| panic!("{name}: {e}"));
            }
        }
    }

    /// What happens to a file while it is open: its name, what is done, and what a read says then. `None`: a read has
    /// the bytes of before.
    type Change<'a> = (&'a str, &'a dyn Fn(&Path), Option<&'a str>);

    fn for_writing(path: &Path) -> File {
        OpenOptions::new().write(true).open(path).expect("the file")
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]
    fn what_is_written_to_while_it_is_open_is_refused() {
        let other: Vec<u8> = content().iter().map(|byte| byte ^ 1).collect();
        let touched = Some("its time of modification is another");
        let changes: [Change<'_>; 9] = [
            ("nothing", &|_| (), None),
            (
                "its last byte",
                &|path| for_writing(path).write_all_at(&[7], LENGTH as u64 - 1).expect("a byte"),
                touched,
            ),
            ("all bytes, as many", &|path| for_writing(path).write_all(&other).expect("bytes"), touched),
            ("emptied and filled again", &|path| std::fs::write(path, &other).expect("bytes"), touched),
            ("cut", &|path| for_writing(path).set_len(9).expect("a cut"), Some("it had 3158073 bytes, and has 9 now")),
            (
                "longer",
                &|path| for_writing(path).set_len(LENGTH as u64 + 1).expect("a longer file"),
                Some("and has 3158074 now"),
            ),
            // The reader has the file that it opened, whoever has the name.
            ("another file with its name", &|path| replace_file(&RealDisk, path, &other).expect("a file"), None),
            ("removed", &|path| std::fs::remove_file(path).expect("the file"), None),
            (
                "a second name, other permissions",
                &|path| {
                    std::fs::hard_link(path, path.with_extension("second")).expect("a link");
                    let mut permissions = path.metadata().expect("the file").permissions();
                    permissions.set_readonly(true);
                    std::fs::set_permissions(path, permissions).expect("permissions");
                },
                None,
            ),
        ];
        for (what, change, want) in changes {
            let directory = tempfile::tempdir().expect("a directory");
            let path = directory.path().join("file");
            std::fs::write(&path, content()).expect("a file");
            // Some systems know times by a few milliseconds only. Nobody changes a model that fast, but tests do.
            let earlier = SystemTime::now() - Duration::from_secs(60);
            for_writing(&path).set_modified(earlier).expect("an earlier time");
            let readers = readers(&path);
            change(&path);
            for (name, reader) in &readers {
                for length in [LEAST - 1, LENGTH] {
                    let mut bytes = vec![0; length];
                    match (reader.read_exact_at(&mut bytes, 0), want) {
                        (Ok(()), None) => assert!(bytes == content()[..length], "{what}, {name}: other bytes"),
                        (Err(error @ StoreError::Changed { .. }), Some(want)) => {
                            let error = error.to_string();
                            assert!(
                                error.contains(want) && error.contains("file was changed"),
                                "{what}, {name}: {error}"
                            );
                        }
                        (found, _) => panic!("{what}, {name}: {found:?}"),
                    }
                }
            }
        }
    }

    /// Who opens a file again by its name wants the same one.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]
    fn another_file_with_the_name_is_told_apart() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        std::fs::write(&path, b"bytes").expect("a file");
        let opened = OpenedFile::new(&path, &path.metadata().expect("the file"));
        opened.expect_in_place().expect("the same file");
        // The old file is kept, so that its inode is not given to the new one.
        std::fs::rename(&path, directory.path().join("old")).expect("another name");
        assert!(matches!(opened.expect_in_place(), Err(StoreError::Io { .. })));
        std::fs::write(&path, b"bytes").expect("a file");
        let error = opened.expect_in_place().expect_err("another file").to_string();
        assert!(error.contains("another file has its name now"), "{error}");
    }

    #[test]
    fn a_read_that_is_refused_is_the_last_one_past_the_cache() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        replace_file(&RealDisk, &path, &content()).expect("a file");
        for (name, reader) in readers(&path) {
            let has_failed = |reader: &FileReader| {
                reader.past_cache.as_ref().is_some_and(|past_cache| past_cache.has_failed.load(Ordering::Relaxed))
            };
            reader.read_exact_at(&mut vec![0; LEAST - 1], 0).expect("bytes");
            assert!(!has_failed(&reader), "{name}: a small part goes through the cache");
            reader.read_exact_at(&mut vec![0; LEAST], 0).expect("bytes");
            assert!(has_failed(&reader) || name != "refused", "{name}");
        }
    }

    /// (where a part begins, its length, where its pieces begin and end)
    #[test]
    fn pieces_meet_at_multiples_of_their_size() {
        type Case<'a> = (usize, usize, &'a [(usize, usize)]);
        let cases: [Case<'_>; 4] = [
            (0, 0, &[]),
            (5, 10, &[(5, 15)]),
            (0, 2 * AT_ONCE, &[(0, AT_ONCE), (AT_ONCE, 2 * AT_ONCE)]),
            (
                AT_ONCE - 1,
                AT_ONCE + 2,
                &[(AT_ONCE - 1, AT_ONCE), (AT_ONCE, 2 * AT_ONCE), (2 * AT_ONCE, 2 * AT_ONCE + 1)],
            ),
        ];
        for (start, length, want) in cases {
            let mut part = vec![0; length];
            let found = pieces(&mut part, start as u64);
            let found: Vec<_> = found.map(|(start, piece)| (start as usize, start as usize + piece.len())).collect();
            assert_eq!(found, want, "{start} {length}");
        }
    }
}
