//! SwiGLU (Shazeer 2020): `silu(gate) · up`, without the intermediate tensors.

use burn::backend::{Flex, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::buffer::{floats, tensor, uninitialized};
use super::simd;
use crate::fused::Fused;
use crate::operations::Swiglu;

/// Elements of one job.
const JOB: usize = 16_384;

impl Fused<Flex, 2> for Swiglu {
    type Saved = [FlexTensor; 2];

    fn forward(self, [gate, up]: [FlexTensor; 2], _: [bool; 2]) -> (FlexTensor, [FlexTensor; 2]) {
        let (gates, ups) = (floats(&gate), floats(&up));
        let mut out = uninitialized(gates.len());
        out.par_chunks_mut(JOB)
            .zip(gates.par_chunks(JOB))
            .zip(ups.par_chunks(JOB))
            .for_each(|((out, gate), up)| simd::swiglu(gate, up, out));
        (tensor(out, gate.shape()), [gate, up])
    }

    fn backward([gate, up]: [FlexTensor; 2], d_out: FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let (gates, ups, d_outs) = (floats(&gate), floats(&up), floats(&d_out));
        let (mut d_gate, mut d_up) = (uninitialized(gates.len()), uninitialized(gates.len()));
        d_gate
            .par_chunks_mut(JOB)
            .zip(d_up.par_chunks_mut(JOB))
            .zip(gates.par_chunks(JOB))
            .zip(ups.par_chunks(JOB))
            .zip(d_outs.par_chunks(JOB))
            .for_each(|((((d_gate, d_up), gate), up), d_out)| simd::swiglu_backward(gate, up, d_out, d_gate, d_up));
        [d_gate, d_up].map(|gradient| Some(tensor(gradient, gate.shape())))
    }
}
