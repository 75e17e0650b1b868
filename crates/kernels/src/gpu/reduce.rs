//! Kernels that reduce rows, one cube per row (norms, softmax, cross-entropy), and the functions
//! that launch them.
//!
//! Arithmetic is f32, whatever the tensors hold. Each unit of a cube sums every `units`-th element
//! of the row. The sums of the units are then added in a tree. The order is the same on every run,
//! and so are the bits. Every kernel stops beyond the last row.

#![allow(clippy::too_many_arguments, reason = "a kernel takes its buffers and sizes one by one")]
#![allow(clippy::collapsible_if, reason = "an element is read only after its index was checked")]

use std::ops::Range;

use burn::backend::TensorMetadata;
use burn::tensor::{DType, Shape};
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::tensor::{buffer, each_row, element, elements_of, empty, last};

/// Launches a kernel with a cube for each of `rows` rows of `width` elements. The number of units
/// follows the other arguments, and the number types come last.
macro_rules! launch {
    ($kernel:ident, $client:expr, $rows:expr, $width:expr, [$($argument:expr),+ $(,)?], $types:expr) => {{
        let client = $client.clone();
        let (cubes, dim, units) = each_row($rows, $width);
        // SAFETY: such kernels stop at the last row of what they write. The function that launches
        // them asserts that the buffers have as many rows of that width.
        unsafe { $kernel::launch_unchecked(&client, cubes, dim, $($argument),+, units, $types) }
    }};
}
pub(super) use launch;

/// `gamma · x / sqrt(mean(x²) + eps)` over the last dimension, and the factor `1 / sqrt(..)` of
/// each row. gamma is f32.
pub(super) fn rms_norm(x: &CubeTensor, gamma: &CubeTensor, eps: f32) -> (CubeTensor, CubeTensor) {
    let width = last(x);
    assert!(elements_of(gamma) == width && gamma.dtype == DType::F32, "a gamma for each element of a row");
    let rows = elements_of(x) / width;
    let (out, factors) = (empty(x, x.shape(), x.dtype), empty(x, [rows], DType::F32));
    let buffers = [x, gamma, &out, &factors].map(buffer);
    let [x_buffer, gamma, out_buffer, factors_buffer] = buffers;
    launch!(
        rms_norm_kernel,
        x.client,
        rows,
        width,
        [x_buffer, gamma, out_buffer, factors_buffer, width, eps],
        element(x.dtype)
    );
    (out, factors)
}

/// d_x of [`rms_norm`].
pub(super) fn rms_norm_backward(
    x: &CubeTensor,
    gamma: &CubeTensor,
    factors: &CubeTensor,
    d_out: &CubeTensor,
) -> CubeTensor {
    let width = last(x);
    let rows = elements_of(x) / width;
    assert!(d_out.shape() == x.shape() && d_out.dtype == x.dtype, "the gradient of this norm");
    assert!(elements_of(gamma) == width && elements_of(factors) == rows, "what the forward pass kept");
    let d_x = empty(x, x.shape(), x.dtype);
    launch!(
        rms_norm_backward_kernel,
        x.client,
        rows,
        width,
        [buffer(x), buffer(gamma), buffer(factors), buffer(d_out), buffer(&d_x), width],
        element(x.dtype)
    );
    d_x
}

/// Σ a · b over the last dimension, in f32: [.., width] -> [..].
pub(super) fn dot(a: &CubeTensor, b: &CubeTensor) -> CubeTensor {
    assert!(a.shape() == b.shape() && a.dtype == b.dtype, "tensors of one shape and number type");
    let shape = a.shape();
    let width = last(a);
    let out = empty(a, Shape::from(shape.iter().copied().take(shape.num_dims() - 1).collect::<Vec<_>>()), DType::F32);
    let rows = elements_of(&out);
    launch!(dot_kernel, a.client, rows, width, [buffer(a), buffer(b), buffer(&out), width], element(a.dtype));
    out
}

/// Queries `first` to before `first + queries`, and the keys that any of them sees. The last
/// queries may lie beyond the end of the micro-batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    pub(super) first: usize,
    pub(super) queries: usize,
    pub(super) first_key: usize,
    pub(super) keys: usize,
}

impl Block {
    /// The block as an argument of a kernel. The micro-batch has `all` queries.
    pub(super) fn argument(&self, all: usize) -> BlockArgumentLaunch {
        BlockArgumentLaunch::new(self.queries, self.first, self.first_key, self.keys, all)
    }
}

