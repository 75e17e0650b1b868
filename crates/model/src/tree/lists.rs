//! What a config's tree holds, as lists: linear layers and tensors.

use super::{Decoder, Linear, Role};
use crate::config::ModelConfig;

/// A linear layer inside the decoder, as a config describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearLayer {
    /// Such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// What the layer is for.
    pub role: Role,
    /// Rows of its weight.
    pub outputs: usize,
    /// Columns of its weight.
    pub inputs: usize,
}

/// All linear layers inside the decoder, in model order: what `all-linear` means.
pub fn linear_layers(config: &ModelConfig) -> Vec<LinearLayer> {
    let describe = |linear: &mut Linear| {
        let [outputs, inputs] = linear.weight.shape;
        LinearLayer { module: linear.module.clone(), role: linear.role, outputs, inputs }
    };
    Decoder::new(config).linears().map(describe).collect()
}

/// The names of all linear layers inside the decoder, in model order.
pub fn linear_modules(config: &ModelConfig) -> Vec<String> {
    linear_layers(config).into_iter().map(|layer| layer.module).collect()
}

/// Name and shape of each tensor that a model of this config has, in model order.
pub fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    Decoder::new(config).slots().iter().map(|slot| (slot.name().to_owned(), slot.shape())).collect()
}
