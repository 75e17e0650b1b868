//! The operations on GPUs. Metal and Vulkan are one backend of burn's, CubeCL, and one set of
//! kernels here.
//!
//! The files named after operations implement [`crate::fused::Fused`]. Of the others, [`product`]
//! multiplies matrices, and [`reduce`], [`pointwise`] and [`heads`] are kernels written for this
//! crate. [`attention`] and [`cross_entropy`] work in pieces, so that neither all scores nor all
//! logits exist at once. A weight is a [`matrix::Matrix`], whose elements may be packed
//! ([`packed`]).

mod add;
mod attention;
mod by_head;
mod cross_entropy;
mod delta_rule;
pub(crate) mod devices;
mod experts;
mod gated;
mod heads;
mod linear;
mod lora_cross_entropy;
mod magnitude;
mod matrix;
mod norm;
mod packed;
mod packed_kernels;
mod packed_numbers;
mod pointwise;
mod product;
mod reduce;
mod rope;
mod short_convolution;
mod tensor;
pub(crate) mod watch;

use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

pub(crate) use packed::{PackedBuffers, dense_on};

use crate::fused::Contiguous;

impl Contiguous for CubeBackend {
    fn contiguous(tensor: CubeTensor) -> CubeTensor {
        tensor::contiguous(tensor)
    }

    fn multiplied(a: CubeTensor, b: CubeTensor) -> CubeTensor {
        product::product(&a, &b, DType::F32)
    }
}
