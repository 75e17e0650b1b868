//! Causal attention on the GPU, a block of queries at a time, whatever rows the queries belong to.
//!
//! The scores of a block are a product for the card's matrix units. A kernel turns them into
//! probabilities, and the next block overwrites them. The backward pass computes them again from
//! ln Σ e^score (Dao et al. 2022, "FlashAttention").
//!
//! Each query has its own range of keys that it sees. Rows are therefore never padded, and blocks
//! need not end where rows do.

use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::slice;
use burn_cubecl::ops::numeric::zeros;
use burn_cubecl::tensor::CubeTensor;

use super::heads::{SoftmaxBackward, add_rows, heads_first, put_tokens_first, sink_gradients, softmax_backward};
use super::pointwise::scaled;
use super::product::{product, transposed};
use super::reduce::{self, Block, QueryRanges, Scoring};
use super::tensor::{contiguous, empty, reshaped, upload_u32};
use crate::arguments::AttentionShape;
use crate::footprint::{ATTENTION_BLOCK, GPU_QUERIES, GPU_SCORES};
use crate::fused::Fused;
use crate::operations::{CausalAttention, SinkAttention};
use crate::segments::Segment;

/// What the backward pass needs: q [t, h, d], k and v [s, k, d], and the result.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    q: CubeTensor,
    k: CubeTensor,
    v: CubeTensor,
    /// f32 [h], if there are any.
    sinks: Option<CubeTensor>,
    out: CubeTensor,
    /// ln Σ e^score, those of the sinks with them: [h, t].
    log_sums: CubeTensor,
    shape: AttentionShape,
}

/// The keys that each query sees: from `starts` to before `ends`, one entry for each query.
struct Ranges {
    starts: Vec<u32>,
    ends: Vec<u32>,
}

impl Ranges {
    fn of(shape: &AttentionShape, queries: usize) -> Ranges {
        let mut ranges = Ranges { starts: vec![0; queries], ends: vec![0; queries] };
        for &Segment { query_start, queries, key_start, keys } in shape.segments.iter() {
            for query in 0..queries {
                let end = key_start + keys - queries + query + 1;
                let start = shape.window.map_or(key_start, |window| key_start.max(end.saturating_sub(window)));
                (ranges.starts[query_start + query], ranges.ends[query_start + query]) = (start as u32, end as u32);
            }
        }
        ranges
    }

    /// Blocks over all queries, in order.
    fn blocks(&self, heads: usize) -> Vec<Block> {
        let all = self.starts.len();
        let mut blocks = Vec::new();
        let mut first = 0;
        while first < all {
            // As many queries as keep the scores below the limit. The keys that they see decide it.
            let mut queries = GPU_QUERIES.min(all.next_multiple_of(ATTENTION_BLOCK));
            let block = loop {
                let seen = first..(first + queries).min(all);
                let from = self.starts[seen.clone()].iter().copied().min().unwrap_or(0) as usize;
                let to = self.ends[seen].iter().copied().max().unwrap_or(0) as usize;
                let first_key = from / ATTENTION_BLOCK * ATTENTION_BLOCK;
                let keys = to.next_multiple_of(ATTENTION_BLOCK) - first_key;
                if queries == ATTENTION_BLOCK || heads * queries * keys * 4 <= GPU_SCORES {
                    break Block { first, queries, first_key, keys };
                }
                queries = (queries / 2).next_multiple_of(ATTENTION_BLOCK);
            };
            first += block.queries;
            blocks.push(block);
        }
        blocks
    }
}

/// What all blocks of a forward or backward pass share.
struct Pass {
    /// Query heads.
    heads: usize,
    /// Key/value heads.
    key_heads: usize,
    /// The width of a head, d.
    width: usize,
    queries: usize,
    /// Keys, rounded up to a multiple of [`ATTENTION_BLOCK`].
    keys: usize,
    blocks: Arc<Vec<Block>>,
    ranges: QueryRanges,
}

impl Pass {
    fn new(q: &CubeTensor, k: &CubeTensor, shape: &AttentionShape) -> Pass {
        let (q_shape, k_shape) = (q.shape(), k.shape());
        let (heads, key_heads, width) = (q_shape[1], k_shape[1], q_shape[2]);
        assert!(
            width == k_shape[2] && heads.is_multiple_of(key_heads),
            "query heads are a multiple of key/value heads"
        );
        // Key 0 means that there is no window.
        let key = shape.window.unwrap_or(0);
        let queries = q_shape[0];
        let (ranges, blocks) = shape.segments.on_device().get(key, || {
            let ranges = Ranges::of(shape, queries);
            let blocks = Arc::new(ranges.blocks(heads));
            (QueryRanges { starts: upload_u32(q, &ranges.starts), ends: upload_u32(q, &ranges.ends) }, blocks)
        });
        Pass { heads, key_heads, width, queries, keys: k_shape[0].next_multiple_of(ATTENTION_BLOCK), blocks, ranges }
    }

    /// Query heads of each key/value head.
    fn group(&self) -> usize {
        self.heads / self.key_heads
    }

    /// All keys (or values) [s, k, d] as [k, keys, d], with zeros beyond the last.
    fn all_keys(&self, x: &CubeTensor) -> CubeTensor {
        heads_first(x, 0, self.keys)
    }

    /// The keys of a block, out of the result of [`Pass::all_keys`].
    fn keys_of(&self, block: &Block, all: &CubeTensor) -> CubeTensor {
        slice(all.clone(), &[0..self.key_heads, block.first_key..block.first_key + block.keys, 0..self.width])
    }

