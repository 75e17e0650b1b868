//! Attention over compressed keys and values (DeepSeek-AI 2024, "DeepSeek-V2"), and what its backward pass
//! keeps.
//!
//! Keys and values of all heads are made from the short vectors, in training and in generation alike: what
//! a cache holds are keys and values.
//!
//! Shape letters: `t` tokens, `h` heads, `p` elements of a head's queries and keys that do not turn, `r` those
//! that do, `y` elements of a head's values.

use burn::tensor::Tensor;
use finetune_kernels::{AttentionShape, attention};

use crate::config::LatentConfig;
use crate::decoder::adapted::Adapted;
use crate::decoder::attention::{AttentionWidths, turn};
use crate::decoder::cache::LayerCache;
use crate::decoder::pass::{Context, linear, norm};
use crate::tree::{LatentAttention, LatentQueries};

/// x [t, hidden] -> [t, hidden]. With a cache, its keys and values come before those of x.
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
    let shared = turn(shared, latent.rope, true, context).expand([tokens, heads, turned]);
    let made = linear(&latent.up, norm(&latent.norm, short.narrow(1, 0, rank), context), context);
    let made = made.reshape([tokens, heads, plain + value]);
    let k_thd = Tensor::cat(vec![made.clone().narrow(2, 0, plain), shared], 2);
    let v_thy = made.narrow(2, plain, value);
    let (k_shd, v_shy) = match cache {
        Some(cache) => cache.extend(k_thd, v_thy),
        None => (k_thd, v_thy),
    };
    let shape = AttentionShape {
        segments: context.segments.clone(),
        scale: latent.scale,
        window: latent.window,
        softcap: None,
    };
    let out = attention(q_thd, k_shd, v_shy, None, shape);
    linear(&latent.o, out.reshape([tokens, heads * value]), context)
}

impl LatentAttention {
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
