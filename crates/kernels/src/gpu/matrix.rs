//! The weight of a product on a GPU: all elements in a tensor, or packed.

use std::ops::Range;

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::packed::{FEW_ROWS, PackedBuffers, buffers};
use super::pointwise::{gather_rows, scaled};
use super::product::{product, transposed};
use crate::weight::{Held, PackedWeight};

/// A matrix [o, i]. Cheap to clone.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "a few of a layer, each moved once or twice")]
pub(super) enum Matrix {
    /// All elements, in f32 or a 16-bit type.
    Dense(CubeTensor),
    /// In a few bits an element.
    Packed(PackedWeight),
}

impl Matrix {
    /// A frozen weight, whichever way it is held.
    pub(super) fn frozen(weight: &PackedWeight) -> Matrix {
        match &*weight.held {
            Held::DenseOnGpu(tensor) => Matrix::Dense(tensor.clone()),
            _ => Matrix::Packed(weight.clone()),
        }
    }

    /// [o, i]
    pub(super) fn shape(&self) -> [usize; 2] {
        match self {
            Matrix::Dense(tensor) => [tensor.shape()[0], tensor.shape()[1]],
            Matrix::Packed(weight) => buffers(weight).shape(),
        }
    }

    /// All elements in a number type. The tensor is not to be kept: it is the memory that a packed
    /// matrix saves.
    pub(super) fn in_type(&self, dtype: DType) -> CubeTensor {
        match self {
            Matrix::Dense(tensor) => scaled(tensor, dtype, 1.0),
            Matrix::Packed(weight) => buffers(weight).rows(0..self.shape()[0], dtype),
        }
    }

    /// Some rows in f32. `numbers` is u32 [o], 0 to o - 1.
    pub(super) fn rows_in_f32(&self, numbers: &CubeTensor, rows: Range<usize>) -> CubeTensor {
        match self {
            Matrix::Dense(tensor) => scaled(&gather_rows(tensor, numbers, rows.start, rows.len()), DType::F32, 1.0),
            Matrix::Packed(weight) => buffers(weight).rows(rows, DType::F32),
        }
    }

    /// `x Wᵀ`: [t, i] -> [t, o] in the number type of x.
    ///
    /// The number of rows of x and the type of W alone decide how. For a few rows, each element of
    /// a packed or 16-bit W is read once.
    pub(super) fn times(&self, x: &CubeTensor) -> CubeTensor {
        if (1..=FEW_ROWS).contains(&x.shape()[0]) {
            match self {
                Matrix::Packed(weight) => return buffers(weight).few_rows(x),
                Matrix::Dense(tensor) => {
                    if let Some(halves) = PackedBuffers::of_halves(tensor) {
                        return halves.few_rows(x);
                    }
                }
            }
        }
        product(x, &transposed(&self.in_type(x.dtype)), x.dtype)
    }
}