/// The keys that each query sees, from `starts` to before `ends`: u32 [t] each. No query of a block
/// sees a key outside of the block.
#[derive(Clone, Debug)]
pub(super) struct QueryRanges {
    pub(super) starts: CubeTensor,
    pub(super) ends: CubeTensor,
}

impl QueryRanges {
    /// The number of queries, t.
    pub(super) fn queries(&self) -> usize {
        elements_of(&self.starts)
    }
}

/// How scores are made of products of queries and keys.
#[derive(Clone, Copy)]
pub(super) struct Scoring<'a> {
    /// Their factor.
    pub(super) scale: f32,
    /// What they are bounded to.
    pub(super) softcap: Option<f32>,
    /// The score of each head's sink, f32 [h].
    pub(super) sinks: Option<&'a CubeTensor>,
}

/// The probabilities of a block's scores [heads · queries, keys], in `dtype`. ln Σ e^score of each
/// row, its sink's with them, is written into log_sums [h, t].
pub(super) fn softmax(
    scores: &CubeTensor,
    log_sums: &CubeTensor,
    block: &Block,
    ranges: &QueryRanges,
    scoring: Scoring<'_>,
    dtype: DType,
) -> CubeTensor {
    let (queries, rows) = (ranges.queries(), elements_of(scores) / block.keys);
    assert!(elements_of(scores) == rows * block.keys && rows.is_multiple_of(block.queries), "scores of the block");
    assert_eq!(elements_of(log_sums), rows / block.queries * queries, "a number for each head and query");
    let Scoring { scale, softcap, sinks } = scoring;
    assert!(sinks.is_none_or(|sinks| elements_of(sinks) == rows / block.queries), "a sink for each head");
    let probabilities = empty(scores, scores.shape(), dtype);
    launch!(
        softmax_kernel,
        scores.client,
        rows,
        block.keys,
        [
            buffer(scores),
            buffer(&ranges.starts),
            buffer(&ranges.ends),
            // Without sinks the kernel reads none, but needs some to bind.
            buffer(sinks.unwrap_or(scores)),
            buffer(&probabilities),
            buffer(log_sums),
            block.argument(queries),
            scale,
            softcap.unwrap_or(1.0),
            softcap.is_some(),
            sinks.is_some(),
        ],
        element(dtype)
    );
    probabilities
}

/// Writes the losses of `range` of all targets into `losses`. The caller has checked that all
/// targets are below v.
///
/// `softcap`: what logits are bounded to. If `gradient` is (number type, scale): returns the gradients of
/// their f32 logits [range, v] times the scale, in that type.
pub(super) fn cross_entropy(
    logits: &CubeTensor,
    targets: &CubeTensor,
    losses: &CubeTensor,
    range: Range<usize>,
    softcap: Option<f32>,
    gradient: Option<(DType, f32)>,
) -> Option<CubeTensor> {
    let vocabulary = last(logits);
    assert_eq!(elements_of(logits), range.len() * vocabulary, "logits of the range");
    assert!(range.end <= elements_of(targets) && range.end <= elements_of(losses), "a range of the targets");
    let (dtype, scale) = gradient.unwrap_or((DType::F32, 1.0));
    // A kernel without gradients does not write this tensor, but needs one to bind.
    let shape = if gradient.is_some() { [range.len(), vocabulary] } else { [1, 1] };
    let d_logits = empty(logits, Shape::from(shape), dtype);
    launch!(
        cross_entropy_kernel,
        logits.client,
        range.len(),
        vocabulary,
        [
            buffer(logits),
            buffer(targets),
            buffer(losses),
            buffer(&d_logits),
            range.start,
            vocabulary,
            scale,
            softcap.unwrap_or(1.0),
            softcap.is_some(),
            gradient.is_some(),
        ],
        element(dtype)
    );
    gradient.map(|_| d_logits)
}

/// Σ of a value over the units of a cube. All units get the sum. `units` is a power of two.
#[cube]
pub(super) fn sum_of_units(value: f32, #[comptime] units: usize) -> f32 {
    let mut shared = Shared::<[f32]>::new_slice(units);
    let unit = UNIT_POS as usize;
    shared[unit] = value;
    sync_cube();
    let mut half = CUBE_DIM as usize / 2;
    while half > 0 {
        if unit < half {
            shared[unit] += shared[unit + half];
        }
        sync_cube();
        half /= 2;
    }
    let sum = shared[0];
    sync_cube();
    sum
}

