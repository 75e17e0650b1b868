//! RMS norm over the last dimension (Zhang and Sennrich 2019, as in Llama):
//! `gamma · x / sqrt(mean(x²) + eps)`.

use std::sync::Arc;

use burn::backend::{Flex, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::buffer::{floats, tensor, uninitialized};
use super::simd;
use crate::fused::Fused;
use crate::operations::RmsNorm;

/// Rows of one job.
const JOB_ROWS: usize = 32;

/// What the backward pass needs: x [.., d], gamma [d], and the factor 1 / sqrt(mean(x²) + eps) of
/// each row.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    x: FlexTensor,
    gamma: FlexTensor,
    factors: Arc<[f32]>,
}

impl Fused<Flex, 2> for RmsNorm {
    type Saved = Saved;

    fn forward(self, [x, gamma]: [FlexTensor; 2], _: [bool; 2]) -> (FlexTensor, Saved) {
        let eps = self.eps as f32;
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

    fn backward(saved: Saved, d_out: FlexTensor, [x_wanted, gamma_wanted]: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let d_gamma = gamma_wanted.then(|| backward_gamma(&saved, &d_out));
        let d_x = x_wanted.then(|| backward_x(&saved, &d_out));
        [d_x, d_gamma]
    }
}

/// d_x [.., d].
fn backward_x(saved: &Saved, d_out: &FlexTensor) -> FlexTensor {
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

/// d_gamma [d], summed over the rows in their order. Only full fine-tuning trains gamma.
fn backward_gamma(saved: &Saved, d_out: &FlexTensor) -> FlexTensor {
    let (xs, d_out) = (floats(&saved.x), floats(d_out));
    let width = saved.gamma.shape().num_elements();
    let mut d_gamma = vec![0.0; width];
    for ((x, d_out), factor) in xs.chunks(width).zip(d_out.chunks(width)).zip(saved.factors.iter()) {
        simd::rms_norm_gamma(x, *factor, d_out, &mut d_gamma);
    }
    tensor(d_gamma, [width])
}
