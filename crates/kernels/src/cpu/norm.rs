//! RMS norm over the last dimension (Zhang and Sennrich 2019, as in Llama): `gamma · x / sqrt(mean(x²) + eps)`.

use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::buffer::{floats, tensor, uninitialized};
use super::simd;

/// Rows that one job takes.
const JOB_ROWS: usize = 32;

/// What the backward pass needs: the input, gamma, and each row's factor 1 / sqrt(mean(x²) + eps).
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    pub(crate) x: FlexTensor,
    pub(crate) gamma: FlexTensor,
    pub(crate) factors: Arc<[f32]>,
}

/// Inputs contiguous: `x` [.., d], `gamma` [d].
pub(crate) fn forward(x: FlexTensor, gamma: FlexTensor, eps: f32) -> (FlexTensor, Saved) {
    let (xs, weights) = (floats(&x), floats(&gamma));
    let width = weights.len();
    let mut out = uninitialized(xs.len());
    let mut factors = vec![0.0; xs.len() / width];
    out.par_chunks_mut(JOB_ROWS * width)
        .zip(xs.par_chunks(JOB_ROWS * width))
        .zip(factors.par_chunks_mut(JOB_ROWS))
        .for_each(|((out, x), factors)| {
            for ((out, x), factor) in out.chunks_mut(width).zip(x.chunks(width)).zip(factors) {
                *factor = simd::rms_norm(x, weights, eps, out);
            }
        });
    let out = tensor(out, x.shape());
    (out, Saved { factors: factors.into(), x, gamma })
}

/// d_x [.., d].
pub(crate) fn backward_x(saved: &Saved, d_out: &FlexTensor) -> FlexTensor {
    let (xs, weights, d_out) = (floats(&saved.x), floats(&saved.gamma), floats(d_out));
    let width = weights.len();
    let mut d_x = uninitialized(xs.len());
    d_x.par_chunks_mut(JOB_ROWS * width)
        .zip(xs.par_chunks(JOB_ROWS * width))
        .zip(d_out.par_chunks(JOB_ROWS * width))
        .zip(saved.factors.par_chunks(JOB_ROWS))
        .for_each(|(((d_x, x), d_out), factors)| {
            let rows = d_x.chunks_mut(width).zip(x.chunks(width)).zip(d_out.chunks(width)).zip(factors);
            for (((d_x, x), d_out), factor) in rows {
                simd::rms_norm_backward(x, weights, *factor, d_out, d_x);
            }
        });
    tensor(d_x, saved.x.shape())
}

/// d_gamma [d], summed over rows in their order. Only full fine-tuning asks for it.
pub(crate) fn backward_gamma(saved: &Saved, d_out: &FlexTensor) -> FlexTensor {
    let (xs, d_out) = (floats(&saved.x), floats(d_out));
    let width = saved.gamma.shape().num_elements();
    let mut d_gamma = vec![0.0; width];
    for ((x, d_out), factor) in xs.chunks(width).zip(d_out.chunks(width)).zip(saved.factors.iter()) {
        simd::rms_norm_gamma(x, *factor, d_out, &mut d_gamma);
    }
    tensor(d_gamma, [width])
}
