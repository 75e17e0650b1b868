//! What kind of file rows lie in, and how it is packed. The first bytes decide. The name decides
//! what they leave open.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use finetune_recipe::is_hub_rows;
use finetune_store::{Holding, recognize, recognize_content};
use flate2::read::MultiGzDecoder;

use crate::error::DatasetError;
use crate::other_kinds;

/// How much of a file is looked at, in bytes, once it is unpacked.
const HEAD: u64 = 4096;

/// How long a pipe is waited for that no program writes to.
const WRITER: Duration = Duration::from_secs(60);

/// How rows are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A JSON object on each line.
    JsonLines,
    /// One JSON list of objects.
    JsonArray,
    /// A header and rows of cells: CSV and TSV. The byte separates cells.
    Table(u8),
    Parquet,
}

/// How a file is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileKind {
    pub(crate) kind: Kind,
    pub(crate) packing: Packing,
}

impl FileKind {
    /// The kind of a file of rows.
    ///
    /// # Errors
    /// [`DatasetError::NotFetched`], [`DatasetError::OtherKind`] for a file of no rows,
    /// [`DatasetError::Damaged`], [`DatasetError::Unreadable`].
    pub(crate) fn of(path: &Path) -> Result<FileKind, DatasetError> {
        if is_hub_rows(path) {
            return Err(DatasetError::NotFetched { entry: path.display().to_string() });
        }
        let holding = recognize(path);
        let packing = match holding {
            Holding::Gzip => Packing::Gzip,
            Holding::Zstd => Packing::Zstd,
            _ => Packing::Plain,
        };
        // The bytes of a pipe can be read once only.
        if is_pipe(path) {
            return Ok(FileKind { kind: Kind::JsonLines, packing });
        }
        let (holding, head) = match packing {
            Packing::Plain => (holding, Vec::new()),
            _ => {
                let head = packing.head(path).map_err(|source| packing.fault(path, source))?;
                (recognize_content(&packing.inner_name(path), &head), head)
            }
        };
        let kind = match holding {
            Holding::JsonArray => Kind::JsonArray,
            Holding::Csv | Holding::Tsv => {
                let head = match packing {
                    Packing::Plain => packing.head(path).map_err(|source| packing.fault(path, source))?,
                    _ => head,
                };
                Kind::Table(separator(&head, holding == Holding::Tsv))
            }
            Holding::Parquet if packing == Packing::Plain => {
                check_ends(path)?;
                Kind::Parquet
            }
            other => {
                other_kinds::refuse(path, other, packing)?;
                Kind::JsonLines
            }
        };
        Ok(FileKind { kind, packing })
    }

    /// Whether each row is one line of the file, as `sed` counts them.
    pub(crate) fn has_lines(self) -> bool {
        self == FileKind { kind: Kind::JsonLines, packing: Packing::Plain }
    }
}

impl Packing {
    /// The unpacked content.
    pub(crate) fn open(self, path: &Path) -> io::Result<Box<dyn BufRead>> {
        /// Bytes that are read at once.
        const BUFFER: usize = 1 << 20;
        let file = open_within(path, WRITER)?;
        Ok(match self {
            Packing::Plain => Box::new(BufReader::with_capacity(BUFFER, file)),
            Packing::Gzip => Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(BufReader::new(file)))),
            Packing::Zstd => Box::new(BufReader::with_capacity(BUFFER, zstd::stream::read::Decoder::new(file)?)),
        })
    }

    fn head(self, path: &Path) -> io::Result<Vec<u8>> {
        let mut head = Vec::new();
        self.open(path)?.take(HEAD).read_to_end(&mut head)?;
        Ok(head)
    }

    /// The error for content that cannot be read.
    pub(crate) fn fault(self, path: &Path, source: io::Error) -> DatasetError {
        if source.kind() == io::ErrorKind::FileTooLarge {
            return DatasetError::EndlessRow { path: path.to_owned(), reason: source.to_string() };
        }
        let what = match self {
            Packing::Plain if source.kind() != io::ErrorKind::InvalidData => {
                return DatasetError::Unreadable { path: path.to_owned(), source };
            }
            Packing::Plain => "file",
            Packing::Gzip => "gzip file",
            Packing::Zstd => "zstd file",
        };
        DatasetError::Damaged { path: path.to_owned(), what, reason: source.to_string() }
    }

    /// The name without what packing has added to it.
    fn inner_name(self, path: &Path) -> PathBuf {
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        match PACKED.contains(&extension.as_str()) {
            true => path.with_extension(""),
            false => path.to_owned(),
        }
    }
}

