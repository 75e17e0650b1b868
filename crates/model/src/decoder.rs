//! From tokens to the hidden states that come out of the last layer, for all families and passes.

pub(crate) mod adapted;
pub(crate) mod attention;
pub(crate) mod balance;
mod beside;
pub(crate) mod between;
pub(crate) mod cache;
mod convolution;
mod delta;
pub(crate) mod expert_use;
mod experts;
mod feed_forward;
pub(crate) mod head;
pub(crate) mod kept;
mod latent;
pub(crate) mod pass;
pub(crate) mod row_branches;

use burn::tensor::{Device, Int, Tensor, TensorData};
use finetune_kernels::devices::submit;
use finetune_kernels::weight::packed_rows;
use finetune_kernels::{Activation, Weight, operations};

use self::between::Between;
use self::cache::LayerCache;
use self::pass::{Context, bare_norm, linear, norm};
use crate::error::ModelError;
use crate::tree::{Decoder, FeedForward, Layer, Matrix, Mixer, Norm, OwnInput};

/// Embeddings [t, hidden] of these tokens.
///
/// # Errors
/// If rows of the embedding cannot be read from its file.
fn embed(weights: &Decoder, tokens: &[u32], context: &Context) -> Result<Tensor<2>, ModelError> {
    let x = rows_of(weights, &weights.embedding, tokens, context)?;
    let x = match weights.embedding_norm {
        Some(eps) => bare_norm(x, eps),
        None => x,
    };
    let Some(branch) = &weights.embedding_lora else { return Ok(scaled(x, weights.embedding_scale)) };
    let ids = indices(tokens, &device_of(weights));
    // The columns of A that belong to the tokens. Tokens go through no dropout, as in PEFT.
    let (a, b) = (context.parameter(branch.a.dense()), context.parameter(branch.b.dense()));
    let low = a.select(1, ids).transpose().cast(context.compute.dtype());
    let x = operations::residual(x, operations::linear(low, b) * branch.scale);
    Ok(scaled(x, weights.embedding_scale))
}

/// The device of a model.
fn device_of(weights: &Decoder) -> Device {
    // Every model has this vector, whatever its matrices are held in.
    weights.head.norm.gamma.values().device().inner()
}

/// Indices on a device, which have no gradient.
fn indices(values: &[u32], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.iter().map(|&value| value as i32).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), &device.clone().inner())
}

/// Rows of a matrix of the model, in the number type of activations.
fn rows_of(weights: &Decoder, matrix: &Matrix, rows: &[u32], context: &Context) -> Result<Tensor<2>, ModelError> {
    let device = device_of(weights);
    if let Some(by_row) = matrix.by_row() {
        let values = match &weights.source {
            Some(source) => source.rows(by_row, rows)?,
            None => by_row.read(rows)?,
        };
        let values = TensorData::new(values, [rows.len(), matrix.shape[1]]);
        return Ok(Tensor::<2>::from_data(values, &device).cast(context.compute.dtype()));
    }
    Ok(match matrix.weight() {
        Weight::Dense(values) => {
            context.parameter(values).select(0, indices(rows, &device)).cast(context.compute.dtype())
        }
        Weight::Packed(packed) => {
            let like = Tensor::<1>::zeros([1], (&device, context.compute.dtype()));
            packed_rows(like, packed.clone(), rows.to_vec())
        }
    })
}

/// x times a factor, which has the number type of activations, as in transformers.
fn scaled(x: Tensor<2>, factor: Option<f32>) -> Tensor<2> {
    match factor {
        Some(factor) => x * factor,
        None => x,
    }
}

/// All layers: x [t, hidden] -> [t, hidden]. `caches` holds one cache for each layer. Where several processes
/// hold the layers, only that of the last one has the result.
///
/// # Errors
/// If a layer cannot be read, or another process cannot be reached.
pub(crate) fn layers(
    weights: &Decoder,
    x: Tensor<2>,
    context: &Context,
    between: &mut Between,
    mut caches: Option<&mut [LayerCache]>,
) -> Result<Tensor<2>, ModelError> {
    let (mut x, held) = (x, weights.held());
    for (place, &n) in held.iter().enumerate() {
        let cache = caches.as_mut().map(|caches| &mut caches[n]);
        let is_cached = cache.is_some();
        // The next pass begins with the first.
        let read = weights.layer(n, Some(held[(place + 1) % held.len()]))?;
        let read_by_layer = weights.arrived(n.checked_sub(1), x)?;
        x = layer(&read, n, read_by_layer, context, between, cache)?;
        weights.expect_experts()?;
        weights.leave(Some(n + 1), &x)?;
        // The few operations of a cached pass are submitted to a GPU together.
        if !is_cached {
            submit(&x.device());
        }
    }
    Ok(x)
}

