//! The gated delta rule, token by token: each value head has a state S [x, y], and each token changes it
//! and reads it.
//!
//! ```text
//! S = e^g S        what is forgotten
//! e = v - Sᵀ k     what the state gets wrong about the key
//! S = S + k (β e)ᵀ
//! o = Sᵀ q
//! ```
//!
//! k is normalized to length 1, q to 1 / √x. The recurrence is the definition, so reading a row in parts
//! gives the same bits as reading it at once. The backward pass keeps the states at the beginnings of
//! chunks of [`CHUNK`] tokens and computes those between again.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::{Flex, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::buffer::{floats, tensor, uninitialized};
use super::simd;
use crate::delta::DeltaShape;
use crate::fused::Fused;
use crate::operations::DeltaRule;

/// Tokens between two states that the backward pass keeps.
const CHUNK: usize = 64;
/// What is added to a sum of squares before its root is taken.
const EPSILON: f32 = 1e-6;

/// The inputs of a rule: u [t, 2 a x + h y], g and beta [t, h], states [m x, h y].
struct Inputs<'a> {
    shape: &'a DeltaShape,
    u: &'a [f32],
    g: &'a [f32],
    beta: &'a [f32],
    states: &'a [f32],
}

/// One row and one key head, with the value heads that share it.
#[derive(Clone, Copy)]
struct Part {
    row: usize,
    first: usize,
    tokens: usize,
    key_head: usize,
}

/// Normalized vectors of a part's tokens, [tokens, x], and the factor of each before it was normalized.
struct Unit {
    values: Vec<f32>,
    factors: Vec<f32>,
}

impl Inputs<'_> {
    fn parts(&self) -> Vec<Part> {
        let rows = self.shape.starts().enumerate();
        let heads = self.shape.key_heads;
        rows.flat_map(|(row, (first, tokens))| (0..heads).map(move |key_head| Part { row, first, tokens, key_head }))
            .collect()
    }

    fn width(&self) -> usize {
        2 * self.shape.keys() + self.shape.values()
    }

    /// The columns of u with the query of a key head; those of the key are `keys` further.
    fn query(&self, part: Part) -> Range<usize> {
        let x = self.shape.key_dim;
        part.key_head * x..(part.key_head + 1) * x
    }

    fn value(&self, token: usize, head: usize) -> &[f32] {
        let y = self.shape.value_dim;
        &self.u[token * self.width() + 2 * self.shape.keys() + head * y..][..y]
    }

    /// Queries (`offset` 0) or keys of a part, of length `length`.
    fn unit(&self, part: Part, offset: usize, length: f32) -> Unit {
        let columns = self.query(part);
        let mut unit = Unit { values: Vec::new(), factors: Vec::new() };
        for token in part.first..part.first + part.tokens {
            let x = &self.u[token * self.width() + offset + columns.start..][..columns.len()];
            let factor = 1.0 / (simd::dot(x, x) + EPSILON).sqrt();
            unit.values.extend(x.iter().map(|value| value * factor * length));
            unit.factors.push(factor);
        }
        unit
    }

    fn units(&self, part: Part) -> [Unit; 2] {
        let length = 1.0 / (self.shape.key_dim as f32).sqrt();
        [self.unit(part, 0, length), self.unit(part, self.shape.keys(), 1.0)]
    }

    /// The state of a head before the first token of a row, [x, y].
    fn state(&self, row: usize, head: usize) -> Vec<f32> {
        let DeltaShape { key_dim, value_dim, begins_empty, .. } = *self.shape;
        if begins_empty {
            return vec![0.0; key_dim * value_dim];
        }
        let width = self.shape.values();
        let rows = (row * key_dim..(row + 1) * key_dim).map(|n| &self.states[n * width + head * value_dim..]);
        rows.flat_map(|row| &row[..value_dim]).copied().collect()
    }

    /// The value heads of a part.
    fn heads(&self, part: Part) -> Range<usize> {
        let group = self.shape.group();
        part.key_head * group..(part.key_head + 1) * group
    }

    /// What a step of a token and a head takes.
    fn step<'s>(&'s self, part: Part, [q, k]: &'s [Unit; 2], head: usize, n: usize) -> Step<'s> {
        let (token, x, heads) = (part.first + n, self.shape.key_dim, self.shape.value_heads);
        Step {
            q: &q.values[n * x..][..x],
            k: &k.values[n * x..][..x],
            v: self.value(token, head),
            decay: self.g[token * heads + head].exp(),
            beta: self.beta[token * heads + head],
        }
    }
}

