//! The gated feed-forward part of a layer, and what its backward pass keeps.

use burn::tensor::Tensor;
use finetune_kernels::operations;

use crate::decoder::adapted::Adapted;
use crate::decoder::pass::{Context, linear};
use crate::tree::{FusedGated, Gated};

/// `down(activation(gate(x)) · up(x))`: x [t, hidden] -> [t, hidden]
pub(crate) fn forward(gated: &Gated, x: Tensor<2>, context: &Context) -> Tensor<2> {
    let gate = linear(&gated.gate, x.clone(), context);
    let up = linear(&gated.up, x, context);
    linear(&gated.down, operations::gated(gate, up, gated.activation), context)
}

/// The same with one projection to gate and up.
pub(crate) fn forward_fused(fused: &FusedGated, x: Tensor<2>, context: &Context) -> Tensor<2> {
    let both = linear(&fused.gate_up, x, context);
    let inner = fused.down.weight.shape[1];
    let (gate, up) = (both.clone().narrow(1, 0, inner), both.narrow(1, inner, inner));
    linear(&fused.down, operations::gated(gate, up, fused.activation), context)
}

impl FusedGated {
    /// As [`Gated::kept`].
    pub(crate) fn kept(&self, adapted: &Adapted<'_>) -> u64 {
        2 * self.inner() + adapted.input_of(&[&self.gate_up]) + adapted.input_of(&[&self.down])
    }

    /// As [`Gated::taken`], and the gradient of the product that gate and up are cut out of.
    pub(crate) fn taken(&self) -> u64 {
        5 * self.inner()
    }

    fn inner(&self) -> u64 {
        self.down.weight.shape[1] as u64
    }
}

impl Gated {
    /// Elements that the backward pass keeps of each token: gate and up; their input and that of
    /// down, if these layers are trained.
    pub(crate) fn kept(&self, adapted: &Adapted<'_>) -> u64 {
        let of_both = adapted.input_of_both(self.gate_up.as_ref());
        let input = adapted.input_of(&[&self.gate, &self.up]).max(of_both);
        2 * self.inner() + input + adapted.input_of(&[&self.down])
    }

    /// Elements that the backward pass takes of each token on top: gradients of gate, up and the
    /// input of down.
    pub(crate) fn taken(&self) -> u64 {
        3 * self.inner()
    }

    fn inner(&self) -> u64 {
        self.gate.weight.shape[0] as u64
    }
}
