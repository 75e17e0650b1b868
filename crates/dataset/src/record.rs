//! A row of a file as it was written, before it is read, with its place.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::jsonl;
use crate::problem::RowProblem;
use crate::table::{self, Header};

/// The most bytes of a row. A row of a million tokens has about four million.
pub const LONGEST_ROW: usize = 16 << 20;

/// A row that has not ended after so many bytes never will: the reading ends. It bounds the time
/// that a small packed file can take.
pub(crate) const GIVE_UP: usize = 256 << 20;

/// The most rows of a block: enough to keep all cores busy, few enough to keep memory flat.
const BLOCK_ROWS: usize = 4096;
/// A block ends behind the row that brings it to so many bytes. So it has less than
/// `BLOCK_BYTES + LONGEST_ROW` bytes.
const BLOCK_BYTES: usize = 16 << 20;

/// The mark that programs on Windows put in front of UTF-8 text.
pub(crate) const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

#[derive(Debug)]
pub(crate) struct Record {
    /// The line that it begins on, from 1. 0 in Parquet, which has no lines.
    pub(crate) line: u32,
    /// Its number in the file, from 1. 0 if each row is a line.
    pub(crate) row: u32,
    /// The column that it begins at, from 1, in bytes.
    pub(crate) column: u32,
    pub(crate) content: Content,
}

#[derive(Debug)]
pub(crate) enum Content {
    /// JSON text. Longer text than `LONGEST_ROW` is cut one byte behind that.
    Json(Vec<u8>),
    /// The cells of a table, with separators and quotes, cut in the same way.
    Cells(Vec<u8>, Arc<Header>),
    /// The values of a Parquet row, and about how many bytes they take.
    Values(Map<String, Value>, usize),
    /// What is wrong here with the file.
    Broken(RowProblem),
}

impl Record {
    /// The row as a JSON object.
    ///
    /// # Errors
    /// It is none.
    pub(crate) fn object(&self) -> Result<Map<String, Value>, RowProblem> {
        if self.bytes() > LONGEST_ROW {
            return Err(RowProblem::LongLine(LONGEST_ROW >> 20));
        }
        match &self.content {
            Content::Json(bytes) => jsonl::object(bytes, self.row > 0),
            Content::Cells(bytes, header) => table::object(bytes, header),
            Content::Values(values, _) => Ok(values.clone()),
            Content::Broken(problem) => Err(problem.clone()),
        }
    }

    /// Whether its values come out of columns. Lists and objects may then be JSON text.
    pub(crate) fn has_columns(&self) -> bool {
        matches!(self.content, Content::Cells(..) | Content::Values(..))
    }

    pub(crate) fn bytes(&self) -> usize {
        match &self.content {
            Content::Json(bytes) | Content::Cells(bytes, _) => bytes.len(),
            Content::Values(_, bytes) => *bytes,
            Content::Broken(_) => 0,
        }
    }

    /// The first characters, at most 81, for a person to recognize it by.
    pub(crate) fn beginning(&self) -> String {
        match &self.content {
            Content::Json(bytes) | Content::Cells(bytes, _) => beginning(bytes),
            Content::Values(values, bytes) if *bytes <= LONGEST_ROW => {
                beginning(Value::Object(values.clone()).to_string().as_bytes())
            }
            Content::Values(..) | Content::Broken(_) => String::new(),
        }
    }
}

/// The next rows of a file. None at its end.
pub(crate) fn block<E>(mut next: impl FnMut() -> Result<Option<Record>, E>) -> Result<Vec<Record>, E> {
    let (mut records, mut bytes) = (Vec::new(), 0);
    while records.len() < BLOCK_ROWS && bytes < BLOCK_BYTES {
        let Some(record) = next()? else { break };
        bytes += record.bytes();
        records.push(record);
    }
    Ok(records)
}

fn beginning(bytes: &[u8]) -> String {
    const SHOWN: usize = 80;
    // A row of a table ends with its line.
    let bytes = bytes.trim_ascii_end();
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * SHOWN)]);
    let shown: String = text.chars().take(SHOWN).map(|it| if it.is_control() { '\u{FFFD}' } else { it }).collect();
    if text.chars().count() > SHOWN || bytes.len() > 4 * SHOWN { shown + "…" } else { shown }
}

/// Puts a part of a row behind what there is of it. One byte over the limit is kept, to show that
/// the limit was passed.
///
/// # Errors
/// The row has not ended after `GIVE_UP` bytes. `seen`: its bytes so far, and `part`.
pub(crate) fn put(row: &mut Vec<u8>, part: &[u8], seen: &mut usize, line: u32) -> std::io::Result<()> {
    let room = (LONGEST_ROW + 1).saturating_sub(row.len());
    row.extend_from_slice(&part[..part.len().min(room)]);
    *seen += part.len();
    if *seen > GIVE_UP {
        let reason = format!("the row on line {line} has not ended after {} MiB", GIVE_UP >> 20);
        return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, reason));
    }
    Ok(())
}
