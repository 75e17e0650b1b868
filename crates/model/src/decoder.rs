//! From tokens to the hidden states that come out of the last layer, for all families and passes.

pub(crate) mod adapted;
pub(crate) mod attention;
pub(crate) mod cache;
mod convolution;
mod delta;
mod experts;
mod feed_forward;
pub(crate) mod head;
pub(crate) mod kept;
mod latent;
pub(crate) mod pass;

use burn::tensor::{Int, Tensor, TensorData};
use finetune_kernels::devices::submit;
use finetune_kernels::weight::packed_rows;
use finetune_kernels::{Weight, operations};

use self::cache::LayerCache;
use self::pass::{Context, norm};
use crate::tree::{Decoder, FeedForward, Layer, Mixer, Norm};

/// Embeddings [t, hidden] of these tokens.
pub(crate) fn embed(weights: &Decoder, tokens: &[u32], context: &Context) -> Tensor<2> {
    let ids: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
    let count = ids.len();
    // Every model has this vector, whatever its matrices are held in.
    let device = weights.head.norm.gamma.values().device().inner();
    let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [count]), &device);
    let x = match weights.embedding.weight() {
        Weight::Dense(embedding) => context.parameter(embedding).select(0, ids.clone()).cast(context.compute.dtype()),
        Weight::Packed(embedding) => {
            let like = Tensor::<1>::zeros([1], (&device, context.compute.dtype()));
            packed_rows(like, embedding.clone(), tokens.to_vec())
        }
    };
    let Some(branch) = &weights.embedding_lora else { return scaled(x, weights.embedding_scale) };
    // The columns of A that belong to the tokens. Tokens go through no dropout, as in PEFT.
    let (a, b) = (context.parameter(branch.a.dense()), context.parameter(branch.b.dense()));
    let low = a.select(1, ids).transpose().cast(context.compute.dtype());
    let x = operations::residual(x, operations::linear(low, b) * branch.scale);
    scaled(x, weights.embedding_scale)
}

/// x times a factor, which has the number type of activations, as in transformers.
fn scaled(x: Tensor<2>, factor: Option<f32>) -> Tensor<2> {
    match factor {
        Some(factor) => x * factor,
        None => x,
    }
}

/// All layers: x [t, hidden] -> [t, hidden]. `before` is called with the number and the input of
/// each layer. `caches` holds one cache for each layer.
pub(crate) fn layers(
    weights: &Decoder,
    x: Tensor<2>,
    context: &Context,
    mut caches: Option<&mut [LayerCache]>,
    before: &mut dyn FnMut(usize, &Tensor<2>),
) -> Tensor<2> {
    weights.layers.iter().enumerate().fold(x, |x, (n, weights)| {
        before(n, &x);
        let cache = caches.as_mut().map(|caches| &mut caches[n]);
        let is_cached = cache.is_some();
        let out = layer(weights, x, context, cache);
        // The few operations of a cached pass are submitted to a GPU together.
        if !is_cached {
            submit(&out.device());
        }
        out
    })
}

/// Hidden states [t, hidden] that come out of the last layer, of whole rows.
pub(crate) fn hidden(weights: &Decoder, tokens: &[u32], context: &Context) -> Tensor<2> {
    layers(weights, embed(weights, tokens, context), context, None, &mut |_, _| {})
}

/// One layer: x [t, hidden] -> [t, hidden]. With a cache, its keys and values come before those of
/// x.
pub(crate) fn layer(layer: &Layer, x: Tensor<2>, context: &Context, cache: Option<&mut LayerCache>) -> Tensor<2> {
    let read = normed(&layer.input_norm, x.clone(), context);
    let mixed = match &layer.mixer {
        Mixer::Attention(attention) => attention::forward(attention, read, context, cache),
        Mixer::Latent(attention) => latent::forward(attention, read, context, cache),
        Mixer::Convolution(convolution) => convolution::forward(convolution, read, context, cache),
        Mixer::Delta(net) => delta::forward(net, read, context, cache),
    };
    let x = operations::residual(x, scaled(normed(&layer.mixer_norm, mixed, context), layer.residual_scale));
    let read = normed(&layer.post_norm, x.clone(), context);
    let fed = match &layer.feed_forward {
        FeedForward::Gated(gated) => feed_forward::forward(gated, read, context),
        FeedForward::Fused(fused) => feed_forward::forward_fused(fused, read, context),
        FeedForward::Experts(mixture) => experts::forward(mixture, read, context),
    };
    operations::residual(x, scaled(normed(&layer.feed_forward_norm, fed, context), layer.residual_scale))
}

/// x through a norm, if there is one.
fn normed(norm_of_part: &Option<Norm>, x: Tensor<2>, context: &Context) -> Tensor<2> {
    match norm_of_part {
        Some(norm_of_part) => norm(norm_of_part, x, context),
        None => x,
    }
}
