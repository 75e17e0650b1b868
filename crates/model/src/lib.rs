//! Decoder-only language models with LoRA: loading, forward and backward passes, adapters, merging, generation.
//!
//! Owns: what a Hugging Face model directory means, the parameters that are trained and their order
//! ([`Layout`]), PEFT's adapter format, merging.
//! Must never know: optimizers, ranks, steps.
//! Start reading at [`Model`] and [`decoder`]; families differ only in [`config`].
//!
//! Shape letters: `t` tokens (rows one after the other), `h` query heads, `k` key/value heads, `d` head dimension.

#![forbid(unsafe_code)]

mod adapted;
pub mod adapter;
mod attention;
mod batch;
mod cache;
mod companions;
pub mod config;
mod decoder;
mod error;
mod extra;
mod family;
mod feed_forward;
mod finite;
mod floats;
mod forward;
mod generate;
mod gradients;
mod head;
mod kept;
mod layout;
mod load;
mod lora;
pub mod merge;
mod model;
mod parameters;
mod pass;
mod placement;
mod random_stream;
mod read_config;
mod readback;
mod text_file;
mod tree;

pub use adapter::{BaseCheck, BaseName, RecordedBase, base_digest};
pub use attention::AttentionWidths;
pub use batch::{Batch, BatchRow, LossSum, Randomness};
pub use burn::tensor::Device;
pub use config::ModelConfig;
pub use error::ModelError;
pub use family::Family;
pub use finetune_kernels::devices::{DeviceKind, FloatType, FoundDevice, HAS_GPU_BACKEND, gpus, note_panic};
pub use finetune_kernels::footprint;
pub use finetune_kernels::matmul::rate as matmul_rate;
pub use floats::float_type;
pub use generate::{Generation, Sampling};
pub use gradients::{Backward, Coefficients};
pub use kept::{LayerKept, kept_layers};
pub use layout::{Layout, Parameter, encode_flat, read_flat};
pub use lora::{LoraTarget, LoraTargets, choose};
pub use model::Model;
pub use placement::Placement;
pub use tree::{LinearLayer, Role, Split, expected_tensors, linear_layers, linear_modules};
