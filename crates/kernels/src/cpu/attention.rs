//! Causal attention over rows of unequal length, with grouped key/value heads and, where a family has
//! them, a sliding window, sinks and a soft cap of the scores.
//!
//! The queries are worked through in blocks, and no score matrix is kept. The backward pass
//! computes the scores again from one number per query, ln Σ e^score (Dao et al. 2022,
//! "FlashAttention"). A block skips the keys that none of its queries may see: a causal row costs
//! half of the square, and a window costs its width.

use std::sync::Arc;

use burn::backend::{Flex, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::buffer::{floats, tensor};
use super::matmul::{Matrix, single};
use super::{one_query, simd};
use crate::arguments::AttentionShape;
use crate::footprint::ATTENTION_BLOCK;
use crate::fused::Fused;
use crate::operations::{CausalAttention, SinkAttention};
use crate::segments::Segment;

/// What the backward pass needs: q [t, h, d], k [s, k, d], v [s, k, y], and the result.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    /// [h]
    sinks: Option<FlexTensor>,
    out: FlexTensor,
    /// ln Σ e^score for each head and query, the sink's with them: [h, t].
    log_sums: Arc<[f32]>,
    shape: AttentionShape,
}

/// Sizes that all jobs share: the numbers of heads, the width of a head of queries and keys, d, and that
/// of a head of values, y.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub(super) query: usize,
    pub(super) key: usize,
    pub(super) width: usize,
    pub(super) value_width: usize,
}

impl Heads {
    /// (queries, keys, sizes) of q [t, h, d], k [s, k, d] and v [s, k, y].
    pub(super) fn of(q: &FlexTensor, k: &FlexTensor, v: &FlexTensor) -> (usize, usize, Heads) {
        let [queries, query, width] = q.shape().dims::<3>();
        let [keys, key, key_width] = k.shape().dims::<3>();
        let [values, value, value_width] = v.shape().dims::<3>();
        assert!(width == key_width && query % key == 0, "query heads are a multiple of key/value heads");
        assert!(values == keys && value == key, "a value for each key");
        (queries, keys, Heads { query, key, width, value_width })
    }

    /// Query heads of each key/value head.
    pub(super) fn group(&self) -> usize {
        self.query / self.key
    }
}

/// A block of queries of one row: `rows` queries from `first` on, and the keys from `from` to
/// before `to` that they may see.
///
/// Query `first + i` sees keys up to and including `last_of_first + i`. All are relative to the
/// segment.
struct Block {
    first: usize,
    rows: usize,
    from: usize,
    to: usize,
    last_of_first: usize,
}

/// The blocks of a row, in order.
fn blocks(segment: &Segment, window: Option<usize>) -> impl Iterator<Item = Block> + '_ {
    let offset = segment.keys - segment.queries;
    (0..segment.queries).step_by(ATTENTION_BLOCK).map(move |first| {
        let rows = ATTENTION_BLOCK.min(segment.queries - first);
        let last_of_first = first + offset;
        let from = window.map_or(0, |window| (last_of_first + 1).saturating_sub(window));
        Block { first, rows, from, to: last_of_first + rows, last_of_first }
    })
}

impl Block {
    fn keys(&self) -> usize {
        self.to - self.from
    }

    /// The columns of the block's scores that its query `i` sees.
    fn seen(&self, i: usize, window: Option<usize>) -> std::ops::Range<usize> {
        let end = self.last_of_first + i + 1;
        let start = window.map_or(0, |window| end.saturating_sub(window));
        start - self.from.min(start)..end - self.from
    }
}

/// One head of a [t, heads, d] tensor: `rows` tokens from token `start` on, [rows, d].
fn head(values: &[f32], heads: usize, head: usize, width: usize, start: usize, rows: usize) -> Matrix<'_> {
    if rows == 0 {
        return Matrix::new(&[], 0, width);
    }
    Matrix::strided(&values[(start * heads + head) * width..], rows, width, heads * width)
}

