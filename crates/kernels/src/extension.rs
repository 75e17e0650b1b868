//! The operations as a burn backend extension: [`Fused`] operations made differentiable.
//! [`crate::operations`] is the way in.

use std::marker::PhantomData;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Flex, TensorMetadata, backend_extension};
use burn::tensor::Shape;

use crate::arguments::{AttentionShape, Dropout, RopeTable, Targets};
use crate::fused::Fused;

/// Shapes and meaning of each operation stand at its function in [`crate::operations`].
#[backend_extension(Flex, Cube: cfg(any(feature = "gpu", target_os = "macos")), Autodiff)]
pub(crate) trait Kernels: burn::backend::Backend {
    fn linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self>;
    fn lora_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
        dropout: Option<Dropout>,
    ) -> FloatTensor<Self>;
    fn rms_norm(x: FloatTensor<Self>, gamma: FloatTensor<Self>, eps: f64) -> FloatTensor<Self>;
    fn rope(x: FloatTensor<Self>, table: RopeTable) -> FloatTensor<Self>;
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self>;
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
    fn linear_cross_entropy(h: FloatTensor<Self>, w: FloatTensor<Self>, targets: Targets) -> FloatTensor<Self>;
    fn residual(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self>;
    fn bias(y: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self>;
    fn gradient_seed(y: FloatTensor<Self>, d_y: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// Without gradients an operation is its forward pass, and nothing is saved.
macro_rules! without_gradients {
    ($backend:ty) => {
        impl Kernels for $backend {
            fn linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
                Self::forward_linear(&Self::contiguous(x), &Self::contiguous(w))
            }

            fn lora_linear(
                x: FloatTensor<Self>,
                w: FloatTensor<Self>,
                a: FloatTensor<Self>,
                b: FloatTensor<Self>,
                scale: f32,
                dropout: Option<Dropout>,
            ) -> FloatTensor<Self> {
                let [x, w, a, b] = [x, w, a, b].map(Self::contiguous);
                Self::forward_lora(x, w, a, b, scale, dropout).0
            }

            fn rms_norm(x: FloatTensor<Self>, gamma: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
                Self::forward_norm(Self::contiguous(x), Self::contiguous(gamma), eps).0
            }

            fn rope(x: FloatTensor<Self>, table: RopeTable) -> FloatTensor<Self> {
                Self::rotate(&Self::contiguous(x), &table, 1.0)
            }

            fn causal_attention(
                q: FloatTensor<Self>,
                k: FloatTensor<Self>,
                v: FloatTensor<Self>,
                shape: AttentionShape,
            ) -> FloatTensor<Self> {
                let [q, k, v] = [q, k, v].map(Self::contiguous);
                Self::forward_attention(q, k, v, shape).0
            }

            fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
                Self::forward_swiglu(&Self::contiguous(gate), &Self::contiguous(up))
            }

            fn linear_cross_entropy(h: FloatTensor<Self>, w: FloatTensor<Self>, targets: Targets) -> FloatTensor<Self> {
                Self::losses(&Self::contiguous(h), &Self::contiguous(w), &targets)
            }

            fn residual(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
                Self::forward_add(Self::contiguous(a), Self::contiguous(b))
            }

            fn bias(y: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self> {
                Self::forward_bias(Self::contiguous(y), Self::contiguous(bias))
            }

            fn gradient_seed(y: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
                zero::<Self>(&y)
            }
        }
    };
}

without_gradients!(Flex);
#[cfg(any(feature = "gpu", target_os = "macos"))]
without_gradients!(burn_cubecl::CubeBackend);

fn zero<B: Fused>(like: &FloatTensor<B>) -> FloatTensor<B> {
    B::float_zeros(Shape::from([1]), &like.device(), burn::tensor::FloatDType::F32)
}

/// The backward step of an operation: a type of its own (burn wants one), its state, and what it does with
/// the gradient of its output, which arrives contiguous.
macro_rules! backward {
    ($name:ident, $parents:literal, $state:ty, |$ops:ident, $d_out:ident, $gradients:ident| $body:block) => {
        #[derive(Debug)]
        struct $name<B>(PhantomData<B>);
        impl<B: Fused> Backward<B, $parents> for $name<B> {
            type State = $state;
            fn backward(self, $ops: Ops<$state, $parents>, $gradients: &mut Gradients, _: &mut Checkpointer) {
                let $d_out = B::contiguous($gradients.consume::<B>(&$ops.node));
                $body
            }
        }
    };
}

backward!(LinearFrozen, 1, FloatTensor<B>, |ops, d_y, gradients| {
    if let [Some(x)] = ops.parents {
        gradients.register::<B>(x.id, B::backward_linear_x(&ops.state, &d_y));
    }
});

backward!(LinearTrained, 2, (FloatTensor<B>, FloatTensor<B>), |ops, d_y, gradients| {
    let (x, w) = ops.state;
    let [x_node, w_node] = ops.parents;
    if let Some(node) = w_node {
        gradients.register::<B>(node.id, B::backward_linear_w(&x, &w, &d_y));
    }
    if let Some(node) = x_node {
        gradients.register::<B>(node.id, B::backward_linear_x(&w, &d_y));
    }
});

backward!(LoraLinear, 3, B::SavedLora, |ops, d_y, gradients| {
    let wanted = ops.parents.each_ref().map(Option::is_some);
    let results = B::backward_lora(ops.state, &d_y, wanted);
    for (node, gradient) in ops.parents.into_iter().zip(results) {
        if let (Some(node), Some(gradient)) = (node, gradient) {
            gradients.register::<B>(node.id, gradient);
        }
    }
});

backward!(RmsNorm, 2, B::SavedNorm, |ops, d_out, gradients| {
    let [x_node, gamma_node] = ops.parents;
    if let Some(node) = gamma_node {
        gradients.register::<B>(node.id, B::backward_norm_gamma(&ops.state, &d_out));
    }
    if let Some(node) = x_node {
        gradients.register::<B>(node.id, B::backward_norm_x(&ops.state, &d_out));
    }
});

backward!(Rope, 1, RopeTable, |ops, d_out, gradients| {
    if let [Some(x)] = ops.parents {
        gradients.register::<B>(x.id, B::rotate(&d_out, &ops.state, -1.0));
    }
});

backward!(CausalAttention, 3, B::SavedAttention, |ops, d_out, gradients| {
    let results = B::backward_attention(&ops.state, &d_out);
    for (node, gradient) in ops.parents.into_iter().zip(results) {
        if let Some(node) = node {
            gradients.register::<B>(node.id, gradient);
        }
    }
});

backward!(Swiglu, 2, (FloatTensor<B>, FloatTensor<B>), |ops, d_out, gradients| {
    let (d_gate, d_up) = B::backward_swiglu(&ops.state.0, &ops.state.1, &d_out);
    for (node, gradient) in ops.parents.into_iter().zip([d_gate, d_up]) {
        if let Some(node) = node {
            gradients.register::<B>(node.id, gradient);
        }
    }
});

backward!(LinearCrossEntropy, 2, B::SavedCrossEntropy, |ops, d_losses, gradients| {
    let (d_h, d_w) = B::backward_cross_entropy(ops.state, &d_losses);
    for (node, gradient) in ops.parents.into_iter().zip([Some(d_h), d_w]) {
        if let (Some(node), Some(gradient)) = (node, gradient) {
            gradients.register::<B>(node.id, gradient);
        }
    }
});

backward!(Residual, 2, (), |ops, d_out, gradients| {
    for node in ops.parents.into_iter().flatten() {
        gradients.register::<B>(node.id, d_out.clone());
    }
});

backward!(Bias, 2, (), |ops, d_y, gradients| {
    let [y_node, bias_node] = ops.parents;
    if let Some(node) = bias_node {
        gradients.register::<B>(node.id, B::backward_bias(&d_y));
    }
    if let Some(node) = y_node {
        gradients.register::<B>(node.id, d_y);
    }
});

/// The upstream gradient is that of a sum, 1: what flows on is the seed itself.
#[derive(Debug)]
struct GradientSeed<B>(PhantomData<B>);
impl<B: Fused> Backward<B, 1> for GradientSeed<B> {
    type State = FloatTensor<B>;
    fn backward(self, ops: Ops<FloatTensor<B>, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let _ = gradients.consume::<B>(&ops.node);
        if let [Some(y)] = ops.parents {
            gradients.register::<B>(y.id, ops.state);
        }
    }
}

impl<B: Fused + Kernels, C: CheckpointStrategy> Kernels for Autodiff<B, C> {
    fn linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        let (x_node, w_node, trained) = (x.node(), w.node(), w.is_tracked());
        let (x, w) = (B::contiguous(x.into_primitive()), B::contiguous(w.into_primitive()));
        let y = B::forward_linear(&x, &w);
        if !trained {
            // Nothing of x has to be kept for a frozen weight.
            return match LinearFrozen(PhantomData::<B>).prepare::<C>([x_node]).compute_bound().stateful() {
                OpsKind::Tracked(step) => step.finish(w, y),
                OpsKind::UnTracked(step) => step.finish(y),
            };
        }
        match LinearTrained(PhantomData::<B>).prepare::<C>([x_node, w_node]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish((x, w), y),
            OpsKind::UnTracked(step) => step.finish(y),
        }
    }

    fn lora_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
        dropout: Option<Dropout>,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), a.node(), b.node()];
        let [x, w, a, b] = [x, w, a, b].map(|tensor| B::contiguous(tensor.into_primitive()));
        let (y, saved) = B::forward_lora(x, w, a, b, scale, dropout);
        match LoraLinear(PhantomData::<B>).prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish(saved, y),
            OpsKind::UnTracked(step) => step.finish(y),
        }
    }

    fn rms_norm(x: FloatTensor<Self>, gamma: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        let nodes = [x.node(), gamma.node()];
        let (x, gamma) = (B::contiguous(x.into_primitive()), B::contiguous(gamma.into_primitive()));
        let (out, saved) = B::forward_norm(x, gamma, eps);
        match RmsNorm(PhantomData::<B>).prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish(saved, out),
            OpsKind::UnTracked(step) => step.finish(out),
        }
    }

    fn rope(x: FloatTensor<Self>, table: RopeTable) -> FloatTensor<Self> {
        let nodes = [x.node()];
        let out = B::rotate(&B::contiguous(x.into_primitive()), &table, 1.0);
        match Rope(PhantomData::<B>).prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish(table, out),
            OpsKind::UnTracked(step) => step.finish(out),
        }
    }

    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self> {
        let nodes = [q.node(), k.node(), v.node()];
        let [q, k, v] = [q, k, v].map(|tensor| B::contiguous(tensor.into_primitive()));
        let (out, saved) = B::forward_attention(q, k, v, shape);
        match CausalAttention(PhantomData::<B>).prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish(saved, out),
            OpsKind::UnTracked(step) => step.finish(out),
        }
    }

    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let nodes = [gate.node(), up.node()];
        let (gate, up) = (B::contiguous(gate.into_primitive()), B::contiguous(up.into_primitive()));
        let out = B::forward_swiglu(&gate, &up);
        match Swiglu(PhantomData::<B>).prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish((gate, up), out),
            OpsKind::UnTracked(step) => step.finish(out),
        }
    }

    fn linear_cross_entropy(h: FloatTensor<Self>, w: FloatTensor<Self>, targets: Targets) -> FloatTensor<Self> {
        let trained_weight = w.is_tracked();
        let nodes = [h.node(), w.node()];
        let (h, w) = (B::contiguous(h.into_primitive()), B::contiguous(w.into_primitive()));
        match LinearCrossEntropy(PhantomData::<B>).prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(step) => {
                let (losses, saved) = B::forward_cross_entropy(h, w, targets, trained_weight);
                step.finish(saved, losses)
            }
            OpsKind::UnTracked(step) => step.finish(B::losses(&h, &w, &targets)),
        }
    }

    fn residual(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        let nodes = [a.node(), b.node()];
        let (a, b) = (B::contiguous(a.into_primitive()), B::contiguous(b.into_primitive()));
        let out = B::forward_add(a, b);
        match Residual(PhantomData::<B>).prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish((), out),
            OpsKind::UnTracked(step) => step.finish(out),
        }
    }

    fn bias(y: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self> {
        let nodes = [y.node(), bias.node()];
        let (y, bias) = (B::contiguous(y.into_primitive()), B::contiguous(bias.into_primitive()));
        let out = B::forward_bias(y, bias);
        match Bias(PhantomData::<B>).prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish((), out),
            OpsKind::UnTracked(step) => step.finish(out),
        }
    }

    fn gradient_seed(y: FloatTensor<Self>, d_y: FloatTensor<Self>) -> FloatTensor<Self> {
        let nodes = [y.node()];
        let zero = zero::<B>(&y.into_primitive());
        match GradientSeed(PhantomData::<B>).prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish(B::contiguous(d_y.into_primitive()), zero),
            OpsKind::UnTracked(step) => step.finish(zero),
        }
    }
}
