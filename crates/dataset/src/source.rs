//! The rows of a file of any kind, a block at a time.

use std::path::Path;

use crate::array::Array;
use crate::error::DatasetError;
use crate::jsonl::Lines;
use crate::kinds::{FileKind, Kind};
use crate::parquet_rows::ParquetRows;
use crate::record::{Record, block};
use crate::table::Table;

/// A file whose rows are being read.
pub(crate) struct Source<'a> {
    path: &'a Path,
    kind: FileKind,
    rows: Rows,
}

enum Rows {
    Lines(Lines),
    Array(Array),
    Table(Table),
    Parquet(ParquetRows),
}

impl<'a> Source<'a> {
    /// # Errors
    /// As [`FileKind::of`] and [`ParquetRows::open`]. [`DatasetError::BadHeader`].
    pub(crate) fn open(path: &'a Path) -> Result<Self, DatasetError> {
        let kind = FileKind::of(path)?;
        let fault = |source| kind.packing.fault(path, source);
        let open = || kind.packing.open(path).map_err(fault);
        let rows = match kind.kind {
            Kind::JsonLines => Rows::Lines(Lines::new(open()?)),
            Kind::JsonArray => Rows::Array(Array::new(open()?)),
            Kind::Table(separator) => match Table::open(open()?, separator).map_err(fault)? {
                Ok(table) => Rows::Table(table),
                Err((line, reason)) => return Err(DatasetError::BadHeader { path: path.to_owned(), line, reason }),
            },
            Kind::Parquet => Rows::Parquet(ParquetRows::open(path)?),
        };
        Ok(Self { path, kind, rows })
    }

    /// The next rows. None at the end of the file.
    ///
    /// # Errors
    /// [`DatasetError::Damaged`], [`DatasetError::Unreadable`], and those of [`ParquetRows::block`].
    pub(crate) fn block(&mut self) -> Result<Vec<Record>, DatasetError> {
        let read = match &mut self.rows {
            Rows::Lines(lines) => block(|| lines.next()),
            Rows::Array(array) => block(|| array.next()),
            Rows::Table(table) => block(|| table.next()),
            Rows::Parquet(rows) => return rows.block(),
        };
        read.map_err(|source| self.kind.packing.fault(self.path, source))
    }
}
