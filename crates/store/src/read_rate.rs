//! How fast a disk gives a file, measured over a part of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use crate::tensors::PIECE;

/// Bytes that are read for a measurement: a fraction of a second on a hard disk, and enough that the start of a read
/// does not count.
const MEASURED: u64 = 32 << 20;

/// Bytes per second of reading from the middle of a file, past the system's cache where it lets itself be passed.
/// `None`: the file is smaller than what is measured, or cannot be read.
pub fn read_rate(path: &Path) -> Option<f64> {
    let file = File::open(path).ok()?;
    let length = file.metadata().ok().filter(std::fs::Metadata::is_file)?.len();
    let start = length.checked_sub(MEASURED)? / 2;
    pass_cache(&file, start);
    let mut piece = vec![0; PIECE];
    let begun = Instant::now();
    for n in 0..MEASURED / PIECE as u64 {
        file.read_exact_at(&mut piece, start + n * PIECE as u64).ok()?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    (seconds > 0.0).then(|| MEASURED as f64 / seconds)
}

/// Asks the system to forget what it has of the part that is measured. A failure is ignored: then memory is measured,
/// which is what a later read of such a file takes too.
#[cfg(target_os = "linux")]
fn pass_cache(file: &File, start: u64) {
    let length = std::num::NonZeroU64::new(MEASURED);
    let _ = rustix::fs::fadvise(file, start, length, rustix::fs::Advice::DontNeed);
}

/// Asks the system to keep nothing of what is read. What it has already is still read from memory.
#[cfg(target_vendor = "apple")]
fn pass_cache(file: &File, _start: u64) {
    let _ = rustix::fs::fcntl_nocache(file, true);
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
fn pass_cache(_file: &File, _start: u64) {}

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