/// One token of one head.
struct Step<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    decay: f32,
    beta: f32,
}

impl Step<'_> {
    /// Changes the state, and writes the error e and the result o.
    fn run(&self, state: &mut [f32], error: &mut [f32], out: &mut [f32]) {
        simd::delta_step(state, [self.q, self.k, self.v], self.decay, self.beta, error, out);
    }
}

impl Fused<Flex, 4> for DeltaRule {
    type Saved = ([FlexTensor; 4], Arc<DeltaShape>);

    fn forward(self, tensors: [FlexTensor; 4], _: [bool; 4]) -> (FlexTensor, Self::Saved) {
        let shape = Arc::new(self.shape);
        let [u, g, beta, states] = tensors.each_ref().map(floats);
        let inputs = Inputs { shape: &shape, u, g, beta, states };
        let (y, width) = (shape.value_dim, shape.values());
        let tokens = tensors[0].shape().dims::<2>()[0];
        // Of each head of each part: the results of its tokens, then its last state.
        let run = |part: Part| {
            let units = inputs.units(part);
            let mut error = vec![0.0; y];
            let of_head = |head: usize| {
                let mut state = inputs.state(part.row, head);
                let mut out = uninitialized(part.tokens * y);
                for (n, out) in out.chunks_mut(y).enumerate() {
                    inputs.step(part, &units, head, n).run(&mut state, &mut error, out);
                }
                (head, out, state)
            };
            inputs.heads(part).map(of_head).collect::<Vec<_>>()
        };
        let parts = inputs.parts();
        let found: Vec<_> = parts.par_iter().map(|&part| (part, run(part))).collect();
        let kept = if shape.keeps_states { shape.rows.len() * shape.key_dim } else { 0 };
        let mut all = uninitialized((tokens + kept) * width);
        for (part, heads) in found {
            for (head, out, state) in heads {
                put(&mut all, width, part.first, head * y, &out, y);
                if shape.keeps_states {
                    put(&mut all, width, tokens + part.row * shape.key_dim, head * y, &state, y);
                }
            }
        }
        (tensor(all, [tokens + kept, width]), (tensors, shape))
    }

    fn backward((tensors, shape): Self::Saved, d_all: FlexTensor, _: [bool; 4]) -> [Option<FlexTensor>; 4] {
        let [u, g, beta, states] = tensors.each_ref().map(floats);
        let inputs = Inputs { shape: &shape, u, g, beta, states };
        let d_all = floats(&d_all);
        let tokens = tensors[0].shape().dims::<2>()[0];
        let parts = inputs.parts();
        let found: Vec<_> = parts.par_iter().map(|&part| (part, backward_of(&inputs, part, d_all, tokens))).collect();
        let (x, y, heads, width) = (shape.key_dim, shape.value_dim, shape.value_heads, inputs.width());
        let (mut d_u, mut d_g, mut d_beta) =
            (uninitialized(tokens * width), uninitialized(tokens * heads), uninitialized(tokens * heads));
        let mut d_states = (!shape.begins_empty).then(|| uninitialized(states.len()));
        for (part, gradients) in found {
            let columns = inputs.query(part);
            put(&mut d_u, width, part.first, columns.start, &gradients.q, x);
            put(&mut d_u, width, part.first, shape.keys() + columns.start, &gradients.k, x);
            for (head, of_head) in inputs.heads(part).zip(gradients.heads) {
                put(&mut d_u, width, part.first, 2 * shape.keys() + head * y, &of_head.v, y);
                put(&mut d_g, heads, part.first, head, &of_head.g, 1);
                put(&mut d_beta, heads, part.first, head, &of_head.beta, 1);
                if let Some(d_states) = &mut d_states {
                    put(d_states, shape.values(), part.row * x, head * y, &of_head.state, y);
                }
            }
        }
        [
            Some(tensor(d_u, [tokens, width])),
            Some(tensor(d_g, [tokens, heads])),
            Some(tensor(d_beta, [tokens, heads])),
            d_states.map(|d_states| tensor(d_states, tensors[3].shape())),
        ]
    }
}

/// Writes `block`, whose rows have `columns` elements, into `all` [.., width] from (row, column) on.
fn put(all: &mut [f32], width: usize, row: usize, column: usize, block: &[f32], columns: usize) {
    for (n, values) in block.chunks(columns).enumerate() {
        all[(row + n) * width + column..][..columns].copy_from_slice(values);
    }
}

