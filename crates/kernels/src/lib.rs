//! The few operations that training spends its time in, each as one fused operation with a hand-written backward pass.
//!
//! Owns: matrix products over threads, LoRA linear, RMS norm, rotary embedding, causal attention over
//! rows of unequal length, SwiGLU, cross-entropy on trained positions only.
//! Must never know: models, files, recipes.
//! Start reading at [`operations`] (what the model calls), then [`composed`] (the same maths in plain
//! tensor operations: the reference of the tests). `extension` makes the operations differentiable; each backend brings
//! its own forward and backward passes: the CPU's in the files named after the operations, the GPUs' in `gpu`.
//!
//! Shape letters used in names: `t` tokens of a micro-batch (all rows one after the other, no padding),
//! `i` inputs, `o` outputs, `r` LoRA rank, `h` query heads, `k` key/value heads, `d` head dimension, `v` vocabulary.

mod attention;
mod buffer;
pub mod composed;
mod cross_entropy;
pub mod devices;
mod extension;
mod flex;
pub mod footprint;
mod fused;
#[cfg(any(feature = "gpu", target_os = "macos"))]
mod gpu;
mod halves;
mod linear;
pub mod matmul;
mod norm;
mod on_device;
pub mod operations;
mod rope;
mod segments;
mod simd;
mod swiglu;

pub use attention::AttentionShape;
pub use cross_entropy::Targets;
pub use devices::{DeviceKind, FloatType, FoundDevice};
pub use linear::Dropout;
pub use rope::RopeTable;
pub use segments::{Segment, Segments};
