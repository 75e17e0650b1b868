//! The lines of a file, one at a time, where its rows are not read: none is held beyond the bytes that a row may have.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use finetune_dataset::LONGEST_ROW;

/// A line that is longer than a row may be. The file and the number of the line, in words.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooLong(pub(crate) String);

/// The lines of a file that are not blank, with their numbers. Behind one that is too long nothing is read.
pub(crate) struct WholeLines {
    file: PathBuf,
    reader: BufReader<File>,
    number: usize,
    has_ended: bool,
}

impl WholeLines {
    /// `None`: the file cannot be opened.
    pub(crate) fn open(file: &Path) -> Option<WholeLines> {
        let reader = BufReader::new(File::open(file).ok()?);
        Some(WholeLines { file: file.to_owned(), reader, number: 0, has_ended: false })
    }
}

impl Iterator for WholeLines {
    type Item = Result<(usize, Vec<u8>), TooLong>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.has_ended {
            let mut line = Vec::new();
            let mut bounded = (&mut self.reader).take(LONGEST_ROW as u64 + 1);
            let read = bounded.read_until(b'\n', &mut line).ok()?;
            self.number += 1;
            self.has_ended = read == 0;
            if line.last() == Some(&b'\n') {
                line.pop();
            }
            if line.len() > LONGEST_ROW {
                self.has_ended = true;
                let (file, number) = (self.file.display(), self.number);
                return Some(Err(TooLong(format!(
                    "{file}:{number}: the row is longer than {} MiB",
                    LONGEST_ROW >> 20
                ))));
            }
            if !line.trim_ascii().is_empty() {
                return Some(Ok((self.number, line)));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use finetune_store::{RealDisk, replace_file};

    use super::*;

    #[test]
    fn lines_have_their_numbers_and_a_bound() {
        let folder = tempfile::tempdir().expect("a directory");
        let file = folder.path().join("rows.jsonl");
        let read = |text: &[u8]| -> Vec<_> {
            replace_file(&RealDisk, &file, text).expect("a file");
            WholeLines::open(&file).expect("it is there").map(|line| line.map(|(n, line)| (n, line.len()))).collect()
        };
        assert_eq!(read(b""), []);
        assert_eq!(read(b"\n \r\n"), []);
        assert_eq!(read(b"{}\n\n[1]\r\nlast"), [Ok((1, 2)), Ok((3, 4)), Ok((4, 4))]);
        let longest = vec![b'x'; LONGEST_ROW];
        assert_eq!(read(&[&longest[..], b"\ny"].concat()), [Ok((1, LONGEST_ROW)), Ok((2, 1))]);
        let long = TooLong(format!("{}:2: the row is longer than 16 MiB", file.display()));
        assert_eq!(read(&[b"a\nx", &longest[..], b"\ny"].concat()), [Ok((1, 1)), Err(long)]);
        assert!(WholeLines::open(&folder.path().join("none")).is_none());
    }
}
