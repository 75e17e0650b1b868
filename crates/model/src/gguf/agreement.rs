//! Whether llama.cpp takes the keys of a file as they are meant. Much of a model stands in no key, and llama.cpp
//! takes it for granted: which layers have a window, how routers weigh experts. So what is going to be written
//! is read as a base is read, and compared with the model.

use std::path::Path;

use finetune_gguf::{Metadata, TensorInfo, TensorType};

use crate::config::{LayerConfig, MixerKind, ModelConfig, Rope, RopeScaling};
use crate::error::ModelError;
use crate::gguf::metadata::has_dense_part;
use crate::gguf::place::refused;
use crate::gguf::read_config::{Described, Header, Keys};

/// How far rotary frequencies may differ, relative to them: a file has them in other forms.
const TOLERANCE: f32 = 1e-3;

/// What a file is going to begin with.
pub(super) struct Planned<'a> {
    pub(super) metadata: &'a Metadata,
    pub(super) tensors: &'a [TensorInfo],
    /// Tensors of factors of rotary frequencies, but Llama 3's.
    pub(super) factors: &'a [(&'static str, Vec<f32>)],
}

impl Header for Planned<'_> {
    fn metadata(&self) -> &Metadata {
        self.metadata
    }

    fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        let factors = self.factors.iter().find(|(known, _)| *known == name);
        Ok(TensorType::F32.encode(factors.map_or(&[][..], |(_, numbers)| numbers))?)
    }
}

/// Compares a model with what is read of its file's beginning. `context`: tokens of the longest text in the file.
/// Llama 3's factors of frequencies are left out of both: they are in the file as numbers.
///
/// # Errors
/// [`ModelError::NotExpressible`] for what differs.
pub(super) fn expect_agreement(
    config: &ModelConfig,
    planned: &Planned<'_>,
    context: usize,
    path: &Path,
) -> Result<(), ModelError> {
    let ropes = config.ropes.iter().map(|rope| match rope.scaling {
        RopeScaling::Llama3 { .. } => Rope { scaling: RopeScaling::None, ..rope.clone() },
        _ => rope.clone(),
    });
    let config = &ModelConfig { ropes: ropes.collect(), ..config.clone() };
    let described = Keys::of(planned, path).and_then(|keys| keys.describe());
    let theirs = described.and_then(|Described { config, .. }| ModelConfig::parse(&config.to_string(), path));
    let theirs = theirs.map_err(|error| match error {
        ModelError::GgufBase { what, .. } => refused(&what),
        other => other,
    })?;
    match difference(config, &theirs, context) {
        None => Ok(()),
        Some(what) => Err(refused(&what)),
    }
}

/// The first thing in which two models differ, in words.
fn difference(ours: &ModelConfig, theirs: &ModelConfig, context: usize) -> Option<String> {
    let told = |what: &str, ours: &str, theirs: &str| {
        Some(format!("{what}: {ours} in this model, {theirs} by the keys that its file would have"))
    };
    let pairs = facts(ours).into_iter().zip(facts(theirs));
    if let Some(((what, ours), (_, theirs))) = pairs.into_iter().find(|(ours, theirs)| ours.1 != theirs.1) {
        return told(what, &ours, &theirs);
    }
    if let Some((n, (ours, theirs))) =
        ours.ropes.iter().zip(&theirs.ropes).enumerate().find(|(_, (ours, theirs))| !turn_alike(ours, theirs, context))
    {
        return told(&format!("rotary embedding {n}"), &format!("{ours:?}"), &format!("{theirs:?}"));
    }
    for (n, (our_layer, their_layer)) in ours.layers.iter().zip(&theirs.layers).enumerate() {
        let (our_layer, their_layer) = (of_layer(ours, our_layer, context), of_layer(theirs, their_layer, context));
        if our_layer != their_layer {
            return told(&format!("layer {n}"), &our_layer, &their_layer);
        }
    }
    None
}

