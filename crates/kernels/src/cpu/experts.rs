//! Mixtures of experts: rows by expert, one product for each expert that is used, and the weighted
//! sum of each token's experts.
//!
//! Every row of a result is computed alone and every sum is in the order of a token's choices, so
//! the bits depend on neither threads nor the other tokens of a product's job.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::{Flex, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::buffer::{floats, tensor, uninitialized};
use super::matmul::{Matrix, matmul};
use super::simd;
use super::weight::{CpuWeight, times, times_transposed};
use crate::dispatch::{Dispatch, ExpertWeights, Scores};
use crate::footprint::EXPERTS_AT_ONCE;
use crate::fused::Fused;
use crate::operations::{Combine, DispatchRows, ExpertLinear, ExpertLoraLinear, WeightsOfExperts};
use crate::shelf;
use crate::weight::PackedWeight;

/// Rows and columns of a tensor of two dimensions.
fn dims(t: &FlexTensor) -> [usize; 2] {
    t.shape().dims::<2>()
}

impl Fused<Flex, 1> for WeightsOfExperts {
    /// Scores of all experts [t, e], weights [t, k], and the choice.
    type Saved = (Arc<[f32]>, Arc<[f32]>, Arc<WeightsOfExperts>);

    fn forward(self, [logits]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, Self::Saved) {
        let [tokens, experts] = dims(&logits);
        let choices = self.chosen.len() / tokens;
        let mut scores = floats(&logits).to_vec();
        let mut weights = uninitialized(tokens * choices);
        let chosen = self.chosen.par_chunks(choices);
        scores.par_chunks_mut(experts).zip(weights.par_chunks_mut(choices)).zip(chosen).for_each(
            |((scores, weights), chosen)| {
                scored(self.rule.scores, scores);
                weigh(&self.rule, scores, chosen, weights);
            },
        );
        let out = tensor(weights.clone(), [tokens, choices]);
        (out, (scores.into(), weights.into(), Arc::new(self)))
    }

    fn backward((scores, weights, operation): Self::Saved, d_out: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let [tokens, choices] = dims(&d_out);
        let experts = scores.len() / tokens;
        let mut d_logits = vec![0.0; scores.len()];
        d_logits
            .par_chunks_mut(experts)
            .zip(scores.par_chunks(experts))
            .zip(weights.par_chunks(choices))
            .zip(floats(&d_out).par_chunks(choices))
            .zip(operation.chosen.par_chunks(choices))
            .for_each(|((((d_logits, scores), weights), d_out), chosen)| {
                weigh_backward(&operation.rule, scores, weights, d_out, chosen, d_logits);
            });
        [Some(tensor(d_logits, [tokens, experts]))]
    }
}

/// Scores of a token's logits, in place.
fn scored(kind: Scores, logits: &mut [f32]) {
    match kind {
        Scores::Sigmoid => logits.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
        Scores::Softmax => {
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            logits.iter_mut().for_each(|x| *x = (*x - largest).exp());
            let sum: f32 = logits.iter().sum();
            logits.iter_mut().for_each(|x| *x /= sum);
        }
    }
}

/// The weights of a token's choices.
fn weigh(rule: &ExpertWeights, scores: &[f32], chosen: &[u32], weights: &mut [f32]) {
    for (weight, &expert) in weights.iter_mut().zip(chosen) {
        *weight = scores[expert as usize];
    }
    let sum: f32 = weights.iter().sum();
    let divisor = rule.normalized.map_or(1.0, |epsilon| sum + epsilon);
    weights.iter_mut().for_each(|weight| *weight = *weight / divisor * rule.scale);
}

/// The gradient of a token's logits, added to zeros.
fn weigh_backward(
    rule: &ExpertWeights,
    scores: &[f32],
    weights: &[f32],
    d_weights: &[f32],
    chosen: &[u32],
    d_logits: &mut [f32],
) {
    let chosen = || chosen.iter().map(|&expert| expert as usize);
    // Of w = scale · s / (Σs + ε): d_s = (scale · d_w - Σ d_w · w) / (Σs + ε).
    let sum: f32 = chosen().map(|expert| scores[expert]).sum();
    let (divisor, mean) = match rule.normalized {
        None => (1.0, 0.0),
        Some(epsilon) => (sum + epsilon, d_weights.iter().zip(weights).map(|(d, w)| d * w).sum()),
    };
    for (expert, d_weight) in chosen().zip(d_weights) {
        d_logits[expert] = (rule.scale * d_weight - mean) / divisor;
    }
    match rule.scores {
        Scores::Sigmoid => {
            for expert in chosen() {
                d_logits[expert] *= scores[expert] * (1.0 - scores[expert]);
            }
        }
        Scores::Softmax => {
            let mean: f32 = chosen().map(|expert| d_logits[expert] * scores[expert]).sum();
            d_logits.iter_mut().zip(scores).for_each(|(d, score)| *d = score * (*d - mean));
        }
    }
}

