//! Attention over compressed keys and values (DeepSeek-AI 2024, "DeepSeek-V2"), and what its backward pass
//! keeps.
//!
//! A cache holds the short vectors of tokens, behind their norm, and the elements of their keys that turn:
//! nothing of single heads. Two ways lead from there to a result:
//!
//! - **expanded**: keys and values of all heads are made of the short vectors. Training, evaluation and
//!   prompts do so.
//! - **absorbed**: q · (W c) is (q W) · c, so each head's query is multiplied by its rows of W, and attention
//!   reads the short vectors c themselves, one head of keys for all query heads. What it makes of them is
//!   multiplied by the rows of W that make values. Next tokens are read so.
//!
//! Both are the same but for the rounding of f32. Which one is taken depends on the tokens that a row reads
//! and on those before them, never on other rows: see [`LatentAttention::absorbs`].
//!
//! Shape letters: `t` tokens, `s` those and the cached ones before them, `h` heads, `c` elements of a short
//! vector, `p` elements of a head's queries and keys that do not turn, `r` those that do, `y` elements of a
//! head's values.

#[cfg(test)]
mod tests;

use std::ops::Range;

use burn::tensor::Tensor;
use finetune_kernels::weight::packed_rows;
use finetune_kernels::{AttentionShape, HeadRows, Segment, Weight, attention, by_head, operations};

use crate::branch::{Dora, LoraBranch};
use crate::config::LatentConfig;
use crate::decoder::adapted::Adapted;
use crate::decoder::attention::{AttentionWidths, turn};
use crate::decoder::cache::LayerCache;
use crate::decoder::pass::{Context, linear, norm};
use crate::tree::{LatentAttention, LatentQueries, Linear};

/// Bytes of keys and values that are made at a time for a prompt behind cached tokens.
const EXPANDED_BYTES: usize = 64 << 20;

/// x [t, hidden] -> [t, hidden]. With a cache, what it holds comes before x.
pub(crate) fn forward(
    latent: &LatentAttention,
    x: Tensor<2>,
    context: &Context,
    cache: Option<&mut LayerCache>,
) -> Tensor<2> {
    let LatentConfig { rank, plain, turned, value, .. } = latent.sizes;
    let (tokens, heads) = (x.dims()[0], latent.heads);
    let q_tq = match &latent.queries {
        LatentQueries::Direct(q) => linear(q, x.clone(), context),
        LatentQueries::Compressed { down, norm: of_queries, up } => {
            linear(up, norm(of_queries, linear(down, x.clone(), context), context), context)
        }
    };
    let q_thd = q_tq.reshape([tokens, heads, plain + turned]);
    let turned_q = turn(q_thd.clone().narrow(2, plain, turned), latent.rope, true, context);
    let q_thd = Tensor::cat(vec![q_thd.narrow(2, 0, plain), turned_q], 2);
    let short = linear(&latent.down, x, context);
    // These elements of the keys are the same for all heads.
    let shared = short.clone().narrow(1, rank, turned).reshape([tokens, 1, turned]);
    let shared_tr = turn(shared, latent.rope, true, context).reshape([tokens, turned]);
    let new = [norm(&latent.norm, short.narrow(1, 0, rank), context), shared_tr];
    let out = match cache {
        None => expanded(latent, 0..heads, q_thd, new, context),
        Some(cache) => {
            let all = Tensor::cat(new.to_vec(), 1).reshape([tokens, 1, rank + turned]);
            let all = cache.extend_shared(all);
            behind(latent, q_thd, new, all, context)
        }
    };
    linear(&latent.o, out.reshape([tokens, heads * value]), context)
}

/// Attention of q [t, h, p + r] with a cache, `all` [.., 1, c + r], that ends with these tokens: `new` holds
/// what it has of them, [t, c] and [t, r]. -> [t, h, y]
fn behind(
    latent: &LatentAttention,
    q_thd: Tensor<3>,
    new: [Tensor<2>; 2],
    all: Tensor<3>,
    context: &Context,
) -> Tensor<3> {
    let LatentConfig { rank, turned, .. } = latent.sizes;
    let (tokens, heads) = (q_thd.dims()[0], latent.heads);
    if context.segments.iter().all(|row| latent.absorbs(row)) {
        return absorbed(latent, q_thd, all, context);
    }
    // Only single rows read more than one token.
    let keys = context.segments.iter().map(|row| row.keys).sum();
    if keys == tokens {
        return expanded(latent, 0..heads, q_thd, new, context);
    }
    let all = all.narrow(0, 0, keys).reshape([keys, rank + turned]);
    let kept = [all.clone().narrow(1, 0, rank), all.narrow(1, rank, turned)];
    let together = (EXPANDED_BYTES / (keys * latent.expanded_elements() * context.compute.bytes())).clamp(1, heads);
    let parts = (0..heads).step_by(together).map(|first| {
        let some = first..heads.min(first + together);
        let q = q_thd.clone().narrow(1, first, some.len());
        expanded(latent, some, q, kept.clone(), context)
    });
    Tensor::cat(parts.collect(), 1)
}

