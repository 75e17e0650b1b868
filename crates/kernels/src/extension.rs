//! The operations as a burn backend extension: the CPU backend's forward passes, and the backward passes
//! that autodiff calls. [`crate::operations`] is the way in.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Flex, TensorMetadata, backend_extension};
use burn_flex::FlexTensor;

use crate::attention::{self, AttentionShape};
use crate::buffer::contiguous;
use crate::cross_entropy::{self, Targets};
use crate::linear::{self, Dropout};
use crate::norm;
use crate::rope::{self, RopeTable};
use crate::swiglu;

/// Shapes and meaning of each operation stand at its function in [`crate::operations`].
#[backend_extension(Flex, Autodiff)]
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
}

impl Kernels for Flex {
    fn linear(x: FlexTensor, w: FlexTensor) -> FlexTensor {
        linear::forward(&contiguous(x), &contiguous(w))
    }

    fn lora_linear(
        x: FlexTensor,
        w: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        scale: f32,
        dropout: Option<Dropout>,
    ) -> FlexTensor {
        linear::lora_forward(contiguous(x), contiguous(w), contiguous(a), contiguous(b), scale, dropout).0
    }

    fn rms_norm(x: FlexTensor, gamma: FlexTensor, eps: f64) -> FlexTensor {
        norm::forward(contiguous(x), contiguous(gamma), eps as f32).0
    }

    fn rope(x: FlexTensor, table: RopeTable) -> FlexTensor {
        rope::rotate(&contiguous(x), &table, 1.0)
    }

    fn causal_attention(q: FlexTensor, k: FlexTensor, v: FlexTensor, shape: AttentionShape) -> FlexTensor {
        attention::forward(contiguous(q), contiguous(k), contiguous(v), shape).0
    }

    fn swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        swiglu::forward(&contiguous(gate), &contiguous(up))
    }

    fn linear_cross_entropy(h: FlexTensor, w: FlexTensor, targets: Targets) -> FlexTensor {
        cross_entropy::losses(&contiguous(h), &contiguous(w), &targets)
    }
}

/// The backward step of an operation: a type of its own (burn wants one), its state, and what it does with
/// the gradient of its output, which arrives contiguous.
macro_rules! backward {
    ($name:ident, $parents:literal, $state:ty, |$ops:ident, $d_out:ident, $gradients:ident| $body:block) => {
        #[derive(Debug)]
        struct $name;
        impl Backward<Flex, $parents> for $name {
            type State = $state;
            fn backward(self, $ops: Ops<$state, $parents>, $gradients: &mut Gradients, _: &mut Checkpointer) {
                let $d_out = contiguous($gradients.consume::<Flex>(&$ops.node));
                $body
            }
        }
    };
}

backward!(LinearFrozen, 1, FlexTensor, |ops, d_y, gradients| {
    if let [Some(x)] = ops.parents {
        gradients.register::<Flex>(x.id, linear::backward_x(&ops.state, &d_y));
    }
});

backward!(LinearTrained, 2, (FlexTensor, FlexTensor), |ops, d_y, gradients| {
    let (x, w) = ops.state;
    let [x_node, w_node] = ops.parents;
    if let Some(node) = w_node {
        gradients.register::<Flex>(node.id, linear::backward_w(&x, &d_y));
    }
    if let Some(node) = x_node {
        gradients.register::<Flex>(node.id, linear::backward_x(&w, &d_y));
    }
});

backward!(LoraLinear, 3, linear::SavedLora, |ops, d_y, gradients| {
    let wanted = ops.parents.each_ref().map(Option::is_some);
    let results = linear::lora_backward(ops.state, &d_y, wanted);
    for (node, gradient) in ops.parents.into_iter().zip(results) {
        if let (Some(node), Some(gradient)) = (node, gradient) {
            gradients.register::<Flex>(node.id, gradient);
        }
    }
});

backward!(RmsNorm, 2, norm::Saved, |ops, d_out, gradients| {
    let [x_node, gamma_node] = ops.parents;
    if let Some(node) = gamma_node {
        gradients.register::<Flex>(node.id, norm::backward_gamma(&ops.state, &d_out));
    }
    if let Some(node) = x_node {
        gradients.register::<Flex>(node.id, norm::backward_x(&ops.state, &d_out));
    }
});

backward!(Rope, 1, RopeTable, |ops, d_out, gradients| {
    if let [Some(x)] = ops.parents {
        gradients.register::<Flex>(x.id, rope::rotate(&d_out, &ops.state, -1.0));
    }
});

backward!(CausalAttention, 3, attention::Saved, |ops, d_out, gradients| {
    let results = attention::backward(&ops.state, &d_out);
    for (node, gradient) in ops.parents.into_iter().zip(results) {
        if let Some(node) = node {
            gradients.register::<Flex>(node.id, gradient);
        }
    }
});

