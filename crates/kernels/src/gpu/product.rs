//! Matrix products on a GPU.
//!
//! Device and number types alone decide which kernel multiplies, never a timing. Another kernel
//! sums in another order, and a run would not resume to the same bits.

use burn::backend::TensorMetadata;
use burn::tensor::{DType, Shape};
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::ops::permute;
use burn_cubecl::tensor::CubeTensor;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::launch_ref;
use cubek::matmul::multi_level;
use cubek::matmul::strategy::Strategy;
use cubek::std::InputBinding;

use super::pointwise::scaled;
use super::tensor::{contiguous, element, empty, reshaped, upload_f32};
use super::watch;

/// The last two dimensions swapped. No element is moved.
pub(super) fn transposed(tensor: &CubeTensor) -> CubeTensor {
    let rank = tensor.rank();
    let mut axes: Vec<usize> = (0..rank).collect();
    axes.swap(rank - 2, rank - 1);
    permute(tensor.clone(), &axes)
}

/// `a b`: [.., m, k] [.., k, n] -> [.., m, n] in number type `out`, summed in f32. Both have one
/// number type and the same leading dimensions.
pub(super) fn product(a: &CubeTensor, b: &CubeTensor, out: DType) -> CubeTensor {
    assert_eq!(a.dtype, b.dtype, "a product of two number types");
    let (a_shape, b_shape) = (a.shape(), b.shape());
    let rank = a_shape.num_dims();
    assert!(a_shape[rank - 1] == b_shape[rank - 2], "inner dimensions differ: {a_shape:?} {b_shape:?}");
    let mut dims: Vec<usize> = a_shape.iter().copied().collect();
    dims[rank - 1] = b_shape[rank - 1];
    let product = empty(a, Shape::from(dims), out);
    let (kernels, widened) = kernels(a);
    let launched = if widened {
        // Metal's matrix units sum bf16 products in bf16 only. f32 copies are exact, and as fast
        // there.
        let (a, b) = (widen(a), widen(b));
        kernels.into_iter().any(|kernel| kernel.multiply(&a, &b, &product))
    } else {
        kernels.into_iter().any(|kernel| kernel.multiply(a, b, &product))
    };
    assert!(launched, "the last kernel multiplies everything");
    watch::tick(&product);
    product
}

/// Σ over the first dimension of x [t, o], in f32.
pub(super) fn column_sums(x: &CubeTensor) -> CubeTensor {
    let (tokens, outputs) = (x.shape()[0], x.shape()[1]);
    // The sum is a product with a row of ones: its order is that of the product's kernel.
    let ones = reshaped(upload_f32(x, &vec![1.0; tokens]), [1, tokens]);
    reshaped(product(&scaled(&ones, x.dtype, 1.0), x, DType::F32), [outputs])
}

/// The tensor in f32, in its layout.
fn widen(tensor: &CubeTensor) -> CubeTensor {
    let rank = tensor.rank();
    if tensor.is_contiguous() {
        return scaled(tensor, DType::F32, 1.0);
    }
    let back = transposed(tensor);
    if back.is_contiguous() {
        return transposed(&scaled(&back, DType::F32, 1.0));
    }
    assert!(rank >= 2, "a matrix");
    scaled(&contiguous(tensor.clone()), DType::F32, 1.0)
}

/// A way to multiply on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProductKernel {
    /// Tiles on the card's matrix units. They take 16-bit numbers and sum in f32.
    MatrixUnits,
    /// Tiles in registers, in the number type of the inputs.
    Tiles,
    /// One unit for each element of the result. Software renderers use it, because it compiles
    /// fast.
    Elements,
}

impl ProductKernel {
    /// Whether the kernel could be launched for such tensors.
    pub(super) fn multiply(self, a: &CubeTensor, b: &CubeTensor, out: &CubeTensor) -> bool {
        let strategy = match self {
            ProductKernel::MatrixUnits => multi_level::Strategy::SimpleCyclicCmma(Default::default()),
            ProductKernel::Tiles => multi_level::Strategy::SimpleUnit(Default::default()),
            ProductKernel::Elements => multi_level::Strategy::Naive,
        };
        let types = MatmulGlobalElems { lhs: element(a.dtype), rhs: element(b.dtype), out: element(out.dtype) };
        let mut types = MatmulElems::from_globals(&types);
        let input = |tensor: &CubeTensor| InputBinding::new(tensor.clone().binding(), element(tensor.dtype));
        let strategy = Strategy::MultiLevel(strategy);
        launch_ref(&strategy, &a.client, input(a), input(b), out.clone().binding(), &mut types).is_ok()
    }
}