impl Fused<Flex, 1> for DispatchRows {
    type Saved = Dispatch;

    fn forward(self, [x]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, Dispatch) {
        let [_, width] = dims(&x);
        let values = floats(&x);
        let mut rows = uninitialized(self.dispatch.len() * width);
        rows.par_chunks_mut(width).zip(self.dispatch.tokens.par_iter()).for_each(|(row, &token)| {
            row.copy_from_slice(&values[token as usize * width..][..width]);
        });
        (tensor(rows, [self.dispatch.len(), width]), self.dispatch)
    }

    fn backward(dispatch: Dispatch, d_rows: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let [_, width] = dims(&d_rows);
        let values = floats(&d_rows);
        let mut d_x = vec![0.0; dispatch.len() / dispatch.choices * width];
        d_x.par_chunks_mut(width).zip(dispatch.rows.par_chunks(dispatch.choices)).for_each(|(d_x, rows)| {
            for &row in rows {
                simd::add_scaled(d_x, 1.0, &values[row as usize * width..][..width]);
            }
        });
        let tokens = dispatch.len() / dispatch.choices;
        [Some(tensor(d_x, [tokens, width]))]
    }
}

impl Fused<Flex, 2> for Combine {
    type Saved = (FlexTensor, FlexTensor, Dispatch);

    fn forward(self, [y, weights]: [FlexTensor; 2], _: [bool; 2]) -> (FlexTensor, Self::Saved) {
        let [_, width] = dims(&y);
        let [tokens, choices] = dims(&weights);
        let values = floats(&y);
        let mut out = vec![0.0; tokens * width];
        out.par_chunks_mut(width)
            .zip(self.dispatch.rows.par_chunks(choices))
            .zip(floats(&weights).par_chunks(choices))
            .for_each(|((out, rows), weights)| {
                for (&row, &weight) in rows.iter().zip(weights) {
                    simd::add_scaled(out, weight, &values[row as usize * width..][..width]);
                }
            });
        (tensor(out, [tokens, width]), (y, weights, self.dispatch))
    }

    fn backward(
        (y, weights, dispatch): Self::Saved,
        d_out: FlexTensor,
        [y_wanted, weights_wanted]: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [rows, width] = dims(&y);
        let [tokens, choices] = dims(&weights);
        let d_outs = floats(&d_out);
        let of_token = |token: usize| &d_outs[token * width..][..width];
        let d_y = y_wanted.then(|| {
            let mut of_rows = vec![0.0; rows];
            dispatch.rows.iter().zip(floats(&weights)).for_each(|(&row, &weight)| of_rows[row as usize] = weight);
            let mut d_y = uninitialized(rows * width);
            d_y.par_chunks_mut(width).zip(&of_rows).zip(dispatch.tokens.par_iter()).for_each(
                |((d_y, &weight), &token)| {
                    let d_out = of_token(token as usize);
                    d_y.iter_mut().zip(d_out).for_each(|(d_y, d_out)| *d_y = weight * d_out);
                },
            );
            tensor(d_y, [rows, width])
        });
        let d_weights = weights_wanted.then(|| {
            let values = floats(&y);
            let mut d_weights = uninitialized(tokens * choices);
            d_weights.par_iter_mut().zip(dispatch.rows.par_iter()).enumerate().for_each(
                |(choice, (d_weight, &row))| {
                    *d_weight = simd::dot(of_token(choice / choices), &values[row as usize * width..][..width]);
                },
            );
            tensor(d_weights, [tokens, choices])
        });
        [d_y, d_weights]
    }
}

/// The experts' matrices, each [o, i].
type Experts = Arc<[PackedWeight]>;

/// A used expert, its rows, and its part of a result.
type PartOf<'a> = (usize, Range<usize>, &'a mut [f32]);