/// Attention of some heads' queries [t, h, p + r], with keys and values made of short vectors [s, c] and
/// what turns of the keys [s, r] -> [t, h, y].
fn expanded(
    latent: &LatentAttention,
    some: Range<usize>,
    q_thd: Tensor<3>,
    [short_sc, shared_sr]: [Tensor<2>; 2],
    context: &Context,
) -> Tensor<3> {
    let LatentConfig { plain, turned, value, .. } = latent.sizes;
    let (keys, heads) = (short_sc.dims()[0], some.len());
    let shared = shared_sr.reshape([keys, 1, turned]).expand([keys, heads, turned]);
    let made = match heads == latent.heads {
        true => linear(&latent.up, short_sc, context),
        false => rows(&latent.up, some.start * (plain + value)..some.end * (plain + value), short_sc, context),
    };
    let made = made.reshape([keys, heads, plain + value]);
    let k_shd = Tensor::cat(vec![made.clone().narrow(2, 0, plain), shared], 2);
    attention(q_thd, k_shd, made.narrow(2, plain, value), None, latent.shape(context))
}

/// As [`expanded`], of all heads over short vectors in a cache [.., 1, c + r], without keys and values being
/// made.
fn absorbed(latent: &LatentAttention, q_thd: Tensor<3>, all: Tensor<3>, context: &Context) -> Tensor<3> {
    let LatentConfig { rank, plain, turned, value, .. } = latent.sizes;
    let step = plain + value;
    let q_thp = q_thd.clone().narrow(2, 0, plain);
    let q_thc = by_keys(&latent.up, q_thp, HeadRows { first: 0, step, count: plain }, context);
    let q = Tensor::cat(vec![q_thc, q_thd.narrow(2, plain, turned)], 2);
    // What turns is summed with the rest, and left out: so the cache is read where it lies.
    let mixed = attention(q, all.clone(), all, None, latent.shape(context)).narrow(2, 0, rank);
    by_values(&latent.up, mixed, HeadRows { first: plain, step, count: value }, context)
}

/// q [t, h, p] times the rows of each head that make keys of short vectors, the branch with them
/// -> [t, h, c].
fn by_keys(up: &Linear, q: Tensor<3>, rows: HeadRows, context: &Context) -> Tensor<3> {
    let weight = context.weight(&up.weight);
    // What the branch adds.
    let low = |branch: &LoraBranch, q: Tensor<3>| {
        let [a, b] = [&branch.a, &branch.b].map(|half| context.weight(half));
        let of_rank = HeadRows { first: 0, step: 0, count: branch.a.shape[0] };
        by_head::times(by_head::times(q, b, rows), a, of_rank) * branch.scale
    };
    if let Some(branches) = &context.branches {
        return branches.added(up.index, by_head::times(q.clone(), weight, rows), &q, low);
    }
    let Some(branch) = &up.lora else { return by_head::times(q, weight, rows) };
    let q = match &branch.dora {
        Some(dora) => magnified(dora, q, rows, context),
        None => q,
    };
    by_head::times(q.clone(), weight, rows) + low(branch, q)
}

/// x [t, h, c] times the transposed rows of each head that make values of short vectors, the branch with
/// them -> [t, h, y].
fn by_values(up: &Linear, x: Tensor<3>, rows: HeadRows, context: &Context) -> Tensor<3> {
    let weight = context.weight(&up.weight);
    // What the branch adds.
    let low = |branch: &LoraBranch, x: Tensor<3>| {
        let [a, b] = [&branch.a, &branch.b].map(|half| context.weight(half));
        let of_rank = HeadRows { first: 0, step: 0, count: branch.a.shape[0] };
        by_head::times_transposed(by_head::times_transposed(x, a, of_rank), b, rows) * branch.scale
    };
    if let Some(branches) = &context.branches {
        return branches.added(up.index, by_head::times_transposed(x.clone(), weight, rows), &x, low);
    }
    let Some(branch) = &up.lora else { return by_head::times_transposed(x, weight, rows) };
    let y = by_head::times_transposed(x.clone(), weight, rows) + low(branch, x);
    match &branch.dora {
        Some(dora) => magnified(dora, y, rows, context),
        None => y,
    }
}