/// What decides what a model computes, but for its layers and rotary embeddings.
fn facts(config: &ModelConfig) -> Vec<(&'static str, String)> {
    let experts = config.experts.as_ref().filter(|_| config.layers.iter().any(|layer| layer.has_experts));
    let experts = experts.map(|experts| {
        let weights = experts.weights;
        let sizes = (experts.count, experts.choices, experts.intermediate_size, experts.groups, experts.shared);
        (sizes, weights.scores, weights.normalized.is_some(), weights.scale)
    });
    let experts = experts.map(|((count, choices, width, groups, shared), scores, is_normalized, scale)| {
        format!(
            "{choices} of {count} experts of {width} elements, groups {groups:?}, shared {shared:?}, {scores:?}, \
             divided by their sum {is_normalized}, times {scale}"
        )
    });
    let biases = (config.qkv_bias, config.output_bias);
    vec![
        ("layers", config.layers.len().to_string()),
        ("hidden_size", config.hidden_size.to_string()),
        ("num_attention_heads", config.heads.to_string()),
        ("vocab_size", config.vocabulary.to_string()),
        ("rms_norm_eps", (config.rms_norm_eps as f32).to_string()),
        ("the factor of attention's scores", config.score_scale.to_string()),
        ("the factor of embeddings", config.embedding_scale.unwrap_or(1.0).to_string()),
        ("the factor of what parts add", config.residual_scale.unwrap_or(1.0).to_string()),
        ("the divisor of logits", config.logits_divisor.unwrap_or(1.0).to_string()),
        ("the bounds of scores and logits", format!("{:?}", (config.score_cap, config.logits_cap))),
        ("the activation", format!("{:?}", config.activation)),
        ("biases of attention's projections", format!("{biases:?}")),
        ("norms of queries and keys", config.query_key_norm.to_string()),
        ("an output layer that is the embedding", config.tied_embeddings.to_string()),
        ("delta nets", format!("{:?}", config.delta)),
        ("convolutions", format!("{:?}", config.convolution)),
        ("latent attention", format!("{:?}", config.latent)),
        ("inputs of layers", format!("{:?}", config.per_layer)),
        ("experts", experts.unwrap_or_else(|| "none".to_owned())),
        ("rotary embeddings", config.ropes.len().to_string()),
    ]
}

/// What a layer is like. A window that is as long as the longest text is none.
fn of_layer(config: &ModelConfig, layer: &LayerConfig, context: usize) -> String {
    let mixer = match layer.mixer {
        MixerKind::Attention => {
            let window =
                layer.window.filter(|&window| window < context).map(|window| format!(" in a window of {window}"));
            let positions =
                layer.rope.map_or("without rotary embedding".to_owned(), |n| format!("rotary embedding {n}"));
            format!(
                "attention{} with {} key/value heads of {}, {positions}, values {:?}",
                window.unwrap_or_default(),
                layer.key_value_heads,
                layer.head_dim,
                layer.values
            )
        }
        other => format!("{other:?}"),
    };
    let dense = has_dense_part(config, layer.has_experts);
    let width = if dense { layer.intermediate_size } else { 0 };
    format!("{mixer}; experts {}, {width} elements in the dense part", layer.has_experts)
}

/// Whether two rotary embeddings turn alike, in rows up to the context's length.
fn turn_alike(ours: &Rope, theirs: &Rope, context: usize) -> bool {
    let near = |(ours, theirs): (f32, f32)| (ours - theirs).abs() <= TOLERANCE * theirs.abs();
    let alike = |is_long: bool| ours.frequencies_of(is_long).into_iter().zip(theirs.frequencies_of(is_long)).all(near);
    ours.width == theirs.width
        && ours.growth == theirs.growth
        && ours.is_long(context) == theirs.is_long(context)
        && near((ours.factor(0), theirs.factor(0)))
        && alike(false)
        && alike(true)
}
