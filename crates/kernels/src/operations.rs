//! What the model calls: the operations of this crate, on whichever device their tensors are.
//!
//! Activations (x, h, q, k, v, y and their gradients) have the number type that a run computes in. A frozen weight may be
//! held in another one, 16 bits wide: it is converted where it is multiplied. Trained parameters, norms and biases are f32.

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use crate::arguments::{AttentionShape, Dropout, RopeTable, Targets};
use crate::extension::Kernels;

/// `x Wᵀ`: x [t, i], w [o, i] -> [t, o]. A `w` that does not require gradients costs none, and x is not kept for it.
pub fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as Kernels>::linear(x.into_dispatch(), w.into_dispatch()))
}

/// `x Wᵀ + scale · drop(x) Aᵀ Bᵀ` (Hu et al. 2021): x [t, i], w [o, i] frozen, a [r, i], b [o, r] -> [t, o].
pub fn lora_linear(
    x: Tensor<2>,
    w: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f32,
    dropout: Option<Dropout>,
) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as Kernels>::lora_linear(
        x.into_dispatch(),
        w.into_dispatch(),
        a.into_dispatch(),
        b.into_dispatch(),
        scale,
        dropout,
    ))
}

/// `gamma · x / sqrt(mean(x²) + eps)` over the last dimension: x [.., d], gamma [d].
pub fn rms_norm<const D: usize>(x: Tensor<D>, gamma: Tensor<1>, eps: f64) -> Tensor<D> {
    Tensor::from_dispatch(<Dispatch as Kernels>::rms_norm(x.into_dispatch(), gamma.into_dispatch(), eps))
}

/// Rotary position embedding, Hugging Face's layout: x [t, heads, d], a table of t tokens.
pub fn rope(x: Tensor<3>, table: RopeTable) -> Tensor<3> {
    Tensor::from_dispatch(<Dispatch as Kernels>::rope(x.into_dispatch(), table))
}

/// Causal attention inside each segment: q [t, h, d], k and v [s, k, d] with k dividing h -> [t, h, d].
pub fn causal_attention(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, shape: AttentionShape) -> Tensor<3> {
    Tensor::from_dispatch(<Dispatch as Kernels>::causal_attention(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        shape,
    ))
}

/// `silu(gate) · up`, both [t, f].
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as Kernels>::swiglu(gate.into_dispatch(), up.into_dispatch()))
}

/// `-ln softmax(h[position_n] Wᵀ)[target_n]` for each target: h [t, i], w [v, i] -> [n]. n may not be zero.
pub fn linear_cross_entropy(h: Tensor<2>, w: Tensor<2>, targets: Targets) -> Tensor<1> {
    assert!(!targets.is_empty(), "a micro-batch without trained tokens has no loss to differentiate");
    Tensor::from_dispatch(<Dispatch as Kernels>::linear_cross_entropy(h.into_dispatch(), w.into_dispatch(), targets))
}

/// `a + b` of one shape and number type: the residual connection.
pub fn residual(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as Kernels>::residual(a.into_dispatch(), b.into_dispatch()))
}

/// y [t, o] plus bias [o].
pub fn bias(y: Tensor<2>, bias: Tensor<1>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as Kernels>::bias(y.into_dispatch(), bias.into_dispatch()))
}

/// A zero that y's gradient `d_y` flows back from: `gradient_seed(y, d_y).backward()` goes on with a backward pass that
/// was taken apart at y.
pub fn gradient_seed(y: Tensor<2>, d_y: Tensor<2>) -> Tensor<1> {
    Tensor::from_dispatch(<Dispatch as Kernels>::gradient_seed(y.into_dispatch(), d_y.into_dispatch()))
}
