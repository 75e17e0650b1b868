//! The end of every pass: the last norm, the output layer, the loss.

use burn::tensor::Tensor;
use finetune_kernels::{Targets, operations};

use crate::decoder::pass::{Context, norm};
use crate::tree::Decoder;

/// The losses [n] of the targets, from the hidden states [t, hidden] that come out of the last
/// layer.
pub(crate) fn losses(weights: &Decoder, h: Tensor<2>, targets: Targets, context: &Context) -> Tensor<1> {
    let h = norm(&weights.head.norm, h, context);
    let weight = context.parameter(weights.output().dense());
    let Some(branch) = &weights.head.lora else { return operations::linear_cross_entropy(h, weight, targets) };
    let (a, b) = (context.parameter(branch.a.dense()), context.parameter(branch.b.dense()));
    let dropped = match context.dropout(weights.head.index) {
        Some(dropout) => operations::drop_input(h.clone(), dropout),
        None => h.clone(),
    };
    operations::lora_cross_entropy(h, weight, operations::linear(dropped, a), b, branch.scale, targets)
}

/// Logits [t, v] of the hidden states [t, hidden] that come out of the last layer.
pub(crate) fn logits(weights: &Decoder, h: Tensor<2>, context: &Context) -> Tensor<2> {
    let h = norm(&weights.head.norm, h, context);
    let weight = context.parameter(weights.output().dense());
    let Some(branch) = &weights.head.lora else { return operations::linear(h, weight) };
    let (a, b) = (context.parameter(branch.a.dense()), context.parameter(branch.b.dense()));
    operations::lora_linear(h, weight, a, b, branch.scale, None)
}
