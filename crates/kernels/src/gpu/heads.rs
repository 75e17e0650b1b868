//! Kernels of attention that work element by element, and the functions that launch them. They copy
//! between tensors by token and tensors by head, and compute the backward pass of the softmax.
//!
//! What [`super::pointwise`] says of its kernels holds for these, too.

#![allow(clippy::too_many_arguments, reason = "a kernel takes its buffers and sizes one by one")]
#![allow(clippy::collapsible_if, reason = "an element is read only after its index was checked")]

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::reduce::{Block, BlockArgument, QueryRanges, Scoring, capped, launch as launch_rows, sum_of_units};
use super::tensor::{
    buffer, each_element, each_row, element, elements_of, empty, launch_elements as launch, same_shape,
};

/// Rows `first` to before `first + rows` of x [t, heads, width] as [heads, rows, width], with zeros
/// beyond the last.
pub(super) fn heads_first(x: &CubeTensor, first: usize, rows: usize) -> CubeTensor {
    let (heads, width) = (x.shape()[1], x.shape()[2]);
    let out = empty(x, [heads, rows, width], x.dtype);
    launch!(
        heads_first_kernel,
        x.client,
        elements_of(&out),
        buffer(x),
        buffer(&out),
        first,
        rows,
        heads,
        width,
        element(x.dtype),
    );
    out
}

/// Copies x into rows `first` and on of out [t, heads, d]. x is [heads, rows, d] in any grouping of
/// its first dimensions. What would lie beyond the last row of out is left out.
pub(super) fn put_tokens_first(x: &CubeTensor, out: &CubeTensor, first: usize, rows: usize) {
    let (heads, width) = (out.shape()[1], out.shape()[2]);
    assert_eq!(elements_of(x), heads * rows * width, "rows of all heads");
    launch!(
        tokens_first_kernel,
        x.client,
        elements_of(x),
        buffer(x),
        buffer(out),
        first,
        rows,
        heads,
        width,
        [element(x.dtype), element(out.dtype)],
    );
}

/// Adds x [heads, rows, d] to rows `first` and on of sums [heads, all, d]. Both are f32.
pub(super) fn add_rows(x: &CubeTensor, sums: &CubeTensor, first: usize) {
    let (x_shape, shape) = (x.shape(), sums.shape());
    let (rows, all, width) = (x_shape[1], shape[1], shape[2]);
    assert!(x_shape[0] == shape[0] && x_shape[2] == width && first + rows <= all, "rows among those of the sums");
    launch!(add_rows_kernel, x.client, elements_of(x), buffer(x), buffer(sums), first, rows, all, width);
}

/// The inputs of [`softmax_backward`] besides the block.
pub(super) struct SoftmaxBackward<'a> {
    /// The scores of the block in f32: [heads · queries, keys] in any grouping.
    pub(super) scores: &'a CubeTensor,
    /// The gradients of its probabilities, of the same shape and type.
    pub(super) d_probabilities: &'a CubeTensor,
    /// ln Σ e^score: [h, t]. Those of the sinks are in it.
    pub(super) log_sums: &'a CubeTensor,
    /// Σ out · d_out over d: [t, h].
    pub(super) deltas: &'a CubeTensor,
    pub(super) scoring: Scoring<'a>,
    /// The number type of the results.
    pub(super) dtype: DType,
}

/// (probabilities, gradients of the scores) of a block, of the shape of its scores.
pub(super) fn softmax_backward(
    inputs: SoftmaxBackward<'_>,
    block: &Block,
    ranges: &QueryRanges,
) -> (CubeTensor, CubeTensor) {
    let SoftmaxBackward { scores, d_probabilities, log_sums, deltas, scoring, dtype } = inputs;
    same_shape(&[scores, d_probabilities]);
    let queries = ranges.queries();
    let heads = elements_of(log_sums) / queries;
    assert!(elements_of(deltas) == heads * queries, "a number for each head and query");
    assert_eq!(elements_of(scores), heads * block.queries * block.keys, "scores of the block");
    let (probabilities, d_scores) = (empty(scores, scores.shape(), dtype), empty(scores, scores.shape(), dtype));
    launch!(
        softmax_backward_kernel,
        scores.client,
        elements_of(scores),
        buffer(scores),
        buffer(d_probabilities),
        buffer(&ranges.starts),
        buffer(&ranges.ends),
        buffer(log_sums),
        buffer(deltas),
        buffer(&probabilities),
        buffer(&d_scores),
        block.argument(queries),
        heads,
        scoring.scale,
        scoring.softcap.unwrap_or(1.0),
        scoring.softcap.is_some(),
        element(dtype),
    );
    (probabilities, d_scores)
}

