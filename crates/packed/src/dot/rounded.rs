//! Rows that are rounded to bf16 as their codes are unpacked, for products in bf16.

use std::ops::Range;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::{BLOCK, RowsOfCodes, x86::bf16::round_row};
use crate::matrix::PackedMatrix;
#[cfg(target_arch = "x86_64")]
use crate::simd::InstructionSet;

impl PackedMatrix {
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
        if InstructionSet::has_bf16()
            && let Some(codes) = RowsOfCodes::of(self)
        {
            codes.round(rows, stride, out);
            return true;
        }
        let _ = out;
        false
    }
}

#[cfg(target_arch = "x86_64")]
impl RowsOfCodes<'_> {
    fn round(&self, rows: Range<usize>, stride: usize, out: &mut [bf16]) {
        let [_, width] = self.matrix.shape;
        let (first, whole) = (rows.start, width / BLOCK * BLOCK);
        let mut rest = [0.0; BLOCK];
        self.each_row(rows, |n, piece, factors| {
            let (out, rest_of_row) = out[n * stride..][..width].split_at_mut(whole);
            // SAFETY: `InstructionSet::has_bf16` has found the instructions on this processor.
            unsafe { round_row(piece, factors, out) };
            if !rest_of_row.is_empty() {
                let rest = &mut rest[..width - whole];
                self.matrix.decode_row(first + n, whole..width, rest);
                for (out, value) in rest_of_row.iter_mut().zip(rest) {
                    *out = bf16::from_f32(*value);
                }
            }
        });
    }
}
