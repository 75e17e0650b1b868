//! The output layer and its cross-entropy in one:
//! `loss_n = -ln softmax(h[position_n] Wᵀ)[target_n]`.
//!
//! Only trained positions are multiplied with the vocabulary, and only a piece of them at a time.
//! Logits therefore take a few tens of megabytes, whatever the vocabulary.
//!
//! If the output layer is frozen, the forward pass turns each piece of logits into its gradient of
//! `h` at once. Nothing of size vocabulary is then kept or computed twice. The idea is that of the
//! Liger kernels (Hsu et al. 2024) and of "Cut Your Losses in Large-Vocabulary Language Models"
//! (Wijmans et al. 2024).

use std::sync::Arc;

use burn::backend::{Flex, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::buffer::{floats, tensor, uninitialized};
use super::matmul::{Matrix, matmul};
use super::simd;
use super::weight::{CpuWeight, times_tall, times_transposed};
use crate::arguments::Targets;
use crate::footprint::cpu_logit_rows;
use crate::fused::Fused;
use crate::operations::{LinearCrossEntropy, PackedCrossEntropy};

/// What the backward pass needs. Either `d_rows` or `inputs` is there.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    targets: Targets,
    h_shape: [usize; 2],
    /// With a frozen W: the gradient of the h of each trained position, [n, i], for an upstream
    /// gradient of 1.
    d_rows: Option<Arc<[f32]>>,
    /// With a trained W: h and W, to compute the logits again.
    inputs: Option<(FlexTensor, CpuWeight)>,
}

/// The rows of h [t, width] at these positions.
pub(super) fn gather(h: &[f32], width: usize, positions: &[u32]) -> Vec<f32> {
    let mut rows = uninitialized(positions.len() * width);
    for (row, &position) in rows.chunks_mut(width).zip(positions) {
        row.copy_from_slice(&h[position as usize * width..][..width]);
    }
    rows
}

/// The loss of one row of logits. The logits are overwritten.
pub(super) fn loss_of(logits: &mut [f32], target: usize, softcap: Option<f32>) -> f32 {
    if let Some(cap) = softcap {
        simd::soft_cap(logits, 1.0, cap);
    }
    simd::cross_entropy_loss(logits, target)
}

/// The same. The logits become their gradients.
pub(super) fn gradient_of(logits: &mut [f32], target: usize, softcap: Option<f32>) -> f32 {
    match softcap {
        Some(cap) => simd::capped_cross_entropy(logits, target, cap),
        None => simd::cross_entropy(logits, target),
    }
}

/// Losses [n] alone.
fn losses(h: &FlexTensor, w: &CpuWeight, targets: &Targets) -> FlexTensor {
    let [vocabulary, width] = w.shape();
    let mut losses = vec![0.0; targets.len()];
    let rows = cpu_logit_rows(vocabulary);
    let mut logits = Vec::new();
    for ((losses, positions), tokens) in
        losses.chunks_mut(rows).zip(targets.positions.chunks(rows)).zip(targets.tokens.chunks(rows))
    {
        let h_rows = gather(floats(h), width, positions);
        logits.resize(positions.len() * vocabulary, 0.0);
        times_transposed(&mut logits, false, 1.0, Matrix::new(&h_rows, positions.len(), width), w);
        logits
            .par_chunks_mut(vocabulary)
            .zip(losses.par_iter_mut())
            .zip(tokens.par_iter())
            .for_each(|((logits, loss), &token)| *loss = loss_of(logits, token as usize, targets.softcap));
    }
    tensor(losses, [targets.len()])
}

/// softmax(logits) - one_hot(target) of a range of the trained positions, [range, v]. Their losses
/// are written into `losses`.
fn logit_gradients(
    h: &FlexTensor,
    w: &CpuWeight,
    targets: &Targets,
    range: std::ops::Range<usize>,
    losses: &mut [f32],
) -> Vec<f32> {
    let [vocabulary, width] = w.shape();
    let h_rows = gather(floats(h), width, &targets.positions[range.clone()]);
    let mut logits = uninitialized(range.len() * vocabulary);
    let h_rows = Matrix::new(&h_rows, range.len(), width);
    times_transposed(&mut logits, false, 1.0, h_rows, w);
    logits
        .par_chunks_mut(vocabulary)
        .zip(losses.par_iter_mut())
        .zip(targets.tokens[range].par_iter())
        .for_each(|((logits, loss), &token)| *loss = gradient_of(logits, token as usize, targets.softcap));
    logits
}