/// Hidden states [t, hidden] that come out of the last layer, of whole rows.
///
/// # Errors
/// As [`begin`].
pub(crate) fn hidden(weights: &Decoder, tokens: &[u32], context: &Context) -> Result<Tensor<2>, ModelError> {
    let (x, mut between) = begin(weights, tokens, context)?;
    layers(weights, x, context, &mut between, None)
}

/// Embeddings [t, hidden] of these tokens, and what layers hand to each other. A process without the first layer has
/// zeros in their place, and reads the outputs of the layer before its own.
///
/// # Errors
/// If rows of a matrix cannot be read from its file.
pub(crate) fn begin(weights: &Decoder, tokens: &[u32], context: &Context) -> Result<(Tensor<2>, Between), ModelError> {
    // Where layers have inputs of their own, all processes need the embeddings.
    let is_needed = weights.per_layer.is_some() || weights.layers.is_empty() || weights.holds(0);
    let x = match is_needed && !weights.embedding.is_absent() {
        true => embed(weights, tokens, context)?,
        false => {
            let shape = [tokens.len(), weights.embedding.shape[1]];
            Tensor::zeros(shape, (&device_of(weights), context.compute.dtype()))
        }
    };
    let rows = match &weights.per_layer {
        None => None,
        Some(per_layer) => Some(rows_for_layers(weights, &per_layer.table, tokens, context)?),
    };
    let between = Between::new(weights, &x, rows, context);
    Ok((x, between))
}

/// The tokens' rows of the table that the layers' own inputs are made of. A token without a row has that of
/// token 0.
fn rows_for_layers(
    weights: &Decoder,
    table: &Matrix,
    tokens: &[u32],
    context: &Context,
) -> Result<Tensor<2>, ModelError> {
    let vocabulary = table.shape[0];
    let known = |&token: &u32| if (token as usize) < vocabulary { token } else { 0 };
    let rows: Vec<u32> = tokens.iter().map(known).collect();
    rows_of(weights, table, &rows, context)
}

/// One layer: x [t, hidden] -> [t, hidden]. With a cache, its keys and values come before those of
/// x.
///
/// # Errors
/// If another process that holds a slice of the layer cannot be reached.
pub(crate) fn layer(
    layer: &Layer,
    n: usize,
    x: Tensor<2>,
    context: &Context,
    between: &mut Between,
    mut cache: Option<&mut LayerCache>,
) -> Result<Tensor<2>, ModelError> {
    let read = normed(&layer.input_norm, x.clone(), context);
    let mixed = match &layer.mixer {
        Mixer::Attention(attention) => attention::forward(attention, n, read, context, cache.as_deref_mut(), between),
        Mixer::Latent(attention) => latent::forward(attention, read, context, cache.as_deref_mut()),
        Mixer::Convolution(convolution) => convolution::forward(convolution, read, context, cache.as_deref_mut()),
        Mixer::Delta(net) => delta::forward(net, read, context, cache.as_deref_mut()),
    };
    if let Some(cache) = cache {
        cache.forget();
    }
    let mixed = context.summed(mixed)?;
    let x = operations::residual(x, scaled(normed(&layer.mixer_norm, mixed, context), layer.residual_scale));
    let read = normed(&layer.post_norm, x.clone(), context);
    let fed = match &layer.feed_forward {
        FeedForward::Gated(gated) => context.summed(feed_forward::forward(gated, read, context))?,
        FeedForward::Fused(fused) => context.summed(feed_forward::forward_fused(fused, read, context))?,
        FeedForward::Experts(mixture) => context.summed(experts::forward(mixture, read, context))?,
        FeedForward::Beside(beside) => beside::forward(beside, read, x.clone(), context)?,
    };
    let x = operations::residual(x, scaled(normed(&layer.feed_forward_norm, fed, context), layer.residual_scale));
    let x = match &layer.own_input {
        Some(own) => operations::residual(x.clone(), own_input(own, x, between.input_of(n), context)),
        None => x,
    };
    Ok(match &layer.scale {
        Some(scale) => x.clone() * context.parameter(scale.values()).cast(x.dtype()).unsqueeze(),
        None => x,
    })
}

/// What a layer adds for its own input [t, width]: x [t, hidden] -> [t, hidden].
fn own_input(own: &OwnInput, x: Tensor<2>, input: Tensor<2>, context: &Context) -> Tensor<2> {
    let gated = operations::gated(linear(&own.gate, x, context), input, Activation::GeluTanh);
    norm(&own.norm, linear(&own.projection, gated, context), context)
}

/// x through a norm, if there is one.
fn normed(norm_of_part: &Option<Norm>, x: Tensor<2>, context: &Context) -> Tensor<2> {
    match norm_of_part {
        Some(norm_of_part) => norm(norm_of_part, x, context),
        None => x,
    }
}
