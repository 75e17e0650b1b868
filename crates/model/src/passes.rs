//! The passes over a model: losses and logits of whole rows, gradients, and text token by token.
//! Each is a part of `impl Model`.

pub(crate) mod backward;
mod cache_bytes;
pub(crate) mod choices;
pub(crate) mod engine;
pub(crate) mod form;
mod forward;
pub(crate) mod generate;
mod generate_ahead;
pub(crate) mod generate_rows;
mod handed;
mod layer_by_layer;
pub(crate) mod lookup;
mod prompts;
pub(crate) mod sampling;
mod scoring;
pub(crate) mod sharing;
pub(crate) mod token_rules;
