//! Attention of one query for each row: the next token of a text, whose earlier keys and values are
//! cached.
//!
//! Blocks of one query leave a matrix product nothing to reuse but the keys. The query heads of a
//! group therefore go over the cache together, which is read where it lies, once. Where a group is
//! large and rows are few, several threads take some heads of it each.

use burn_flex::FlexTensor;
use finetune_packed::InstructionSet;
use finetune_packed::dot::keys::Apart;
use rayon::prelude::*;

use super::attention::{Heads, probabilities};
use super::buffer::{floats, tensor, uninitialized};
use super::simd;
use crate::arguments::AttentionShape;
use crate::segments::{Segment, Segments};

/// Fewer multiplications than this, about 20 microseconds of them, are not worth another thread. The
/// threads of the pool fall asleep after a longer pause than that, and waking them takes longer.
const PARALLEL: usize = 1 << 17;

/// Fewest query heads that go over a cache together: keys are read, and brought into another order, once
/// for all of them.
const TOGETHER: usize = 8;

/// Most query heads of a key/value head whose products with keys are made one by one. With more it pays to bring keys
/// into another order first. It is the model that decides, so the bits do not depend on rows and threads.
const FEW_QUERIES: usize = 8;

/// Whether query n is the only one of row n.
pub(super) fn fits(segments: &Segments, queries: usize) -> bool {
    let is_next = |(n, segment): (usize, &Segment)| segment.queries == 1 && segment.query_start == n;
    segments.len() == queries && segments.iter().enumerate().all(is_next)
}

/// q [t, h, d], k [s, k, d], v [s, k, y], sinks [h] -> [t, h, y], for segments that [`fits`] accepts.
///
/// Results are sums in the order of the keys. So are scores in that of d, or they are those of
/// [`finetune_packed::dot::keys`] where few query heads share a key/value head. A result depends on its own row
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
    // A job is a row and query heads of one key/value head: queries and results of those follow each other.
    let pieces = pieces(heads, queries);
    let together = heads.group() / pieces;
    let (group, stride) = (together * heads.width, heads.key * heads.width);
    let (group_out, value_stride) = (together * heads.value_width, heads.key * heads.value_width);
    let segments: Vec<&Segment> = shape.segments.iter().collect();
    let mut out = uninitialized(queries * heads.query * heads.value_width);
    let job = |(n, (q, out)): (usize, (&[f32], &mut [f32]))| {
        let (segment, piece) = (segments[n / (heads.key * pieces)], n % (heads.key * pieces));
        let head = piece / pieces;
        let first = shape.window.map_or(0, |window| segment.keys.saturating_sub(window));
        let keys = segment.keys - first;
        let at = segment.key_start + first;
        let (keys_at, values_at) = (at * stride + head * heads.width, at * value_stride + head * heads.value_width);
        let mut scores = uninitialized(together * keys);
        let (values, width) = (&ks[keys_at..], heads.width);
        if heads.group() <= FEW_QUERIES {
            InstructionSet::best().dot_apart(q, Apart { values, stride, width }, &mut scores);
        } else {
            simd::key_scores(q, values, stride, width, &mut scores);
        }
        for (n, scores) in scores.chunks_mut(keys).enumerate() {
            let sink = sinks.map(|sinks| floats(sinks)[piece * together + n]);
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

/// The pieces that the query heads of a key/value head are cut into. One, unless all threads have something
/// to do with more: the many query heads of latent attention share one head.
fn pieces(heads: Heads, queries: usize) -> usize {
    let wanted = (2 * rayon::current_num_threads()).div_ceil((queries * heads.key).max(1));
    let most = wanted.min(heads.group() / TOGETHER).max(1);
    (1..=most).rev().find(|pieces| heads.group().is_multiple_of(*pieces)).unwrap_or(1)
}
