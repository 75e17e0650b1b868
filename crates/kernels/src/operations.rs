//! What the model calls. On the CPU backend these are the fused operations of this crate; on any other
//! backend the same maths composed of the backend's own operations ([`crate::composed`]).

use burn::backend::{Dispatch, DispatchDevice};
use burn::tensor::{Device, Tensor};

use crate::attention::AttentionShape;
use crate::composed;
use crate::cross_entropy::Targets;
use crate::extension::Kernels;
use crate::linear::Dropout;
use crate::rope::RopeTable;

/// Whether tensors of this device are worked on by the CPU kernels of this crate.
pub fn is_cpu(device: &Device) -> bool {
    matches!(device.clone().without_autodiff().as_dispatch(), DispatchDevice::Flex(_))
}

/// `x Wᵀ`: x [t, i], w [o, i] -> [t, o]. A `w` that does not require gradients costs none, and x is not kept for it.
pub fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    if !is_cpu(&x.device()) {
        return composed::linear(x, w);
    }
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
    if !is_cpu(&x.device()) {
        return composed::lora_linear(x, w, a, b, scale, dropout);
    }
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
    if !is_cpu(&x.device()) {
        return composed::rms_norm(x, gamma, eps);
    }
    Tensor::from_dispatch(<Dispatch as Kernels>::rms_norm(x.into_dispatch(), gamma.into_dispatch(), eps))
}

/// Rotary position embedding, Hugging Face's layout: x [t, heads, d], a table of t tokens.
pub fn rope(x: Tensor<3>, table: RopeTable) -> Tensor<3> {
    if !is_cpu(&x.device()) {
        return composed::rope(x, &table);
    }
    Tensor::from_dispatch(<Dispatch as Kernels>::rope(x.into_dispatch(), table))
}

/// Causal attention inside each segment: q [t, h, d], k and v [s, k, d] with k dividing h -> [t, h, d].
pub fn causal_attention(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, shape: AttentionShape) -> Tensor<3> {
    if !is_cpu(&q.device()) {
        return composed::causal_attention(q, k, v, &shape);
    }
    Tensor::from_dispatch(<Dispatch as Kernels>::causal_attention(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        shape,
    ))
}

/// `silu(gate) · up`, both [t, f].
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    if !is_cpu(&gate.device()) {
        return composed::swiglu(gate, up);
    }
    Tensor::from_dispatch(<Dispatch as Kernels>::swiglu(gate.into_dispatch(), up.into_dispatch()))
}

/// `-ln softmax(h[position_n] Wᵀ)[target_n]` for each target: h [t, i], w [v, i] -> [n]. n may not be zero.
pub fn linear_cross_entropy(h: Tensor<2>, w: Tensor<2>, targets: Targets) -> Tensor<1> {
    assert!(!targets.is_empty(), "a micro-batch without trained tokens has no loss to differentiate");
    if !is_cpu(&h.device()) {
        return composed::linear_cross_entropy(h, w, &targets);
    }
    Tensor::from_dispatch(<Dispatch as Kernels>::linear_cross_entropy(h.into_dispatch(), w.into_dispatch(), targets))
}
