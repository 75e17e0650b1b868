//! Rows of a packed embedding.

use burn::backend::Flex;
use burn_flex::FlexTensor;

use super::buffer::{tensor, uninitialized};
use super::weight::CpuWeight;
use crate::fused::Fused;
use crate::operations::PackedRows;

impl Fused<Flex, 1> for PackedRows {
    type Saved = ();

    fn forward(self, _: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, ()) {
        let w = CpuWeight::from(self.w);
        let [_, columns] = w.shape();
        let mut out = uninitialized(self.rows.len() * columns);
        for (&row, out) in self.rows.iter().zip(out.chunks_mut(columns.max(1))) {
            w.read(row as usize, 0, out);
        }
        (tensor(out, [self.rows.len(), columns]), ())
    }

    fn backward(_: (), _: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [None]
    }
}
