//! Grouped-query attention, and what its backward pass keeps.
//!
//! Shape letters: `t` tokens of all rows one after the other, `s` those and the cached ones before
//! them, `h` query heads, `k` key/value heads, `d` head dimension.

use burn::tensor::{Tensor, activation};
use finetune_kernels::{AttentionShape, attention, operations};

use crate::decoder::adapted::Adapted;
use crate::decoder::between::Between;
use crate::decoder::cache::LayerCache;
use crate::decoder::pass::{Context, bare_norm, linear, norm};
use crate::tree::{Attention, Norm, Projections};

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

impl AttentionWidths {
    /// Of a mixer without keys that later tokens look at.
    pub(crate) const NONE: AttentionWidths = AttentionWidths { heads: 0, query: 0, key: 0 };
}

/// x [t, hidden] -> [t, hidden]. With a cache, its keys and values come before those of x.
///
/// `between`: where it takes keys and values of an earlier layer from, and leaves its own for later ones.
pub(crate) fn forward(
    module: &Attention,
    n: usize,
    x: Tensor<2>,
    context: &Context,
    cache: Option<&mut LayerCache>,
    between: &mut Between,
) -> Tensor<2> {
    let Attention { heads, key_value_heads, head_dim, .. } = *module;
    let tokens = x.dims()[0];
    // Norms are of a head, or of all heads together.
    let normed = |x: Tensor<2>, gamma: &Option<Norm>, heads: usize| match gamma {
        Some(gamma) if gamma.gamma.length == head_dim => norm(gamma, x.reshape([tokens, heads, head_dim]), context),
        Some(gamma) => norm(gamma, x, context).reshape([tokens, heads, head_dim]),
        None => {
            let x = x.reshape([tokens, heads, head_dim]);
            match module.bare_norm {
                Some(eps) => bare_norm(x, eps),
                None => x,
            }
        }
    };
    let made_gate = module.gate.as_ref().map(|gate| linear(gate, x.clone(), context));
    let (q_tq, own) = projected(module, x, context);
    let (q_tq, gate_tq) = queries(module, q_tq);
    let gate_tq = gate_tq.or(made_gate);
    let q_thd = turn(normed(q_tq, &module.q_norm, heads), module.query_rope, module.rope_pairs, context);
    let [k_skd, v_skd] = match own {
        Err(source) => between.keys_and_values(source),
        Ok([k_tk, v_tk]) => {
            let k_tkd = normed(k_tk, &module.k_norm, key_value_heads);
            let v_tkd = v_tk.reshape([tokens, key_value_heads, head_dim]);
            let v_tkd = match module.value_norm {
                Some(eps) => bare_norm(v_tkd, eps),
                None => v_tkd,
            };
            let k_tkd = turn(k_tkd, module.rope, module.rope_pairs, context);
            let both = match cache {
                Some(cache) => cache.extend(k_tkd, v_tkd).into(),
                None => [k_tkd, v_tkd],
            };
            between.leave(n, &both);
            both
        }
    };
    let shape = AttentionShape {
        segments: context.segments_of(module.window),
        scale: module.scale,
        window: module.window,
        softcap: module.softcap,
    };
    let sinks = module.sinks.as_ref().map(|sinks| context.parameter(sinks.values()));
    let out_thd = attention(q_thd, k_skd, v_skd, sinks, shape);
    let out_tq = out_thd.reshape([tokens, heads * head_dim]);
    let out_tq = match gate_tq {
        Some(gate) => out_tq * activation::sigmoid(gate),
        None => out_tq,
    };
    linear(&module.o, out_tq, context)
}

/// Queries [t, h · d] of x, and keys and values [t, k · d], all before norms and positions; or the layer
/// whose keys and values are taken.
fn projected(module: &Attention, x: Tensor<2>, context: &Context) -> (Tensor<2>, Result<[Tensor<2>; 2], usize>) {
    let Attention { heads, key_value_heads, head_dim, .. } = *module;
    match &module.projections {
        Projections::Apart { q, k, v } => {
            let queries = linear(q, x.clone(), context);
            let keys = linear(k, x.clone(), context);
            let values = match v {
                Some(v) => linear(v, x, context),
                None => keys.clone(),
            };
            (queries, Ok([keys, values]))
        }
        Projections::Queries { q, source } => (linear(q, x, context), Err(*source)),
        Projections::Fused(qkv) => {
            let (query, key) = (heads * head_dim, key_value_heads * head_dim);
            let made = linear(qkv, x, context);
            let part = |first, width| made.clone().narrow(1, first, width);
            (part(0, query), Ok([part(query, key), part(query + key, key)]))
        }
    }
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
/// `in_pairs`: neighbours turn together. They come out one half behind the other, in queries and keys alike.
pub(crate) fn turn(x: Tensor<3>, rope: Option<usize>, in_pairs: bool, context: &Context) -> Tensor<3> {
    let Some(rope) = rope else { return x };
    let table = context.ropes[rope].clone();
    let (width, [tokens, heads, head_dim]) = (table.width(), x.dims());
    let turned = x.clone().narrow(2, 0, width);
    let turned = match in_pairs {
        true => turned.reshape([tokens, heads, width / 2, 2]).swap_dims(2, 3).reshape([tokens, heads, width]),
        false => turned,
    };
    let turned = operations::rope(turned, table);
    match head_dim - width {
        0 => turned,
        rest => Tensor::cat(vec![turned, x.narrow(2, width, rest)], 2),
    }
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
        let has_norm = |norm: &Option<Norm>| norm.is_some() || self.bare_norm.is_some();
        let of_norms: u64 = of_norms.iter().filter(|(norm, _)| has_norm(norm)).map(|(_, width)| width).sum();
        let mut readers = match &self.projections {
            Projections::Apart { q, k, v: Some(v) } => vec![q, k, v],
            Projections::Apart { q, k, v: None } => vec![q, k],
            Projections::Queries { q, .. } => vec![q],
            Projections::Fused(qkv) => vec![qkv],
        };
        readers.extend(&self.gate);
        let input = adapted.input_of(&readers);
        let of_gate = if self.is_gated || self.gate.is_some() { 2 * query } else { 0 };
        2 * query + 2 * key + of_norms + of_gate + input
    }

    /// f32 numbers that the backward pass keeps of each token: the sum of exponentials of each
    /// head.
    pub(crate) fn statistics(&self) -> u64 {
        self.heads as u64
    }
}
