//! Packed weights whose shape no model says, such as those beside a text model: what their tensors tell by themselves.

use finetune_store::{Dtype, TensorView};

use super::{bitsandbytes, compressed};
use crate::PackedError;

/// The packed weight that a tensor is of, such as `model.visual.merger.weight`, and its shape [o, i], if this is the
/// tensor that tells it: of each weight one does. `None`: it is another tensor of the weight, plain numbers, or of a
/// form that tells no shape (MLX, GPTQ, AWQ).
///
/// Reads headers and tensors of a few bytes only.
///
/// # Errors
/// [`PackedError::Malformed`] for a shape that is none, [`PackedError::Store`] if a tensor cannot be read.
pub fn told_shape(tensor: &TensorView<'_>) -> Result<Option<(String, [usize; 2])>, PackedError> {
    if let Some(weight) = bitsandbytes::weight_of_state(tensor.name) {
        return Ok(Some((weight.to_owned(), bitsandbytes::shape_in_state(*tensor)?)));
    }
    if let Some(stem) = tensor.name.strip_suffix(compressed::SHAPE) {
        return Ok(Some((format!("{stem}.weight"), compressed::shape_in(tensor)?)));
    }
    Ok(match (tensor.dtype, tensor.shape) {
        // Codes of a byte have the shape of the weight.
        (Dtype::F8_E4M3 | Dtype::I8, &[rows, columns]) if tensor.name.ends_with(".weight") => {
            Some((tensor.name.to_owned(), [rows, columns]))
        }
        _ => None,
    })
}