/// (kernels, widened): the kernels to multiply with, best first, and whether they multiply f32
/// copies. f32 products are never rounded to TF32.
fn kernels(a: &CubeTensor) -> (Vec<ProductKernel>, bool) {
    let properties = a.client.properties();
    if properties.identity.physical.is_none() {
        return (vec![ProductKernel::Elements], false);
    }
    let units = &properties.features.matmul.cmma;
    let single = element(DType::F32);
    let takes = |dtype| units.iter().any(|unit| unit.a_type == element(dtype) && unit.cd_type == single);
    // Matrix units that have TF32 would round f32 to it.
    let takes_f32 = takes(DType::F32) && !properties.supports_type(tf32::elem_type_native());
    let widened = a.dtype != DType::F32 && !takes(a.dtype) && takes_f32;
    let units = if a.dtype == DType::F32 || widened { takes_f32 } else { takes(a.dtype) };
    let mut kernels = vec![ProductKernel::Tiles, ProductKernel::Elements];
    if units {
        kernels.insert(0, ProductKernel::MatrixUnits);
    }
    (kernels, widened)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor, TensorData};
    use burn_cubecl::cubecl::prelude::*;
    use finetune_random::Stream;

    use super::*;
    use crate::devices::gpus;

    fn tensor(values: &[f32], rows: usize, columns: usize, device: &Device) -> CubeTensor {
        let like = Tensor::<2>::from_data(TensorData::new(values.to_vec(), [rows, columns]), device);
        <burn_cubecl::CubeBackend as burn::backend::ops::FloatTensorOps<_>>::float_from_data(
            like.into_data(),
            &cube_device(device),
        )
    }

    fn cube_device(device: &Device) -> burn_cubecl::CubeDevice {
        match device.as_dispatch() {
            burn::backend::DispatchDevice::Cube(device) => device.clone(),
            other => panic!("{other:?} is no GPU"),
        }
    }

    /// Every kernel that can be launched here, with f32 and the 16-bit types of the device, against
    /// f64.
    #[test]
    fn gpu_products_match_f64() {
        if std::env::var("FINETUNE_TEST_DEVICE").as_deref() != Ok("gpu") {
            println!("SKIPPED: FINETUNE_TEST_DEVICE is not gpu");
            return;
        }
        let gpu = gpus(true).into_iter().next().expect("a GPU, or a software renderer");
        let mut checked = 0;
        for (m, n, k) in [(64, 64, 64), (37, 16, 100), (5, 130, 33)] {
            let values = Stream::new(m as u64, 1, n as u64, k as u32).normal(m * k + k * n, 1.0);
            let (a_values, b_values) = values.split_at(m * k);
            for kind in &gpu.types {
                let dtype = kind.dtype();
                let a = super::super::pointwise::scaled(&tensor(a_values, m, k, &gpu.device), dtype, 1.0);
                // The layout of the weights of a linear layer: [n, k], used transposed.
                let b = transposed(&super::super::pointwise::scaled(&tensor(b_values, n, k, &gpu.device), dtype, 1.0));
                for kernel in [ProductKernel::MatrixUnits, ProductKernel::Tiles, ProductKernel::Elements] {
                    if kernel == ProductKernel::MatrixUnits && *kind == crate::FloatType::F32 {
                        continue;
                    }
                    let out = empty(&a, Shape::from([m, n]), DType::F32);
                    if !kernel.multiply(&a, &b, &out) {
                        continue;
                    }
                    let bytes = out.client.read_one(out.handle.clone()).expect("the product");
                    let got = f32::from_bytes(&bytes);
                    let bound = (k as f64).sqrt() * if *kind == crate::FloatType::F32 { 1e-5 } else { 2e-2 };
                    for i in 0..m {
                        for j in 0..n {
                            let want: f64 =
                                (0..k).map(|l| f64::from(a_values[i * k + l]) * f64::from(b_values[j * k + l])).sum();
                            let got = f64::from(got[i * n + j]);
                            assert!(
                                (got - want).abs() < bound,
                                "{kernel:?} {kind:?} {m}x{n}x{k} ({i}, {j}): {got} {want}"
                            );
                        }
                    }
                    checked += 1;
                }
            }
        }
        assert!(checked >= 6, "at least two kernels for each shape: {checked}");
    }
}
