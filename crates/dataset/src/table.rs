//! Rows of CSV and TSV, each with the line that it begins on, and their cells. A cell in quotes may
//! hold line breaks, so a row may span lines.

use std::cell::RefCell;
use std::collections::HashSet;
use std::io::{self, BufRead, Cursor};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::jsonl::text;
use crate::problem::RowProblem;
use crate::record::{BYTE_ORDER_MARK, Content, Record, put};

/// The first row of a table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) names: Vec<String>,
    pub(crate) separator: u8,
}

pub(crate) struct Table {
    reader: Box<dyn BufRead>,
    /// The line that was read last.
    line: u32,
    separator: u8,
    header: Arc<Header>,
}

/// Where in a row a byte stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    CellBegins,
    Cell,
    Quoted,
    /// Behind a quote within quotes: the cell has ended, or a second quote follows.
    Quote,
}

impl Place {
    /// The place behind a byte. `None`: the row ends with it.
    fn behind(self, byte: u8, separator: u8) -> Option<Place> {
        Some(match (self, byte) {
            (Place::Quoted, b'"') => Place::Quote,
            (Place::Quoted, _) => Place::Quoted,
            (Place::CellBegins, b'"') | (Place::Quote, b'"') => Place::Quoted,
            (_, b'\n') => return None,
            (_, byte) if byte == separator => Place::CellBegins,
            _ => Place::Cell,
        })
    }
}

impl Table {
    /// A table whose header is read. `Err` within: what is wrong with the header, and its line.
    pub(crate) fn open(reader: Box<dyn BufRead>, separator: u8) -> io::Result<Result<Self, (u32, String)>> {
        let mut table = Self { reader, line: 0, separator, header: Arc::default() };
        let Some((line, bytes, closed)) = table.row()? else { return Ok(Ok(table)) };
        if !closed {
            return Ok(Err((line, RowProblem::OpenQuote.to_string())));
        }
        let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes);
        let names = match cells(bytes, separator) {
            Ok(cells) => cells.into_iter().map(|name| name.trim().to_owned()).collect::<Vec<_>>(),
            Err(problem) => return Ok(Err((line, problem.to_string()))),
        };
        let mut known: HashSet<&str> = HashSet::new();
        let twice = names.iter().find(|name| !name.is_empty() && !known.insert(name.as_str()));
        if let Some(name) = twice {
            return Ok(Err((line, format!("two columns are called {name:?}"))));
        }
        table.header = Arc::new(Header { names, separator });
        Ok(Ok(table))
    }

    pub(crate) fn next(&mut self) -> io::Result<Option<Record>> {
        let Some((line, bytes, closed)) = self.row()? else { return Ok(None) };
        let content = match closed {
            true => Content::Cells(bytes, self.header.clone()),
            false => Content::Broken(RowProblem::OpenQuote),
        };
        Ok(Some(Record { line, row: 0, column: 1, content }))
    }

    /// The next row that is not blank: its line, its bytes, and whether its quotes are closed.
    fn row(&mut self) -> io::Result<Option<(u32, Vec<u8>, bool)>> {
        loop {
            let line = self.line.saturating_add(1);
            let (mut row, mut seen, mut place) = (Vec::new(), 0, Some(Place::CellBegins));
            while let Some(before) = place {
                let available = self.reader.fill_buf()?;
                if available.is_empty() {
                    break;
                }
                let (mut now, mut used) = (Some(before), 0);
                for &byte in available {
                    used += 1;
                    // The mark of a file does not hide the quotes of its first cell.
                    if line == 1 && BYTE_ORDER_MARK.get(seen + used - 1) == Some(&byte) {
                        continue;
                    }
                    self.line += u32::from(byte == b'\n');
                    now = now.and_then(|place| place.behind(byte, self.separator));
                    if now.is_none() {
                        break;
                    }
                }
                place = now;
                put(&mut row, &available[..used], &mut seen, line)?;
                self.reader.consume(used);
            }
            if seen == 0 {
                return Ok(None);
            }
            let is_blank = |byte: &u8| byte.is_ascii_whitespace() || *byte == self.separator;
            if !row.iter().all(is_blank) {
                return Ok(Some((line, row, place != Some(Place::Quoted))));
            }
        }
    }
}

/// The cells of a row.
fn cells(row: &[u8], separator: u8) -> Result<Vec<String>, RowProblem> {
    let row = row.strip_suffix(b"\n").unwrap_or(row);
    let row = row.strip_suffix(b"\r").unwrap_or(row);
    text(row)?;
    CELLS.with_borrow_mut(|kept| {
        let mut cells =
            kept.take().filter(|cells| cells.separator == separator).unwrap_or_else(|| Cells::new(separator));
        let read = cells.read(row);
        // A row that it has not read to its end would be in front of the next one.
        *kept = Some(cells).filter(|_| matches!(&read, Ok((_, true))));
        match read {
            Ok((record, _)) => Ok(record.iter().map(str::to_owned).collect()),
            Err(error) => Err(RowProblem::Cells(error.to_string())),
        }
    })
}

