//! Lines of a JSONL file, each with its number, and the JSON object on a line.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use serde_json::{Map, Value};

use crate::json::{kind, value};
use crate::problem::RowProblem;

/// The most bytes of a line. A row of a million tokens has about four million.
pub(crate) const LONGEST_LINE: usize = 16 << 20;

/// The most lines of a block: enough to keep all cores busy, few enough to keep memory flat.
const BLOCK_LINES: usize = 4096;
/// A block ends behind the line that brings it to so many bytes. So it has less than
/// `BLOCK_BYTES + LONGEST_LINE` bytes.
const BLOCK_BYTES: usize = 16 << 20;

/// The mark that programs on Windows put in front of UTF-8 text.
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

pub(crate) struct Line {
    /// From 1.
    pub(crate) number: u32,
    /// Without its line break. A line longer than `LONGEST_LINE` is cut one byte behind that.
    pub(crate) bytes: Vec<u8>,
}

pub(crate) struct Lines {
    reader: BufReader<File>,
    number: u32,
}

impl Lines {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { reader: BufReader::with_capacity(1 << 20, File::open(path)?), number: 0 })
    }

    /// The next lines that are not blank. No lines at the end of the file.
    pub(crate) fn block(&mut self) -> io::Result<Vec<Line>> {
        let (mut lines, mut size) = (Vec::new(), 0);
        while lines.len() < BLOCK_LINES && size < BLOCK_BYTES {
            let Some(bytes) = self.line()? else { break };
            if !bytes.iter().all(u8::is_ascii_whitespace) {
                size += bytes.len();
                lines.push(Line { number: self.number, bytes });
            }
        }
        Ok(lines)
    }

    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        let mut started = false;
        loop {
            let available = self.reader.fill_buf()?;
            if available.is_empty() {
                if !started {
                    return Ok(None);
                }
                break;
            }
            started = true;
            let end = available.iter().position(|byte| *byte == b'\n');
            let part = &available[..end.unwrap_or(available.len())];
            // One byte over the limit is kept, to show that the limit was passed.
            let room = (LONGEST_LINE + 1).saturating_sub(line.len());
            line.extend_from_slice(&part[..part.len().min(room)]);
            let used = part.len() + usize::from(end.is_some());
            self.reader.consume(used);
            if end.is_some() {
                break;
            }
        }
        self.number = self.number.saturating_add(1);
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        // In front of any line, since people concatenate files that each begin with a mark.
        while line.starts_with(BYTE_ORDER_MARK) {
            line.drain(..BYTE_ORDER_MARK.len());
        }
        Ok(Some(line))
    }
}

/// Reads the JSON object on a line.
pub(crate) fn object(bytes: &[u8]) -> Result<Map<String, Value>, RowProblem> {
    if bytes.len() > LONGEST_LINE {
        return Err(RowProblem::LongLine(LONGEST_LINE >> 20));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| match bytes {
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => RowProblem::Utf16,
        _ => RowProblem::NotUtf8(error.valid_up_to()),
    })?;
    if let Some(place) = text.find('\0') {
        return Err(RowProblem::NulCharacter(place));
    }
    // serde_json stops at 128 levels of nesting by itself.
    match value(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(RowProblem::NotAnObject(kind(&other))),
        Err(error) => {
            let full = error.to_string();
            let reason = full.split(" at line ").next().unwrap_or(&full).to_owned();
            let expected = if text.trim_start().starts_with('[') {
                Some("one JSON object on each line, not one array over all")
            } else if error.is_eof() {
                Some("one JSON object on each line, not one over several")
            } else {
                None
            };
            Err(RowProblem::NotJson { reason, column: error.column().max(1), expected })
        }
    }
}

/// The first characters of a line, at most 81, for a person to recognize it by.
pub(crate) fn beginning(bytes: &[u8]) -> String {
    const SHOWN: usize = 80;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * SHOWN)]);
    let shown: String = text.chars().take(SHOWN).map(|it| if it.is_control() { '\u{FFFD}' } else { it }).collect();
    if text.chars().count() > SHOWN || bytes.len() > 4 * SHOWN { shown + "…" } else { shown }
}
