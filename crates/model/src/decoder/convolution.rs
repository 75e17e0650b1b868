//! A short convolution between two gates (Liquid AI 2025, "LFM2"), and what its backward pass keeps.
//!
//! Shape letters: `t` tokens, `c` channels, `m` rows.

use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use finetune_kernels::operations;

use crate::decoder::adapted::Adapted;
use crate::decoder::cache::LayerCache;
use crate::decoder::delta::last_inputs;
use crate::decoder::pass::{Context, linear};
use crate::tree::ShortConvolution;

/// x [t, hidden] -> [t, hidden]. With a cache, each row goes on from its last inputs.
pub(crate) fn forward(
    convolution: &ShortConvolution,
    x: Tensor<2>,
    context: &Context,
    cache: Option<&mut LayerCache>,
) -> Tensor<2> {
    let [_, channels] = x.dims();
    let taps = convolution.taps;
    let rows: Arc<[usize]> = context.segments.iter().map(|segment| segment.queries).collect();
    let made = linear(&convolution.input, x.clone(), context);
    let part = |n: usize| made.clone().narrow(1, n * channels, channels);
    let (before, behind, u) = (part(0), part(1), part(2));
    let u_tc = before * u;
    let zeros = |shape: [usize; 2]| Tensor::<2>::zeros(shape, (&x.device(), DType::F32));
    let past = cache.as_ref().and_then(|cache| cache.recurrent().map(|[past, _]| past.clone()));
    let past = past.unwrap_or_else(|| zeros([rows.len() * (taps - 1), channels])).cast(u_tc.dtype());
    let kernel = context.parameter(convolution.kernel.values()).reshape([channels, taps]);
    if let Some(cache) = cache {
        // It has no state beside its last inputs.
        cache.set_recurrent([last_inputs(u_tc.clone(), past.clone(), &rows, taps - 1), zeros([rows.len(), 1])]);
    }
    let convolved = operations::short_convolution(u_tc, kernel, past, rows, false);
    let convolved = match &convolution.bias {
        Some(bias) => operations::bias(convolved, context.parameter(bias.values())),
        None => convolved,
    };
    linear(&convolution.out, behind * convolved, context)
}

impl ShortConvolution {
    /// Elements that the backward pass keeps of each token: both gates, what is gated and what is convolved,
    /// the result before the second gate; and the inputs of linear layers that are trained.
    pub(crate) fn kept(&self, adapted: &Adapted<'_>) -> u64 {
        let channels = self.out.weight.shape[1] as u64;
        5 * channels + adapted.input_of(&[&self.input]) + adapted.input_of(&[&self.out])
    }
}
