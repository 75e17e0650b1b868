//! The items of one JSON list that spans a file, each with the line that it begins on. The list is
//! never in memory: an item is found by its brackets and quotes, and read by itself.

use std::io::{self, BufRead};

use crate::problem::RowProblem;
use crate::record::{BYTE_ORDER_MARK, Content, Record, put};

pub(crate) struct Array {
    reader: Box<dyn BufRead>,
    line: u32,
    /// Bytes of the line so far.
    column: u32,
    row: u32,
    state: State,
}

/// What was seen last between two items.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Nothing,
    Open,
    Item,
    Comma,
    Closed,
    /// What was wrong has been told.
    Told,
}

/// How far the item is that is being read.
#[derive(Default)]
struct Depth {
    brackets: usize,
    in_string: bool,
    escaped: bool,
}

impl Depth {
    /// Whether the item ends with this byte: `Some(true)`, or in front of it: `Some(false)`.
    fn ends(&mut self, byte: u8) -> Option<bool> {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return None;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.brackets += 1,
            b'}' | b']' if self.brackets == 0 => return Some(false),
            b'}' | b']' => {
                self.brackets -= 1;
                return (self.brackets == 0).then_some(true);
            }
            b',' if self.brackets == 0 => return Some(false),
            _ if self.brackets == 0 && byte.is_ascii_whitespace() => return Some(false),
            _ => {}
        }
        None
    }
}

impl Array {
    pub(crate) fn new(reader: Box<dyn BufRead>) -> Self {
        Self { reader, line: 1, column: 0, row: 0, state: State::Nothing }
    }

    /// The next item, or what is wrong between two of them.
    pub(crate) fn next(&mut self) -> io::Result<Option<Record>> {
        loop {
            let Some(byte) = self.reader.fill_buf()?.first().copied() else {
                return Ok(match self.state {
                    State::Closed | State::Told => None,
                    _ => {
                        self.state = State::Told;
                        Some(self.broken("the list is not closed: the file ends here"))
                    }
                });
            };
            match (self.state, byte) {
                (_, byte) if byte.is_ascii_whitespace() => self.skip(byte),
                (State::Nothing, byte) if BYTE_ORDER_MARK.contains(&byte) => self.skip(byte),
                (State::Nothing, b'[') => self.step(byte, State::Open),
                (State::Item, b',') => self.step(byte, State::Comma),
                (State::Open | State::Item, b']') => self.step(byte, State::Closed),
                (State::Comma, b']') => {
                    let record = self.broken("a comma stands behind the last item");
                    self.step(byte, State::Closed);
                    return Ok(Some(record));
                }
                (State::Item, _) => {
                    self.state = State::Comma;
                    return Ok(Some(self.broken("a comma is missing in front of this item")));
                }
                (State::Open | State::Comma, _) => return self.item().map(Some),
                (State::Told, _) => return Ok(None),
                (State::Nothing | State::Closed, _) => {
                    self.state = State::Told;
                    return Ok(Some(self.broken("text follows the list")));
                }
            }
        }
    }

    fn step(&mut self, byte: u8, state: State) {
        self.state = state;
        self.skip(byte);
    }

    fn skip(&mut self, byte: u8) {
        self.reader.consume(1);
        self.count(&[byte]);
    }

    /// Counts lines and columns.
    fn count(&mut self, bytes: &[u8]) {
        let lines = bytes.iter().filter(|byte| **byte == b'\n').count() as u32;
        let behind = bytes.iter().rev().take_while(|byte| **byte != b'\n').count() as u32;
        self.line = self.line.saturating_add(lines);
        self.column = if lines > 0 { behind } else { self.column.saturating_add(behind) };
    }

    fn broken(&self, what: &'static str) -> Record {
        let content = Content::Broken(RowProblem::List(what));
        Record { line: self.line, row: self.row.saturating_add(1), column: self.column + 1, content }
    }

    fn item(&mut self) -> io::Result<Record> {
        self.row = self.row.saturating_add(1);
        let (line, column) = (self.line, self.column + 1);
        let (mut bytes, mut seen, mut depth) = (Vec::new(), 0, Depth::default());
        loop {
            let available = self.reader.fill_buf()?;
            if available.is_empty() {
                break;
            }
            let mut used = available.len();
            let mut ended = false;
            for (index, &byte) in available.iter().enumerate() {
                if let Some(with) = depth.ends(byte) {
                    (used, ended) = (index + usize::from(with), true);
                    break;
                }
            }
            // A bracket that closes nothing would never be passed.
            let stray = ended && used == 0 && bytes.is_empty();
            let part = available[..used.max(usize::from(stray))].to_vec();
            self.reader.consume(part.len());
            self.count(&part);
            put(&mut bytes, &part, &mut seen, line)?;
            if ended {
                break;
            }
        }
        self.state = State::Item;
        Ok(Record { line, row: self.row, column, content: Content::Json(bytes) })
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;

    /// What comes out of a text, read `buffer` bytes at a time: line, column, row and text.
    fn items(text: &str, buffer: usize) -> Vec<String> {
        let reader = BufReader::with_capacity(buffer, std::io::Cursor::new(text.as_bytes().to_vec()));
        let mut array = Array::new(Box::new(reader));
        let mut found = Vec::new();
        while let Some(record) = array.next().expect("memory can be read") {
            let text = match record.content {
                Content::Json(bytes) => String::from_utf8(bytes).expect("text"),
                Content::Broken(problem) => format!("! {problem}"),
                _ => unreachable!("a list has no cells"),
            };
            found.push(format!("{}:{} {} {text}", record.line, record.column, record.row));
        }
        found
    }

    #[test]
    fn items_are_found_with_their_lines() {
        for (text, expected) in [
            ("[]", vec![]),
            ("\u{FEFF} [ ] \n", vec![]),
            ("[{\"a\": 1}, {\"b\": [2]}]", vec!["1:2 1 {\"a\": 1}", "1:12 2 {\"b\": [2]}"]),
            ("[\n  {\n  \"a\": 1},\n{}\n]\n", vec!["2:3 1 {\n  \"a\": 1}", "4:1 2 {}"]),
            ("[{\"a\": \"]},{\\\"\"}]", vec!["1:2 1 {\"a\": \"]},{\\\"\"}"]),
            ("[1, \"b\" ,null]", vec!["1:2 1 1", "1:5 2 \"b\"", "1:10 3 null"]),
            ("[{}", vec!["1:2 1 {}", "1:4 2 ! the list is not closed: the file ends here"]),
            ("[{\"a\": ", vec!["1:2 1 {\"a\": ", "1:8 2 ! the list is not closed: the file ends here"]),
            ("[{},]", vec!["1:2 1 {}", "1:5 2 ! a comma stands behind the last item"]),
            ("[{} {}]", vec!["1:2 1 {}", "1:5 2 ! a comma is missing in front of this item", "1:5 2 {}"]),
            ("[{}]\n{}", vec!["1:2 1 {}", "2:1 2 ! text follows the list"]),
            ("[}]", vec!["1:2 1 }"]),
            ("[,]", vec!["1:2 1 ,"]),
        ] {
            for buffer in [1, 2, 7, 1024] {
                assert_eq!(items(text, buffer), expected, "{text:?} by {buffer}");
            }
        }
    }
}
