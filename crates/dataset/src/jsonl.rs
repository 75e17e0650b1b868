//! Lines of a JSONL file, each with its number, and the JSON object of a row.

use std::io::{self, BufRead};

use serde_json::{Map, Value};

use crate::json::{kind, value};
use crate::problem::RowProblem;
use crate::record::{BYTE_ORDER_MARK, Content, Record, put};

pub(crate) struct Lines {
    reader: Box<dyn BufRead>,
    line: u32,
}

impl Lines {
    pub(crate) fn new(reader: Box<dyn BufRead>) -> Self {
        Self { reader, line: 0 }
    }

    /// The next line that is not blank.
    pub(crate) fn next(&mut self) -> io::Result<Option<Record>> {
        while let Some(bytes) = self.line()? {
            if !bytes.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some(Record { line: self.line, row: 0, column: 1, content: Content::Json(bytes) }));
            }
        }
        Ok(None)
    }

    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let (mut line, mut seen) = (Vec::new(), 0);
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
            put(&mut line, part, &mut seen, self.line.saturating_add(1))?;
            let used = part.len() + usize::from(end.is_some());
            self.reader.consume(used);
            if end.is_some() {
                break;
            }
        }
        self.line = self.line.saturating_add(1);
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

/// Reads the JSON object of a row. `in_list`: it is an item of a list that spans the file, and not
/// a line.
pub(crate) fn object(bytes: &[u8], in_list: bool) -> Result<Map<String, Value>, RowProblem> {
    let text = text(bytes)?;
    // serde_json stops at 128 levels of nesting by itself.
    match value(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) if in_list => Err(RowProblem::NotAnObjectInList(kind(&other))),
        Ok(other) => Err(RowProblem::NotAnObject(kind(&other))),
        Err(error) => {
            let full = error.to_string();
            let reason = full.split(" at line ").next().unwrap_or(&full).to_owned();
            let expected = if in_list {
                None
            } else if text.trim_start().starts_with('[') {
                Some("one JSON object on each line, not one array over all")
            } else if error.is_eof() {
                Some("one JSON object on each line, not one over several")
            } else {
                foreign_words(text, &error)
            };
            let below = error.line().saturating_sub(1);
            Err(RowProblem::NotJson { reason, below, column: error.column().max(1), expected })
        }
    }
}

/// What programs write that JSON does not have, if that is what the reader stopped at.
fn foreign_words(text: &str, error: &serde_json::Error) -> Option<&'static str> {
    const WORDS: [&str; 5] = ["NaN", "Infinity", "True", "False", "None"];
    let line = text.split('\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    let near: String = line.bytes().skip(error.column().saturating_sub(2)).take(10).map(char::from).collect();
    if error.to_string().contains("hex escape") {
        return Some("whole characters: \\ud83d and the like need their second half behind them");
    }
    if error.to_string().starts_with("trailing characters") {
        return Some(match near.contains('\r') {
            true => "one JSON object on each line, and lines that end with \\n",
            false => "one JSON object on each line, and nothing behind it",
        });
    }
    if WORDS.iter().any(|word| near.contains(word)) {
        return Some("JSON, as json.dumps writes it: true, false, null, and no NaN or Infinity");
    }
    near.contains('\'').then_some("JSON, as json.dumps writes it: texts stand between double quotes")
}

/// The text of a row.
///
/// # Errors
/// The bytes are no UTF-8, or hold a NUL character.
pub(crate) fn text(bytes: &[u8]) -> Result<&str, RowProblem> {
    let text = std::str::from_utf8(bytes).map_err(|error| match bytes {
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => RowProblem::Utf16,
        _ => RowProblem::NotUtf8(error.valid_up_to()),
    })?;
    match text.find('\0') {
        Some(place) => Err(RowProblem::NulCharacter(place)),
        None => Ok(text),
    }
}
