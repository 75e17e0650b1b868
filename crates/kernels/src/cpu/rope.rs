//! Rotary position embedding in Hugging Face's layout: element i of a head turns together with
//! element i + d/2.

use burn::backend::{Flex, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::buffer::{floats, tensor, uninitialized};
use super::simd;
use crate::arguments::RopeTable;
use crate::fused::Fused;
use crate::operations::Rope;

/// Tokens of one job.
const JOB_TOKENS: usize = 32;

impl Fused<Flex, 1> for Rope {
    type Saved = RopeTable;

    fn forward(self, [x]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, RopeTable) {
        (rotate(&x, &self.table, 1.0), self.table)
    }

    fn backward(table: RopeTable, d_out: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(rotate(&d_out, &table, -1.0))]
    }
}

/// x [t, heads, d], contiguous, turned by the table's angles times `sign`: 1 turns, -1 turns back,
/// which is the backward pass.
fn rotate(x: &FlexTensor, table: &RopeTable, sign: f32) -> FlexTensor {
    let [tokens, heads, width] = x.shape().dims::<3>();
    let half = table.half;
    assert!(width == 2 * half && table.cosines.len() == tokens * half, "rope table of another shape");
    let xs = floats(x);
    let mut out = uninitialized(xs.len());
    let job = JOB_TOKENS * heads * width;
    out.par_chunks_mut(job).zip(xs.par_chunks(job)).enumerate().for_each(|(n, (out, x))| {
        let tokens = out.chunks_mut(heads * width).zip(x.chunks(heads * width)).enumerate();
        for (t, (out, x)) in tokens {
            let at = (n * JOB_TOKENS + t) * half;
            let (cosines, sines) = (&table.cosines[at..at + half], &table.sines[at..at + half]);
            for (out, x) in out.chunks_mut(width).zip(x.chunks(width)) {
                simd::rotate(x, cosines, sines, sign, out);
            }
        }
    });
    tensor(out, x.shape())
}
