//! Rows of a Parquet file, one after the other, without the columns ever being in memory as a
//! whole.
//!
//! The crate that reads them expects well-meant files. A torn one can panic there, and a page can
//! claim any size. So it reads within bounds (`guard.rs`), a block of rows at a time.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Map, Value, json};

use crate::error::DatasetError;
use crate::guard::{Bounds, Foreign, watched};
use crate::record::{Content, Record, block};

/// What the reading of a block of rows may take. A page is unpacked as a whole.
const BOUNDS: Bounds = Bounds { time: Duration::from_secs(300), bytes: 2 << 30 };

/// The column that pandas keeps its row numbers in.
const INDEX: &str = "__index_level_0__";

/// The key of an object in place of bytes.
const NOT_TEXT: &str = "bytes that are not UTF-8";

pub(crate) struct ParquetRows {
    path: PathBuf,
    /// `None` once a block could not be read.
    rows: Option<RowIter<'static>>,
    row: u32,
}

impl ParquetRows {
    /// # Errors
    /// [`DatasetError::Damaged`], [`DatasetError::Unreadable`], those of [`watched`].
    pub(crate) fn open(path: &Path) -> Result<Self, DatasetError> {
        let file = File::open(path).map_err(|source| DatasetError::Unreadable { path: path.to_owned(), source })?;
        let opened = watched(&Foreign::Parquet(path.display().to_string()), BOUNDS, move || {
            let reader: Box<dyn FileReader> = Box::new(SerializedFileReader::new(file)?);
            Ok::<_, ParquetError>(RowIter::from_file_into(reader))
        })?;
        let rows = opened.map_err(|error| damaged(path, &error))?;
        Ok(Self { path: path.to_owned(), rows: Some(rows), row: 0 })
    }

    /// The next rows. None at the end of the file.
    ///
    /// # Errors
    /// As [`ParquetRows::open`].
    pub(crate) fn block(&mut self) -> Result<Vec<Record>, DatasetError> {
        let Some(mut rows) = self.rows.take() else { return Ok(Vec::new()) };
        let mut row = self.row;
        let (read, rows, row) = watched(&Foreign::Parquet(self.path.display().to_string()), BOUNDS, move || {
            let records = block(|| {
                let Some(found) = rows.next().transpose()? else { return Ok::<_, ParquetError>(None) };
                row = row.saturating_add(1);
                let mut bytes = 0;
                let values = object(&found, &mut bytes);
                Ok(Some(Record { line: 0, row, column: 1, content: Content::Values(values, bytes) }))
            });
            (records, rows, row)
        })?;
        let records = read.map_err(|error| damaged(&self.path, &error))?;
        (self.rows, self.row) = (Some(rows), row);
        Ok(records)
    }
}

fn damaged(path: &Path, error: &ParquetError) -> DatasetError {
    let text = error.to_string();
    let reason = text.trim_start_matches("Parquet error: ").to_owned();
    DatasetError::Damaged { path: path.to_owned(), what: "Parquet file", reason }
}

/// A row or a struct as an object. `bytes` grows by about what its values take.
fn object(row: &Row, bytes: &mut usize) -> Map<String, Value> {
    let columns = row.get_column_iter().filter(|(name, _)| *name != INDEX);
    columns.map(|(name, field)| (name.clone(), value(field, bytes))).collect()
}

/// Dates and times become text as ISO 8601 has them, decimal numbers text with all their digits,
/// numbers that are not finite null. Bytes are text if they are UTF-8: older programs do not mark
/// text as such. Others, such as pictures, become an object that says how many they are.
fn value(field: &Field, bytes: &mut usize) -> Value {
    *bytes += 16;
    match field {
        Field::Str(text) => {
            *bytes += text.len();
            Value::String(text.clone())
        }
        Field::Bytes(found) => {
            *bytes += found.len();
            match std::str::from_utf8(found.data()) {
                Ok(text) => Value::String(text.to_owned()),
                // Text of another encoding must not be trained on as base64.
                Err(_) => json!({ NOT_TEXT: found.len() }),
            }
        }
        Field::Group(row) => Value::Object(object(row, bytes)),
        Field::ListInternal(list) => list.elements().iter().map(|item| value(item, bytes)).collect(),
        Field::MapInternal(map) => {
            let entry = |(key, item): &(Field, Field)| {
                let key = match value(key, &mut 0) {
                    Value::String(key) => key,
                    other => other.to_string(),
                };
                (key, item.clone())
            };
            let entries: Vec<(String, Field)> = map.entries().iter().map(entry).collect();
            Value::Object(entries.iter().map(|(key, item)| (key.clone(), value(item, bytes))).collect())
        }
        other => other.to_json_value(),
    }
}
