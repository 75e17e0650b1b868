//! Causal attention over rows of unequal length, with grouped key/value heads and an optional
//! sliding window.
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
use crate::fused::Fused;
use crate::operations::CausalAttention;
use crate::segments::Segment;

/// Queries of a block. Its scores stay in the second-level cache up to 2,000 keys.
const BLOCK: usize = 64;

/// What the backward pass needs: q [t, h, d], k and v [s, k, d], and the result.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    out: FlexTensor,
    /// ln Σ e^(scale · score) for each head and query: [h, t].
    log_sums: Arc<[f32]>,
    shape: AttentionShape,
}

/// Sizes that all jobs share: the numbers of heads, and the width of a head, d.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub(super) query: usize,
    pub(super) key: usize,
    pub(super) width: usize,
}

impl Heads {
    /// (queries, keys, sizes) of q [t, h, d] and k [s, k, d].
    pub(super) fn of(q: &FlexTensor, k: &FlexTensor) -> (usize, usize, Heads) {
        let [queries, query, width] = q.shape().dims::<3>();
        let [keys, key, key_width] = k.shape().dims::<3>();
        assert!(width == key_width && query % key == 0, "query heads are a multiple of key/value heads");
        (queries, keys, Heads { query, key, width })
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
    (0..segment.queries).step_by(BLOCK).map(move |first| {
        let rows = BLOCK.min(segment.queries - first);
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

impl Fused<Flex, 3> for CausalAttention {
    type Saved = Saved;

    fn forward(self, [q, k, v]: [FlexTensor; 3], _: [bool; 3]) -> (FlexTensor, Saved) {
        let shape = self.shape;
        let (queries, _, heads) = Heads::of(&q, &k);
        let (qs, ks, vs) = (floats(&q), floats(&k), floats(&v));
        // One job for each row and query head. Each returns its own [row, d] and log-sums.
        let jobs: Vec<(&Segment, usize)> =
            shape.segments.iter().flat_map(|segment| (0..heads.query).map(move |h| (segment, h))).collect();
        let results: Vec<(Vec<f32>, Vec<f32>)> = jobs
            .par_iter()
            .map(|&(segment, h)| forward_head(qs, ks, vs, heads, segment, h, shape.scale, shape.window))
            .collect();
        let mut out = vec![0.0; queries * heads.query * heads.width];
        let mut log_sums = vec![0.0; heads.query * queries];
        for ((segment, h), (rows, sums)) in jobs.iter().zip(&results) {
            put(&mut out, heads.query, *h, heads.width, segment.query_start, rows);
            log_sums[h * queries + segment.query_start..][..sums.len()].copy_from_slice(sums);
        }
        let out = tensor(out, q.shape());
        (out.clone(), Saved { q, k, v, out, log_sums: log_sums.into(), shape })
    }

    fn without_gradients(self, [q, k, v]: [FlexTensor; 3]) -> FlexTensor {
        if one_query::fits(&self.shape.segments, q.shape()[0]) {
            return one_query::attend(&q, &k, &v, &self.shape);
        }
        <Self as Fused<Flex, 3>>::forward(self, [q, k, v], [false; 3]).0
    }

    fn backward(saved: Saved, d_out: FlexTensor, _: [bool; 3]) -> [Option<FlexTensor>; 3] {
        let (queries, keys, heads) = Heads::of(&saved.q, &saved.k);
        let shape = &saved.shape;
        // One job for each row and key/value head: the query heads of a group add to the same keys,
        // in their order.
        let jobs: Vec<(&Segment, usize)> =
            shape.segments.iter().flat_map(|segment| (0..heads.key).map(move |kv| (segment, kv))).collect();
        let results: Vec<[Vec<f32>; 3]> = jobs
            .par_iter()
            .map(|&(segment, kv)| backward_group(&saved, floats(&d_out), heads, queries, segment, kv))
            .collect();
        let mut d_q = vec![0.0; queries * heads.query * heads.width];
        let mut d_k = vec![0.0; keys * heads.key * heads.width];
        let mut d_v = vec![0.0; keys * heads.key * heads.width];
        for ((segment, kv), [group_q, rows_k, rows_v]) in jobs.iter().zip(&results) {
            for (g, rows) in group_q.chunks(segment.queries.max(1) * heads.width).enumerate() {
                put(&mut d_q, heads.query, kv * heads.group() + g, heads.width, segment.query_start, rows);
            }
            put(&mut d_k, heads.key, *kv, heads.width, segment.key_start, rows_k);
            put(&mut d_v, heads.key, *kv, heads.width, segment.key_start, rows_v);
        }
        [tensor(d_q, saved.q.shape()), tensor(d_k, saved.k.shape()), tensor(d_v, saved.v.shape())].map(Some)
    }
}

/// Copies a head's rows [n, d] into a [t, heads, d] tensor.
fn put(out: &mut [f32], heads: usize, head: usize, width: usize, start: usize, rows: &[f32]) {
    for (row, values) in rows.chunks(width).enumerate() {
        out[((start + row) * heads + head) * width..][..width].copy_from_slice(values);
    }
}

/// The result [n, d] of query head `h` for the n queries of a row, and their log-sums [n].
#[expect(clippy::too_many_arguments, reason = "one head's slice of everything")]
fn forward_head(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    heads: Heads,
    segment: &Segment,
    h: usize,
    scale: f32,
    window: Option<usize>,
) -> (Vec<f32>, Vec<f32>) {
    let (width, kv) = (heads.width, h / heads.group());
    let mut out = vec![0.0; segment.queries * width];
    let mut log_sums = vec![0.0; segment.queries];
    let mut scores = Vec::new();
    for block in blocks(segment, window) {
        let keys = block.keys();
        let q_block = head(q, heads.query, h, width, segment.query_start + block.first, block.rows);
        let k_block = head(k, heads.key, kv, width, segment.key_start + block.from, keys);
        let v_block = head(v, heads.key, kv, width, segment.key_start + block.from, keys);
        scores.resize(block.rows * keys, 0.0);
        single(&mut scores, keys, false, 1.0, q_block, k_block.transposed());
        for (i, row) in scores.chunks_mut(keys).enumerate() {
            let seen = block.seen(i, window);
            row[..seen.start].fill(0.0);
            row[seen.end..].fill(0.0);
            log_sums[block.first + i] = simd::softmax(&mut row[seen], scale);
        }
        let rows = &mut out[block.first * width..][..block.rows * width];
        single(rows, width, false, 1.0, Matrix::new(&scores, block.rows, keys), v_block);
    }
    (out, log_sums)
}

/// The gradients of a row for key/value head `kv`: of q [g, n, d] for the g query heads of its
/// group, of k and of v [m, d].
fn backward_group(
    saved: &Saved,
    d_out: &[f32],
    heads: Heads,
    queries: usize,
    segment: &Segment,
    kv: usize,
) -> [Vec<f32>; 3] {
    let (width, window, scale) = (heads.width, saved.shape.window, saved.shape.scale);
    let (q, k, v, out) = (floats(&saved.q), floats(&saved.k), floats(&saved.v), floats(&saved.out));
    let mut d_q = vec![0.0; heads.group() * segment.queries * width];
    let mut d_k = vec![0.0; segment.keys * width];
    let mut d_v = vec![0.0; segment.keys * width];
    let (mut probabilities, mut d_scores) = (Vec::new(), Vec::new());
    for g in 0..heads.group() {
        let h = kv * heads.group() + g;
        for block in blocks(segment, window) {
            let keys = block.keys();
            let start = segment.query_start + block.first;
            let q_block = head(q, heads.query, h, width, start, block.rows);
            let d_block = head(d_out, heads.query, h, width, start, block.rows);
            let k_block = head(k, heads.key, kv, width, segment.key_start + block.from, keys);
            let v_block = head(v, heads.key, kv, width, segment.key_start + block.from, keys);
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
                simd::softmax_again(&mut p[seen.clone()], scale, saved.log_sums[h * queries + start + i]);
                // Σ p d_p over the keys equals out · d_out over the head's dimensions.
                let at = ((start + i) * heads.query + h) * width;
                let delta = simd::dot(&out[at..at + width], &d_out[at..at + width]);
                simd::softmax_backward(&p[seen.clone()], &mut d[seen], delta, scale);
            }
            let p = Matrix::new(&probabilities, block.rows, keys);
            let d = Matrix::new(&d_scores, block.rows, keys);
            let d_q_rows = &mut d_q[(g * segment.queries + block.first) * width..][..block.rows * width];
            single(d_q_rows, width, false, 1.0, d, k_block);
            let range = block.from * width..block.to * width;
            single(&mut d_k[range.clone()], width, true, 1.0, d.transposed(), q_block);
            single(&mut d_v[range], width, true, 1.0, p.transposed(), d_block);
        }
    }
    [d_q, d_k, d_v]
}
