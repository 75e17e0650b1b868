//! Scales and biases out of tensors, each checked to be a number.

use finetune_store::{Dtype, TensorView};
use half::{bf16, f16};

use super::module::wrong;
use crate::{Numbers, PackedError};

/// Reads a tensor of floats, or of E8M0 and E4M3 numbers.
pub(super) fn read(tensor: &TensorView<'_>) -> Result<Numbers, PackedError> {
    let numbers = match tensor.dtype {
        Dtype::F32 => Numbers::F32(f32s(tensor)?),
        Dtype::F16 => Numbers::F16(pairs(&tensor.bytes()?).map(f16::from_bits).collect()),
        Dtype::BF16 => Numbers::BF16(pairs(&tensor.bytes()?).map(bf16::from_bits).collect()),
        Dtype::F8_E8M0 => Numbers::E8M0(tensor.bytes()?),
        Dtype::F8_E4M3 => Numbers::E4M3(tensor.bytes()?),
        other => return Err(wrong(tensor, format!("it is {other}, and scales are floats"))),
    };
    check(tensor, &numbers)?;
    Ok(numbers)
}

/// Reads a tensor of bytes that are E8M0 numbers, of whichever dtype.
pub(super) fn read_e8m0(tensor: &TensorView<'_>) -> Result<Numbers, PackedError> {
    let numbers = Numbers::E8M0(tensor.bytes()?);
    check(tensor, &numbers)?;
    Ok(numbers)
}

/// Reads a tensor of bytes that are E4M3 numbers, of whichever dtype.
pub(super) fn read_e4m3(tensor: &TensorView<'_>) -> Result<Numbers, PackedError> {
    let numbers = Numbers::E4M3(tensor.bytes()?);
    check(tensor, &numbers)?;
    Ok(numbers)
}

/// Reads an F32 tensor whose numbers are all finite.
pub(super) fn read_f32(tensor: &TensorView<'_>) -> Result<Vec<f32>, PackedError> {
    let values = f32s(tensor)?;
    check_f32(tensor, &values)?;
    Ok(values)
}

/// Refuses numbers, read from this tensor or computed from it, that are NaN or infinite.
pub(super) fn check_f32(tensor: &TensorView<'_>, values: &[f32]) -> Result<(), PackedError> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(place) => Err(wrong(tensor, format!("number {place} is {}", values[place]))),
        None => Ok(()),
    }
}

fn check(tensor: &TensorView<'_>, numbers: &Numbers) -> Result<(), PackedError> {
    match (0..numbers.len()).find(|&place| !numbers.get(place).is_finite()) {
        Some(place) => Err(wrong(tensor, format!("number {place} is {}", numbers.get(place)))),
        None => Ok(()),
    }
}

fn f32s(tensor: &TensorView<'_>) -> Result<Vec<f32>, PackedError> {
    let bytes = tensor.bytes()?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

fn pairs(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes))
}
