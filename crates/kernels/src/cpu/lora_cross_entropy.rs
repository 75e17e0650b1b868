//! The output layer with a LoRA branch, and its cross-entropy in one. The method is that of
//! `cross_entropy.rs` with a trained output layer: the logits are computed again in the backward
//! pass, a piece of the trained positions at a time.

use burn::backend::{Flex, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::buffer::{floats, tensor, uninitialized};
use super::cross_entropy::{gather, gradient_of, loss_of};
use super::matmul::{Matrix, matmul};
use super::simd;
use super::weight::{CpuWeight, times_tall, times_transposed};
use crate::arguments::Targets;
use crate::footprint::cpu_logit_rows;
use crate::fused::Fused;
use crate::operations::{LoraCrossEntropy, PackedLoraCrossEntropy};

/// What the backward pass needs: all inputs, to compute the logits again.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    h: FlexTensor,
    w: CpuWeight,
    g: FlexTensor,
    b: FlexTensor,
    scale: f32,
    targets: Targets,
}

/// The rows of h and g of a piece of the trained positions, and its logits [n, v].
struct Piece {
    g_rows: Vec<f32>,
    logits: Vec<f32>,
}

impl Saved {
    /// [v, i, r]
    fn sizes(&self) -> [usize; 3] {
        let [vocabulary, width] = self.w.shape();
        [vocabulary, width, self.b.shape()[1]]
    }

    fn branch(&self) -> Matrix<'_> {
        let [vocabulary, _, rank] = self.sizes();
        Matrix::new(floats(&self.b), vocabulary, rank)
    }

    fn piece(&self, positions: &[u32]) -> Piece {
        let [vocabulary, width, rank] = self.sizes();
        let count = positions.len();
        let h_rows = gather(floats(&self.h), width, positions);
        let g_rows = gather(floats(&self.g), rank, positions);
        let mut logits = uninitialized(count * vocabulary);
        times_transposed(&mut logits, false, 1.0, Matrix::new(&h_rows, count, width), &self.w);
        let branch = self.branch().transposed();
        matmul(&mut logits, true, self.scale, Matrix::new(&g_rows, count, rank), branch);
        Piece { g_rows, logits }
    }

    /// Losses [n].
    fn losses(&self) -> FlexTensor {
        let [vocabulary, ..] = self.sizes();
        let rows = cpu_logit_rows(vocabulary);
        let mut losses = vec![0.0; self.targets.len()];
        let pieces = self.targets.positions.chunks(rows).zip(self.targets.tokens.chunks(rows));
        for (losses, (positions, tokens)) in losses.chunks_mut(rows).zip(pieces) {
            let mut logits = self.piece(positions).logits;
            logits
                .par_chunks_mut(vocabulary)
                .zip(losses.par_iter_mut())
                .zip(tokens.par_iter())
                .for_each(|((logits, loss), &token)| *loss = loss_of(logits, token as usize, self.targets.softcap));
        }
        tensor(losses, [self.targets.len()])
    }

    /// The gradients of h, g and b.
    fn gradients(&self, d_losses: &FlexTensor, wanted: [bool; 3]) -> [Option<FlexTensor>; 3] {
        let [vocabulary, width, rank] = self.sizes();
        let (tokens, upstream) = (self.h.shape()[0], floats(d_losses));
        let zeros = |wanted: bool, len: usize| vec![0.0f32; if wanted { len } else { 0 }];
        let (mut d_h, mut d_g) = (zeros(wanted[0], tokens * width), zeros(wanted[1], tokens * rank));
        let mut d_b = zeros(wanted[2], vocabulary * rank);
        let rows = cpu_logit_rows(vocabulary);
        let pieces = self.targets.positions.chunks(rows).zip(self.targets.tokens.chunks(rows));
        for ((positions, targets), upstream) in pieces.zip(upstream.chunks(rows)) {
            let count = positions.len();
            let Piece { g_rows, logits: mut d_logits } = self.piece(positions);
            d_logits.par_chunks_mut(vocabulary).zip(targets.par_iter()).zip(upstream.par_iter()).for_each(
                |((logits, &token), &factor)| {
                    gradient_of(logits, token as usize, self.targets.softcap);
                    simd::scale(logits, factor);
                },
            );
            let d_logits = Matrix::new(&d_logits, count, vocabulary);
            if wanted[0] {
                let mut d_rows = uninitialized(count * width);
                times_tall(&mut d_rows, d_logits, &self.w);
                scatter(&mut d_h, positions, &d_rows, width);
            }
            if wanted[1] {
                let mut d_rows = uninitialized(count * rank);
                matmul(&mut d_rows, false, self.scale, d_logits, self.branch());
                scatter(&mut d_g, positions, &d_rows, rank);
            }
            if wanted[2] {
                matmul(&mut d_b, true, self.scale, d_logits.transposed(), Matrix::new(&g_rows, count, rank));
            }
        }
        let found = |wanted: bool, values: Vec<f32>, shape: [usize; 2]| wanted.then(|| tensor(values, shape));
        [
            found(wanted[0], d_h, [tokens, width]),
            found(wanted[1], d_g, [tokens, rank]),
            found(wanted[2], d_b, [vocabulary, rank]),
        ]
    }
}

/// Adds rows [n, width] to the rows of `sums` [t, width] at these positions.
fn scatter(sums: &mut [f32], positions: &[u32], rows: &[f32], width: usize) {
    for (&position, row) in positions.iter().zip(rows.chunks(width)) {
        simd::add_scaled(&mut sums[position as usize * width..][..width], 1.0, row);
    }
}

impl Fused<Flex, 4> for LoraCrossEntropy {
    type Saved = Saved;

    fn forward(self, [h, w, g, b]: [FlexTensor; 4], _: [bool; 4]) -> (FlexTensor, Saved) {
        let LoraCrossEntropy { scale, targets } = self;
        let saved = Saved { h, w: w.into(), g, b, scale, targets };
        (saved.losses(), saved)
    }

    fn backward(saved: Saved, d_losses: FlexTensor, [h, _, g, b]: [bool; 4]) -> [Option<FlexTensor>; 4] {
        let [d_h, d_g, d_b] = saved.gradients(&d_losses, [h, g, b]);
        [d_h, None, d_g, d_b]
    }
}

impl Fused<Flex, 3> for PackedLoraCrossEntropy {
    type Saved = Saved;

    fn forward(self, [h, g, b]: [FlexTensor; 3], _: [bool; 3]) -> (FlexTensor, Saved) {
        let PackedLoraCrossEntropy { w, scale, targets } = self;
        let saved = Saved { h, w: w.into(), g, b, scale, targets };
        (saved.losses(), saved)
    }

    fn backward(saved: Saved, d_losses: FlexTensor, wanted: [bool; 3]) -> [Option<FlexTensor>; 3] {
        saved.gradients(&d_losses, wanted)
    }
}