/// The gradients of the sinks f32 [h], of `log_sums` and `deltas` as [`SoftmaxBackward`] has them.
pub(super) fn sink_gradients(sinks: &CubeTensor, log_sums: &CubeTensor, deltas: &CubeTensor) -> CubeTensor {
    let heads = elements_of(sinks);
    assert_eq!(sinks.dtype, DType::F32, "sinks in f32");
    assert_eq!(elements_of(log_sums), elements_of(deltas), "numbers of the same heads and queries");
    let queries = elements_of(log_sums) / heads;
    let d_sinks = empty(sinks, [heads], DType::F32);
    launch_rows!(
        sink_gradients_kernel,
        sinks.client,
        heads,
        queries,
        [buffer(sinks), buffer(log_sums), buffer(deltas), buffer(&d_sinks), queries, heads],
        element(DType::F32)
    );
    d_sinks
}

/// Queries (or keys) `first` to before `first + rows` of x [t, heads, width] as
/// [heads, rows, width], with zeros beyond the last.
#[cube(launch_unchecked)]
fn heads_first_kernel<T: Float>(
    x: &[T],
    out: &mut [T],
    first: usize,
    rows: usize,
    heads: usize,
    width: usize,
    #[define(T)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    let column = i % width;
    let row = i / width % rows + first;
    let head = i / width / rows;
    let at = (row * heads + head) * width + column;
    if at < x.len() {
        out[i] = x[at];
    } else {
        out[i] = T::cast_from(0.0f32);
    }
}

/// The reverse of [`heads_first_kernel`]: x [heads, rows, width] into rows `first` and on of out
/// [t, heads, width].
#[cube(launch_unchecked)]
fn tokens_first_kernel<I: Float, O: Float>(
    x: &[I],
    out: &mut [O],
    first: usize,
    rows: usize,
    heads: usize,
    width: usize,
    #[define(I, O)] _dtypes: [ElemType; 2],
) {
    let i = ABSOLUTE_POS;
    if i >= x.len() {
        terminate!();
    }
    let column = i % width;
    let row = i / width % rows + first;
    let head = i / width / rows;
    let at = (row * heads + head) * width + column;
    if at < out.len() {
        out[at] = O::cast_from(f32::cast_from(x[i]));
    }
}

/// Adds x [heads, rows, width] to rows `first` and on of sums [heads, all_rows, width].
#[cube(launch_unchecked)]
fn add_rows_kernel(x: &[f32], sums: &mut [f32], first: usize, rows: usize, all_rows: usize, width: usize) {
    let i = ABSOLUTE_POS;
    if i >= x.len() {
        terminate!();
    }
    let column = i % width;
    let row = i / width % rows + first;
    let head = i / width / rows;
    let at = (head * all_rows + row) * width + column;
    sums[at] += x[i];
}

/// The gradient of each head's sink, one cube each: `-Σ p · delta` over the queries, with the probability
/// `p = e^(sink - ln Σ e^score)` of the sink.
#[cube(launch_unchecked)]
fn sink_gradients_kernel<T: Float>(
    sinks: &[f32],
    log_sums: &[f32],
    deltas: &[f32],
    d_sinks: &mut [T],
    queries: usize,
    heads: usize,
    #[comptime] units: usize,
    #[define(T)] _dtype: ElemType,
) {
    let head = CUBE_POS;
    if head >= d_sinks.len() {
        terminate!();
    }
    let mut sum = 0.0f32;
    let mut query = UNIT_POS as usize;
    while query < queries {
        sum += (sinks[head] - log_sums[head * queries + query]).exp() * deltas[query * heads + head];
        query += units;
    }
    let total = sum_of_units(sum, units);
    if UNIT_POS == 0 {
        d_sinks[head] = T::cast_from(-total);
    }
}

/// The probabilities of a block again, from its scores and log-sums, and the gradients of its
/// scores, `p · (d_p - delta) · scale`, through the cap if there is one. See [`super::reduce::softmax`].
#[cube(launch_unchecked)]
fn softmax_backward_kernel<T: Float>(
    scores: &[f32],
    d_probabilities: &[f32],
    starts: &[u32],
    ends: &[u32],
    log_sums: &[f32],
    deltas: &[f32],
    probabilities: &mut [T],
    d_scores: &mut [T],
    block: BlockArgument,
    heads: usize,
    scale: f32,
    cap: f32,
    #[comptime] is_capped: bool,
    #[define(T)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= scores.len() {
        terminate!();
    }
    let row = i / block.keys;
    let key = i % block.keys + block.first_key;
    let query = block.first_query + row % block.queries;
    let head = row / block.queries;
    let mut probability = 0.0f32;
    let mut gradient = 0.0f32;
    if query < block.all_queries {
        if key >= starts[query] as usize {
            if key < ends[query] as usize {
                let score = capped(scores[i] * scale, cap, is_capped);
                probability = (score - log_sums[head * block.all_queries + query]).exp();
                gradient = probability * (d_probabilities[i] - deltas[query * heads + head]) * scale;
                if comptime!(is_capped) {
                    gradient *= 1.0f32 - (score / cap) * (score / cap);
                }
            }
        }
    }
    probabilities[i] = T::cast_from(probability);
    d_scores[i] = T::cast_from(gradient);
}