/// Each used expert, its rows, and its part of `out` [n, width].
fn parts<'a>(dispatch: &Dispatch, out: &'a mut [f32], width: usize) -> Vec<PartOf<'a>> {
    let mut rest = out;
    let mut parts = Vec::new();
    for (expert, rows) in dispatch.used() {
        let (part, later) = rest.split_at_mut(rows.len() * width);
        parts.push((expert, rows, part));
        rest = later;
    }
    parts
}

/// Calls `compute` with each used expert, its rows, and its part of `out` [n, width], on all threads.
fn for_each_expert(
    dispatch: &Dispatch,
    out: &mut [f32],
    width: usize,
    compute: impl Fn(usize, Range<usize>, &mut [f32]) + Sync,
) {
    let parts = parts(dispatch, out, width);
    parts.into_par_iter().for_each(|(expert, rows, part)| compute(expert, rows, part));
}

/// Calls `compute` with the matrix of each used expert, the rows of the expert, and its part of `out` [n, width], on
/// all threads. Matrices that are on a shelf are read in the order of the experts, and are in memory only while they
/// are multiplied. The part of one that cannot be read is NaN.
fn for_each_matrix(
    experts: &Experts,
    dispatch: &Dispatch,
    out: &mut [f32],
    width: usize,
    compute: impl Fn(&CpuWeight, Range<usize>, &mut [f32]) + Sync,
) {
    let number = |expert: usize| experts[expert].place().map(|(_, number)| number);
    let shelf = experts.first().and_then(PackedWeight::place).map(|(shelf, _)| shelf);
    let used = || dispatch.used().map(|(expert, _)| expert);
    let Some((shelf, numbers)) = shelf.zip(used().map(number).collect::<Option<Vec<usize>>>()) else {
        return for_each_expert(dispatch, out, width, |expert, rows, part| {
            compute(&CpuWeight::from(experts[expert].clone()), rows, part);
        });
    };
    // Who takes the next matrix takes the next part, so both come under one lock.
    let left = Mutex::new((shelf.bring(numbers), parts(dispatch, out, width).into_iter()));
    let next = || {
        let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, rows, part) = left.1.next()?;
        Some((shelf::next(&**shelf, &left.0), rows, part))
    };
    // Each takes one after the other: no more matrices are in memory than there are of these.
    let takers = rayon::current_num_threads().min(EXPERTS_AT_ONCE);
    (0..takers).into_par_iter().with_max_len(1).for_each(|_| {
        while let Some((weight, rows, part)) = next() {
            match weight {
                Some(weight) => compute(&weight.into(), rows, part),
                None => part.fill(f32::NAN),
            }
        }
    });
}

/// Some rows of a matrix with this many columns.
fn rows_of(values: &[f32], rows: Range<usize>, columns: usize) -> Matrix<'_> {
    Matrix::new(&values[rows.start * columns..rows.end * columns], rows.len(), columns)
}

/// x Wᵀ of each row's expert, [n, o]
fn products(x: &FlexTensor, experts: &Experts, dispatch: &Dispatch) -> Vec<f32> {
    let [rows, inputs] = dims(x);
    let [outputs, _] = experts[0].shape();
    let values = floats(x);
    let mut y = uninitialized(rows * outputs);
    for_each_matrix(experts, dispatch, &mut y, outputs, |w, rows, y| {
        times_transposed(y, false, 1.0, rows_of(values, rows, inputs), w);
    });
    y
}

/// d_y W of each row's expert, [n, i]
fn input_gradients(d_y: &FlexTensor, experts: &Experts, dispatch: &Dispatch) -> Vec<f32> {
    let [rows, outputs] = dims(d_y);
    let [_, inputs] = experts[0].shape();
    let values = floats(d_y);
    let mut d_x = uninitialized(rows * inputs);
    for_each_matrix(experts, dispatch, &mut d_x, inputs, |w, rows, d_x| {
        times(d_x, false, 1.0, rows_of(values, rows, outputs), w);
    });
    d_x
}

impl Fused<Flex, 1> for ExpertLinear {
    type Saved = (Experts, Dispatch);

    fn forward(self, [x]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, Self::Saved) {
        let y = products(&x, &self.experts, &self.dispatch);
        (tensor(y, [dims(&x)[0], self.experts[0].shape()[0]]), (self.experts, self.dispatch))
    }

