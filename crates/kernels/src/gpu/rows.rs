//! Kernels that work a row at a time, one cube per row: norms, softmax, cross-entropy.
//!
//! Arithmetic is f32 whatever the tensors hold. A cube's units each sum every `units`-th element of the row, then add
//! up in a tree: the same order on every run, so the same bits.

use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;

/// Σ over the units of a cube, known to all of them. `units` is a power of two.
#[cube]
fn sum_of_units(value: f32, #[comptime] units: usize) -> f32 {
    let mut shared = Shared::<[f32]>::new_slice(units);
    let unit = UNIT_POS as usize;
    shared[unit] = value;
    sync_cube();
    let mut half = CUBE_DIM as usize / 2;
    while half > 0 {
        if unit < half {
            shared[unit] = shared[unit] + shared[unit + half];
        }
        sync_cube();
        half = half / 2;
    }
    let sum = shared[0];
    sync_cube();
    sum
}

/// The largest value of the units of a cube.
#[cube]
fn largest_of_units(value: f32, #[comptime] units: usize) -> f32 {
    let mut shared = Shared::<[f32]>::new_slice(units);
    let unit = UNIT_POS as usize;
    shared[unit] = value;
    sync_cube();
    let mut half = CUBE_DIM as usize / 2;
    while half > 0 {
        if unit < half {
            shared[unit] = max(shared[unit], shared[unit + half]);
        }
        sync_cube();
        half = half / 2;
    }
    let largest = shared[0];
    sync_cube();
    largest
}

/// `out = gamma · x / sqrt(mean(x²) + eps)`; `factors` gets the last part of each row.
#[cube(launch_unchecked)]
pub(super) fn rms_norm<T: Float>(
    x: &[T],
    gamma: &[f32],
    out: &mut [T],
    factors: &mut [f32],
    width: usize,
    eps: f32,
    #[comptime] units: usize,
    #[define(T)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= factors.len() {
        terminate!();
    }
    let start = row * width;
    let mut squares = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < width {
        let value = f32::cast_from(x[start + i]);
        squares += value * value;
        i += units;
    }
    let total = sum_of_units(squares, units);
    let factor = 1.0f32 / (total / f32::cast_from(width) + eps).sqrt();
    if UNIT_POS == 0 {
        factors[row] = factor;
    }
    let mut i = UNIT_POS as usize;
    while i < width {
        out[start + i] = T::cast_from(f32::cast_from(x[start + i]) * factor * gamma[i]);
        i += units;
    }
}

/// `d_x = factor · (g - x̂ · mean(g · x̂))` with `g = gamma · d_out` and `x̂ = factor · x`.
#[cube(launch_unchecked)]
pub(super) fn rms_norm_backward<T: Float>(
    x: &[T],
    gamma: &[f32],
    factors: &[f32],
    d_out: &[T],
    d_x: &mut [T],
    width: usize,
    #[comptime] units: usize,
    #[define(T)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= factors.len() {
        terminate!();
    }
    let start = row * width;
    let factor = factors[row];
    let mut product = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < width {
        product += f32::cast_from(d_out[start + i]) * gamma[i] * f32::cast_from(x[start + i]) * factor;
        i += units;
    }
    let mean = sum_of_units(product, units) / f32::cast_from(width);
    let mut i = UNIT_POS as usize;
    while i < width {
        let normed = f32::cast_from(x[start + i]) * factor;
        let gradient = f32::cast_from(d_out[start + i]) * gamma[i];
        d_x[start + i] = T::cast_from(factor * (gradient - normed * mean));
        i += units;
    }
}

/// `out[row] = Σ a · b` over the row.
#[cube(launch_unchecked)]
pub(super) fn dot<T: Float>(
    a: &[T],
    b: &[T],
    out: &mut [f32],
    width: usize,
    #[comptime] units: usize,
    #[define(T)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= out.len() {
        terminate!();
    }
    let start = row * width;
    let mut product = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < width {
        product += f32::cast_from(a[start + i]) * f32::cast_from(b[start + i]);
        i += units;
    }
    let sum = sum_of_units(product, units);
    if UNIT_POS == 0 {
        out[row] = sum;
    }
}