/// The largest value of the units of a cube. All units get it. `units` is a power of two.
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
        half /= 2;
    }
    let largest = shared[0];
    sync_cube();
    largest
}

/// `out = gamma · x / sqrt(mean(x²) + eps)`. `factors` gets `1 / sqrt(mean(x²) + eps)` of each row.
#[cube(launch_unchecked)]
fn rms_norm_kernel<T: Float>(
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
fn rms_norm_backward_kernel<T: Float>(
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
fn dot_kernel<T: Float>(
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

/// The part of all queries and keys that a block of scores covers. Row r of a block is query
/// `first_query + r % queries` of head `r / queries`. Column c is key `first_key + c`. A query sees
/// the keys in its [starts, ends).
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct BlockArgument {
    pub(super) queries: usize,
    pub(super) first_query: usize,
    pub(super) first_key: usize,
    pub(super) keys: usize,
    /// Queries of the whole micro-batch.
    pub(super) all_queries: usize,
}

/// The probabilities of a block's scores, and ln Σ e^score of each row. Rows beyond the last query
/// get zeros.
#[cube(launch_unchecked)]
fn softmax_kernel<T: Float>(
    scores: &[f32],
    starts: &[u32],
    ends: &[u32],
    sinks: &[f32],
    probabilities: &mut [T],
    log_sums: &mut [f32],
    block: BlockArgument,
    scale: f32,
    cap: f32,
    #[comptime] is_capped: bool,
    #[comptime] has_sinks: bool,
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
        let score = capped(scores[start + i] * scale, cap, is_capped);
        let higher = max(largest, score);
        sum = sum * (largest - higher).exp() + (score - higher).exp();
        largest = higher;
        i += units;
    }
    let mut row_largest = largest_of_units(largest, units);
    if comptime!(has_sinks) {
        row_largest = max(row_largest, sinks[head]);
    }
    let mut row_sum = sum_of_units(sum * (largest - row_largest).exp(), units);
    if comptime!(has_sinks) {
        row_sum += (sinks[head] - row_largest).exp();
    }
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
                probability = (capped(scores[start + i] * scale, cap, is_capped) - log_sum).exp();
            }
        }
        probabilities[start + i] = T::cast_from(probability);
        i += units;
    }
}

/// A score or a logit, bounded by `cap · tanh(logit / cap)` if it is asked for.
#[cube]
pub(super) fn capped(logit: f32, cap: f32, #[comptime] is_capped: bool) -> f32 {
    let mut value = logit;
    if comptime!(is_capped) {
        // tanh by e^x, which is within its range here.
        let part = min(max(logit / cap, -15.0f32), 15.0f32);
        value = cap * (1.0f32 - 2.0f32 / ((2.0f32 * part).exp() + 1.0f32));
    }
    value
}

/// The loss of each row of logits, and in `d_logits` their gradients
/// `(softmax - one_hot(target)) · scale`, through the cap if there is one.
#[cube(launch_unchecked)]
fn cross_entropy_kernel<T: Float>(
    logits: &[f32],
    targets: &[u32],
    losses: &mut [f32],
    d_logits: &mut [T],
    first: usize,
    vocabulary: usize,
    scale: f32,
    cap: f32,
    #[comptime] is_capped: bool,
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
        let logit = capped(logits[start + i], cap, is_capped);
        let higher = max(largest, logit);
        sum = sum * (largest - higher).exp() + (logit - higher).exp();
        largest = higher;
        i += units;
    }
    let row_largest = largest_of_units(largest, units);
    let row_sum = sum_of_units(sum * (largest - row_largest).exp(), units);
    let target = targets[first + row] as usize;
    if UNIT_POS == 0 {
        losses[first + row] = row_sum.ln() + (row_largest - capped(logits[start + target], cap, is_capped));
    }
    if comptime!(with_gradient) {
        let mut i = UNIT_POS as usize;
        while i < vocabulary {
            let logit = capped(logits[start + i], cap, is_capped);
            let mut gradient = (logit - row_largest).exp() / row_sum;
            if i == target {
                gradient -= 1.0f32;
            }
            if comptime!(is_capped) {
                gradient *= 1.0f32 - (logit / cap) * (logit / cap);
            }
            d_logits[start + i] = T::cast_from(gradient * scale);
            i += units;
        }
    }
}
