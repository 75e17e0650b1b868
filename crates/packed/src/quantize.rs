//! 16-bit matrices packed as the reference programs pack them: mlx 0.32.4 and bitsandbytes 0.50.2.
//!
//! All codes and scales, and the bytes in a file, are those of the reference on a CPU
//! (`tests/quantizers.rs`). Each form has its own file, with its arithmetic and its tensors.

mod int8;
mod mlx;
mod mxfp4;
mod nf4;

use finetune_store::{Dtype, TensorSpec};
use half::{bf16, f16};
use serde_json::{Value, json};

use crate::error::PackedError;
use crate::matrix::{Decoder, PackedMatrix, Rounding};
use crate::numbers::Numbers;

/// A form that a matrix can be packed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// bitsandbytes' NF4 in blocks of 64, without double quantization.
    Nf4,
    /// bitsandbytes' int8 with a scale for each row (LLM.int8()).
    Int8,
    /// MLX's affine form with 4 bits and groups of 64.
    Mlx4,
    /// MLX's affine form with 8 bits and groups of 64.
    Mlx8,
    /// MLX's mxfp4: groups of 32 with a power of two each.
    Mxfp4,
}

/// The number type that a matrix had before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// f32
    F32,
    /// IEEE half
    F16,
    /// bfloat16
    BF16,
}

impl Stored {
    pub(crate) fn dtype(self) -> Dtype {
        match self {
            Stored::F32 => Dtype::F32,
            Stored::F16 => Dtype::F16,
            Stored::BF16 => Dtype::BF16,
        }
    }