/// The result [t, h, y], and what the backward pass needs.
fn forward([q, k, v]: [FlexTensor; 3], sinks: Option<FlexTensor>, shape: AttentionShape) -> (FlexTensor, Saved) {
    let (queries, _, heads) = Heads::of(&q, &k, &v);
    let (qs, ks, vs) = (floats(&q), floats(&k), floats(&v));
    let sink_of = |h: usize| sinks.as_ref().map(|sinks| floats(sinks)[h]);
    // One job for each row and query head. Each returns its own [row, y] and log-sums.
    let jobs: Vec<(&Segment, usize)> =
        shape.segments.iter().flat_map(|segment| (0..heads.query).map(move |h| (segment, h))).collect();
    let results: Vec<(Vec<f32>, Vec<f32>)> = jobs
        .par_iter()
        .map(|&(segment, h)| forward_head([qs, ks, vs], heads, segment, h, &shape, sink_of(h)))
        .collect();
    let mut out = vec![0.0; queries * heads.query * heads.value_width];
    let mut log_sums = vec![0.0; heads.query * queries];
    for ((segment, h), (rows, sums)) in jobs.iter().zip(&results) {
        put(&mut out, heads.query, *h, heads.value_width, segment.query_start, rows);
        log_sums[h * queries + segment.query_start..][..sums.len()].copy_from_slice(sums);
    }
    let out = tensor(out, [queries, heads.query, heads.value_width]);
    (out.clone(), Saved { q, k, v, sinks, out, log_sums: log_sums.into(), shape })
}

fn without_gradients([q, k, v]: [FlexTensor; 3], sinks: Option<FlexTensor>, shape: AttentionShape) -> FlexTensor {
    if one_query::fits(&shape.segments, q.shape()[0]) {
        return one_query::attend(&q, &k, &v, sinks.as_ref(), &shape);
    }
    forward([q, k, v], sinks, shape).0
}

/// The gradients of q, k and v.
fn backward(saved: &Saved, d_out: &FlexTensor) -> [Option<FlexTensor>; 3] {
    let (queries, keys, heads) = Heads::of(&saved.q, &saved.k, &saved.v);
    let shape = &saved.shape;
    // One job for each row and key/value head: the query heads of a group add to the same keys,
    // in their order.
    let jobs: Vec<(&Segment, usize)> =
        shape.segments.iter().flat_map(|segment| (0..heads.key).map(move |kv| (segment, kv))).collect();
    let results: Vec<[Vec<f32>; 3]> = jobs
        .par_iter()
        .map(|&(segment, kv)| backward_group(saved, floats(d_out), heads, queries, segment, kv))
        .collect();
    let mut d_q = vec![0.0; queries * heads.query * heads.width];
    let mut d_k = vec![0.0; keys * heads.key * heads.width];
    let mut d_v = vec![0.0; keys * heads.key * heads.value_width];
    for ((segment, kv), [group_q, rows_k, rows_v]) in jobs.iter().zip(&results) {
        for (g, rows) in group_q.chunks(segment.queries.max(1) * heads.width).enumerate() {
            put(&mut d_q, heads.query, kv * heads.group() + g, heads.width, segment.query_start, rows);
        }
        put(&mut d_k, heads.key, *kv, heads.width, segment.key_start, rows_k);
        put(&mut d_v, heads.key, *kv, heads.value_width, segment.key_start, rows_v);
    }
    [tensor(d_q, saved.q.shape()), tensor(d_k, saved.k.shape()), tensor(d_v, saved.v.shape())].map(Some)
}

/// The gradients of the sinks [h]: of each query -p delta, with the sink's probability p.
fn sink_gradients(saved: &Saved, sinks: &FlexTensor, d_out: &FlexTensor) -> FlexTensor {
    let (queries, _, heads) = Heads::of(&saved.q, &saved.k, &saved.v);
    let (out, d_out) = (floats(&saved.out), floats(d_out));
    let of_head = |(h, &sink): (usize, &f32)| -> f32 {
        let of_query = |query: usize| {
            let at = (query * heads.query + h) * heads.value_width;
            let delta = simd::dot(&out[at..at + heads.value_width], &d_out[at..at + heads.value_width]);
            -(sink - saved.log_sums[h * queries + query]).exp() * delta
        };
        (0..queries).map(of_query).sum()
    };
    tensor(floats(sinks).iter().enumerate().map(of_head).collect(), [heads.query])
}

