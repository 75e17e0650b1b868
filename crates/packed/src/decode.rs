//! Decoding rows and blocks: [`PackedMatrix::value`] for many elements at a time, with the same bits.

#[cfg(test)]
mod tests;

use std::ops::Range;

use crate::codes::Codes;
use crate::matrix::{Decoder, Groups, PackedMatrix, Zeros};
use crate::numbers::Numbers;
use crate::simd::InstructionSet;
use crate::values::{Each, Meaning, Piece};

/// Groups whose scales are read at a time, to a buffer on the stack.
const GROUPS: usize = 64;

/// Columns that are decoded before they are transposed. With [`ROWS`] rows they take 8 KiB.
const COLUMNS: usize = 256;

/// Rows that are transposed at a time.
pub(crate) const ROWS: usize = 8;

/// Groups of a row that follow each other.
struct Runs {
    /// The group of the first element.
    group: usize,
    /// Elements of the first group, from there on.
    first: usize,
    /// Elements of each group after it.
    period: usize,
}

impl Runs {
    /// Groups of `period` elements each, from element `at` on, counted from the start of group
    /// `origin`.
    fn new(origin: usize, at: usize, period: usize) -> Runs {
        Runs { group: origin + at / period, first: period - at % period, period }
    }
}

impl PackedMatrix {
    /// The values of some columns of a row: `out[n]` is that of column `columns.start + n`. They have
    /// the bits of [`PackedMatrix::value`].
    ///
    /// # Panics
    /// If the range is beyond the matrix, or `out` is not as long as it.
    pub fn decode_row(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        self.decode_row_with(InstructionSet::best(), row, columns, out);
    }