/// Which keys the rows of a block of scores see. Row r of a block is query `first_query + r % queries` of head
/// `r / queries`; column c is key `first_key + c`, seen if it lies in [starts, ends) of its query.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct Block {
    pub(super) queries: usize,
    pub(super) first_query: usize,
    pub(super) first_key: usize,
    pub(super) keys: usize,
    /// Queries of the whole micro-batch.
    pub(super) all_queries: usize,
}

/// Probabilities of a block's scores, and ln Σ e^score of each row. A row that sees nothing (padding) gets zeros.
#[cube(launch_unchecked)]
pub(super) fn softmax<T: Float>(
    scores: &[f32],
    starts: &[u32],
    ends: &[u32],
    probabilities: &mut [T],
    log_sums: &mut [f32],
    block: Block,
    scale: f32,
    #[comptime] units: usize,
    #[define(T)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    let keys = block.keys;
    let start = row * keys;
    if start >= scores.len() {
        terminate!();
    }
    let query = block.first_query + row % block.queries;
    let head = row / block.queries;
    let mut from = 0usize;
    let mut to = 0usize;
    if query < block.all_queries {
        from = starts[query] as usize - block.first_key;
        to = ends[query] as usize - block.first_key;
    }
    // Below every score and every logit.
    let mut largest = f32::new(-3.0e38);
    let mut sum = 0.0f32;
    let mut i = from + UNIT_POS as usize;
    while i < to {
        let score = scores[start + i] * scale;
        let higher = max(largest, score);
        sum = sum * (largest - higher).exp() + (score - higher).exp();
        largest = higher;
        i += units;
    }
    let row_largest = largest_of_units(largest, units);
    let row_sum = sum_of_units(sum * (largest - row_largest).exp(), units);
    let log_sum = row_largest + row_sum.ln();
    if UNIT_POS == 0 {
        if query < block.all_queries {
            log_sums[head * block.all_queries + query] = log_sum;
        }
    }
    let mut i = UNIT_POS as usize;
    while i < keys {
        let mut probability = 0.0f32;
        if i >= from {
            if i < to {
                probability = (scores[start + i] * scale - log_sum).exp();
            }
        }
        probabilities[start + i] = T::cast_from(probability);
        i += units;
    }
}

/// The loss of each row of logits, and over `d_logits` the gradient `(softmax - one_hot(target)) · scale`.
#[cube(launch_unchecked)]
pub(super) fn cross_entropy<T: Float>(
    logits: &[f32],
    targets: &[u32],
    losses: &mut [f32],
    d_logits: &mut [T],
    first: usize,
    vocabulary: usize,
    scale: f32,
    #[comptime] with_gradient: bool,
    #[comptime] units: usize,
    #[define(T)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    let start = row * vocabulary;
    if start >= logits.len() {
        terminate!();
    }
    // Below every score and every logit.
    let mut largest = f32::new(-3.0e38);
    let mut sum = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < vocabulary {
        let logit = logits[start + i];
        let higher = max(largest, logit);
        sum = sum * (largest - higher).exp() + (logit - higher).exp();
        largest = higher;
        i += units;
    }
    let row_largest = largest_of_units(largest, units);
    let row_sum = sum_of_units(sum * (largest - row_largest).exp(), units);
    let target = targets[first + row] as usize;
    if UNIT_POS == 0 {
        losses[first + row] = row_sum.ln() + (row_largest - logits[start + target]);
    }
    if comptime!(with_gradient) {
        let mut i = UNIT_POS as usize;
        while i < vocabulary {
            let mut gradient = (logits[start + i] - row_largest).exp() / row_sum;
            if i == target {
                gradient -= 1.0f32;
            }
            d_logits[start + i] = T::cast_from(gradient * scale);
            i += units;
        }
    }
}
