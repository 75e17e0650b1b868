//! A LoRA branch of some rows of a product: rows with different adapters go through one matrix together, and
//! each through its own branch.

use std::ops::Range;

use burn::tensor::Tensor;

use crate::devices::is_cpu;
use crate::{composed, operations};

/// `y` with `scale · x Aᵀ Bᵀ` added to these rows: y [t, o], x [t, i], a [r, i], b [o, r] -> [t, o]. It has no
/// gradient.
///
/// On the CPU a row has the bits that [`operations::lora_linear`] of these rows alone gives it, as long as its
/// row of `y` has those of [`operations::linear`] of these rows alone.
///
/// # Panics
/// If the sizes do not fit, a row is beyond y, or a gradient is required.
pub fn add_low_rank(
    y: Tensor<2>,
    x: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    rows: Range<usize>,
    scale: f32,
) -> Tensor<2> {
    let (tokens, inputs) = (y.dims()[0], a.dims()[1]);
    assert!(rows.start <= rows.end && rows.end <= tokens, "rows {rows:?} of {tokens}");
    assert!(x.dims() == [tokens, inputs], "an input of {inputs} elements for each of {tokens} rows");
    if rows.is_empty() {
        return y;
    }
    match is_cpu(&y.device()) {
        true => operations::add_low_rank(y, x, a, b, rows, scale),
        false => composed::add_low_rank(y, x, a, b, rows, scale),
    }
}