    /// The queries of a block out of [t, h, d], as [k, group · queries, d]. Heads that share keys
    /// follow each other.
    fn queries_of(&self, block: &Block, x: &CubeTensor) -> CubeTensor {
        let x = heads_first(x, block.first, block.queries);
        reshaped(x, [self.key_heads, self.group() * block.queries, self.width])
    }

    /// f32 scores of a block, not scaled: [k, group · queries, keys].
    fn scores(&self, q: &CubeTensor, k: &CubeTensor) -> CubeTensor {
        contiguous(product(q, &transposed(k), DType::F32))
    }
}

/// The result [t, h, d], with sinks f32 [h] or without.
fn forward([q, k, v]: [CubeTensor; 3], sinks: Option<CubeTensor>, shape: AttentionShape) -> (CubeTensor, Saved) {
    let pass = Pass::new(&q, &k, &shape);
    let dtype = q.dtype;
    let (all_k, all_v) = (pass.all_keys(&k), pass.all_keys(&v));
    let out = empty(&q, q.shape(), dtype);
    let log_sums = empty(&q, [pass.heads, pass.queries], DType::F32);
    for block in pass.blocks.iter() {
        let scores = pass.scores(&pass.queries_of(block, &q), &pass.keys_of(block, &all_k));
        let scoring = scoring(&shape, sinks.as_ref());
        let probabilities = reduce::softmax(&scores, &log_sums, block, &pass.ranges, scoring, dtype);
        let rows = contiguous(product(&probabilities, &pass.keys_of(block, &all_v), dtype));
        put_tokens_first(&rows, &out, block.first, block.queries);
    }
    (out.clone(), Saved { q, k, v, sinks, out, log_sums, shape })
}

fn scoring<'a>(shape: &AttentionShape, sinks: Option<&'a CubeTensor>) -> Scoring<'a> {
    Scoring { scale: shape.scale, softcap: shape.softcap, sinks }
}

/// The gradients of q, k, v and of the sinks, if there are any and theirs is wanted.
fn backward(saved: &Saved, d_out: &CubeTensor, sinks_wanted: bool) -> ([CubeTensor; 3], Option<CubeTensor>) {
    let Saved { q, k, v, sinks, out, log_sums, shape } = saved;
    let pass = Pass::new(q, k, shape);
    let dtype = q.dtype;
    let (all_k, all_v) = (pass.all_keys(k), pass.all_keys(v));
    let deltas = reduce::dot(out, d_out);
    let d_q = empty(q, q.shape(), dtype);
    let sums = || zeros(q.device.clone(), [pass.key_heads, pass.keys, pass.width].into(), DType::F32);
    let (d_k_sums, d_v_sums) = (contiguous(sums()), contiguous(sums()));
    for block in pass.blocks.iter() {
        let (q_rows, d_rows) = (pass.queries_of(block, q), pass.queries_of(block, d_out));
        let (k_rows, v_rows) = (pass.keys_of(block, &all_k), pass.keys_of(block, &all_v));
        let scores = pass.scores(&q_rows, &k_rows);
        let d_probabilities = pass.scores(&d_rows, &v_rows);
        let inputs = SoftmaxBackward {
            scores: &scores,
            d_probabilities: &d_probabilities,
            log_sums,
            deltas: &deltas,
            scoring: scoring(shape, sinks.as_ref()),
            dtype,
        };
        let (probabilities, d_scores) = softmax_backward(inputs, block, &pass.ranges);
        let d_rows_q = contiguous(product(&d_scores, &k_rows, dtype));
        put_tokens_first(&d_rows_q, &d_q, block.first, block.queries);
        add_rows(&contiguous(product(&transposed(&d_scores), &q_rows, DType::F32)), &d_k_sums, block.first_key);
        add_rows(&contiguous(product(&transposed(&probabilities), &d_rows, DType::F32)), &d_v_sums, block.first_key);
    }
    let (d_k, d_v) = (empty(k, k.shape(), dtype), empty(v, v.shape(), dtype));
    put_tokens_first(&d_k_sums, &d_k, 0, pass.keys);
    put_tokens_first(&d_v_sums, &d_v, 0, pass.keys);
    let d_sinks = sinks.as_ref().filter(|_| sinks_wanted).map(|sinks| sink_gradients(sinks, log_sums, &deltas));
    ([d_q, d_k, d_v], d_sinks)
}

impl Fused<CubeBackend, 3> for CausalAttention {
    type Saved = Saved;

    fn forward(self, tensors: [CubeTensor; 3], _: [bool; 3]) -> (CubeTensor, Saved) {
        forward(tensors, None, self.shape)
    }

    fn backward(saved: Saved, d_out: CubeTensor, _: [bool; 3]) -> [Option<CubeTensor>; 3] {
        backward(&saved, &d_out, false).0.map(Some)
    }
}

impl Fused<CubeBackend, 4> for SinkAttention {
    type Saved = Saved;

    fn forward(self, [q, k, v, sinks]: [CubeTensor; 4], _: [bool; 4]) -> (CubeTensor, Saved) {
        forward([q, k, v], Some(scaled(&sinks, DType::F32, 1.0)), self.shape)
    }

    fn backward(saved: Saved, d_out: CubeTensor, [.., sinks_wanted]: [bool; 4]) -> [Option<CubeTensor>; 4] {
        let ([d_q, d_k, d_v], d_sinks) = backward(&saved, &d_out, sinks_wanted);
        [Some(d_q), Some(d_k), Some(d_v), d_sinks]
    }
}
