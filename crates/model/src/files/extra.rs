//! Tensors of a model's files that its config does not ask for.
//!
//! transformers lists them and goes on. So does this program, unless the tensor would take part in
//! the arithmetic of a decoder. A bias, a norm, another layer and scales of packed weights would.
//! Then config and weights do not belong together.

use std::collections::BTreeSet;

use finetune_store::{TensorSet, TensorView};

use crate::config::{ModelConfig, Rope};
use crate::error::ModelError;
use crate::files::floats::{float_type, to_f32};
use crate::tree::expected_tensors;

/// What an extra tensor means.
enum Extra {
    /// Its content is known already.
    Known,
    /// No part of the model uses it.
    Unused,
    /// The model that it was made for computes with it.
    Meant,
}

/// Names of the extra tensors that are passed over; an error for one that must not be. `parts`: names
/// of those that packed matrices are made of.
pub(crate) fn passed_over(
    files: &TensorSet,
    config: &ModelConfig,
    parts: &BTreeSet<String>,
    directory: &std::path::Path,
) -> Result<Vec<String>, ModelError> {
    let expected = expected_tensors(config);
    let known: BTreeSet<&str> = expected.iter().map(|(name, _)| name).chain(parts).map(String::as_str).collect();
    let (mut unused, mut meant) = (Vec::new(), Vec::new());
    for view in files.names().filter(|name| !known.contains(name)).filter_map(|name| files.get(name)) {
        match kind(&view, config)? {
            Extra::Known => {}
            Extra::Unused => unused.push(view.name.to_owned()),
            Extra::Meant => meant.push(view.name.to_owned()),
        }
    }
    match meant.as_slice() {
        [] => Ok(unused),
        [first, rest @ ..] => {
            let more = if rest.is_empty() { String::new() } else { format!(" (and {} more)", rest.len()) };
            let (path, family) = (directory.to_owned(), config.family.architecture);
            Err(ModelError::ExtraTensor { path, name: first.clone(), family, more })
        }
    }
}

/// What this extra tensor means.
fn kind(view: &TensorView<'_>, config: &ModelConfig) -> Result<Extra, ModelError> {
    let name = view.name;
    // A tied output layer stored a second time: `ModelConfig::load` has compared them.
    if config.tied_embeddings && name == "lm_head.weight" {
        return Ok(Extra::Known);
    }
    if view.size() == 0 {
        return Ok(Extra::Unused);
    }
    if name.ends_with(".rotary_emb.inv_freq") {
        return Ok(if are_frequencies(view, config)? { Extra::Known } else { Extra::Unused });
    }
    if is_of_idle_layer(name, config) {
        return Ok(Extra::Unused);
    }
    let inside = name.starts_with("model.") || name.starts_with("lm_head.");
    let last = name.rsplit('.').next().unwrap_or(name);
    // Causal masks of old exports are called `bias` and have four dimensions.
    let is_mask = last == "bias" && view.shape.len() > 2;
    Ok(if inside && is_parameter(last) && !is_mask { Extra::Meant } else { Extra::Unused })
}

/// Whether a tensor is of a layer that predicts further tokens.
fn is_of_idle_layer(name: &str, config: &ModelConfig) -> bool {
    let number = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    let layers = config.layers.len();
    number.is_some_and(|number| (layers..layers + config.idle_layers).contains(&number))
}

/// Whether outputs depend on a tensor of this name: weights and biases, and the parts of packed
/// ones.
fn is_parameter(last: &str) -> bool {
    const PACKED: [&str; 8] = ["qweight", "qzeros", "scales", "biases", "g_idx", "absmax", "blocks", "quant_map"];
    last == "weight" || last == "bias" || last.starts_with("weight_") || PACKED.contains(&last)
}

/// Whether the rotary frequencies that old exports carry are those of the config, to the precision
/// of 16 bits.
fn are_frequencies(view: &TensorView<'_>, config: &ModelConfig) -> Result<bool, ModelError> {
    let Some(own) = config.ropes.first().map(Rope::frequencies) else { return Ok(false) };
    if view.size() / view.dtype.size() != own.len() || float_type(view.dtype).is_none() {
        return Ok(false);
    }
    let stored = to_f32(view)?;
    // 2^-7 is one unit in the last place of bf16. 1e-7 is what f16 rounds small frequencies to.
    Ok(stored.iter().zip(&own).all(|(a, b)| (a - b).abs() <= b.abs() / 128.0 + 1e-7))
}
