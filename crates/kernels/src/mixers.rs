//! Mixers of tokens as the model calls them: the fused operation where the device has one for what is
//! asked, the composed one otherwise.

use std::sync::Arc;

use burn::tensor::{DType, Tensor};

use crate::arguments::AttentionShape;
use crate::devices::is_cpu;
use crate::{composed, operations};

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
    if is_cpu(&q.device()) {
        return match sinks {
            None => operations::causal_attention(q, k, v, shape),
            Some(sinks) => operations::sink_attention(q, k, v, sinks, shape),
        };
    }
    if sinks.is_some() || shape.softcap.is_some() {
        // With a matrix of all scores of a row, in f32.
        let dtype = q.dtype();
        let [q, k, v] = [q, k, v].map(|x| x.cast(DType::F32));
        let out = match sinks {
            None => composed::causal_attention(q, k, v, &shape),
            Some(sinks) => composed::sink_attention(q, k, v, sinks, &shape),
        };
        return out.cast(dtype);
    }
    let ([tokens, heads, width], [keys, key_heads, value_width]) = (q.dims(), v.dims());
    if value_width == width {
        return operations::causal_attention(q, k, v, shape);
    }
    // The kernels have one width of a head: the narrower of the two is filled up with zeros.
    let wide = width.max(value_width);
    let fill = |x: Tensor<3>, rows: usize, heads: usize, width: usize| {
        if width == wide {
            return x;
        }
        let zeros = Tensor::zeros([rows, heads, wide - width], (&x.device(), x.dtype()));
        Tensor::cat(vec![x, zeros], 2)
    };
    let (q, k) = (fill(q, tokens, heads, width), fill(k, keys, key_heads, width));
    let out = operations::causal_attention(q, k, fill(v, keys, key_heads, value_width), shape);
    out.narrow(2, 0, value_width)
}

/// A causal convolution of each channel over the tokens of each row: u [t, c], w [c, k], past
/// [m · (k - 1), c] -> [t, c]. See [`operations::short_convolution`].
pub fn short_convolution(u: Tensor<2>, w: Tensor<2>, past: Tensor<2>, rows: Arc<[usize]>) -> Tensor<2> {
    if is_cpu(&u.device()) {
        return operations::short_convolution(u, w, past, rows, false);
    }
    let dtype = u.dtype();
    composed::short_convolution(u.cast(DType::F32), w, past.cast(DType::F32), &rows, false).cast(dtype)
}
