//! How fast a disk gives a file, measured over a part of it, in the way in which layers are read.

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use crate::file_reader::FileReader;
use crate::identity::OpenedFile;

/// Bytes that are read for a measurement: a fraction of a second on a hard disk, and enough that the start of a read
/// does not count.
const MEASURED: u64 = 32 << 20;
/// Threads that read at a time: as many as read layers.
const READERS: u64 = 4;
/// Bytes that each asks for at a time.
const PART: u64 = 2 << 20;

/// Bytes per second of reading from the middle of a file, past the system's cache where it lets itself be passed.
/// `None`: the file is smaller than what is measured, or cannot be read.
pub fn read_rate(path: &Path) -> Option<f64> {
    let file = File::open(path).ok()?;
    let metadata = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
    let start = metadata.len().checked_sub(MEASURED)? / 2;
    // Where the file system has no reads past the cache.
    forget(&file, start);
    let mut reader = FileReader::new(file, OpenedFile::new(path, &metadata));
    reader.pass_cache();
    let read = |from: u64| {
        let mut part = vec![0; PART as usize];
        let mut parts = (from..from + MEASURED / READERS).step_by(PART as usize);
        parts.all(|place| reader.read_exact_at(&mut part, place).is_ok())
    };
    let begun = Instant::now();
    let all_read = std::thread::scope(|scope| {
        let begin = |n: u64| {
            let from = start + n * (MEASURED / READERS);
            std::thread::Builder::new().spawn_scoped(scope, move || read(from))
        };
        let threads: Vec<_> = (0..READERS).map(begin).collect();
        threads.into_iter().all(|thread| thread.is_ok_and(|thread| thread.join().unwrap_or(false)))
    });
    let seconds = begun.elapsed().as_secs_f64();
    (all_read && seconds > 0.0).then(|| MEASURED as f64 / seconds)
}

/// Asks the system to forget what it has of the part that is measured. A failure is ignored: then memory is measured,
/// which is what a later read of such a file takes too.
#[cfg(target_os = "linux")]
fn forget(file: &File, start: u64) {
    let length = std::num::NonZeroU64::new(MEASURED);
    let _ = rustix::fs::fadvise(file, start, length, rustix::fs::Advice::DontNeed);
}

#[cfg(not(target_os = "linux"))]
fn forget(_file: &File, _start: u64) {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RealDisk;
    use crate::replace::replace_file;

    #[test]
    fn only_files_that_are_large_enough_have_a_rate() {
        let directory = tempfile::tempdir().expect("a directory");
        for (bytes, has_rate) in [(0, false), (MEASURED - 1, false), (MEASURED, true), (MEASURED + 5000, true)] {
            let path = directory.path().join("file");
            replace_file(&RealDisk, &path, &vec![1; bytes as usize]).expect("a file");
            assert_eq!(read_rate(&path).is_some_and(|rate| rate > 0.0), has_rate, "{bytes}");
        }
        assert_eq!(read_rate(directory.path()), None);
    }
}
