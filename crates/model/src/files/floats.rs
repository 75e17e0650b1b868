//! Conversion of a file's numbers to f32 and back.

use burn::tensor::TensorData;
use finetune_kernels::FloatType;
use finetune_store::{Dtype, TensorView};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::error::ModelError;
use crate::files::finite::expect_finite;

/// The number type of a file's tensor; `None` if weights are never held in it.
pub fn float_type(dtype: Dtype) -> Option<FloatType> {
    match dtype {
        Dtype::F32 => Some(FloatType::F32),
        Dtype::F16 => Some(FloatType::F16),
        Dtype::BF16 => Some(FloatType::BF16),
        _ => None,
    }
}

/// The name in files of a number type.
pub(crate) fn dtype_of(kind: FloatType) -> Dtype {
    match kind {
        FloatType::F32 => Dtype::F32,
        FloatType::F16 => Dtype::F16,
        FloatType::BF16 => Dtype::BF16,
    }
}

/// Bytes of a tensor that are in memory beside its numbers.
const AT_ONCE: usize = 1 << 20;

/// The elements of a tensor in this number type, which is that of its file. One that is not finite is an error.
///
/// burn copies what it is given as bytes, and the largest matrix may be a third of the memory. So numbers are made of
/// the bytes, piece by piece.
pub(crate) fn as_stored(view: &TensorView<'_>, kind: FloatType, shape: [usize; 2]) -> Result<TensorData, ModelError> {
    Ok(match kind {
        FloatType::F32 => TensorData::new(read(view, f32::from_le_bytes)?, shape),
        FloatType::F16 => TensorData::new(read(view, f16::from_le_bytes)?, shape),
        FloatType::BF16 => TensorData::new(read(view, bf16::from_le_bytes)?, shape),
    })
}

fn read<E, const N: usize>(view: &TensorView<'_>, number: fn([u8; N]) -> E) -> Result<Vec<E>, ModelError> {
    let mut values = Vec::with_capacity(view.size() / N);
    for start in (0..view.size()).step_by(AT_ONCE) {
        let piece = view.bytes_at(start, AT_ONCE.min(view.size() - start))?;
        expect_finite(view, &piece, values.len())?;
        values.extend(elements(&piece, number));
    }
    Ok(values)
}

fn elements<E, const N: usize>(bytes: &[u8], number: fn([u8; N]) -> E) -> impl Iterator<Item = E> {
    bytes.as_chunks::<N>().0.iter().map(move |element| number(*element))
}

/// Elements in this number type, as bytes.
pub(crate) fn data_of(bytes: &[u8], kind: FloatType, shape: [usize; 2]) -> TensorData {
    match kind {
        FloatType::F32 => TensorData::new(elements(bytes, f32::from_le_bytes).collect::<Vec<_>>(), shape),
        FloatType::F16 => TensorData::new(elements(bytes, f16::from_le_bytes).collect::<Vec<_>>(), shape),
        FloatType::BF16 => TensorData::new(elements(bytes, bf16::from_le_bytes).collect::<Vec<_>>(), shape),
    }
}

/// The elements of a tensor in f32, finite or not.
pub(crate) fn to_f32(view: &TensorView<'_>) -> Result<Vec<f32>, ModelError> {
    read_f32(view, |_, _| Ok(()))
}

/// The elements of a tensor in f32. One that is not finite is an error.
pub(crate) fn to_finite_f32(view: &TensorView<'_>) -> Result<Vec<f32>, ModelError> {
    read_f32(view, |bytes, start| expect_finite(view, bytes, start))
}

/// Reads piece by piece, so that the file's bytes and the numbers are never both in memory as a
/// whole. `check` is called with each piece and the number of its first element.
fn read_f32(
    view: &TensorView<'_>,
    check: impl Fn(&[u8], usize) -> Result<(), ModelError>,
) -> Result<Vec<f32>, ModelError> {
    let kind = float_type_of(view)?;
    let mut values: Vec<f32> = Vec::with_capacity(view.size() / view.dtype.size());
    view.pieces(|piece| -> Result<(), ModelError> {
        check(piece, values.len())?;
        extend(&mut values, piece, kind);
        Ok(())
    })?;
    Ok(values)
}

/// The elements from `first` on of a tensor in f32. One that is not finite is an error.
pub(crate) fn to_finite_f32_of(view: &TensorView<'_>, first: usize, count: usize) -> Result<Vec<f32>, ModelError> {
    let (kind, size) = (float_type_of(view)?, view.dtype.size());
    let bytes = view.bytes_at(first * size, count * size)?;
    expect_finite(view, &bytes, first)?;
    let mut values = Vec::with_capacity(count);
    extend(&mut values, &bytes, kind);
    Ok(values)
}

/// The number type of a tensor; an error if weights are never held in it.
fn float_type_of(view: &TensorView<'_>) -> Result<FloatType, ModelError> {
    float_type(view.dtype).ok_or_else(|| ModelError::Dtype {
        path: view.path().to_owned(),
        name: view.name.to_owned(),
        dtype: view.dtype.to_string(),
    })
}

/// Numbers of a type that weights are held in, as bytes, in f32. Of another type there are none.
pub(crate) fn numbers(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let mut values = Vec::with_capacity(bytes.len() / dtype.size());
    if let Some(kind) = float_type(dtype) {
        extend(&mut values, bytes, kind);
    }
    values
}

/// Adds numbers of a type, as bytes.
fn extend(values: &mut Vec<f32>, bytes: &[u8], kind: FloatType) {
    let pairs = || bytes.par_chunks_exact(2).map(|b| [b[0], b[1]]);
    match kind {
        FloatType::F32 => {
            values.par_extend(bytes.par_chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
        }
        FloatType::BF16 => values.par_extend(pairs().map(|b| bf16::from_le_bytes(b).to_f32())),
        FloatType::F16 => values.par_extend(pairs().map(|b| f16::from_le_bytes(b).to_f32())),
    }
}

/// Rounds f32 values to a file's number type, as bytes.
pub(crate) fn from_f32(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// f32 values as they read back once they are rounded to a file's number type.
pub(crate) fn rounded(values: &[f32], dtype: Dtype) -> Vec<f32> {
    match dtype {
        Dtype::BF16 => values.par_iter().map(|&value| bf16::from_f32(value).to_f32()).collect(),
        Dtype::F16 => values.par_iter().map(|&value| f16::from_f32(value).to_f32()).collect(),
        _ => values.to_vec(),
    }
}

/// Whether two tensors hold the same numbers, perhaps in different types.
pub(crate) fn have_same_values(a: &TensorView<'_>, b: &TensorView<'_>) -> Result<bool, ModelError> {
    if a.dtype == b.dtype && hash(a)? == hash(b)? {
        return Ok(true);
    }
    if float_type(a.dtype).is_none() || float_type(b.dtype).is_none() {
        return Ok(false);
    }
    // Rarely reached: for the same numbers in two types, or zeros of two signs.
    Ok(to_f32(a)? == to_f32(b)?)
}

fn hash(view: &TensorView<'_>) -> Result<blake3::Hash, ModelError> {
    let mut hasher = blake3::Hasher::new();
    view.pieces(|piece| -> Result<(), ModelError> {
        hasher.update_rayon(piece);
        Ok(())
    })?;
    Ok(hasher.finalize())
}