/// Whether a path names something that is read once: a pipe, with or without a name, or a terminal.
pub(crate) fn is_pipe(path: &Path) -> bool {
    path.metadata().is_ok_and(|about| !about.is_file() && !about.is_dir())
}

/// Opens a file. A pipe with a name opens once a program opens it for writing.
///
/// # Errors
/// As [`File::open`], and if no program does within `patience`.
fn open_within(path: &Path, patience: Duration) -> io::Result<File> {
    if !is_pipe(path) {
        return File::open(path);
    }
    let (sender, opened) = mpsc::channel();
    let own = path.to_owned();
    // The thread waits in the system. Nothing calls it back, so it is left behind there.
    thread::Builder::new().name("open-pipe".to_owned()).spawn(move || {
        // Nobody is there any more to take the file: it is closed again.
        let _ = sender.send(File::open(own));
    })?;
    opened.recv_timeout(patience).unwrap_or_else(|_| {
        let seconds = patience.as_secs_f64();
        let reason = format!("it is a pipe that no program opened for writing within {seconds} s");
        Err(io::Error::new(io::ErrorKind::TimedOut, reason))
    })
}

/// What packing adds to the name of a file.
pub(crate) const PACKED: [&str; 3] = ["gz", "zst", "zstd"];

/// Extensions of files of rows.
pub(crate) const EXTENSIONS: [&str; 6] = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"];

/// What separates the cells of a table: by its header, tabs if it has tabs and no commas, as
/// spreadsheets in many countries a semicolon, otherwise a comma.
fn separator(head: &[u8], named_tsv: bool) -> u8 {
    let mut quoted = false;
    let (mut commas, mut tabs, mut semicolons) = (0, 0, 0);
    for &byte in head {
        match byte {
            b'"' => quoted = !quoted,
            b'\n' if !quoted => break,
            b',' if !quoted => commas += 1,
            b'\t' if !quoted => tabs += 1,
            b';' if !quoted => semicolons += 1,
            _ => {}
        }
    }
    match (commas, tabs, semicolons) {
        _ if named_tsv => b'\t',
        (0, 1.., _) => b'\t',
        (0, 0, 1..) => b';',
        _ => b',',
    }
}

/// Refuses a Parquet file that is encrypted, or whose end is missing.
fn check_ends(path: &Path) -> Result<(), DatasetError> {
    let ends = || -> io::Result<[[u8; 4]; 2]> {
        let mut file = File::open(path)?;
        let mut ends = [[0; 4]; 2];
        file.read_exact(&mut ends[0])?;
        file.seek(SeekFrom::End(-4))?;
        file.read_exact(&mut ends[1])?;
        Ok(ends)
    };
    let ends = ends().map_err(|source| DatasetError::Unreadable { path: path.to_owned(), source })?;
    if ends.contains(b"PARE") {
        return Err(DatasetError::OtherKind {
            path: path.to_owned(),
            what: "an encrypted Parquet file",
            remedy: "write it again without encryption".to_owned(),
        });
    }
    if &ends[1] != b"PAR1" {
        let reason = "it does not end as one, so a part of it is missing".to_owned();
        return Err(DatasetError::Damaged { path: path.to_owned(), what: "Parquet file", reason });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_pipe_that_no_program_writes_to_is_not_waited_for_without_end() {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path().join("rows.jsonl");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().expect("mkfifo").success());
        let error = open_within(&path, Duration::from_millis(200)).expect_err("no writer");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let said = Packing::Plain.fault(&path, error).to_string();
        assert!(said.ends_with("rows.jsonl: it is a pipe that no program opened for writing within 0.2 s"), "{said}");
    }

    #[test]
    fn the_header_tells_what_separates_cells() {
        for (head, named_tsv, expected) in [
            ("prompt,completion\na\tb,c", false, b','),
            ("prompt\tcompletion\n", false, b'\t'),
            ("prompt\tcompletion, long\n", true, b'\t'),
            ("prompt;completion\na,b;c", false, b';'),
            ("\"a;b\",c\n", false, b','),
            ("text\nfirst; second", false, b','),
            ("text", true, b'\t'),
        ] {
            assert_eq!(separator(head.as_bytes(), named_tsv), expected, "{head:?}");
        }
    }
}