impl Fused<Flex, 3> for CausalAttention {
    type Saved = Saved;

    fn forward(self, inputs: [FlexTensor; 3], _: [bool; 3]) -> (FlexTensor, Saved) {
        forward(inputs, None, self.shape)
    }

    fn without_gradients(self, inputs: [FlexTensor; 3]) -> FlexTensor {
        without_gradients(inputs, None, self.shape)
    }

    fn backward(saved: Saved, d_out: FlexTensor, _: [bool; 3]) -> [Option<FlexTensor>; 3] {
        backward(&saved, &d_out)
    }
}

impl Fused<Flex, 4> for SinkAttention {
    type Saved = Saved;

    fn forward(self, [q, k, v, sinks]: [FlexTensor; 4], _: [bool; 4]) -> (FlexTensor, Saved) {
        forward([q, k, v], Some(sinks), self.shape)
    }

    fn without_gradients(self, [q, k, v, sinks]: [FlexTensor; 4]) -> FlexTensor {
        without_gradients([q, k, v], Some(sinks), self.shape)
    }

    fn backward(saved: Saved, d_out: FlexTensor, [.., wanted]: [bool; 4]) -> [Option<FlexTensor>; 4] {
        let d_sinks = saved.sinks.as_ref().filter(|_| wanted).map(|sinks| sink_gradients(&saved, sinks, &d_out));
        let [d_q, d_k, d_v] = backward(&saved, &d_out);
        [d_q, d_k, d_v, d_sinks]
    }
}

/// Copies a head's rows [n, d] into a [t, heads, d] tensor.
fn put(out: &mut [f32], heads: usize, head: usize, width: usize, start: usize, rows: &[f32]) {
    for (row, values) in rows.chunks(width).enumerate() {
        out[((start + row) * heads + head) * width..][..width].copy_from_slice(values);
    }
}

/// The probabilities of a query's scores, in place. Returns ln Σ e^score.
pub(super) fn probabilities(scores: &mut [f32], shape: &AttentionShape, sink: Option<f32>) -> f32 {
    let log_sum = match shape.softcap {
        None => simd::softmax(scores, shape.scale),
        Some(cap) => {
            simd::soft_cap(scores, shape.scale, cap);
            simd::softmax(scores, 1.0)
        }
    };
    match sink {
        None => log_sum,
        Some(sink) => simd::add_sink(scores, log_sum, sink),
    }
}

/// From a query's scores their probabilities, in place, and from the gradients of those the gradients of
/// the scores, in place.
fn gradients_of_scores(scores: &mut [f32], d: &mut [f32], shape: &AttentionShape, log_sum: f32, delta: f32) {
    match shape.softcap {
        None => {
            simd::softmax_again(scores, shape.scale, log_sum);
            simd::softmax_backward(scores, d, delta, shape.scale);
        }
        Some(cap) => {
            simd::soft_cap(scores, shape.scale, cap);
            let mut slopes = vec![shape.scale; d.len()];
            simd::soft_cap_backward(scores, cap, &mut slopes);
            simd::softmax_again(scores, 1.0, log_sum);
            simd::softmax_backward(scores, d, delta, 1.0);
            d.iter_mut().zip(&slopes).for_each(|(d, slope)| *d *= slope);
        }
    }
}

