//! Rows of a matrix whose codes are multiplied as they are unpacked.

use std::ops::Range;

use super::{Ahead, BLOCK, HALF, Then, add_rest};
use crate::matrix::{Decoder, Groups, PackedMatrix, Rounding};
use crate::values::Piece;

/// Scales that are read together, if each row has its own.
const NUMBERS: usize = 256;
/// Rows whose products are computed together.
pub(super) const TOGETHER: usize = 4;

/// A matrix whose codes are multiplied as they are unpacked: its groups are whole halves of a block.
pub(super) struct RowsOfCodes<'a> {
    pub(super) matrix: &'a PackedMatrix,
    /// Elements of a group.
    period: usize,
    /// Groups of a row.
    groups: usize,
    /// Rows that share them.
    sharing: usize,
}

impl<'a> RowsOfCodes<'a> {
    /// `None` if its codes have to be decoded first.
    pub(super) fn of(matrix: &'a PackedMatrix) -> Option<RowsOfCodes<'a>> {
        let [_, width] = matrix.shape;
        let (period, sharing, is_whole) = match matrix.groups {
            Groups::Blocks { rows, columns } => (columns.min(width), rows, true),
            Groups::Flat { elements } => (elements, 1, width.is_multiple_of(elements)),
            Groups::OfColumns { .. } => return None,
        };
        let is_table = matches!(matrix.decoder, Decoder::Table { .. });
        let has_form = match matrix.codes.bits() {
            4 => true,
            8 => !is_table && matrix.rounding == Rounding::None,
            _ => false,
        };
        let begins_with_a_byte = matrix.codes.row_bits().is_multiple_of(8);
        let of_halves = is_whole && (period.is_multiple_of(HALF) || period == width);
        let fits = has_form && begins_with_a_byte && of_halves && width >= BLOCK;
        fits.then(|| RowsOfCodes { matrix, period, groups: width.div_ceil(period), sharing })
    }

    /// `products` multiplies the whole blocks of some rows.
    #[inline(always)]
    pub(super) fn dot(
        &self,
        rows: Range<usize>,
        x: &[f32],
        out: &mut [f32],
        products: impl Fn(&Piece, &[f32; 16], &[f32], &mut [f32]),
    ) {
        let (whole, rest_of_x) = x.split_at(x.len() / BLOCK * BLOCK);
        let mut rest = vec![0f32; rest_of_x.len()];
        let start = rows.start;
        self.each_some(rows, |first, count, some, factors| {
            let out = &mut out[first..][..count];
            products(some, factors, whole, out);
            if rest.is_empty() {
                return;
            }
            for (row, out) in (start + first..).zip(out) {
                self.matrix.decode_row(row, whole.len()..x.len(), &mut rest);
                *out = add_rest(*out, rest_of_x, rest.iter().copied());
            }
        });
    }

    /// `split` writes the whole blocks of a row.
    #[inline(always)]
    pub(super) fn split(
        &self,
        rows: Range<usize>,
        some: &mut [f32],
        then: Then<'_>,
        split: impl Fn(&Piece, &[f32; 16], &mut [f32]),
    ) {
        let [_, width] = self.matrix.shape;
        let (whole, at_once) = (width / BLOCK * BLOCK, some.len() / width);
        let (first, count) = (rows.start, rows.len());
        self.each_row(rows, |n, piece, factors| {
            let out = &mut some[n % at_once * width..][..width];
            split(piece, factors, &mut out[..whole]);
            if whole < width {
                self.matrix.decode_row(first + n, whole..width, &mut out[whole..]);
            }
            if n % at_once + 1 == at_once || n + 1 == count {
                let begin = n / at_once * at_once;
                let codes = &self.matrix.codes;
                let bytes = codes.bit(first + begin, 0) / 8..codes.bit(first + n + 1, 0) / 8;
                let ahead = codes.bytes().get(bytes).map_or(Ahead::NONE, Ahead::of);
                then(begin, &some[..(n - begin + 1) * width], ahead);
            }
        });
    }

    /// Calls `row` with the number of each row, counted from the first, its codes with their numbers, and the factors
    /// of 4 bits.
    #[inline(always)]
    pub(super) fn each_row(&self, rows: Range<usize>, mut row: impl FnMut(usize, &Piece, &[f32; 16])) {
        self.each_some(rows, |first, _, some, factors| {
            for (n, piece) in self.rows_of(some).enumerate() {
                row(first + n, &piece, factors);
            }
        });
    }

    /// Each of some rows.
    #[inline(always)]
    pub(super) fn rows_of<'p>(&self, some: &'p Piece<'p>) -> impl Iterator<Item = Piece<'p>> {
        let [scales, zeros, biases] = [some.scales, some.zeros, some.biases].map(|numbers| numbers.chunks(self.groups));
        let bits = (some.bit..).step_by(some.codes.row_bits());
        let numbers = scales.zip(zeros).zip(biases);
        bits.zip(numbers).map(|(bit, ((scales, zeros), biases))| Piece { bit, scales, zeros, biases, ..*some })
    }

    /// Calls `some` with the number of a row, counted from the first, and how many follow from it on, their codes with
    /// the numbers of one row behind those of the other, and the factors of 4 bits.
    #[inline(always)]
    pub(super) fn each_some(&self, rows: Range<usize>, mut some: impl FnMut(usize, usize, &Piece, &[f32; 16])) {
        let RowsOfCodes { matrix, period, groups, sharing } = *self;
        // The numbers of several rows are read together: those of one may be fewer than a vector.
        let most = if sharing == 1 { (NUMBERS / groups).max(1).next_multiple_of(TOGETHER) } else { 1 };
        let (mut scales, mut zeros, mut biases) =
            (vec![0f32; most * groups], vec![0f32; most * groups], vec![-0f32; most * groups]);
        let ((meaning, factor), codes, rounding) = (matrix.meaning(), &matrix.codes, matrix.rounding);
        let mut factors = [0.0; 16];
        for first in rows.clone().step_by(most) {
            let count = most.min(rows.end - first);
            let (group, numbers) = (first / sharing * groups, count * groups);
            matrix.scales.read(group, &mut scales[..numbers]);
            matrix.read_offsets(group, &mut zeros[..numbers], &mut biases[..numbers]);
            let piece = Piece {
                codes,
                bit: codes.bit(first, 0),
                first: period,
                period,
                meaning,
                rounding,
                scales: &scales[..numbers],
                zeros: &zeros[..numbers],
                biases: &biases[..numbers],
                factor,
                has_short_scales: matrix.scales.are_short(),
            };
            if codes.bits() == 4 && first == rows.start {
                factors = piece.factors();
            }
            some(first - rows.start, count, &piece, &factors);
        }
    }
}
