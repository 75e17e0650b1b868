//! Decoder-only language models with LoRA: loading, forward and backward passes, adapters, merging,
//! generation.
//!
//! Owns: what a Hugging Face model directory means, the parameters that are trained and their order
//! ([`Layout`]), PEFT's adapter format, merging.
//! Must never know: optimizers, ranks, steps.
//! Start reading at [`Model`] and `tree`, then `decoder`. Families differ in [`config`] only.
//!
//! Shape letters: `t` tokens (rows one after the other), `h` query heads, `k` key/value heads, `d`
//! head dimension, `v` tokens of the vocabulary, `n` targets, `o` and `i` outputs and inputs of a
//! linear layer, `r` rank of a branch.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod adaptation;
pub mod adapter;
mod batch;
mod branch;
pub mod config;
mod decoder;
mod error;
mod files;
mod flat_file;
pub mod gguf;
mod layer_source;
mod layout;
mod lora;
pub mod merge;
mod model;
mod parameters;
mod passes;
mod placement;
mod product_rates;
mod random_stream;
mod readback;
mod slice;
mod spread;
mod stage;
mod tree;
mod vocabulary;

pub use adaptation::{Adaptation, TargetLayer, choose, target_layers};
pub use adapter::{BaseCheck, BaseFile, BaseName, RecordedBase, base_digest, base_digest_of, base_files};
pub use batch::{Batch, BatchRow, LossSum, Randomness};
pub use burn::tensor::Device;
pub use config::ModelConfig;
pub use config::family::Family;
pub use decoder::attention::AttentionWidths;
pub use decoder::cache::KeyValueCache;
pub use decoder::expert_use::ExpertCounts;
pub use decoder::kept::{LayerKept, kept_layers};
pub use error::ModelError;
pub use files::base_files::{stated_type, stored_type};
pub use files::config_alone::{assumed_of_packing, stated_packing};
pub use files::finite::expect_finite_file;
pub use files::floats::float_type;
pub use files::packing::{BaseForm, ExpertSizes, LayerSizes, PackedSizes, scheme_named, scheme_word};
pub use finetune_kernels::devices::{
    DeviceKind, FloatType, FoundDevice, HAS_GPU_BACKEND, gpus, note_panic, product_rate,
};
pub use finetune_kernels::footprint;
pub use finetune_kernels::matmul::rate as matmul_rate;
pub use finetune_kernels::processor;
pub use finetune_packed::Scheme;
pub use finetune_packed::files::PackedConfig;
pub use flat_file::{FlatFile, FlatReader};
pub use layer_source::{DiskWait, EXPERTS_IN_MEMORY, tell_of_disk_waits};
pub use layout::{Layout, Parameter};
pub use lora::{LoraTarget, LoraTargets};
pub use merge::quantize_model;
pub use model::{Model, OpenedBase};
pub use passes::backward::{Backward, Coefficients, Part};
pub use passes::engine::{
    Engine, EngineCounts, EngineEnd, EngineEvent, EngineRequest, EngineSettings, Listener, PassCounts, Refusal,
};
pub use passes::form::Form;
pub use passes::generate::{Generation, GenerationStep};
pub use passes::generate_rows::{MOST_AHEAD, RowRequest};
pub use passes::lookup::Speculated;
pub use passes::sampling::Sampling;
pub use passes::token_rules::{ChosenToken, Logprobs, TokenRules};
pub use placement::Placement;
pub use product_rates::{ProductRates, product_rates};
pub use slice::{Slice, Sums, not_in_slices, slice_bytes};
pub use spread::{Held, Spread, TrainedElements};
pub use stage::{Arrangement, Hops, Order, Pass, Seconds, Simulated, Stage, not_in_stages};
pub use tree::{LinearLayer, Role, Split, expected_tensors, linear_layers, linear_modules};