backward!(Swiglu, 2, (FlexTensor, FlexTensor), |ops, d_out, gradients| {
    let (d_gate, d_up) = swiglu::backward(&ops.state.0, &ops.state.1, &d_out);
    for (node, gradient) in ops.parents.into_iter().zip([d_gate, d_up]) {
        if let Some(node) = node {
            gradients.register::<Flex>(node.id, gradient);
        }
    }
});

backward!(LinearCrossEntropy, 2, (cross_entropy::Saved, usize), |ops, d_losses, gradients| {
    let (saved, width) = ops.state;
    let (d_h, d_w) = cross_entropy::backward(saved, width, &d_losses);
    for (node, gradient) in ops.parents.into_iter().zip([Some(d_h), d_w]) {
        if let (Some(node), Some(gradient)) = (node, gradient) {
            gradients.register::<Flex>(node.id, gradient);
        }
    }
});

impl<C: CheckpointStrategy> Kernels for Autodiff<Flex, C> {
    fn linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        if !w.is_tracked() {
            // Nothing of x has to be kept for a frozen weight.
            return match LinearFrozen.prepare::<C>([x.node()]).compute_bound().stateful() {
                OpsKind::Tracked(step) => {
                    let (x, w) = (contiguous(x.into_primitive()), contiguous(w.into_primitive()));
                    let y = linear::forward(&x, &w);
                    step.finish(w, y)
                }
                OpsKind::UnTracked(step) => step.finish(Flex::linear(x.into_primitive(), w.into_primitive())),
            };
        }
        match LinearTrained.prepare::<C>([x.node(), w.node()]).compute_bound().stateful() {
            OpsKind::Tracked(step) => {
                let (x, w) = (contiguous(x.into_primitive()), contiguous(w.into_primitive()));
                let y = linear::forward(&x, &w);
                step.finish((x, w), y)
            }
            OpsKind::UnTracked(step) => step.finish(Flex::linear(x.into_primitive(), w.into_primitive())),
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
        let [x, w, a, b] = [x, w, a, b].map(|tensor| contiguous(tensor.into_primitive()));
        match LoraLinear.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(step) => {
                let (y, saved) = linear::lora_forward(x, w, a, b, scale, dropout);
                step.finish(saved, y)
            }
            OpsKind::UnTracked(step) => step.finish(Flex::lora_linear(x, w, a, b, scale, dropout)),
        }
    }

    fn rms_norm(x: FloatTensor<Self>, gamma: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        let nodes = [x.node(), gamma.node()];
        let (x, gamma) = (contiguous(x.into_primitive()), contiguous(gamma.into_primitive()));
        match RmsNorm.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(step) => {
                let (out, saved) = norm::forward(x, gamma, eps as f32);
                step.finish(saved, out)
            }
            OpsKind::UnTracked(step) => step.finish(Flex::rms_norm(x, gamma, eps)),
        }
    }

    fn rope(x: FloatTensor<Self>, table: RopeTable) -> FloatTensor<Self> {
        match Rope.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(step) => {
                let out = Flex::rope(x.into_primitive(), table.clone());
                step.finish(table, out)
            }
            OpsKind::UnTracked(step) => step.finish(Flex::rope(x.into_primitive(), table)),
        }
    }

    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self> {
        let nodes = [q.node(), k.node(), v.node()];
        let [q, k, v] = [q, k, v].map(|tensor| contiguous(tensor.into_primitive()));
        match CausalAttention.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(step) => {
                let (out, saved) = attention::forward(q, k, v, shape);
                step.finish(saved, out)
            }
            OpsKind::UnTracked(step) => step.finish(Flex::causal_attention(q, k, v, shape)),
        }
    }

    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let nodes = [gate.node(), up.node()];
        let (gate, up) = (contiguous(gate.into_primitive()), contiguous(up.into_primitive()));
        match Swiglu.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(step) => {
                let out = swiglu::forward(&gate, &up);
                step.finish((gate, up), out)
            }
            OpsKind::UnTracked(step) => step.finish(Flex::swiglu(gate, up)),
        }
    }

    fn linear_cross_entropy(h: FloatTensor<Self>, w: FloatTensor<Self>, targets: Targets) -> FloatTensor<Self> {
        let trained_weight = w.is_tracked();
        let nodes = [h.node(), w.node()];
        let (h, w) = (contiguous(h.into_primitive()), contiguous(w.into_primitive()));
        match LinearCrossEntropy.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(step) => {
                let width = w.shape()[1];
                let (losses, saved) = cross_entropy::forward(h, w, targets, trained_weight);
                step.finish((saved, width), losses)
            }
            OpsKind::UnTracked(step) => step.finish(Flex::linear_cross_entropy(h, w, targets)),
        }
    }
}