    /// The values of a block, row after row: `out` is [rows, columns].
    ///
    /// # Panics
    /// As [`PackedMatrix::decode_row`].
    pub fn decode_block(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        assert_eq!(out.len(), rows.len() * columns.len(), "a buffer of the size of the block");
        if columns.is_empty() {
            return;
        }
        let set = InstructionSet::best();
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len())) {
            self.decode_row_with(set, row, columns.clone(), out);
        }
    }

    /// The values of a block, column after column: `out` is [columns, rows].
    ///
    /// # Panics
    /// As [`PackedMatrix::decode_row`].
    pub fn decode_transposed(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        self.decode_transposed_with(InstructionSet::best(), rows, columns, out);
    }

    pub(crate) fn decode_transposed_with(
        &self,
        set: InstructionSet,
        rows: Range<usize>,
        columns: Range<usize>,
        out: &mut [f32],
    ) {
        assert_eq!(out.len(), rows.len() * columns.len(), "a buffer of the size of the block");
        let mut block = [0f32; ROWS * COLUMNS];
        for first in columns.clone().step_by(COLUMNS) {
            let some = first..columns.end.min(first + COLUMNS);
            let out = &mut out[(first - columns.start) * rows.len()..][..some.len() * rows.len()];
            for row in rows.clone().step_by(ROWS) {
                let here = row..rows.end.min(row + ROWS);
                for (row, line) in here.clone().zip(block.chunks_exact_mut(COLUMNS)) {
                    self.decode_row_with(set, row, some.clone(), &mut line[..some.len()]);
                }
                set.transpose(&block, COLUMNS, [here.len(), some.len()], &mut out[row - rows.start..], rows.len());
            }
        }
    }

    pub(crate) fn decode_row_with(&self, set: InstructionSet, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let [rows, width] = self.shape;
        assert!(row < rows && columns.end <= width, "row {row}, columns {columns:?} of a matrix {rows} × {width}");
        assert_eq!(out.len(), columns.len(), "a buffer of the length of the range");
        if out.is_empty() {
            return;
        }
        let start = columns.start;
        match &self.groups {
            Groups::Blocks { rows, columns } => {
                let runs = Runs::new(row / rows * width.div_ceil(*columns), start, *columns);
                self.decode_runs(set, row, start, runs, out);
            }
            Groups::Flat { elements } => {
                self.decode_runs(set, row, start, Runs::new(0, row * width + start, *elements), out);
            }
            Groups::OfColumns { group, count } => self.decode_columns(set, row, start, &group[columns], *count, out),
        }
    }

    fn meaning(&self) -> Meaning<'_> {
        match &self.decoder {
            Decoder::Affine { .. } => Meaning::Affine,
            Decoder::Shifted { factor, .. } => Meaning::Shifted { factor: *factor },
            Decoder::Table { table } => Meaning::of_table(table, self.codes.bits()),
        }
    }

    fn decode_runs(&self, set: InstructionSet, row: usize, start: usize, runs: Runs, mut out: &mut [f32]) {
        let Runs { mut group, mut first, period } = runs;
        let meaning = self.meaning();
        let (mut scales, mut offsets) = ([0f32; GROUPS], [0f32; GROUPS]);
        let mut bit = self.codes.bit(row, start);
        while !out.is_empty() {
            first = first.min(out.len());
            let count = GROUPS.min(1 + (out.len() - first).div_ceil(period));
            let (scales, offsets) = (&mut scales[..count], &mut offsets[..count]);
            self.scales.read(group, scales);
            self.read_offsets(group, offsets);
            let (now, later) =
                out.split_at_mut(out.len().min(first.saturating_add((count - 1).saturating_mul(period))));
            let (codes, rounding) = (&self.codes, self.rounding);
            set.decode(&Piece { codes, bit, first, period, meaning, rounding, scales, offsets }, now);
            group += count;
            bit += now.len() * self.codes.bits();
            first = period;
            out = later;
        }
    }

    /// The biases or zero points of groups, from one on.
    fn read_offsets(&self, group: usize, out: &mut [f32]) {
        match &self.decoder {
            Decoder::Affine { biases } => biases.read(group, out),
            Decoder::Shifted { zeros: Zeros::All(zero), .. } => out.fill(f32::from(*zero)),
            Decoder::Shifted { zeros: Zeros::Each(zeros), .. } => {
                for (out, zero) in out.iter_mut().zip(&zeros[group..]) {
                    *out = f32::from(*zero);
                }
            }
            Decoder::Table { .. } => {}
        }
    }

    /// Every column has its own group: `group` are those of the columns of `out`.
    fn decode_columns(
        &self,
        set: InstructionSet,
        row: usize,
        start: usize,
        group: &[u32],
        count: usize,
        out: &mut [f32],
    ) {
        let (mut of_row, mut offsets_of_row) = (vec![0f32; count], vec![0f32; count]);
        self.scales.read(row * count, &mut of_row);
        self.read_offsets(row * count, &mut offsets_of_row);
        let (mut codes, mut scales, mut offsets) = ([0u8; GROUPS], [0f32; GROUPS], [0f32; GROUPS]);
        let mut bit = self.codes.bit(row, start);
        for (group, out) in group.chunks(GROUPS).zip(out.chunks_mut(GROUPS)) {
            let n = out.len();
            self.codes.unpack(bit, &mut codes[..n]);
            for ((scale, offset), group) in scales.iter_mut().zip(&mut offsets).zip(group) {
                (*scale, *offset) = (of_row[*group as usize], offsets_of_row[*group as usize]);
            }
            let each = Each { meaning: self.meaning(), rounding: self.rounding };
            set.decode_each(&each, &codes[..n], &scales[..n], &offsets[..n], out);
            bit += n * self.codes.bits();
        }
    }
}

impl Numbers {
    /// Numbers from the `start`th on.
    pub(crate) fn read(&self, start: usize, out: &mut [f32]) {
        use half::slice::HalfFloatSliceExt;
        let end = start + out.len();
        match self {
            Numbers::F32(values) => out.copy_from_slice(&values[start..end]),
            Numbers::F16(values) => values[start..end].convert_to_f32_slice(out),
            Numbers::BF16(values) => values[start..end].convert_to_f32_slice(out),
            Numbers::E8M0(_) | Numbers::E4M3(_) | Numbers::Product { .. } => {
                for (out, n) in out.iter_mut().zip(start..) {
                    *out = self.get(n);
                }
            }
        }
    }
}

impl Codes {
    /// The bit at which a code begins. With the high half first it is that of the other half.
    pub(crate) fn bit(&self, row: usize, column: usize) -> usize {
        row * self.row_bits() + column * self.bits()
    }
}
