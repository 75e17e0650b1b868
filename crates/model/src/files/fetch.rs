//! A matrix from the files of a base, in the memory of the host and in the form that the model holds it in.
//! It may be read on one thread and put onto the device on another.

use burn::tensor::{Element, Tensor, TensorData};
use finetune_kernels::{FloatType, FrozenValues, PackedWeight, Weight};
use finetune_packed::PackedMatrix;
use finetune_store::Dtype;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::base_files::{BaseFiles, BaseTensor};
use crate::files::floats::{as_stored, data_of, float_type};
use crate::placement::Placement;
use crate::tree::Matrix;

/// A matrix in the memory of the host.
pub(crate) enum Fetched {
    /// The elements, and their number type on the device.
    Dense(TensorData, FloatType),
    Packed(PackedMatrix),
    /// Of an expert.
    Frozen(FrozenValues),
    /// For products in bf16.
    Bf16(Vec<bf16>),
}

impl Fetched {
    /// The matrix on the device.
    pub(crate) fn onto(self, shape: [usize; 2], placement: &Placement) -> Weight {
        let device = placement.device();
        let with_products =
            |weight: PackedWeight| if placement.has_bf16_products() { weight.with_bf16_products() } else { weight };
        match self {
            Fetched::Dense(data, held) => Weight::Dense(Tensor::from_data(data, (device, held.dtype()))),
            Fetched::Packed(packed) => Weight::Packed(with_products(PackedWeight::new(packed, device))),
            Fetched::Frozen(values) => Weight::Packed(with_products(PackedWeight::of_values(values, shape, device))),
            Fetched::Bf16(values) => Weight::Packed(PackedWeight::bf16(values, shape)),
        }
    }
}

/// Reads what is here of a matrix.
///
/// # Errors
/// If it cannot be read, or has a number that is not finite.
pub(crate) fn fetch(
    files: &BaseFiles,
    config: &ModelConfig,
    placement: &Placement,
    matrix: &Matrix,
) -> Result<Fetched, ModelError> {
    let tensor = files.tensor(config, &matrix.name, &matrix.whole_shape())?.part(matrix.cut.clone());
    let in_bf16 = placement.has_bf16_products();
    Ok(match tensor.packed()? {
        Some(packed) => Fetched::Packed(packed),
        None if matrix.is_of_expert => Fetched::Frozen(of_expert(&tensor, placement)?),
        None if in_bf16 => Fetched::Bf16(rounded(&tensor, &tensor.values()?, bf16::from_f32, "bf16")?),
        None => dense(&tensor, matrix.shape, placement)?,
    })
}

/// All elements of a matrix that is not packed, in the type that the placement says.
fn dense(tensor: &BaseTensor<'_>, shape: [usize; 2], placement: &Placement) -> Result<Fetched, ModelError> {
    // What is made of packed parts has no type of its own.
    let dtype = tensor.dtype().unwrap_or(Dtype::F32);
    let stored = float_type(dtype).expect("checked when the tensor was looked up");
    let held = placement.held(stored);
    // The numbers go to the device as they lie in the file, without a conversion.
    if held == stored {
        if let Some(view) = tensor.whole_view() {
            return Ok(Fetched::Dense(as_stored(view, stored, shape)?, held));
        }
        if let Some(bytes) = tensor.bytes_in(dtype, true)? {
            return Ok(Fetched::Dense(data_of(&bytes, stored, shape), held));
        }
    }
    let values = tensor.values()?;
    let data = match held {
        FloatType::F32 => TensorData::new(values, shape),
        FloatType::F16 => TensorData::new(rounded(tensor, &values, f16::from_f32, "f16")?, shape),
        FloatType::BF16 => TensorData::new(rounded(tensor, &values, bf16::from_f32, "bf16")?, shape),
    };
    Ok(Fetched::Dense(data, held))
}

/// All elements of an expert's matrix, in the type that the placement says.
fn of_expert(tensor: &BaseTensor<'_>, placement: &Placement) -> Result<FrozenValues, ModelError> {
    let stored = float_type(tensor.dtype().expect("it is not packed")).expect("checked when it was looked up");
    let held = if placement.has_bf16_products() { FloatType::BF16 } else { placement.held(stored) };
    // The values are exact in the type of the file, so rounding to that changes none.
    let values = tensor.values()?;
    Ok(match held {
        FloatType::F32 => FrozenValues::F32(values),
        FloatType::F16 => FrozenValues::F16(rounded(tensor, &values, f16::from_f32, "f16")?),
        FloatType::BF16 => FrozenValues::Bf16(rounded(tensor, &values, bf16::from_f32, "bf16")?),
    })
}

/// The values in a 16-bit type. A finite number that becomes infinite is an error.
fn rounded<E: Element>(
    tensor: &BaseTensor<'_>,
    values: &[f32],
    round: fn(f32) -> E,
    kind: &str,
) -> Result<Vec<E>, ModelError> {
    let rounded: Vec<E> = values.par_iter().map(|&value| round(value)).collect();
    match rounded.par_iter().position_first(|value| !value.elem::<f32>().is_finite()) {
        None => Ok(rounded),
        Some(element) => Err(ModelError::NotFinite {
            path: tensor.path().to_owned(),
            name: tensor.name.clone(),
            element,
            after: format!(" once rounded to {kind}"),
        }),
    }
}
