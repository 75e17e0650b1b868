//! The bytes of a part of a matrix. Of some rows nothing else is read; of some columns what lies between them is
//! passed over, unless that would be many small reads.

use finetune_store::TensorView;
use rayon::prelude::*;

use crate::error::ModelError;
use crate::files::finite::expect_finite;
use crate::slice::{Along, Cut};

/// Bytes of a row's part from which it is read alone: a page of the disk.
const ALONE: usize = 4 << 10;
/// Bytes of whole rows that are read at a time otherwise.
const PIECE: usize = 1 << 20;

/// The bytes of the part, row-major. A number that is not finite is an error if `must_be_finite`.
///
/// # Errors
/// If the file cannot be read.
pub(super) fn bytes_of_part(view: &TensorView<'_>, cut: &Cut, must_be_finite: bool) -> Result<Vec<u8>, ModelError> {
    let (size, [rows, columns]) = (view.dtype.size(), cut.whole);
    let row = columns * size;
    // Some elements, from the `first` one on.
    let read = |first: usize, count: usize| -> Result<Vec<u8>, ModelError> {
        let bytes = view.bytes_at(first * size, count * size)?;
        if must_be_finite {
            expect_finite(view, &bytes, first)?;
        }
        Ok(bytes)
    };
    let pieces: Result<Vec<Vec<u8>>, ModelError> = match &cut.along {
        Along::Rows(ranges) => ranges.iter().map(|range| read(range.start * columns, range.len() * columns)).collect(),
        Along::Columns(range) if range.len() * size >= ALONE => {
            (0..rows).into_par_iter().map(|n| read(n * columns + range.start, range.len())).collect()
        }
        Along::Columns(range) => {
            let at_once = (PIECE / row.max(1)).max(1);
            let own = range.start * size..range.end * size;
            let some_rows = |n: usize| -> Result<Vec<u8>, ModelError> {
                let first = n * at_once;
                let bytes = read(first * columns, at_once.min(rows - first) * columns)?;
                Ok(bytes.chunks_exact(row).flat_map(|row| &row[own.clone()]).copied().collect())
            };
            (0..rows.div_ceil(at_once)).into_par_iter().map(some_rows).collect()
        }
    };
    Ok(pieces?.concat())
}