/// z [t, h, n] times m / n of the rows of each head.
fn magnified(dora: &Dora, z: Tensor<3>, rows: HeadRows, context: &Context) -> Tensor<3> {
    let [tokens, heads, count] = z.dims();
    let of_rows =
        |all: Tensor<1>| all.reshape([heads, rows.step]).narrow(1, rows.first, count).reshape([heads * count]);
    let (m, n) = (of_rows(context.parameter(dora.magnitude.values())), of_rows(dora.norms.clone()));
    operations::magnitude(z.reshape([tokens, heads * count]), m, n).reshape([tokens, heads, count])
}

/// Some outputs of a linear layer without a bias, in generation: x [s, i] -> [s, n].
fn rows(layer: &Linear, some: Range<usize>, x: Tensor<2>, context: &Context) -> Tensor<2> {
    let (first, count) = (some.start, some.len());
    let w = match context.weight(&layer.weight) {
        Weight::Dense(w) => w.narrow(0, first, count),
        Weight::Packed(w) => {
            let like = Tensor::<1>::zeros([1], (&x.device(), x.dtype()));
            packed_rows(like, w, some.map(|row| row as u32).collect())
        }
    };
    let Some(branch) = &layer.lora else { return operations::linear(x, w) };
    let (a, b) = (context.parameter(branch.a.dense()), context.parameter(branch.b.dense()).narrow(0, first, count));
    let y = operations::lora_linear(x, w, a, b, branch.scale, None);
    let Some(dora) = &branch.dora else { return y };
    let (m, n) = (context.parameter(dora.magnitude.values()), dora.norms.clone());
    operations::magnitude(y, m.narrow(0, first, count), n.narrow(0, first, count))
}

impl LatentAttention {
    fn shape(&self, context: &Context) -> AttentionShape {
        AttentionShape { segments: context.segments.clone(), scale: self.scale, window: self.window, softcap: None }
    }

    /// Whether a row with a cache is read without keys and values of single heads being made.
    ///
    /// A next token is. Several at once are, if making keys and values of all cached tokens again would
    /// take more multiplications than the longer sums of their scores and results do. A beginning is not:
    /// it makes no more of them than it reads.
    fn absorbs(&self, row: &Segment) -> bool {
        let LatentConfig { rank, plain, turned, value, .. } = self.sizes;
        let cached = row.keys - row.queries;
        // Of each head.
        let again = cached * (plain + value) * rank;
        let longer = row.queries * row.keys * (2 * rank + turned).saturating_sub(plain + value);
        row.queries == 1 || cached > 0 && longer <= again
    }

    /// Elements of a token's keys and values for one head.
    fn expanded_elements(&self) -> usize {
        let LatentConfig { plain, turned, value, .. } = self.sizes;
        plain + turned + value
    }

    /// The widths of this attention.
    pub(crate) fn widths(&self) -> AttentionWidths {
        let LatentConfig { plain, turned, .. } = self.sizes;
        let all = (self.heads * (plain + turned)) as u64;
        AttentionWidths { heads: self.heads as u64, query: all, key: all }
    }

    /// Elements that the backward pass keeps of each token: queries, keys, values and the output of
    /// attention; the short vectors before and behind their norms; the inputs of trained layers. (The
    /// input of o is the output of attention.)
    pub(crate) fn kept(&self, adapted: &Adapted<'_>) -> u64 {
        let LatentConfig { query_rank, rank, plain, turned, value } = self.sizes;
        let of_heads = self.heads as u64 * (2 * (plain + turned) + 2 * value) as u64;
        let of_short = 2 * (rank + query_rank.unwrap_or(0)) as u64;
        let input = match &self.queries {
            LatentQueries::Direct(q) => adapted.input_of(&[q, &self.down]),
            LatentQueries::Compressed { down, .. } => adapted.input_of(&[down, &self.down]),
        };
        of_heads + of_short + input
    }

    /// f32 numbers that the backward pass keeps of each token: the sum of exponentials of each head, and
    /// what the two norms keep.
    pub(crate) fn statistics(&self) -> u64 {
        self.heads as u64 + 2
    }
}
