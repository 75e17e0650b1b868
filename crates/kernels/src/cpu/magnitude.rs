//! DoRA's magnitudes (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation"): outputs scaled
//! one by one, and the norms of the rows of a weight with its branch.
//!
//! As in PEFT, the norms are constants of the backward pass.

use burn::backend::{Flex, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::buffer::{floats, tensor, uninitialized};
use super::matmul::{Matrix, matmul};
use super::weight::CpuWeight;
use crate::arguments::Dropout;
use crate::fused::Fused;
use crate::operations::{DropInput, DroppedMagnitude, Magnitude, MergedNorms, PackedMergedNorms};

/// Elements of one job.
const JOB: usize = 1 << 14;
/// Outputs whose magnitude one job differentiates. The sums over tokens do not depend on it.
const OUTPUTS_PER_JOB: usize = 256;
/// Bytes of a block of rows of a weight with its branch.
const BLOCK_BYTES: usize = 16 << 20;

/// m / n
fn factors(m: &FlexTensor, n: &FlexTensor) -> Vec<f32> {
    floats(m).iter().zip(floats(n)).map(|(m, n)| m / n).collect()
}

/// Rows of `width` elements for one job.
fn rows_per_job(width: usize) -> usize {
    (JOB / width.max(1)).max(1) * width
}

/// `out[t, o] = f(t · width + o, o)`
fn each(len: usize, width: usize, f: impl Fn(usize, usize) -> f32 + Sync) -> Vec<f32> {
    let mut out = uninitialized(len);
    let job = rows_per_job(width);
    out.par_chunks_mut(job).enumerate().for_each(|(number, out)| {
        for (row, out) in out.chunks_mut(width).enumerate() {
            let start = number * job + row * width;
            for (o, out) in out.iter_mut().enumerate() {
                *out = f(start + o, o);
            }
        }
    });
    out
}

/// `Σ over t of f(t · width + o) / n[o]`, the tokens in their order: the gradient of m, [o].
fn magnitude_gradient(len: usize, n: &FlexTensor, f: impl Fn(usize) -> f32 + Sync) -> FlexTensor {
    let n = floats(n);
    let width = n.len();
    let mut d_m = vec![0.0; width];
    d_m.par_chunks_mut(OUTPUTS_PER_JOB).enumerate().for_each(|(job, d_m)| {
        let first = job * OUTPUTS_PER_JOB;
        for start in (0..len).step_by(width) {
            for (o, sum) in d_m.iter_mut().enumerate() {
                *sum += f(start + first + o);
            }
        }
        for (sum, n) in d_m.iter_mut().zip(&n[first..]) {
            *sum /= n;
        }
    });
    tensor(d_m, [width])
}

impl Fused<Flex, 3> for Magnitude {
    type Saved = [FlexTensor; 3];

    fn forward(self, [z, m, n]: [FlexTensor; 3], _: [bool; 3]) -> (FlexTensor, Self::Saved) {
        let factors = factors(&m, &n);
        let zs = floats(&z);
        let y = tensor(each(zs.len(), factors.len(), |i, o| zs[i] * factors[o]), z.shape());
        (y, [z, m, n])
    }

    fn backward([z, m, n]: Self::Saved, d_y: FlexTensor, wanted: [bool; 3]) -> [Option<FlexTensor>; 3] {
        let (zs, d_ys) = (floats(&z), floats(&d_y));
        let d_z = wanted[0].then(|| {
            let factors = factors(&m, &n);
            tensor(each(d_ys.len(), factors.len(), |i, o| d_ys[i] * factors[o]), z.shape())
        });
        let d_m = wanted[1].then(|| magnitude_gradient(d_ys.len(), &n, |i| d_ys[i] * zs[i]));
        [d_z, d_m, None]
    }
}

/// What the backward pass of [`DroppedMagnitude`] needs.
#[derive(Clone, Debug)]
pub(crate) struct SavedDropped {
    dropped: FlexTensor,
    branch: FlexTensor,
    m: FlexTensor,
    n: FlexTensor,
    scale: f32,
}

impl Fused<Flex, 5> for DroppedMagnitude {
    type Saved = SavedDropped;

    fn forward(self, [y, dropped, branch, m, n]: [FlexTensor; 5], _: [bool; 5]) -> (FlexTensor, SavedDropped) {
        let scale = self.scale;
        let factors = factors(&m, &n);
        let (ys, drops, lows) = (floats(&y), floats(&dropped), floats(&branch));
        let out = each(ys.len(), factors.len(), |i, o| {
            ys[i] + ((factors[o] - 1.0) * drops[i] + factors[o] * lows[i] * scale)
        });
        let out = tensor(out, y.shape());
        (out, SavedDropped { dropped, branch, m, n, scale })
    }

    fn backward(saved: SavedDropped, d_y: FlexTensor, wanted: [bool; 5]) -> [Option<FlexTensor>; 5] {
        let SavedDropped { dropped, branch, m, n, scale } = saved;
        let factors = factors(&m, &n);
        let d_ys = floats(&d_y);
        let times = |f: &(dyn Fn(f32) -> f32 + Sync)| {
            tensor(each(d_ys.len(), factors.len(), |i, o| d_ys[i] * f(factors[o])), d_y.shape())
        };
        let d_dropped = wanted[1].then(|| times(&|factor| factor - 1.0));
        let d_branch = wanted[2].then(|| times(&|factor| factor * scale));
        let (drops, lows) = (floats(&dropped), floats(&branch));
        let d_m = wanted[3].then(|| magnitude_gradient(d_ys.len(), &n, |i| d_ys[i] * (drops[i] + lows[i] * scale)));
        [wanted[0].then(|| d_y.clone()), d_dropped, d_branch, d_m, None]
    }
}

/// The norms [o] of the rows of `W + scale · B A`.
fn merged_norms(w: &CpuWeight, a: &FlexTensor, b: &FlexTensor, scale: f32) -> FlexTensor {
    let [outputs, inputs] = w.shape();
    let rank = a.shape()[0];
    let (a, bs) = (Matrix::new(floats(a), rank, inputs), floats(b));
    let mut norms = uninitialized(outputs);
    // The blocks depend on the shape alone, and so do the bits.
    let rows = (BLOCK_BYTES / 4 / inputs.max(1)).max(1);
    let mut block = uninitialized(rows.min(outputs) * inputs);
    for (start, norms) in (0..outputs).step_by(rows).zip(norms.chunks_mut(rows)) {
        let count = norms.len();
        let block = &mut block[..count * inputs];
        w.read_rows(start, block);
        matmul(block, true, scale, Matrix::new(&bs[start * rank..][..count * rank], count, rank), a);
        norms.par_iter_mut().zip(block.par_chunks(inputs)).with_min_len(16).for_each(|(norm, row)| {
            let sum: f64 = row.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
            *norm = sum.sqrt() as f32;
        });
    }
    tensor(norms, [outputs])
}

impl Fused<Flex, 3> for MergedNorms {
    type Saved = ();

    fn forward(self, [w, a, b]: [FlexTensor; 3], _: [bool; 3]) -> (FlexTensor, ()) {
        (merged_norms(&w.into(), &a, &b, self.scale), ())
    }

    fn backward(_: (), _: FlexTensor, _: [bool; 3]) -> [Option<FlexTensor>; 3] {
        [None, None, None]
    }
}

impl Fused<Flex, 2> for PackedMergedNorms {
    type Saved = ();

    fn forward(self, [a, b]: [FlexTensor; 2], _: [bool; 2]) -> (FlexTensor, ()) {
        (merged_norms(&self.w.into(), &a, &b, self.scale), ())
    }

    fn backward(_: (), _: FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        [None, None]
    }
}

impl Fused<Flex, 1> for DropInput {
    type Saved = Dropout;

    fn forward(self, [x]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, Dropout) {
        (tensor(self.dropout.apply(floats(&x)), x.shape()), self.dropout)
    }

    fn backward(dropout: Dropout, d_y: FlexTensor, [wanted]: [bool; 1]) -> [Option<FlexTensor>; 1] {
        // The mask multiplies, so it is its own backward pass.
        [wanted.then(|| tensor(dropout.apply(floats(&d_y)), d_y.shape()))]
    }
}
