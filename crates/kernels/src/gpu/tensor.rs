//! Tensors of the GPU backend: results, uploads, and the number of units that a kernel is launched
//! with.

use burn::backend::TensorMetadata;
use burn::tensor::{DType, Shape};
use burn_cubecl::cubecl::calculate_cube_count_elemwise;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;

/// Units of a cube of a kernel that works element by element.
const ELEMENT_UNITS: u32 = 256;
/// The largest number of cubes along one side of a launch that every graphics API takes.
const MOST_CUBES: usize = 65_535;

/// The size of the last dimension.
pub(super) fn last(tensor: &CubeTensor) -> usize {
    let shape = tensor.shape();
    shape[shape.num_dims() - 1]
}

/// The number of elements.
pub(super) fn elements_of(tensor: &CubeTensor) -> usize {
    tensor.shape().num_elements()
}

/// The tensor with its elements in row-major order, from the start of its handle and without gaps.
pub(super) fn contiguous(tensor: CubeTensor) -> CubeTensor {
    into_contiguous(tensor)
}

/// A tensor on the device of `like`, of unspecified content.
pub(super) fn empty(like: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape.into(), dtype)
}

/// The values on the device of `like`: [n].
pub(super) fn upload_u32(like: &CubeTensor, values: &[u32]) -> CubeTensor {
    upload(like, u32::as_bytes(values), values.len(), DType::U32)
}

/// The values on the device of `like`: [n].
pub(super) fn upload_f32(like: &CubeTensor, values: &[f32]) -> CubeTensor {
    upload(like, f32::as_bytes(values), values.len(), DType::F32)
}

fn upload(like: &CubeTensor, bytes: &[u8], len: usize, dtype: DType) -> CubeTensor {
    let handle = like.client.create_from_slice(bytes);
    CubeTensor::new_contiguous(like.client.clone(), like.device.clone(), Shape::from([len]), handle, dtype)
}

/// The same elements in another shape. `tensor` is contiguous.
pub(super) fn reshaped(mut tensor: CubeTensor, shape: impl Into<Shape>) -> CubeTensor {
    let shape = shape.into();
    assert_eq!(shape.num_elements(), tensor.shape().num_elements(), "a reshape keeps all elements");
    tensor = CubeTensor::new_contiguous(tensor.client, tensor.device, shape, tensor.handle, tensor.dtype);
    tensor
}

/// CubeCL's name of a float type.
pub(super) fn element(dtype: DType) -> ElemType {
    match dtype {
        DType::F32 => f32::elem_type_native(),
        DType::F16 => half::f16::elem_type_native(),
        DType::BF16 => half::bf16::elem_type_native(),
        other => unreachable!("{other:?} tensors do not reach these kernels"),
    }
}

/// Launches a kernel with one unit for each of `count` elements.
macro_rules! launch_elements {
    ($kernel:ident, $client:expr, $count:expr, $($argument:expr),+ $(,)?) => {{
        let client = $client.clone();
        let (cubes, dim) = each_element(&client, $count);
        // SAFETY: such kernels stop at the length of what they write. The function that launches
        // them asserts that the buffers that they read are long enough.
        unsafe { $kernel::launch_unchecked(&client, cubes, dim, $($argument),+) }
    }};
}
pub(super) use launch_elements;

/// The tensor as an argument of a kernel.
pub(super) fn buffer(tensor: &CubeTensor) -> BufferArg {
    tensor.clone().into_buffer_arg()
}

/// Panics if the tensors differ in shape or number type.
pub(super) fn same_shape(tensors: &[&CubeTensor]) {
    let first = tensors[0];
    assert!(
        tensors.iter().all(|tensor| tensor.shape() == first.shape() && tensor.dtype == first.dtype),
        "tensors of one shape and number type"
    );
}

/// The size of a launch with one unit for each of `count` elements.
pub(super) fn each_element(client: &burn_cubecl::cubecl::client::Client, count: usize) -> (CubeCount, CubeDim) {
    let dim = CubeDim::new_1d(ELEMENT_UNITS);
    (calculate_cube_count_elemwise(client, count, dim), dim)
}

/// The size of a launch with one cube for each of `rows` rows of this width, and the units of a
/// cube. There may be more cubes than rows: kernels stop beyond the last row.
pub(super) fn each_row(rows: usize, width: usize) -> (CubeCount, CubeDim, usize) {
    let units: usize = match width {
        0..=128 => 32,
        129..=512 => 64,
        _ => 256,
    };
    let x = rows.clamp(1, MOST_CUBES);
    let count = CubeCount::Static(x as u32, rows.div_ceil(x) as u32, 1);
    (count, CubeDim::new_1d(units as u32), units)
}