/// Gradients of a part.
struct Gradients {
    /// Of queries and keys before they were normalized, [tokens, x].
    q: Vec<f32>,
    k: Vec<f32>,
    heads: Vec<OfHead>,
}

/// Gradients of a value head.
struct OfHead {
    /// [tokens, y]
    v: Vec<f32>,
    /// [tokens]
    g: Vec<f32>,
    beta: Vec<f32>,
    /// Of the state before the first token, [x, y].
    state: Vec<f32>,
}

fn backward_of(inputs: &Inputs<'_>, part: Part, d_all: &[f32], tokens: usize) -> Gradients {
    let shape = inputs.shape;
    let (x, y, width) = (shape.key_dim, shape.value_dim, shape.values());
    let units = inputs.units(part);
    let (mut d_q, mut d_k) = (vec![0.0; part.tokens * x], vec![0.0; part.tokens * x]);
    let mut heads = Vec::new();
    // The states before each token of a chunk, and the errors of its tokens.
    let (mut states, mut errors) = (vec![0.0; CHUNK * x * y], vec![0.0; CHUNK * y]);
    let (mut out, mut sums) = (vec![0.0; y], simd::DeltaSums::new(x));
    for head in inputs.heads(part) {
        let mut state = inputs.state(part.row, head);
        let mut starts = Vec::new();
        for n in 0..part.tokens {
            if n % CHUNK == 0 {
                starts.push(state.clone());
            }
            inputs.step(part, &units, head, n).run(&mut state, &mut errors[..y], &mut out);
        }
        let mut d_state = vec![0.0; x * y];
        if shape.keeps_states {
            for (n, d_state) in d_state.chunks_mut(y).enumerate() {
                let row = tokens + part.row * x + n;
                d_state.copy_from_slice(&d_all[row * width + head * y..][..y]);
            }
        }
        let (mut d_v, mut d_g, mut d_beta) =
            (vec![0.0; part.tokens * y], vec![0.0; part.tokens], vec![0.0; part.tokens]);
        for (chunk, mut state) in starts.into_iter().enumerate().rev() {
            let range = chunk * CHUNK..part.tokens.min((chunk + 1) * CHUNK);
            for (place, n) in range.clone().enumerate() {
                states[place * x * y..][..x * y].copy_from_slice(&state);
                let error = &mut errors[place * y..][..y];
                inputs.step(part, &units, head, n).run(&mut state, error, &mut out);
            }
            for n in range.clone().rev() {
                let place = n - range.start;
                let step = inputs.step(part, &units, head, n);
                let d_out = &d_all[(part.first + n) * width + head * y..][..y];
                let seen = simd::DeltaSeen {
                    before: &states[place * x * y..][..x * y],
                    q: step.q,
                    k: step.k,
                    decay: step.decay,
                    beta: step.beta,
                    error: &errors[place * y..][..y],
                    d_out,
                };
                let gradients = (&mut d_q[n * x..][..x], &mut d_k[n * x..][..x], &mut d_v[n * y..][..y]);
                let (of_g, of_beta) = simd::delta_step_backward(seen, &mut d_state, gradients, &mut sums);
                d_g[n] = of_g;
                d_beta[n] = of_beta;
            }
        }
        heads.push(OfHead { v: d_v, g: d_g, beta: d_beta, state: d_state });
    }
    let length = 1.0 / (x as f32).sqrt();
    let [q, k] = &units;
    unit_backward(&mut d_q, q, x, length);
    unit_backward(&mut d_k, k, x, 1.0);
    Gradients { q: d_q, k: d_k, heads }
}

/// From gradients of normalized vectors of length `length` to those of the vectors before.
fn unit_backward(gradients: &mut [f32], unit: &Unit, width: usize, length: f32) {
    let vectors = gradients.chunks_mut(width).zip(unit.values.chunks(width)).zip(&unit.factors);
    for ((gradient, normalized), factor) in vectors {
        // n = length · x · f with f = 1 / |x|: d_x = f (length · d_n - n (n · d_n) / length).
        let along = simd::dot(gradient, normalized) / length;
        for (gradient, normalized) in gradient.iter_mut().zip(normalized) {
            *gradient = factor * (length * *gradient - normalized * along);
        }
    }
}