    fn backward((experts, dispatch): Self::Saved, d_y: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let d_x = input_gradients(&d_y, &experts, &dispatch);
        [Some(tensor(d_x, [dims(&d_y)[0], experts[0].shape()[1]]))]
    }
}

/// What the backward pass of LoRA over experts needs. `h` is x Aᵀ of each row's expert, [n, r].
#[derive(Clone, Debug)]
pub(crate) struct SavedExpertLora {
    x: FlexTensor,
    a: FlexTensor,
    b: FlexTensor,
    h: Arc<[f32]>,
    operation: Arc<ExpertLoraLinear>,
}

impl Fused<Flex, 3> for ExpertLoraLinear {
    type Saved = SavedExpertLora;

    fn forward(self, [x, a, b]: [FlexTensor; 3], _: [bool; 3]) -> (FlexTensor, SavedExpertLora) {
        let ([rows, inputs], [outputs, _]) = (dims(&x), self.experts[0].shape());
        let rank = dims(&b)[1];
        let (values, a_values, b_values) = (floats(&x), floats(&a), floats(&b));
        let mut h = uninitialized(rows * rank);
        for_each_expert(&self.dispatch, &mut h, rank, |expert, rows, h| {
            let a = rows_of(a_values, expert * rank..(expert + 1) * rank, inputs);
            matmul(h, false, 1.0, rows_of(values, rows, inputs), a.transposed());
        });
        let mut y = products(&x, &self.experts, &self.dispatch);
        for_each_expert(&self.dispatch, &mut y, outputs, |expert, rows, y| {
            let b = rows_of(b_values, expert * outputs..(expert + 1) * outputs, rank);
            matmul(y, true, self.scale, rows_of(&h, rows, rank), b.transposed());
        });
        let saved = SavedExpertLora { x, a, b, h: h.into(), operation: Arc::new(self) };
        (tensor(y, [rows, outputs]), saved)
    }

    fn backward(
        saved: SavedExpertLora,
        d_y: FlexTensor,
        [x_wanted, a_wanted, b_wanted]: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let SavedExpertLora { x, a, b, h, operation } = saved;
        let ExpertLoraLinear { experts, dispatch, scale } = &*operation;
        let ([rows, inputs], [outputs, _]) = (dims(&x), experts[0].shape());
        let rank = dims(&b)[1];
        let (values, a_values, b_values, d_ys) = (floats(&x), floats(&a), floats(&b), floats(&d_y));
        let mut d_h = uninitialized(rows * rank);
        for_each_expert(dispatch, &mut d_h, rank, |expert, rows, d_h| {
            let b = rows_of(b_values, expert * outputs..(expert + 1) * outputs, rank);
            matmul(d_h, false, *scale, rows_of(d_ys, rows, outputs), b);
        });
        let range = |expert: usize| dispatch.starts[expert] as usize..dispatch.starts[expert + 1] as usize;
        let d_b = b_wanted.then(|| {
            let mut d_b = vec![0.0; b_values.len()];
            d_b.par_chunks_mut(outputs * rank).enumerate().for_each(|(expert, d_b)| {
                let rows = range(expert);
                if !rows.is_empty() {
                    let d_y = rows_of(d_ys, rows.clone(), outputs);
                    matmul(d_b, false, *scale, d_y.transposed(), rows_of(&h, rows, rank));
                }
            });
            tensor(d_b, b.shape())
        });
        let d_a = a_wanted.then(|| {
            let mut d_a = vec![0.0; a_values.len()];
            d_a.par_chunks_mut(rank * inputs).enumerate().for_each(|(expert, d_a)| {
                let rows = range(expert);
                if !rows.is_empty() {
                    let d_h = rows_of(&d_h, rows.clone(), rank);
                    matmul(d_a, false, 1.0, d_h.transposed(), rows_of(values, rows, inputs));
                }
            });
            tensor(d_a, a.shape())
        });
        let d_x = x_wanted.then(|| {
            let mut d_x = input_gradients(&d_y, experts, dispatch);
            for_each_expert(dispatch, &mut d_x, inputs, |expert, rows, d_x| {
                let a = rows_of(a_values, expert * rank..(expert + 1) * rank, inputs);
                matmul(d_x, true, 1.0, rows_of(&d_h, rows, rank), a);
            });
            tensor(d_x, [rows, inputs])
        });
        [d_x, d_a, d_b]
    }
}
