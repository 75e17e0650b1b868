use std::ops::Range;

use crate::PackedMatrix;

impl PackedMatrix {
    /// TEMP
    pub fn decode_row(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        for (out, column) in out.iter_mut().zip(columns) {
            *out = self.value(row, column);
        }
    }
}
