//! Decoding rows: [`PackedMatrix::value`] for many elements at a time, with the same bits.

#[cfg(test)]
mod tests;

use std::ops::Range;

use crate::codes::Codes;
use crate::matrix::{Decoder, Groups, PackedMatrix, Zeros};
use crate::numbers::{Numbers, e4m3, e8m0, each};
use crate::simd::InstructionSet;
use crate::values::{Each, Meaning, Piece};

/// Groups whose scales are read at a time, to a buffer on the stack.
const GROUPS: usize = 64;

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
    /// The values of some columns of a row: `out[n]` is that of column `columns.start + n`. They
    /// have the bits of [`PackedMatrix::value`].
    ///
    /// # Panics
    /// If the range is beyond the matrix, or `out` is not as long as it.
    pub fn decode_row(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        self.decode_row_with(InstructionSet::best(), row, columns, out);
    }

    /// [`PackedMatrix::decode_row`] with one of [`InstructionSet::here`], for tests and benchmarks.
    ///
    /// # Panics
    /// As [`PackedMatrix::decode_row`].
    pub fn decode_row_with(&self, set: InstructionSet, row: usize, columns: Range<usize>, out: &mut [f32]) {
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

    /// What codes mean, and what their values are multiplied by at the end.
    pub(crate) fn meaning(&self) -> (Meaning<'_>, f32) {
        match &self.decoder {
            Decoder::Affine { .. } => (Meaning::Affine, 1.0),
            Decoder::Shifted { zeros: Zeros::All(zero), factor } => (Meaning::Shifted { zero: Some(*zero) }, *factor),
            Decoder::Shifted { zeros: Zeros::Each(_), factor } => (Meaning::Shifted { zero: None }, *factor),
            Decoder::Table { table } => (Meaning::of_table(table, self.codes.bits()), 1.0),
        }
    }

    fn decode_runs(&self, set: InstructionSet, row: usize, start: usize, runs: Runs, mut out: &mut [f32]) {
        let Runs { mut group, mut first, period } = runs;
        let (meaning, factor) = self.meaning();
        let (codes, rounding) = (&self.codes, self.rounding);
        let (mut scales, mut zeros, mut biases) = ([0f32; GROUPS], [0f32; GROUPS], [-0f32; GROUPS]);
        let mut bit = codes.bit(row, start);
        while !out.is_empty() {
            first = first.min(out.len());
            let count = GROUPS.min(1 + (out.len() - first).div_ceil(period));
            let (scales, zeros, biases) = (&mut scales[..count], &mut zeros[..count], &mut biases[..count]);
            self.scales.read(group, scales);
            self.read_offsets(group, zeros, biases);
            let (now, later) =
                out.split_at_mut(out.len().min(first.saturating_add((count - 1).saturating_mul(period))));
            let has_short_scales = self.scales.are_short();
            let piece =
                Piece { codes, bit, first, period, meaning, rounding, scales, zeros, biases, factor, has_short_scales };
            set.decode(&piece, now);
            group += count;
            bit += now.len() * codes.bits();
            first = period;
            out = later;
        }
    }

    /// Zero points and biases of groups, from one on. What the decoder does not have stays as it
    /// is.
    pub(crate) fn read_offsets(&self, group: usize, zeros: &mut [f32], biases: &mut [f32]) {
        match &self.decoder {
            Decoder::Affine { biases: numbers } => numbers.read(group, biases),
            Decoder::Shifted { zeros: Zeros::All(zero), .. } => zeros.fill(f32::from(*zero)),
            Decoder::Shifted { zeros: Zeros::Each(points), .. } => {
                for (out, zero) in zeros.iter_mut().zip(&points[group..]) {
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
        let (mut scales, mut zeros, mut biases) = (vec![0f32; count], vec![0f32; count], vec![-0f32; count]);
        self.scales.read(row * count, &mut scales);
        self.read_offsets(row * count, &mut zeros, &mut biases);
        let ((meaning, factor), rounding) = (self.meaning(), self.rounding);
        let mut codes = [0u8; GROUPS];
        let (mut scale, mut zero, mut bias) = ([0f32; GROUPS], [0f32; GROUPS], [-0f32; GROUPS]);
        let mut bit = self.codes.bit(row, start);
        for (group, out) in group.chunks(GROUPS).zip(out.chunks_mut(GROUPS)) {
            let n = out.len();
            self.codes.unpack(bit, &mut codes[..n]);
            pick(&scales, group, &mut scale);
            match self.decoder {
                Decoder::Affine { .. } => pick(&biases, group, &mut bias),
                Decoder::Shifted { .. } => pick(&zeros, group, &mut zero),
                Decoder::Table { .. } => {}
            }
            let (scales, zeros, biases) = (&scale[..n], &zero[..n], &bias[..n]);
            set.decode_each(&Each { meaning, rounding, scales, zeros, biases, factor }, &codes[..n], out);
            bit += n * self.codes.bits();
        }
    }
}

/// `out[n] = numbers[places[n]]`
fn pick(numbers: &[f32], places: &[u32], out: &mut [f32]) {
    for (out, place) in out.iter_mut().zip(places) {
        *out = numbers[*place as usize];
    }
}

impl Numbers {
    /// Numbers from the `start`th on.
    pub(crate) fn read(&self, start: usize, out: &mut [f32]) {
        let end = start + out.len();
        match self {
            Numbers::F32(values) => out.copy_from_slice(&values[start..end]),
            Numbers::F16(values) => InstructionSet::best().widen_f16(&values[start..end], out),
            Numbers::BF16(values) => InstructionSet::best().widen(&values[start..end], out),
            Numbers::E8M0(values) => each(&values[start..end], out, |power| e8m0(*power)),
            Numbers::E4M3(values) => each(&values[start..end], out, |code| e4m3(*code)),
            Numbers::Product { scales, factors, per } => {
                // As long as factors have one scale, it is read once.
                let (mut at, mut out) = (start, out);
                while !out.is_empty() {
                    let (now, later) = out.split_at_mut(out.len().min(per - at % per));
                    let scale = scales[at / per].to_f32();
                    each(&factors[at..at + now.len()], now, |factor| scale * f32::from(*factor));
                    at += now.len();
                    out = later;
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
