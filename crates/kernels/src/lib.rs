//! The few operations that training spends its time in. Each is one fused operation with a
//! hand-written backward pass.
//!
//! Owns: matrix products over threads, LoRA linear, RMS norm, rotary embedding, causal attention
//! over rows of unequal length, gated units, products by expert and by head, branches of some rows, the gated delta rule,
//! cross-entropy on trained positions only.
//! Must never know: models, files, recipes.
//! Start reading at [`operations`] (the table of what the model calls), then [`composed`] (the same
//! maths in plain tensor operations: the reference of the tests). `fused` says what a backend
//! brings for an operation: the CPU's passes are in `cpu`, the GPUs' in `gpu`. `extension` makes
//! them differentiable.
//!
//! Shape letters used in names: `t` tokens of a micro-batch (all rows one after the other, no
//! padding), `s` keys, `i` inputs, `o` outputs, `f` features of a feed-forward layer, `r` LoRA
//! rank, `h` query heads, `k` key/value heads, `d` head dimension, `v` vocabulary.

#![warn(missing_docs)]

mod arguments;
pub mod by_head;
mod chunked;
pub mod composed;
mod cpu;
mod delta;
pub mod devices;
mod dispatch;
mod extension;
pub mod footprint;
mod found_device;
mod fused;
#[cfg(gpu_backend)]
mod gpu;
mod mixers;
mod on_device;
pub mod operations;
pub mod processor;
pub mod product_time;
pub mod row_branch;
mod segments;
mod shelf;
pub mod weight;

pub use arguments::{Activation, AttentionShape, Dropout, RopeTable, Targets};
pub use by_head::HeadRows;
pub use cpu::few_rows::FEW_ROWS;
pub use cpu::matmul;
pub use delta::DeltaShape;
pub use devices::{DeviceKind, FloatType, FoundDevice};
pub use dispatch::{Dispatch, ExpertWeights, Scores};
pub use extension::LatePart;
pub use mixers::attention;
pub use segments::{Segment, Segments};
pub use shelf::Shelf;
pub use weight::{FrozenValues, PackedWeight, Weight};
