//! The end of every pass: the last norm, the output layer, the loss.

use burn::tensor::Tensor;
use finetune_kernels::{Targets, composed, operations, weight};

use crate::decoder::pass::{Context, norm};
use crate::tree::{Decoder, Head};

/// The losses [n] of the targets, from the hidden states [t, hidden] that come out of the last
/// layer.
pub(crate) fn losses(weights: &Decoder, h: Tensor<2>, targets: Targets, context: &Context) -> Tensor<1> {
    let h = read(&weights.head, h, context);
    let targets = targets.capped(weights.head.softcap);
    let output = context.weight(weights.output());
    let Some(branch) = &weights.head.lora else { return weight::linear_cross_entropy(h, output, targets) };
    let (a, b) = (context.parameter(branch.a.dense()), context.parameter(branch.b.dense()));
    let dropped = match context.dropout(weights.head.index) {
        Some(dropout) => operations::drop_input(h.clone(), dropout),
        None => h.clone(),
    };
    weight::lora_cross_entropy(h, output, operations::linear(dropped, a), b, branch.scale, targets)
}

/// What the output layer reads. It is divided by what logits are divided by.
fn read(head: &Head, h: Tensor<2>, context: &Context) -> Tensor<2> {
    let h = norm(&head.norm, h, context);
    match head.divisor {
        Some(divisor) => h / divisor,
        None => h,
    }
}

/// Logits [t, v] of the hidden states [t, hidden] that come out of the last layer.
pub(crate) fn logits(weights: &Decoder, h: Tensor<2>, context: &Context) -> Tensor<2> {
    let h = read(&weights.head, h, context);
    let output = context.weight(weights.output());
    let logits = match (&context.branches, &weights.head.lora) {
        (Some(branches), _) => branches.linear(weights.head.index, h, output, context),
        (None, None) => weight::linear(h, output),
        (None, Some(branch)) => {
            let (a, b) = (context.parameter(branch.a.dense()), context.parameter(branch.b.dense()));
            weight::lora_linear(h, output, a, b, branch.scale, None)
        }
    };
    composed::soft_cap(logits, weights.head.softcap)
}