    /// Rounds to the nearest number of this type.
    fn round(self, value: f32) -> f32 {
        match self {
            Stored::F32 => value,
            Stored::F16 => f16::from_f32(value).to_f32(),
            Stored::BF16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// The numbers, rounded to this type.
    fn numbers(self, values: Vec<f32>) -> Numbers {
        match self {
            Stored::F32 => Numbers::F32(values),
            Stored::F16 => Numbers::F16(values.into_iter().map(f16::from_f32).collect()),
            Stored::BF16 => Numbers::BF16(values.into_iter().map(bf16::from_f32).collect()),
        }
    }

    /// The type whose numbers the decoded values are.
    fn rounding(self) -> Rounding {
        match self {
            Stored::F32 => Rounding::None,
            Stored::F16 => Rounding::F16,
            Stored::BF16 => Rounding::BF16,
        }
    }

    fn of_rounding(rounding: Rounding) -> Stored {
        match rounding {
            Rounding::None => Stored::F32,
            Rounding::F16 => Stored::F16,
            Rounding::BF16 => Stored::BF16,
        }
    }
}

/// Packs a matrix [rows, columns]: `values` row after row, each a number of the type `stored`. Rows
/// are shared between the threads of rayon's pool; their number changes no bit.
///
/// # Errors
/// [`PackedError::CannotQuantize`] for a number that is not finite or beyond what the form holds,
/// and for columns that do not fill its groups.
///
/// # Panics
/// If there are more or fewer values than the shape has.
pub fn quantize(
    scheme: Scheme,
    values: &[f32],
    shape: [usize; 2],
    stored: Stored,
) -> Result<PackedMatrix, PackedError> {
    let [rows, columns] = shape;
    assert_eq!(values.len(), rows * columns, "values of a matrix {rows} × {columns}");
    if values.is_empty() {
        return Err(PackedError::cannot_quantize("it has no elements"));
    }
    if let Some(n) = values.iter().position(|value| !value.is_finite()) {
        let (row, column, value) = (n / columns, n % columns, values[n]);
        return Err(PackedError::cannot_quantize(format!("element {column} of row {row} is {value}")));
    }
    if let Some(group) = group(scheme).filter(|group| columns % group != 0) {
        let what = format!("its {columns} columns do not fill groups of {group}");
        return Err(PackedError::cannot_quantize(what));
    }
    match scheme {
        Scheme::Nf4 => Ok(nf4::quantize(values, shape, stored)),
        Scheme::Int8 => int8::quantize(values, shape),
        Scheme::Mlx4 => mlx::quantize(values, shape, stored, 4),
        Scheme::Mlx8 => mlx::quantize(values, shape, stored, 8),
        Scheme::Mxfp4 => Ok(mxfp4::quantize(values, shape, stored)),
    }
}

/// Columns that share a scale, if rows must fill whole groups.
fn group(scheme: Scheme) -> Option<usize> {
    match scheme {
        Scheme::Nf4 | Scheme::Int8 => None,
        Scheme::Mlx4 | Scheme::Mlx8 => Some(mlx::GROUP),
        Scheme::Mxfp4 => Some(mxfp4::GROUP),
    }
}

/// Whether the reference program packs a matrix. `is_linear`: it is the weight of a linear layer
/// inside the decoder, not the embedding or the output layer. bitsandbytes packs only those; MLX
/// all whose columns fill its groups.
pub fn applies(scheme: Scheme, [rows, columns]: [usize; 2], is_linear: bool) -> bool {
    let fits = match group(scheme) {
        None => is_linear,
        Some(group) => columns % group == 0,
    };
    fits && rows * columns > 0
}

/// Bytes in memory of a packed matrix: [`PackedMatrix::bytes`] of what [`quantize`] makes.
pub fn memory(scheme: Scheme, [rows, columns]: [usize; 2], stored: Stored) -> u64 {
    let (elements, rows) = (rows as u64 * columns as u64, rows as u64);
    match scheme {
        Scheme::Nf4 => elements.div_ceil(2) + 4 * elements.div_ceil(nf4::BLOCK as u64) + 4 * 16,
        Scheme::Int8 => elements + 4 * rows,
        Scheme::Mlx4 => elements / 2 + 2 * stored.dtype().size() as u64 * (elements / mlx::GROUP as u64),
        Scheme::Mlx8 => elements + 2 * stored.dtype().size() as u64 * (elements / mlx::GROUP as u64),
        Scheme::Mxfp4 => elements / 2 + elements / mxfp4::GROUP as u64 + 4 * 16,
    }
}

/// Tensors of a file that the reference program loads a packed matrix from, in the order of
/// [`file_bytes`]. `weight` is the name of the matrix, as `model.layers.0.mlp.up_proj.weight`.
pub fn file_tensors(scheme: Scheme, weight: &str, shape: [usize; 2], stored: Stored) -> Vec<TensorSpec> {
    let tensors = match scheme {
        Scheme::Nf4 => nf4::tensors(shape, stored),
        Scheme::Int8 => int8::tensors(shape),
        Scheme::Mlx4 => mlx::tensors(shape, stored, 4),
        Scheme::Mlx8 => mlx::tensors(shape, stored, 8),
        Scheme::Mxfp4 => mxfp4::tensors(shape),
    };
    let module = weight.strip_suffix(".weight").unwrap_or(weight);
    let spec =
        |(name, dtype, shape): (&str, Dtype, Vec<usize>)| TensorSpec { name: format!("{module}.{name}"), dtype, shape };
    tensors.into_iter().map(spec).collect()
}

/// The bytes of [`file_tensors`], of a matrix that [`quantize`] made.
pub fn file_bytes(scheme: Scheme, matrix: &PackedMatrix) -> Vec<Vec<u8>> {
    let codes = matrix.codes.bytes();
    let scales = bytes_of(&matrix.scales);
    match scheme {
        Scheme::Nf4 => nf4::bytes(matrix.shape, Stored::of_rounding(matrix.rounding), codes, scales),
        Scheme::Int8 => int8::bytes(codes, scales),
        Scheme::Mlx4 | Scheme::Mlx8 => {
            let mut tensors = vec![codes.to_vec(), scales];
            if let Decoder::Affine { biases } = &matrix.decoder {
                tensors.push(bytes_of(biases));
            }
            tensors
        }
        Scheme::Mxfp4 => vec![codes.to_vec(), scales],
    }
}

/// How many of the rising `middles` are below each value: the number of the nearest of the values
/// that they lie between.
fn ranks(values: &[f32], middles: &[f32], ranks: &mut [u32]) {
    for middle in middles {
        for (rank, value) in ranks.iter_mut().zip(values) {
            *rank += u32::from(value > middle);
        }
    }
}

/// Numbers as a file has them, little-endian.
fn bytes_of(numbers: &Numbers) -> Vec<u8> {
    match numbers {
        Numbers::F32(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Numbers::F16(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Numbers::BF16(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Numbers::E8M0(values) | Numbers::E4M3(values) => values.clone(),
        Numbers::Product { .. } => unreachable!("no quantizer makes them"),
    }
}

/// Keys of `config.json` that tell the reference program how the weights are packed, with their
/// values.
pub fn config_entry(scheme: Scheme) -> Vec<(&'static str, Value)> {
    let mlx = |bits: usize, group: usize, mode: &str| {
        let value = json!({"group_size": group, "bits": bits, "mode": mode});
        vec![("quantization", value.clone()), ("quantization_config", value)]
    };
    match scheme {
        Scheme::Mlx4 => mlx(4, mlx::GROUP, "affine"),
        Scheme::Mlx8 => mlx(8, mlx::GROUP, "affine"),
        Scheme::Mxfp4 => mlx(4, mxfp4::GROUP, "mxfp4"),
        Scheme::Nf4 => vec![("quantization_config", bitsandbytes(true))],
        Scheme::Int8 => vec![("quantization_config", bitsandbytes(false))],
    }
}

/// `BitsAndBytesConfig(...).to_dict()` of transformers 5.23, for 4 or 8 bits.
fn bitsandbytes(is_nf4: bool) -> Value {
    json!({
        "quant_method": "bitsandbytes",
        "_load_in_8bit": !is_nf4,
        "_load_in_4bit": is_nf4,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": null,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "bnb_4bit_quant_type": if is_nf4 { "nf4" } else { "fp4" },
        "bnb_4bit_use_double_quant": false,
        "bnb_4bit_compute_dtype": if is_nf4 { "bfloat16" } else { "float32" },
        "bnb_4bit_quant_storage": "uint8",
        "load_in_4bit": is_nf4,
        "load_in_8bit": !is_nf4,
    })
}
