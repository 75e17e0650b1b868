//! [`Fused`] on the CPU backend: the functions of the files beside this one.

mod attention;
pub(crate) mod buffer;
mod cross_entropy;
mod dropout;
pub(crate) mod halves;
mod linear;
pub mod matmul;
mod norm;
mod rope;
mod simd;
mod swiglu;

use burn::backend::ops::FloatTensorOps;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::Shape;
use burn_flex::FlexTensor;

use crate::arguments::{AttentionShape, Dropout, RopeTable, Targets};
use crate::fused::Fused;

impl Fused for Flex {
    type SavedLora = linear::SavedLora;
    type SavedNorm = norm::Saved;
    type SavedAttention = attention::Saved;
    type SavedCrossEntropy = cross_entropy::Saved;

    fn contiguous(tensor: FlexTensor) -> FlexTensor {
        buffer::contiguous(tensor)
    }

    fn forward_linear(x: &FlexTensor, w: &FlexTensor) -> FlexTensor {
        linear::forward(x, w)
    }

    fn backward_linear_x(w: &FlexTensor, d_y: &FlexTensor) -> FlexTensor {
        linear::backward_x(w, d_y)
    }

    fn backward_linear_w(x: &FlexTensor, _: &FlexTensor, d_y: &FlexTensor) -> FlexTensor {
        linear::backward_w(x, d_y)
    }

    fn forward_lora(
        x: FlexTensor,
        w: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        scale: f32,
        dropout: Option<Dropout>,
    ) -> (FlexTensor, linear::SavedLora) {
        linear::lora_forward(x, w, a, b, scale, dropout)
    }

    fn backward_lora(saved: linear::SavedLora, d_y: &FlexTensor, wanted: [bool; 3]) -> [Option<FlexTensor>; 3] {
        linear::lora_backward(saved, d_y, wanted)
    }

    fn forward_norm(x: FlexTensor, gamma: FlexTensor, eps: f64) -> (FlexTensor, norm::Saved) {
        norm::forward(x, gamma, eps as f32)
    }

    fn backward_norm_x(saved: &norm::Saved, d_out: &FlexTensor) -> FlexTensor {
        norm::backward_x(saved, d_out)
    }

    fn backward_norm_gamma(saved: &norm::Saved, d_out: &FlexTensor) -> FlexTensor {
        norm::backward_gamma(saved, d_out)
    }

    fn rotate(x: &FlexTensor, table: &RopeTable, sign: f32) -> FlexTensor {
        rope::rotate(x, table, sign)
    }

    fn forward_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        shape: AttentionShape,
    ) -> (FlexTensor, attention::Saved) {
        attention::forward(q, k, v, shape)
    }

    fn backward_attention(saved: &attention::Saved, d_out: &FlexTensor) -> [FlexTensor; 3] {
        attention::backward(saved, d_out)
    }

    fn forward_swiglu(gate: &FlexTensor, up: &FlexTensor) -> FlexTensor {
        swiglu::forward(gate, up)
    }

    fn backward_swiglu(gate: &FlexTensor, up: &FlexTensor, d_out: &FlexTensor) -> (FlexTensor, FlexTensor) {
        swiglu::backward(gate, up, d_out)
    }

    fn losses(h: &FlexTensor, w: &FlexTensor, targets: &Targets) -> FlexTensor {
        cross_entropy::losses(h, w, targets)
    }

    fn forward_cross_entropy(
        h: FlexTensor,
        w: FlexTensor,
        targets: Targets,
        trained_weight: bool,
    ) -> (FlexTensor, cross_entropy::Saved) {
        cross_entropy::forward(h, w, targets, trained_weight)
    }

    fn backward_cross_entropy(saved: cross_entropy::Saved, d_losses: &FlexTensor) -> (FlexTensor, Option<FlexTensor>) {
        cross_entropy::backward(saved, d_losses)
    }

    fn forward_add(a: FlexTensor, b: FlexTensor) -> FlexTensor {
        Flex::float_add(a, b)
    }

    fn forward_bias(y: FlexTensor, bias: FlexTensor) -> FlexTensor {
        let outputs = bias.shape().num_elements();
        Flex::float_add(y, Flex::float_reshape(bias, Shape::from([1, outputs])))
    }

    fn backward_bias(d_y: &FlexTensor) -> FlexTensor {
        let outputs = d_y.shape()[1];
        Flex::float_reshape(Flex::float_sum_dim(d_y.clone(), 0), Shape::from([outputs]))
    }
}
