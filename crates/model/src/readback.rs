//! Reading values back from the device.

use burn::tensor::Tensor;
use finetune_kernels::devices::dropped_work;

use crate::error::ModelError;

/// The elements in row-major order, as f32. On a GPU this waits for all work that the tensor
/// depends on, and returns the errors of that work.
pub(crate) fn data<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, ModelError> {
    let device = tensor.device();
    // A read may be deferred until the values are looked at, so each of these calls can fail.
    let failed = |error: &dyn std::fmt::Display| ModelError::device(error.to_string());
    let data = tensor.try_into_data().map_err(|error| failed(&error))?;
    let data = data.try_cast_as::<f32>().map_err(|error| failed(&error))?;
    let values = data.try_into_vec::<f32>().map_err(|error| failed(&error))?;
    match dropped_work(&device) {
        Some(what) => Err(ModelError::Device { what }),
        None => Ok(values),
    }
}
