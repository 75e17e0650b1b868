//! Flex tensors as slices of f32, and buffers for results.

use burn::backend::TensorMetadata;
use burn::tensor::{Shape, TensorData};
use burn_flex::FlexTensor;

/// The tensor with a storage of exactly its elements, in row-major order.
pub(crate) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    let exact = tensor.is_contiguous()
        && tensor.layout().start_offset() == 0
        && tensor.bytes().len() == tensor.shape().num_elements() * tensor.dtype().size();
    if exact { tensor } else { tensor.to_contiguous() }
}

/// The elements of a tensor that went through [`contiguous`].
pub(crate) fn floats(tensor: &FlexTensor) -> &[f32] {
    tensor.storage::<f32>()
}

/// A tensor of these elements.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape.into()))
}

/// `len` floats of unspecified value, for results that are written in full.
///
/// Zeroing them first would be one more pass over memory; many operations here take no more than
/// one.
#[expect(unsafe_code, reason = "uninitialized output buffers")]
#[expect(clippy::uninit_vec, reason = "every caller writes each element before it reads any")]
pub(crate) fn uninitialized(len: usize) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    // SAFETY: the capacity is `len`, and any bit pattern is an f32. Callers write every element
    // before reading it; the tests of each operation compare all outputs with a reference.
    unsafe { values.set_len(len) };
    values
}

/// The same shape with another last dimension.
pub(crate) fn with_last(shape: &Shape, last: usize) -> Shape {
    let mut dims: Vec<usize> = shape.iter().copied().collect();
    *dims.last_mut().expect("a tensor of at least one dimension") = last;
    Shape::from(dims)
}
