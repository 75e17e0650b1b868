//! Grouped-query attention, and what its backward pass keeps.
//!
//! Shape letters: `t` tokens of all rows one after the other, `s` those and the cached ones before
//! them, `h` query heads, `k` key/value heads, `d` head dimension.

use burn::tensor::Tensor;
use finetune_kernels::{AttentionShape, operations};

use crate::decoder::adapted::Adapted;
use crate::decoder::cache::LayerCache;
use crate::decoder::pass::{Context, linear, norm};
use crate::tree::{Attention, Norm};

/// Widths of attention, in elements of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionWidths {
    /// Query heads.
    pub heads: u64,
    /// Elements of all query heads.
    pub query: u64,
    /// Elements of all key heads, and of all value heads.
    pub key: u64,
}

/// x [t, hidden] -> [t, hidden]. With a cache, its keys and values come before those of x.
pub(crate) fn forward(
    attention: &Attention,
    x: Tensor<2>,
    context: &Context,
    cache: Option<&mut LayerCache>,
) -> Tensor<2> {
    let Attention { heads, key_value_heads, head_dim, .. } = *attention;
    let tokens = x.dims()[0];
    // Norms are of a head, or of all heads together.
    let normed = |x: Tensor<2>, gamma: &Option<Norm>, heads: usize| match gamma {
        Some(gamma) if gamma.gamma.length == head_dim => norm(gamma, x.reshape([tokens, heads, head_dim]), context),
        Some(gamma) => norm(gamma, x, context).reshape([tokens, heads, head_dim]),
        None => x.reshape([tokens, heads, head_dim]),
    };
    let turn = |x: Tensor<3>, rope: Option<usize>| match rope {
        Some(rope) => operations::rope(x, context.ropes[rope].clone()),
        None => x,
    };
    let q_thd = normed(linear(&attention.q, x.clone(), context), &attention.q_norm, heads);
    let k_tkd = normed(linear(&attention.k, x.clone(), context), &attention.k_norm, key_value_heads);
    let v_tkd = linear(&attention.v, x, context).reshape([tokens, key_value_heads, head_dim]);
    let (q_thd, k_tkd) = (turn(q_thd, attention.query_rope), turn(k_tkd, attention.rope));
    let (k_skd, v_skd) = match cache {
        Some(cache) => cache.extend(k_tkd, v_tkd),
        None => (k_tkd, v_tkd),
    };
    let shape = AttentionShape { segments: context.segments.clone(), scale: attention.scale, window: attention.window };
    let out_thd = operations::causal_attention(q_thd, k_skd, v_skd, shape);
    linear(&attention.o, out_thd.reshape([tokens, heads * head_dim]), context)
}

impl Attention {
    /// The widths of this attention.
    pub(crate) fn widths(&self) -> AttentionWidths {
        AttentionWidths {
            heads: self.heads as u64,
            query: (self.heads * self.head_dim) as u64,
            key: (self.key_value_heads * self.head_dim) as u64,
        }
    }

    /// Elements that the backward pass keeps of each token: queries and keys as they are scored,
    /// values, and the output of attention. On top of that, the input of the heads' norms, and the
    /// input of q, k and v if one of them is trained. (The input of o is the output of attention.)
    pub(crate) fn kept(&self, adapted: &Adapted<'_>) -> u64 {
        let AttentionWidths { query, key, .. } = self.widths();
        let of_norms = [(&self.q_norm, query), (&self.k_norm, key)];
        let of_norms: u64 = of_norms.iter().filter(|(norm, _)| norm.is_some()).map(|(_, width)| width).sum();
        let input = adapted.input_of(&[&self.q, &self.k, &self.v]);
        2 * query + 2 * key + of_norms + input
    }

    /// f32 numbers that the backward pass keeps of each token: the sum of exponentials of each
    /// head.
    pub(crate) fn statistics(&self) -> u64 {
        self.heads as u64
    }
}
