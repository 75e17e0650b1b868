//! Matrix products on the GPU. Which kernel multiplies is a function of device and number types alone, never of a timing:
//! another kernel sums in another order, and a run would not resume to the same bits.

use burn::backend::TensorMetadata;
use burn::tensor::{DType, Shape};
use burn_cubecl::ops::permute;
use burn_cubecl::tensor::CubeTensor;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::launch_ref;
use cubek::matmul::multi_level;
use cubek::matmul::strategy::Strategy;
use cubek::std::InputBinding;

use super::tensor::{element, empty};

/// The last two dimensions the other way round; nothing is moved.
pub(super) fn transposed(tensor: &CubeTensor) -> CubeTensor {
    let rank = tensor.rank();
    let mut axes: Vec<usize> = (0..rank).collect();
    axes.swap(rank - 2, rank - 1);
    permute(tensor.clone(), &axes)
}

/// `a b`: [.., m, k] [.., k, n] -> [.., m, n] of `out` numbers, summed in f32. Both have one number type and the same
/// leading dimensions.
pub(super) fn product(a: &CubeTensor, b: &CubeTensor, out: DType) -> CubeTensor {
    assert_eq!(a.dtype, b.dtype, "a product of two number types");
    let (a_shape, b_shape) = (a.shape(), b.shape());
    let rank = a_shape.num_dims();
    assert!(a_shape[rank - 1] == b_shape[rank - 2], "inner dimensions differ: {a_shape:?} {b_shape:?}");
    let mut dims: Vec<usize> = a_shape.iter().copied().collect();
    dims[rank - 1] = b_shape[rank - 1];
    let product = empty(a, Shape::from(dims), out);
    for strategy in strategies(a) {
        let elements = MatmulGlobalElems { lhs: element(a.dtype), rhs: element(b.dtype), out: element(out) };
        let mut elements = MatmulElems::from_globals(&elements);
        let input = |tensor: &CubeTensor| InputBinding::new(tensor.clone().binding(), element(tensor.dtype));
        if launch_ref(&strategy, &a.client, input(a), input(b), product.clone().binding(), &mut elements).is_ok() {
            return product;
        }
    }
    unreachable!("the last kernel multiplies everything")
}

/// Kernels to multiply with, best first. Matrix units take 16-bit numbers and sum in f32; f32 stays f32 (no TF32).
fn strategies(a: &CubeTensor) -> Vec<Strategy> {
    let mut strategies = Vec::new();
    if a.dtype != DType::F32 && !a.client.properties().features.matmul.cmma.is_empty() {
        strategies.push(Strategy::MultiLevel(multi_level::Strategy::SimpleCyclicCmma(Default::default())));
    }
    strategies.push(Strategy::MultiLevel(multi_level::Strategy::SimpleUnit(Default::default())));
    strategies.push(Strategy::MultiLevel(multi_level::Strategy::Naive));
    strategies
}
