//! SwiGLU (Shazeer 2020): `silu(gate) · up`, without the intermediate tensors.

use burn::backend::TensorMetadata;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::buffer::{floats, tensor, uninitialized};
use super::simd;

const JOB: usize = 16_384;

pub(crate) fn forward(gate: &FlexTensor, up: &FlexTensor) -> FlexTensor {
    let (gates, ups) = (floats(gate), floats(up));
    let mut out = uninitialized(gates.len());
    out.par_chunks_mut(JOB)
        .zip(gates.par_chunks(JOB))
        .zip(ups.par_chunks(JOB))
        .for_each(|((out, gate), up)| simd::swiglu(gate, up, out));
    tensor(out, gate.shape())
}

/// (d_gate, d_up)
pub(crate) fn backward(gate: &FlexTensor, up: &FlexTensor, d_out: &FlexTensor) -> (FlexTensor, FlexTensor) {
    let (gates, ups, d_outs) = (floats(gate), floats(up), floats(d_out));
    let (mut d_gate, mut d_up) = (uninitialized(gates.len()), uninitialized(gates.len()));
    d_gate
        .par_chunks_mut(JOB)
        .zip(d_up.par_chunks_mut(JOB))
        .zip(gates.par_chunks(JOB))
        .zip(ups.par_chunks(JOB))
        .zip(d_outs.par_chunks(JOB))
        .for_each(|((((d_gate, d_up), gate), up), d_out)| simd::swiglu_backward(gate, up, d_out, d_gate, d_up));
    (tensor(d_gate, gate.shape()), tensor(d_up, gate.shape()))
}
