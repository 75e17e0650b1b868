//! Mixers of tokens as the model calls them.

use burn::tensor::Tensor;

use crate::arguments::AttentionShape;
use crate::devices::is_cpu;
use crate::operations;

/// Causal attention inside each segment: q [t, h, d], k [s, k, d], v [s, k, y], perhaps sinks [h] ->
/// [t, h, y]. See [`operations::causal_attention`] and [`operations::sink_attention`].
///
/// # Panics
/// If h is no multiple of k.
pub fn attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    sinks: Option<Tensor<1>>,
    shape: AttentionShape,
) -> Tensor<3> {
    let fused = |q, k, v| match sinks {
        None => operations::causal_attention(q, k, v, shape),
        Some(sinks) => operations::sink_attention(q, k, v, sinks, shape),
    };
    let ([tokens, heads, width], [keys, key_heads, value_width]) = (q.dims(), v.dims());
    if is_cpu(&q.device()) || value_width == width {
        return fused(q, k, v);
    }
    // The kernels of GPUs have one width of a head: the narrower of the two is filled up with zeros.
    let wide = width.max(value_width);
    let fill = |x: Tensor<3>, rows: usize, heads: usize, width: usize| {
        if width == wide {
            return x;
        }
        let zeros = Tensor::zeros([rows, heads, wide - width], (&x.device(), x.dtype()));
        Tensor::cat(vec![x, zeros], 2)
    };
    let (q, k) = (fill(q, tokens, heads, width), fill(k, keys, key_heads, width));
    fused(q, k, fill(v, keys, key_heads, value_width)).narrow(2, 0, value_width)
}
