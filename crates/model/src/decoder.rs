//! The forward pass, one for all families.
//!
//! Shape letters: `t` tokens of all rows one after the other, `h` query heads, `k` key/value heads, `d` head dimension.

use std::sync::Arc;

use burn::tensor::{Int, Tensor, TensorData};
use finetune_kernels::devices::submit;
use finetune_kernels::{AttentionShape, Dropout, FloatType, RopeTable, Segments, operations};
use finetune_random::Stream;

use crate::config::ModelConfig;
use crate::generate::LayerCache;
use crate::model::{Purpose, Randomness};
use crate::weights::{Layer, Linear, Weights};

/// What a pass depends on besides weights and tokens.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) rope: RopeTable,
    pub(crate) segments: Segments,
    /// The number type of activations.
    pub(crate) compute: FloatType,
    /// Whether trained parameters are tracked for gradients.
    pub(crate) training: bool,
    pub(crate) dropout: Option<BatchDropout>,
}

/// Dropout of a micro-batch, the same in all modules but for their streams.
#[derive(Clone)]
pub(crate) struct BatchDropout {
    pub(crate) probability: f32,
    pub(crate) randomness: Randomness,
    /// (row, position) of each token.
    pub(crate) tokens: Arc<[(u32, u32)]>,
}

impl Context {
    /// The same pass without a graph.
    pub(crate) fn untracked(&self) -> Context {
        Context { training: false, ..self.clone() }
    }

    fn parameter<const D: usize>(&self, tensor: &Tensor<D>) -> Tensor<D> {
        if self.training { tensor.clone() } else { tensor.clone().inner() }
    }

    fn dropout(&self, module: u32) -> Option<Dropout> {
        self.dropout.as_ref().map(|BatchDropout { probability, randomness, tokens }| Dropout {
            probability: *probability,
            stream: Stream::new(randomness.seed, Purpose::Dropout as u32, randomness.step, module),
            tokens: tokens.clone(),
        })
    }
}

/// Embeddings [t, hidden] of these tokens.
pub(crate) fn embed(weights: &Weights, tokens: &[u32], context: &Context) -> Tensor<2> {
    let ids: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
    let count = ids.len();
    let device = weights.embedding.device().inner();
    let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [count]), &device);
    context.parameter(&weights.embedding).select(0, ids).cast(context.compute.dtype())
}

/// Hidden states [t, hidden] that come out of the last layer, before the final norm.
pub(crate) fn hidden(weights: &Weights, config: &ModelConfig, tokens: &[u32], context: &Context) -> Tensor<2> {
    weights.layers.iter().fold(embed(weights, tokens, context), |x, weights| {
        let out = layer(weights, config, x, context, None);
        submit(&out.device());
        out
    })
}

/// One layer: x [t, hidden] -> [t, hidden]. With a cache, its keys and values come before those of x.
pub(crate) fn layer(
    layer: &Layer,
    config: &ModelConfig,
    x: Tensor<2>,
    context: &Context,
    cache: Option<&mut LayerCache>,
) -> Tensor<2> {
    let eps = config.rms_norm_eps;
    let normed = operations::rms_norm(x.clone(), context.parameter(&layer.input_norm), eps);
    let x = operations::residual(x, attention(layer, config, normed, context, cache));
    let normed = operations::rms_norm(x.clone(), context.parameter(&layer.post_norm), eps);
    let gate = linear(&layer.gate, normed.clone(), context);
    let up = linear(&layer.up, normed, context);
    operations::residual(x, linear(&layer.down, operations::swiglu(gate, up), context))
}

fn attention(
    layer: &Layer,
    config: &ModelConfig,
    x: Tensor<2>,
    context: &Context,
    cache: Option<&mut LayerCache>,
) -> Tensor<2> {
    let (tokens, width) = (x.dims()[0], config.head_dim);
    let q_thd = linear(&layer.q, x.clone(), context).reshape([tokens, config.heads, width]);
    let k_tkd = linear(&layer.k, x.clone(), context).reshape([tokens, config.key_value_heads, width]);
    let v_tkd = linear(&layer.v, x, context).reshape([tokens, config.key_value_heads, width]);
    let norm = |x: Tensor<3>, gamma: &Option<Tensor<1>>| match gamma {
        Some(gamma) => operations::rms_norm(x, context.parameter(gamma), config.rms_norm_eps),
        None => x,
    };
    let q_thd = operations::rope(norm(q_thd, &layer.q_norm), context.rope.clone());
    let k_tkd = operations::rope(norm(k_tkd, &layer.k_norm), context.rope.clone());
    let (k_skd, v_skd) = match cache {
        Some(cache) => cache.extend(k_tkd, v_tkd),
        None => (k_tkd, v_tkd),
    };
    let shape =
        AttentionShape { segments: context.segments.clone(), scale: 1.0 / (width as f32).sqrt(), window: layer.window };
    let out_thd = operations::causal_attention(q_thd, k_skd, v_skd, shape);
    linear(&layer.o, out_thd.reshape([tokens, config.heads * width]), context)
}

fn linear(linear: &Linear, x: Tensor<2>, context: &Context) -> Tensor<2> {
    let weight = context.parameter(&linear.weight);
    let y = match &linear.lora {
        None => operations::linear(x, weight),
        Some(branch) => {
            let (a, b) = (context.parameter(&branch.a), context.parameter(&branch.b));
            operations::lora_linear(x, weight, a, b, branch.scale, context.dropout(branch.module))
        }
    };
    match &linear.bias {
        Some(bias) => operations::bias(y, context.parameter(bias)),
        None => y,
    }
}