/// The result [n, y] of query head `h` for the n queries of a row, and their log-sums [n].
fn forward_head(
    [q, k, v]: [&[f32]; 3],
    heads: Heads,
    segment: &Segment,
    h: usize,
    shape: &AttentionShape,
    sink: Option<f32>,
) -> (Vec<f32>, Vec<f32>) {
    let Heads { width, value_width, .. } = heads;
    let kv = h / heads.group();
    let mut out = vec![0.0; segment.queries * value_width];
    let mut log_sums = vec![0.0; segment.queries];
    let mut scores = Vec::new();
    for block in blocks(segment, shape.window) {
        let keys = block.keys();
        let q_block = head(q, heads.query, h, width, segment.query_start + block.first, block.rows);
        let k_block = head(k, heads.key, kv, width, segment.key_start + block.from, keys);
        let v_block = head(v, heads.key, kv, value_width, segment.key_start + block.from, keys);
        scores.resize(block.rows * keys, 0.0);
        single(&mut scores, keys, false, 1.0, q_block, k_block.transposed());
        for (i, row) in scores.chunks_mut(keys).enumerate() {
            let seen = block.seen(i, shape.window);
            row[..seen.start].fill(0.0);
            row[seen.end..].fill(0.0);
            log_sums[block.first + i] = probabilities(&mut row[seen], shape, sink);
        }
        let rows = &mut out[block.first * value_width..][..block.rows * value_width];
        single(rows, value_width, false, 1.0, Matrix::new(&scores, block.rows, keys), v_block);
    }
    (out, log_sums)
}

/// The gradients of a row for key/value head `kv`: of q [g, n, d] for the g query heads of its
/// group, of k [m, d] and of v [m, y].
fn backward_group(
    saved: &Saved,
    d_out: &[f32],
    heads: Heads,
    queries: usize,
    segment: &Segment,
    kv: usize,
) -> [Vec<f32>; 3] {
    let Heads { width, value_width, .. } = heads;
    let window = saved.shape.window;
    let (q, k, v, out) = (floats(&saved.q), floats(&saved.k), floats(&saved.v), floats(&saved.out));
    let mut d_q = vec![0.0; heads.group() * segment.queries * width];
    let mut d_k = vec![0.0; segment.keys * width];
    let mut d_v = vec![0.0; segment.keys * value_width];
    let (mut probabilities, mut d_scores) = (Vec::new(), Vec::new());
    for g in 0..heads.group() {
        let h = kv * heads.group() + g;
        for block in blocks(segment, window) {
            let keys = block.keys();
            let start = segment.query_start + block.first;
            let q_block = head(q, heads.query, h, width, start, block.rows);
            let d_block = head(d_out, heads.query, h, value_width, start, block.rows);
            let k_block = head(k, heads.key, kv, width, segment.key_start + block.from, keys);
            let v_block = head(v, heads.key, kv, value_width, segment.key_start + block.from, keys);
            probabilities.resize(block.rows * keys, 0.0);
            d_scores.resize(block.rows * keys, 0.0);
            single(&mut probabilities, keys, false, 1.0, q_block, k_block.transposed());
            single(&mut d_scores, keys, false, 1.0, d_block, v_block.transposed());
            for (i, (p, d)) in probabilities.chunks_mut(keys).zip(d_scores.chunks_mut(keys)).enumerate() {
                let seen = block.seen(i, window);
                for row in [&mut *p, &mut *d] {
                    row[..seen.start].fill(0.0);
                    row[seen.end..].fill(0.0);
                }
                // Σ p d_p over the keys equals out · d_out over the head's dimensions.
                let at = ((start + i) * heads.query + h) * value_width;
                let delta = simd::dot(&out[at..at + value_width], &d_out[at..at + value_width]);
                let log_sum = saved.log_sums[h * queries + start + i];
                gradients_of_scores(&mut p[seen.clone()], &mut d[seen], &saved.shape, log_sum, delta);
            }
            let p = Matrix::new(&probabilities, block.rows, keys);
            let d = Matrix::new(&d_scores, block.rows, keys);
            let d_q_rows = &mut d_q[(g * segment.queries + block.first) * width..][..block.rows * width];
            single(d_q_rows, width, false, 1.0, d, k_block);
            let d_k_rows = &mut d_k[block.from * width..block.to * width];
            single(d_k_rows, width, true, 1.0, d.transposed(), q_block);
            let d_v_rows = &mut d_v[block.from * value_width..block.to * value_width];
            single(d_v_rows, value_width, true, 1.0, p.transposed(), d_block);
        }
    }
    [d_q, d_k, d_v]
}
