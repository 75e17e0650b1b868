//! A dense feed-forward part and a mixture of experts beside it (Gemma 4), and what its backward pass keeps.

use burn::tensor::Tensor;
use finetune_kernels::operations;

use crate::decoder::adapted::Adapted;
use crate::decoder::pass::{Context, norm};
use crate::decoder::{experts, feed_forward};
use crate::error::ModelError;
use crate::tree::Beside;

/// read [t, hidden], the residual stream through its norm, and x [t, hidden], the stream itself ->
/// [t, hidden]
///
/// # Errors
/// As [`Context::summed`].
pub(crate) fn forward(
    beside: &Beside,
    read: Tensor<2>,
    x: Tensor<2>,
    context: &Context,
) -> Result<Tensor<2>, ModelError> {
    let hidden = x.dims()[1] as f32;
    let dense = context.summed(feed_forward::forward(&beside.dense, read, context))?;
    let dense = norm(&beside.dense_norm, dense, context);
    let of_router = norm(&beside.router_norm, x.clone(), context) * (1.0 / hidden.sqrt());
    let [before, behind] = &beside.experts_norms;
    let of_experts = experts::routed(&beside.experts, of_router, norm(before, x, context), context);
    Ok(operations::residual(dense, norm(behind, context.summed(of_experts)?, context)))
}

impl Beside {
    /// Elements that the backward pass keeps of each token: of both parts, and the inputs of the four norms.
    pub(crate) fn kept(&self, adapted: &Adapted<'_>) -> u64 {
        let hidden = self.dense_norm.gamma.length as u64;
        self.dense.kept(adapted) + self.experts.kept(adapted) + 5 * hidden
    }

    /// Elements that it takes of each token on top.
    pub(crate) fn taken(&self) -> u64 {
        self.dense.taken() + self.experts.taken()
    }

    /// f32 numbers that it keeps of each token.
    pub(crate) fn statistics(&self) -> u64 {
        self.experts.statistics() + 4
    }
}
