//! Gated units (Shazeer 2020): `activation(gate) · up`, without the intermediate tensors.

use burn::backend::{Flex, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::buffer::{floats, tensor, uninitialized};
use super::simd;
use crate::arguments::Activation;
use crate::fused::Fused;
use crate::operations::Gated;

/// Elements of one job.
const JOB: usize = 16_384;

impl Fused<Flex, 2> for Gated {
    type Saved = ([FlexTensor; 2], Activation);

    fn forward(self, [gate, up]: [FlexTensor; 2], _: [bool; 2]) -> (FlexTensor, Self::Saved) {
        let forward = match self.activation {
            Activation::Silu => simd::swiglu,
            Activation::GeluTanh => simd::geglu,
            Activation::Clamped => simd::clamped,
        };
        let (gates, ups) = (floats(&gate), floats(&up));
        let mut out = uninitialized(gates.len());
        out.par_chunks_mut(JOB)
            .zip(gates.par_chunks(JOB))
            .zip(ups.par_chunks(JOB))
            .for_each(|((out, gate), up)| forward(gate, up, out));
        (tensor(out, gate.shape()), ([gate, up], self.activation))
    }

    fn backward(([gate, up], activation): Self::Saved, d_out: FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let backward = match activation {
            Activation::Silu => simd::swiglu_backward,
            Activation::GeluTanh => simd::geglu_backward,
            Activation::Clamped => simd::clamped_backward,
        };
        let (gates, ups, d_outs) = (floats(&gate), floats(&up), floats(&d_out));
        let (mut d_gate, mut d_up) = (uninitialized(gates.len()), uninitialized(gates.len()));
        d_gate
            .par_chunks_mut(JOB)
            .zip(d_up.par_chunks_mut(JOB))
            .zip(gates.par_chunks(JOB))
            .zip(ups.par_chunks(JOB))
            .zip(d_outs.par_chunks(JOB))
            .for_each(|((((d_gate, d_up), gate), up), d_out)| backward(gate, up, d_out, d_gate, d_up));
        [d_gate, d_up].map(|gradient| Some(tensor(gradient, gate.shape())))
    }
}
