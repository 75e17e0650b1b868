//! Rows that are rounded to bf16 as their codes are unpacked, and their products in bf16 with sums in f32.
//!
//! A product is summed in pieces of [`PIECE`] steps of [`STEP`] elements. Sixteen lanes take two neighbours of a step
//! each; at the end of a piece the lanes are added ([`totals`]). Codes of 4 bits have another order in each step, the one
//! in which they come out of memory fastest: activations are brought into it once ([`PackedMatrix::arrange`]).

use std::ops::Range;

use half::bf16;

use super::HALF;
#[cfg(target_arch = "x86_64")]
pub use super::x86::bf16::totals;
#[cfg(target_arch = "x86_64")]
use super::{BLOCK, RowsOfCodes, x86::bf16 as instructions};
use crate::matrix::PackedMatrix;
#[cfg(target_arch = "x86_64")]
use crate::simd::InstructionSet;

/// Elements that one instruction takes.
pub const STEP: usize = HALF;
/// Steps of a piece of a sum. Ten rows of it stay in a first-level cache of 32 KiB.
pub const PIECE: usize = 32;

impl PackedMatrix {
    /// Brings a row of activations into the order in which [`PackedMatrix::round_rows`] writes the elements of a row.
    ///
    /// # Panics
    /// If `x` is not as long as a row.
    pub fn arrange(&self, x: &mut [bf16]) {
        let [_, width] = self.shape;
        assert_eq!(x.len(), width, "as many activations as columns");
        #[cfg(target_arch = "x86_64")]
        if self.codes.bits() == 4 && self.codes_to_round().is_some() {
            // SAFETY: `codes_to_round` has found the instructions on this processor.
            unsafe { instructions::arrange(&mut x[..width / BLOCK * BLOCK]) };
        }
    }

    /// Reads some rows, rounded to the nearest bf16, to places that lie `stride` apart, if this processor and the form
    /// of the codes have a fast way. What is between the rows stays. Values below the smallest normal number
    /// may become 0.
    ///
    /// # Panics
    /// If the range is beyond the matrix, or `out` too short.
    pub fn round_rows(&self, rows: Range<usize>, stride: usize, out: &mut [bf16]) -> bool {
        let [height, width] = self.shape;
        assert!(rows.end <= height && width <= stride, "rows {rows:?} of {height}, {width} columns for {stride}");
        #[cfg(target_arch = "x86_64")]
        if let Some(codes) = self.codes_to_round() {
            codes.round(rows, stride, out);
            return true;
        }
        let _ = out;
        false
    }

    /// The products of arranged activations with some rows, `out[n] = x · w[rows.start + n]`, if this processor and the
    /// form have a fast way: the sums of [`PackedMatrix::round_rows`], without its rows in memory.
    ///
    /// # Panics
    /// If the range is beyond the matrix, or `x` or `out` have another length.
    pub fn dot_rounded(&self, rows: Range<usize>, x: &[bf16], out: &mut [f32]) -> bool {
        let [height, width] = self.shape;
        assert!(rows.end <= height && x.len() == width, "rows {rows:?} of {height}, {} of {width} columns", x.len());
        assert_eq!(out.len(), rows.len(), "a product for each row");
        #[cfg(target_arch = "x86_64")]
        if width.is_multiple_of(BLOCK)
            && let Some(codes) = self.codes_to_round()
        {
            codes.dot_rounded(rows, x, out);
            return true;
        }
        false
    }

    /// The codes, if this processor and their form have a fast way to bf16.
    #[cfg(target_arch = "x86_64")]
    fn codes_to_round(&self) -> Option<RowsOfCodes<'_>> {
        if InstructionSet::has_bf16() { RowsOfCodes::of(self) } else { None }
    }
}

#[cfg(target_arch = "x86_64")]
impl RowsOfCodes<'_> {
    /// The processor has to have the instructions.
    fn round(&self, rows: Range<usize>, stride: usize, out: &mut [bf16]) {
        let [_, width] = self.matrix.shape;
        let (first, whole) = (rows.start, width / BLOCK * BLOCK);
        let mut rest = [0.0; BLOCK];
        self.each_row(rows, |n, piece, factors| {
            let (out, rest_of_row) = out[n * stride..][..width].split_at_mut(whole);
            // SAFETY: as this function's.
            unsafe { instructions::round_row(piece, factors, out) };
            if !rest_of_row.is_empty() {
                let rest = &mut rest[..width - whole];
                self.matrix.decode_row(first + n, whole..width, rest);
                for (out, value) in rest_of_row.iter_mut().zip(rest) {
                    *out = bf16::from_f32(*value);
                }
            }
        });
    }

    /// The processor has to have the instructions.
    fn dot_rounded(&self, rows: Range<usize>, x: &[bf16], out: &mut [f32]) {
        self.each_some(rows, |first, count, piece, factors| {
            // SAFETY: as this function's.
            unsafe { instructions::dot_rows(piece, factors, x, &mut out[first..][..count]) };
        });
    }
}
