//! Tensors of any backend, with the operations that formulas of matrices are written in.
//!
//! Arithmetic is f32. Shapes broadcast as burn's do. Matrices are the last two dimensions.

use std::ops::{Add, Mul, Range, Sub};

use burn::backend::TensorMetadata;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, FloatDType, Shape, Slice, TensorData};

use crate::fused::Contiguous;

/// A tensor of f32. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Array<B: Contiguous>(FloatTensor<B>);

/// Which rows [`Array::rows`] takes, on the device.
#[derive(Clone, Debug)]
pub(crate) struct Rows<B: Contiguous>(IntTensor<B>);

impl<B: Contiguous> Array<B> {
    /// The tensor in f32.
    pub(crate) fn of(tensor: FloatTensor<B>) -> Array<B> {
        Array(if tensor.dtype() == DType::F32 { tensor } else { B::float_cast(tensor, FloatDType::F32) })
    }

    /// The tensor in a number type.
    pub(crate) fn into_type(self, dtype: DType) -> FloatTensor<B> {
        if dtype == DType::F32 { self.0 } else { B::float_cast(self.0, dtype.into()) }
    }

    /// These values on the device of this tensor.
    pub(crate) fn with_values(&self, values: Vec<f32>, shape: impl Into<Shape>) -> Array<B> {
        Array(B::float_from_data(TensorData::new(values, shape.into()), &self.0.device()))
    }

    /// Numbers of rows on the device of this tensor.
    pub(crate) fn numbers(&self, rows: &[usize]) -> Rows<B> {
        let numbers: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
        Rows(B::int_from_data(TensorData::new(numbers, [rows.len()]), &self.0.device()))
    }

    /// Elements of a dimension.
    pub(crate) fn len_of(&self, dim: usize) -> usize {
        self.0.shape()[dim]
    }

    /// These rows of the first dimension.
    pub(crate) fn rows(&self, rows: &Rows<B>) -> Array<B> {
        Array(B::float_select(self.0.clone(), 0, rows.0.clone()))
    }

    /// A part of a dimension.
    pub(crate) fn part(&self, dim: usize, range: Range<usize>) -> Array<B> {
        let shape = self.0.shape();
        if range == (0..shape[dim]) {
            return self.clone();
        }
        let of = |n: usize| if n == dim { range.clone() } else { 0..shape[n] };
        let slices: Vec<Slice> = (0..shape.num_dims()).map(|n| Slice::from(of(n))).collect();
        Array(B::float_slice(self.0.clone(), &slices))
    }

    /// The parts one behind the other.
    pub(crate) fn together(mut parts: Vec<Array<B>>, dim: usize) -> Array<B> {
        if parts.len() == 1 {
            return parts.remove(0);
        }
        Array(B::float_cat(parts.into_iter().map(|part| part.0).collect(), dim))
    }

    /// The same elements in another shape.
    pub(crate) fn shaped(&self, shape: impl Into<Shape>) -> Array<B> {
        Array(B::float_reshape(self.0.clone(), shape.into()))
    }

    /// The dimensions in another order, and the elements copied into it.
    pub(crate) fn permuted(&self, axes: &[usize]) -> Array<B> {
        Array(B::contiguous(B::float_permute(self.0.clone(), axes)))
    }

    /// Dimensions of one element repeated, and the elements copied.
    pub(crate) fn repeated(&self, shape: impl Into<Shape>) -> Array<B> {
        Array(B::contiguous(B::float_expand(self.0.clone(), shape.into())))
    }

    /// Matrices with rows and columns swapped. No element is moved.
    pub(crate) fn transposed(&self) -> Array<B> {
        let rank = self.0.rank();
        Array(B::float_swap_dims(self.0.clone(), rank - 2, rank - 1))
    }

    /// Products of matrices, [.., m, k] [.., k, n] -> [.., m, n].
    pub(crate) fn times(&self, other: &Array<B>) -> Array<B> {
        Array(B::multiplied(self.0.clone(), other.0.clone()))
    }

    /// The sum over a dimension, of which one element stays.
    pub(crate) fn sum(&self, dim: usize) -> Array<B> {
        Array(B::float_sum_dim(self.0.clone(), dim))
    }

    pub(crate) fn exp(&self) -> Array<B> {
        Array(B::float_exp(self.0.clone()))
    }

    /// 1 / √x
    pub(crate) fn inverse_root(&self) -> Array<B> {
        Array(B::float_recip(B::float_sqrt(self.0.clone())))
    }

    pub(crate) fn plus(&self, number: f32) -> Array<B> {
        Array(B::float_add_scalar(self.0.clone(), number.into()))
    }

    pub(crate) fn scaled(&self, factor: f32) -> Array<B> {
        Array(B::float_mul_scalar(self.0.clone(), factor.into()))
    }
}

/// An operator of arrays and borrowed ones.
macro_rules! operator {
    ($trait:ident, $method:ident, $operation:ident) => {
        impl<B: Contiguous> $trait<Array<B>> for Array<B> {
            type Output = Array<B>;

            fn $method(self, other: Array<B>) -> Array<B> {
                Array(B::$operation(self.0, other.0))
            }
        }

        impl<B: Contiguous> $trait<&Array<B>> for Array<B> {
            type Output = Array<B>;

            fn $method(self, other: &Array<B>) -> Array<B> {
                self.$method(other.clone())
            }
        }

        impl<B: Contiguous> $trait<Array<B>> for &Array<B> {
            type Output = Array<B>;

            fn $method(self, other: Array<B>) -> Array<B> {
                self.clone().$method(other)
            }
        }

        impl<B: Contiguous> $trait<&Array<B>> for &Array<B> {
            type Output = Array<B>;

            fn $method(self, other: &Array<B>) -> Array<B> {
                self.clone().$method(other.clone())
            }
        }
    };
}

operator!(Add, add, float_add);
operator!(Sub, sub, float_sub);
operator!(Mul, mul, float_mul);
