//! Grouped-query attention, and what its backward pass keeps.
//!
//! Shape letters: `t` tokens of all rows one after the other, `s` those and the cached ones before
//! them, `h` query heads, `k` key/value heads, `d` head dimension.

use burn::tensor::{Tensor, activation};
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
    let (q_tq, gate_tq) = queries(attention, linear(&attention.q, x.clone(), context));
    let q_thd = normed(q_tq, &attention.q_norm, heads);
    let k_tkd = normed(linear(&attention.k, x.clone(), context), &attention.k_norm, key_value_heads);
    let v_tkd = linear(&attention.v, x, context).reshape([tokens, key_value_heads, head_dim]);
    let (q_thd, k_tkd) = (turn(q_thd, attention.query_rope, context), turn(k_tkd, attention.rope, context));
    let (k_skd, v_skd) = match cache {
        Some(cache) => cache.extend(k_tkd, v_tkd),
        None => (k_tkd, v_tkd),
    };
    let shape = AttentionShape { segments: context.segments.clone(), scale: attention.scale, window: attention.window };
    let out_thd = operations::causal_attention(q_thd, k_skd, v_skd, shape);
    let out_tq = out_thd.reshape([tokens, heads * head_dim]);
    let out_tq = match gate_tq {
        Some(gate) => out_tq * activation::sigmoid(gate),
        None => out_tq,
    };
    linear(&attention.o, out_tq, context)
}

/// Queries [t, h · d] and the gate of the output, which has the same shape, of what the query projection
/// makes.
fn queries(attention: &Attention, made: Tensor<2>) -> (Tensor<2>, Option<Tensor<2>>) {
    if !attention.is_gated {
        return (made, None);
    }
    let Attention { heads, head_dim, .. } = *attention;
    let tokens = made.dims()[0];
    let both = made.reshape([tokens, heads, 2 * head_dim]);
    let half = |first| both.clone().narrow(2, first, head_dim).reshape([tokens, heads * head_dim]);
    (half(0), Some(half(head_dim)))
}

/// x [t, heads, d] with the first elements of each head turned by a rotary embedding, if there is one.
fn turn(x: Tensor<3>, rope: Option<usize>, context: &Context) -> Tensor<3> {
    let Some(rope) = rope else { return x };
    let table = context.ropes[rope].clone();
    let (width, head_dim) = (table.width(), x.dims()[2]);
    if width == head_dim {
        return operations::rope(x, table);
    }
    let turned = operations::rope(x.clone().narrow(2, 0, width), table);
    Tensor::cat(vec![turned, x.narrow(2, width, head_dim - width)], 2)
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
        let of_gate = if self.is_gated { 2 * query } else { 0 };
        2 * query + 2 * key + of_norms + of_gate + input
    }

    /// f32 numbers that the backward pass keeps of each token: the sum of exponentials of each
    /// head.
    pub(crate) fn statistics(&self) -> u64 {
        self.heads as u64
    }
}