impl Saved {
    /// The gradient of h, and that of a trained W.
    fn gradients(self, d_losses: &FlexTensor) -> (FlexTensor, Option<FlexTensor>) {
        let Saved { targets, h_shape: [h_tokens, width], d_rows, inputs } = self;
        let upstream = floats(d_losses);
        let mut d_h = vec![0.0; h_tokens * width];
        let mut scatter = |positions: &[u32], upstream: &[f32], d_rows: &[f32]| {
            // A position is trained at most once. Adding is right for a repeated one, too.
            for ((&position, factor), d_row) in positions.iter().zip(upstream).zip(d_rows.chunks(width)) {
                simd::add_scaled(&mut d_h[position as usize * width..][..width], *factor, d_row);
            }
        };
        let Some((h, w)) = inputs else {
            let d_rows = d_rows.expect("the forward pass kept either the inputs or their gradient");
            scatter(&targets.positions, upstream, &d_rows);
            return (tensor(d_h, [h_tokens, width]), None);
        };
        let [vocabulary, _] = w.shape();
        let mut d_w = vec![0.0; vocabulary * width];
        let rows = cpu_logit_rows(vocabulary);
        for start in (0..targets.len()).step_by(rows) {
            let range = start..(start + rows).min(targets.len());
            let mut d_logits = logit_gradients(&h, &w, &targets, range.clone(), &mut vec![0.0; range.len()]);
            for (d_logits, factor) in d_logits.chunks_mut(vocabulary).zip(&upstream[range.clone()]) {
                simd::scale(d_logits, *factor);
            }
            let positions = &targets.positions[range.clone()];
            let h_rows = gather(floats(&h), width, positions);
            let d_logits = Matrix::new(&d_logits, range.len(), vocabulary);
            matmul(&mut d_w, true, 1.0, d_logits.transposed(), Matrix::new(&h_rows, range.len(), width));
            let mut d_rows = uninitialized(range.len() * width);
            times_tall(&mut d_rows, d_logits, &w);
            scatter(positions, &vec![1.0; range.len()], &d_rows);
        }
        (tensor(d_h, [h_tokens, width]), Some(tensor(d_w, [vocabulary, width])))
    }
}

/// The losses [n] with a frozen W, and the gradients of h for an upstream gradient of 1.
fn frozen(h: &FlexTensor, w: &CpuWeight, targets: Targets) -> (FlexTensor, Saved) {
    let [vocabulary, width] = w.shape();
    let mut losses = vec![0.0; targets.len()];
    let mut d_rows = uninitialized(targets.len() * width);
    let rows = cpu_logit_rows(vocabulary);
    let pieces = losses.chunks_mut(rows).zip(d_rows.chunks_mut(rows * width)).enumerate();
    for (piece, (losses, d_rows)) in pieces {
        let range = piece * rows..piece * rows + losses.len();
        let d_logits = logit_gradients(h, w, &targets, range, losses);
        times_tall(d_rows, Matrix::new(&d_logits, losses.len(), vocabulary), w);
    }
    let out = tensor(losses, [targets.len()]);
    let h_shape = h.shape().dims::<2>();
    (out, Saved { targets, h_shape, d_rows: Some(d_rows.into()), inputs: None })
}

impl Fused<Flex, 2> for LinearCrossEntropy {
    type Saved = Saved;

    fn forward(self, [h, w]: [FlexTensor; 2], [_, w_trained]: [bool; 2]) -> (FlexTensor, Saved) {
        let targets = self.targets;
        let w = w.into();
        if w_trained {
            let h_shape = h.shape().dims::<2>();
            let out = losses(&h, &w, &targets);
            return (out, Saved { targets, h_shape, d_rows: None, inputs: Some((h, w)) });
        }
        frozen(&h, &w, targets)
    }

    fn without_gradients(self, [h, w]: [FlexTensor; 2]) -> FlexTensor {
        losses(&h, &w.into(), &self.targets)
    }

    fn backward(saved: Saved, d_losses: FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let (d_h, d_w) = saved.gradients(&d_losses);
        [Some(d_h), d_w]
    }
}

impl Fused<Flex, 1> for PackedCrossEntropy {
    type Saved = Saved;

    fn forward(self, [h]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, Saved) {
        frozen(&h, &self.w.into(), self.targets)
    }

    fn without_gradients(self, [h]: [FlexTensor; 1]) -> FlexTensor {
        losses(&h, &self.w.into(), &self.targets)
    }

    fn backward(saved: Saved, d_losses: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(saved.gradients(&d_losses).0)]
    }
}