thread_local! {
    /// The reader of the last row on this thread. Making one takes longer than reading a row.
    static CELLS: RefCell<Option<Cells>> = const { RefCell::new(None) };
}

/// Reads one row after the other, each by itself.
struct Cells {
    separator: u8,
    reader: csv::Reader<Cursor<Vec<u8>>>,
}

impl Cells {
    fn new(separator: u8) -> Self {
        let reader = csv::ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .delimiter(separator)
            // Line breaks outside of quotes are known to be none of the row.
            .terminator(csv::Terminator::Any(b'\n'))
            .from_reader(Cursor::default());
        Self { separator, reader }
    }

    /// The cells of a row, and whether all of it was read.
    fn read(&mut self, row: &[u8]) -> Result<(csv::StringRecord, bool), csv::Error> {
        let ended = [row, b"\n"].concat();
        let (before, bytes) = (self.reader.position().byte(), ended.len() as u64);
        *self.reader.get_mut() = Cursor::new(ended);
        let mut record = csv::StringRecord::new();
        let found = self.reader.read_record(&mut record)?;
        Ok((record, found && self.reader.position().byte() - before == bytes))
    }
}

/// A row as an object of texts. Columns without a name are left out: they number the rows.
pub(crate) fn object(row: &[u8], header: &Header) -> Result<Map<String, Value>, RowProblem> {
    let cells = cells(row, header.separator)?;
    if cells.len() != header.names.len() {
        return Err(RowProblem::CellCount { found: cells.len(), wanted: header.names.len() });
    }
    let named = header.names.iter().zip(cells).filter(|(name, _)| !name.is_empty() && !name.starts_with("Unnamed: "));
    Ok(named.map(|(name, cell)| (name.clone(), Value::String(cell))).collect())
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use serde_json::json;

    use super::*;

    /// The rows of a table, read `buffer` bytes at a time: line and object, or the problem.
    fn rows(text: &[u8], separator: u8, buffer: usize) -> Vec<String> {
        let reader = BufReader::with_capacity(buffer, io::Cursor::new(text.to_vec()));
        let mut table = match Table::open(Box::new(reader), separator).expect("memory can be read") {
            Ok(table) => table,
            Err((line, reason)) => return vec![format!("header {line}: {reason}")],
        };
        let mut found = Vec::new();
        while let Some(record) = table.next().expect("memory can be read") {
            let shown = match record.object() {
                Ok(object) => json!(object).to_string(),
                Err(problem) => format!("! {problem}"),
            };
            found.push(format!("{} {shown}", record.line));
        }
        found
    }

    #[test]
    fn rows_are_found_with_the_lines_that_they_begin_on() {
        let cases: [(&[u8], u8, &[&str]); 13] = [
            (b"a,b\n1,2\n3,4", b',', &[r#"2 {"a":"1","b":"2"}"#, r#"3 {"a":"3","b":"4"}"#]),
            (b"\xEF\xBB\xBF\"a\",b\r\n\r\n1,2\r\n", b',', &[r#"3 {"a":"1","b":"2"}"#]),
            (b"a,b\n\"x\ny\",\"2\"\"\"\n5,6\n", b',', &[r#"2 {"a":"x\ny","b":"2\""}"#, r#"4 {"a":"5","b":"6"}"#]),
            (b"a\tb\n1,5\t\"2\"\n", b'\t', &[r#"2 {"a":"1,5","b":"2"}"#]),
            (b"a;b\n1;\n;;\n;\n", b';', &[r#"2 {"a":"1","b":""}"#]),
            // A quote within a cell that has none around it is a character.
            (b"a,b\n5\" disk,x\n1,2\n", b',', &[r#"2 {"a":"5\" disk","b":"x"}"#, r#"3 {"a":"1","b":"2"}"#]),
            (b",a,Unnamed: 2\n0,x,y\n", b',', &[r#"2 {"a":"x"}"#]),
            (b"a,b\n1\n1,2,3\n", b',', &["2 ! 1 cells, and the header has 2", "3 ! 3 cells, and the header has 2"]),
            (b"a,b\n1,\"open\n2,3\n", b',', &["2 ! a quote is opened and not closed"]),
            (b"a,b\nCaf\xe9,1\n", b',', &["2 ! invalid UTF-8 at byte 3 of the line"]),
            (b"a,b,a\n1,2,3\n", b',', &["header 1: two columns are called \"a\""]),
            (b"a,b\n", b',', &[]),
            (b"", b',', &[]),
        ];
        for (text, separator, expected) in cases {
            for buffer in [1, 3, 1024] {
                let shown = String::from_utf8_lossy(text).into_owned();
                assert_eq!(rows(text, separator, buffer), expected, "{shown:?} by {buffer}");
            }
        }
    }
}
