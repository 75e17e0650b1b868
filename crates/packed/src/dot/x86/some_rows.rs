//! Rows of codes that are unpacked together.

use super::{AHEAD, prefetch_at};
use crate::dot::{HALF, LINE};
use crate::values::Piece;

/// Rows of whole blocks.
pub(super) struct SomeRows<'a> {
    pub(super) piece: &'a Piece<'a>,
    pub(super) factors: &'a [f32; 16],
    /// Halves of blocks in a row.
    pub(super) halves: usize,
    /// Halves of a group, and groups of a row.
    pub(super) period: usize,
    pub(super) groups: usize,
    /// Bytes from one row to the next.
    stride: usize,
}

impl<'a> SomeRows<'a> {
    /// So many rows of a piece.
    pub(super) fn new(piece: &'a Piece<'a>, factors: &'a [f32; 16], rows: usize, halves: usize) -> SomeRows<'a> {
        let (stride, groups) = (piece.codes.row_bits() / 8, piece.scales.len() / rows.max(1));
        let period = (piece.period / HALF).clamp(1, halves.max(1));
        let bytes = rows.saturating_sub(1) * stride + halves * HALF * piece.codes.bits() / 8;
        assert!(piece.bit / 8 + bytes <= piece.codes.bytes().len(), "rows beyond the codes");
        assert!(halves.div_ceil(period) <= groups, "more groups than numbers");
        for numbers in [piece.scales, piece.zeros, piece.biases] {
            assert!(numbers.len() >= rows * groups, "a number for each group");
        }
        SomeRows { piece, factors, halves, period, groups, stride }
    }

    /// Whether products of codes of 8 bits with scales are not rounded: scales of 16 bits leave them room in f32.
    pub(super) fn has_exact_products(&self) -> bool {
        self.piece.scales.iter().fold(0, |all, scale| all | scale.to_bits()).trailing_zeros() >= 13
    }

    /// Whether the difference of two such products is the product of the difference, down to the sign of a zero.
    pub(super) fn has_exact_differences(&self) -> bool {
        let are_positive = || self.piece.scales.iter().fold(true, |all, scale| all & (*scale > 0.0));
        self.piece.factor == 1.0 && self.has_exact_products() && are_positive()
    }

    /// Calls `half` with the number of half of a block, from 0 on, the place of its codes in each of N rows from one on,
    /// and what `of_group` says of its group in each.
    #[inline(always)]
    pub(super) fn each_half<const N: usize, T: Copy>(
        &self,
        first: usize,
        empty: T,
        of_group: impl Fn(usize) -> T,
        mut half: impl FnMut(usize, &[*const u8; N], &[T; N]),
    ) {
        let bytes = HALF * self.piece.codes.bits() / 8;
        // As many elements of 8 bits as of 4.
        let ahead = AHEAD * self.piece.codes.bits() / 4;
        let start = self.piece.codes.bytes().as_ptr().wrapping_add(self.piece.bit / 8);
        let rows: [*const u8; N] = std::array::from_fn(|row| start.wrapping_add((first + row) * self.stride));
        // `at`: halves from the start of the group.
        let mut one = |n: usize, at: usize, groups: &[T; N]| {
            let codes = rows.map(|codes| codes.wrapping_add(n * bytes));
            if (at * bytes).is_multiple_of(LINE) {
                for codes in codes {
                    // SAFETY: every processor of this architecture has the instruction.
                    unsafe { prefetch_at(codes.wrapping_add(ahead).cast()) };
                }
            }
            half(n, &codes, groups);
        };
        let mut groups = [empty; N];
        for (group, begin) in (0..self.halves).step_by(self.period).enumerate() {
            for (row, of_row) in groups.iter_mut().enumerate() {
                *of_row = of_group((first + row) * self.groups + group);
            }
            // Groups of a block, the usual ones, without a loop.
            if self.period == 2 && begin + 2 <= self.halves {
                one(begin, 0, &groups);
                one(begin + 1, 1, &groups);
                continue;
            }
            for n in begin..self.halves.min(begin + self.period) {
                one(n, n - begin, &groups);
            }
        }
    }
}
