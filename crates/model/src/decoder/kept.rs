//! What the backward pass keeps of each token, layer by layer: the part of a memory estimate that
//! only the decoder knows. Each variant counts its own tensors, beside the code that makes them.

use finetune_kernels::footprint::DeltaSizes;

use crate::adaptation::Adaptation;
use crate::branch::EMBEDDING;
use crate::config::ModelConfig;
use crate::decoder::adapted::Adapted;
use crate::decoder::attention::AttentionWidths;
use crate::tree::{Decoder, FeedForward, Layer, Mixer, Norm};

/// What a layer that is differentiated keeps of each token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerKept {
    /// Elements, in the number type of activations, that the mixer and its norm keep.
    pub mixer: u64,
    /// The same for the feed-forward part and its norm.
    pub feed_forward: u64,
    /// The same for LoRA branches: the product of the input with each A, and what DoRA keeps.
    pub branches: u64,
    /// f32 numbers that norms and attention keep.
    pub statistics: u64,
    /// Elements that the backward pass of the feed-forward part takes on top while it runs.
    pub taken: u64,
    /// The widths of its attention, for the memory that attention itself takes.
    pub attention: AttentionWidths,
    /// The sizes of its gated delta rule, likewise.
    pub delta: Option<DeltaSizes>,
}

/// What the layers from the lowest trained one on keep. The layers below are not differentiated.
/// `adaptation`: what is trained; `None` if all weights are.
pub fn kept_layers(config: &ModelConfig, adaptation: Option<&Adaptation>) -> Vec<LayerKept> {
    let adapted = Adapted::new(adaptation);
    let mut decoder = Decoder::new(config);
    let of_inputs = decoder.per_layer.as_ref().is_some_and(|per_layer| adapted.has(&per_layer.projection));
    let from_tokens = adapted.saves(&decoder.embedding.name) || adapted.branch(EMBEDDING).is_some() || of_inputs;
    let layers = &mut decoder.layers;
    let is_trained = |layer: &mut Layer| {
        layer.linears().iter().any(|linear| adapted.has(linear))
            || layer.places().iter().any(|place| adapted.branch(place.module).is_some())
            || layer.slots().iter().any(|slot| adapted.saves(slot.name()))
    };
    let first = layers.iter_mut().position(is_trained).unwrap_or(layers.len());
    let first = if from_tokens { 0 } else { first };
    layers[first..].iter_mut().map(|layer| kept(layer, config.hidden_size as u64, &adapted)).collect()
}

/// Elements that a layer keeps for its own input: the input, the gate before and behind it, what the norm
/// reads; and what comes out of the layer before it is scaled.
fn own_input(layer: &Layer, hidden: u64) -> u64 {
    let of_input = layer.own_input.as_ref().map_or(0, |own| 3 * own.gate.weight.shape[0] as u64 + hidden);
    of_input + if layer.scale.is_some() { hidden } else { 0 }
}

fn kept(layer: &mut Layer, hidden: u64, adapted: &Adapted<'_>) -> LayerKept {
    // A token goes through some of the experts' branches only: those are in `experts.kept`.
    let linears = layer.linears();
    let branches = linears.iter().filter(|linear| !linear.weight.is_of_expert).map(|linear| adapted.of_branch(linear));
    let branches = branches.sum();
    let (of_mixer, of_mixer_in_f32, widths) = match &layer.mixer {
        Mixer::Attention(attention) => (attention.kept(adapted), attention.statistics(), attention.widths()),
        Mixer::Latent(latent) => (latent.kept(adapted), latent.statistics(), latent.widths()),
        Mixer::Convolution(convolution) => (convolution.kept(adapted), 0, AttentionWidths::NONE),
        Mixer::Delta(net) => (net.kept(adapted), 0, AttentionWidths::NONE),
    };
    let (kept, taken, statistics) = match &layer.feed_forward {
        FeedForward::Gated(gated) => (gated.kept(adapted), gated.taken(), 0),
        FeedForward::Fused(fused) => (fused.kept(adapted), fused.taken(), 0),
        FeedForward::Beside(beside) => (beside.kept(adapted), beside.taken(), beside.statistics()),
        FeedForward::Experts(experts) => (experts.kept(adapted), experts.taken(), experts.statistics()),
    };
    let norms = |norms: [&Option<Norm>; 2]| norms.iter().filter(|norm| norm.is_some()).count() as u64;
    let of_parts = [norms([&layer.input_norm, &layer.mixer_norm]), norms([&layer.post_norm, &layer.feed_forward_norm])];
    LayerKept {
        // Each norm keeps its input, and one number of each token.
        mixer: of_parts[0] * hidden + of_mixer,
        feed_forward: of_parts[1] * hidden + kept + own_input(layer, hidden),
        branches,
        statistics: of_mixer_in_f32 + statistics + of_parts.iter().sum::<u64>(),
        // On top of that, gradients of the residual stream.
        taken: taken + 2 * hidden,
        attention: widths,
        delta: if let Mixer::Delta(net) = &layer.mixer { Some(net.sizes()) } else { None },
    }
}
