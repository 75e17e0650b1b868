//! The operations on the CPU, on tensors of burn's backend Flex.
//!
//! Each file implements [`crate::fused::Fused`] for the operations that it is named after. They
//! stand on [`matmul`] (matrix products over threads) and `simd` (rows of numbers).

mod add;
mod attention;
pub(crate) mod bf16_product;
mod buffer;
mod by_head;
mod cross_entropy;
mod delta_rule;
mod dropout;
mod experts;
pub(crate) mod few_rows;
mod gated;
mod linear;
mod lora_cross_entropy;
mod magnitude;
pub mod matmul;
mod norm;
mod one_query;
mod packed_rows;
mod rope;
mod short_convolution;
mod simd;
pub(crate) mod weight;

use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use burn_flex::FlexTensor;

use crate::fused::Contiguous;

impl Contiguous for Flex {
    fn contiguous(tensor: FlexTensor) -> FlexTensor {
        buffer::contiguous(tensor)
    }

    fn multiplied(a: FlexTensor, b: FlexTensor) -> FlexTensor {
        Flex::float_matmul(a, b)
    }
}
