//! Attention of one query for each row: the next token of a text, whose earlier keys and values are
//! cached.
//!
//! Blocks of one query leave a matrix product nothing to reuse but the keys. The query heads of a
//! group therefore go over the cache together, which is read where it lies, once.

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::attention::{Heads, probabilities};
use super::buffer::{floats, tensor, uninitialized};
use super::simd;
use crate::arguments::AttentionShape;
use crate::segments::{Segment, Segments};

/// Fewer multiplications than this, about 20 microseconds of them, are not worth another thread. The
/// threads of the pool fall asleep after a longer pause than that, and waking them takes longer.
const PARALLEL: usize = 1 << 17;

/// Whether query n is the only one of row n.
pub(super) fn fits(segments: &Segments, queries: usize) -> bool {
    let is_next = |(n, segment): (usize, &Segment)| segment.queries == 1 && segment.query_start == n;
    segments.len() == queries && segments.iter().enumerate().all(is_next)
}

/// q [t, h, d], k [s, k, d], v [s, k, y], sinks [h] -> [t, h, y], for segments that [`fits`] accepts.
///
/// Scores and results are sums in the order of d and of the keys. A result depends on its own row
/// alone.
pub(super) fn attend(
    q: &FlexTensor,
    k: &FlexTensor,
    v: &FlexTensor,
    sinks: Option<&FlexTensor>,
    shape: &AttentionShape,
) -> FlexTensor {
    let (queries, _, heads) = Heads::of(q, k, v);
    let (qs, ks, vs) = (floats(q), floats(k), floats(v));
    let (group, stride) = (heads.group() * heads.width, heads.key * heads.width);
    let (group_out, value_stride) = (heads.group() * heads.value_width, heads.key * heads.value_width);
    let segments: Vec<&Segment> = shape.segments.iter().collect();
    let mut out = uninitialized(queries * heads.query * heads.value_width);
    // A job is a row and key/value head: the queries and results of its group follow each other.
    let job = |(n, (q, out)): (usize, (&[f32], &mut [f32]))| {
        let (segment, head) = (segments[n / heads.key], n % heads.key);
        let first = shape.window.map_or(0, |window| segment.keys.saturating_sub(window));
        let keys = segment.keys - first;
        let at = segment.key_start + first;
        let (keys_at, values_at) = (at * stride + head * heads.width, at * value_stride + head * heads.value_width);
        let mut scores = uninitialized(heads.group() * keys);
        simd::key_scores(q, &ks[keys_at..], stride, heads.width, &mut scores);
        for (n, scores) in scores.chunks_mut(keys).enumerate() {
            let sink = sinks.map(|sinks| floats(sinks)[head * heads.group() + n]);
            probabilities(scores, shape, sink);
        }
        simd::weighted_sums(&scores, &vs[values_at..], value_stride, heads.value_width, out);
    };
    let keys: usize = segments.iter().map(|segment| segment.keys).sum();
    if 2 * keys * heads.query * heads.width < PARALLEL {
        qs.chunks(group).zip(out.chunks_mut(group_out)).enumerate().for_each(job);
    } else {
        qs.par_chunks(group).zip(out.par_chunks_mut(group_out)).enumerate().for_each(job);
    }
    tensor(out, [queries, heads.query, heads.value_width])
}
