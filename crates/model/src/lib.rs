//! Decoder-only language models with LoRA: loading, forward and backward passes, adapters, merging, generation.
//!
//! Owns: what a Hugging Face model directory means, the parameters that are trained and their order
//! ([`Layout`]), PEFT's adapter format, merging.
//! Must never know: optimizers, ranks, steps.
//! Start reading at [`Model`] and [`decoder`]; families differ only in [`config`].
//!
//! Shape letters: `t` tokens (rows one after the other), `h` query heads, `k` key/value heads, `d` head dimension.

#![forbid(unsafe_code)]

pub mod adapter;
mod companions;
pub mod config;
mod decoder;
mod error;
mod extra;
mod finite;
mod generate;
mod gradients;
mod layout;
mod load;
mod lora;
pub mod merge;
mod model;
mod placement;
mod weights;

pub use adapter::{BaseCheck, BaseName, RecordedBase, base_digest};
pub use burn::tensor::Device;
pub use config::ModelConfig;
pub use error::ModelError;
pub use finetune_kernels::devices::{DeviceKind, FloatType, FoundDevice, HAS_GPU_BACKEND, gpus, note_panic};
pub use finetune_kernels::footprint;
pub use finetune_kernels::matmul::rate as matmul_rate;
pub use generate::{Generation, Sampling};
pub use layout::{Layout, Parameter};
pub use load::float_type;
pub use lora::{LoraTarget, LoraTargets, choose};
pub use model::{Batch, BatchRow, LossSum, Model, Randomness};
pub use placement::Placement;
pub use weights::expected_tensors;
