//! The end of every pass: the last norm, the output layer, the loss.

use burn::tensor::Tensor;
use finetune_kernels::{Targets, operations};

use crate::decoder::pass::{Context, norm};
use crate::tree::Decoder;

/// The losses [n] of the targets, from the hidden states [t, hidden] that come out of the last
/// layer.
pub(crate) fn losses(weights: &Decoder, h: Tensor<2>, targets: Targets, context: &Context) -> Tensor<1> {
    let h = norm(&weights.head.norm, h, context);
    operations::linear_cross_entropy(h, context.parameter(weights.output().dense()), targets)
}

/// Logits [t, v] of the hidden states [t, hidden] that come out of the last layer.
pub(crate) fn logits(weights: &Decoder, h: Tensor<2>, context: &Context) -> Tensor<2> {
    let h = norm(&weights.head.norm, h, context);
    operations::linear(h, context.parameter(weights.output().dense()))
}
