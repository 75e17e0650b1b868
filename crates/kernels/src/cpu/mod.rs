//! The operations on the CPU, on tensors of burn's backend Flex.
//!
//! Each file implements [`crate::fused::Fused`] for the operations that it is named after. They
//! stand on [`matmul`] (matrix products over threads) and `simd` (rows of numbers).

mod add;
mod attention;
mod buffer;
mod cross_entropy;
mod dropout;
pub(crate) mod half_weights;
mod linear;
mod lora_cross_entropy;
mod magnitude;
pub mod matmul;
mod norm;
mod one_query;
mod rope;
mod simd;
mod swiglu;

use burn::backend::Flex;
use burn_flex::FlexTensor;

use crate::fused::Contiguous;

impl Contiguous for Flex {
    fn contiguous(tensor: FlexTensor) -> FlexTensor {
        buffer::contiguous(tensor)
    }
}
