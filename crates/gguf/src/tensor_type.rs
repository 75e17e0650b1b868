//! The number types of tensors, and numbers in them.
//!
//! The numbers of the types are ggml's (`enum ggml_type`). Rounding is gguf-py's `quants.py`, which
//! gives the same bits as ggml's reference (`quantize_row_q8_0_ref`, `ggml_compute_fp32_to_bf16`).

use half::{bf16, f16};

use crate::error::GgufError;

/// Numbers that share a scale in [`TensorType::Q8_0`].
pub const BLOCK: usize = 32;
/// Bytes of such a block: the scale in f16, then a signed byte for each number.
const BLOCK_BYTES: usize = 2 + BLOCK;

/// The number type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorType {
    /// Float of 32 bits.
    F32,
    /// Float of 16 bits (IEEE half).
    F16,
    /// Float of 16 bits with the exponent of `F32`.
    BF16,
    /// Signed bytes, [`BLOCK`] of which share a scale.
    Q8_0,
    /// A type that is not read here, by its number.
    Other(u32),
}

impl TensorType {
    const CODES: [(TensorType, u32, &str); 4] = [
        (TensorType::F32, 0, "f32"),
        (TensorType::F16, 1, "f16"),
        (TensorType::BF16, 30, "bf16"),
        (TensorType::Q8_0, 8, "q8_0"),
    ];

    pub(crate) fn of_code(code: u32) -> TensorType {
        Self::CODES.iter().find(|(_, known, _)| *known == code).map_or(TensorType::Other(code), |(kind, ..)| *kind)
    }

    pub(crate) fn code(self) -> u32 {
        match self {
            TensorType::Other(code) => code,
            known => Self::CODES.iter().find(|(kind, ..)| *kind == known).map_or(0, |(_, code, _)| *code),
        }
    }

    /// ggml's name in lower case, such as `q8_0`.
    pub fn name(self) -> &'static str {
        Self::CODES.iter().find(|(kind, ..)| *kind == self).map_or("of another type", |(.., name)| *name)
    }

    /// Bytes of a tensor of this shape, the outermost dimension first. `None`: the type is not
    /// known, the size overflows, or rows are no whole number of blocks.
    pub fn bytes(self, shape: &[usize]) -> Option<u64> {
        let count = shape.iter().try_fold(1_u64, |count, &length| count.checked_mul(length as u64))?;
        match self {
            TensorType::F32 => count.checked_mul(4),
            TensorType::F16 | TensorType::BF16 => count.checked_mul(2),
            TensorType::Q8_0 => {
                let whole = shape.last().is_some_and(|row| row.is_multiple_of(BLOCK));
                (count / BLOCK as u64).checked_mul(BLOCK_BYTES as u64).filter(|_| whole)
            }
            TensorType::Other(_) => None,
        }
    }

    /// Numbers in this type, rounded to the nearest. For [`TensorType::Q8_0`] these are whole rows.
    ///
    /// # Errors
    /// [`GgufError::Impossible`] for a type that is not written, or numbers that are no whole
    /// blocks.
    pub fn encode(self, values: &[f32]) -> Result<Vec<u8>, GgufError> {
        match self {
            TensorType::F32 => Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect()),
            TensorType::F16 => Ok(values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect()),
            TensorType::BF16 => Ok(values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect()),
            TensorType::Q8_0 => match values.as_chunks::<BLOCK>() {
                (blocks, []) => Ok(blocks.iter().flat_map(q8_0).collect()),
                _ => Err(GgufError::Impossible { what: format!("{} numbers in blocks of {BLOCK}", values.len()) }),
            },
            TensorType::Other(code) => Err(unknown(code)),
        }
    }

    /// The numbers of a tensor's bytes.
    ///
    /// # Errors
    /// [`GgufError::Impossible`] for a type that is not read, or bytes that are no whole numbers.
    pub fn decode(self, bytes: &[u8]) -> Result<Vec<f32>, GgufError> {
        let cut = || GgufError::Impossible { what: format!("{} bytes of {}", bytes.len(), self.name()) };
        let pairs = || bytes.as_chunks::<2>();
        match self {
            TensorType::F32 => match bytes.as_chunks::<4>() {
                (numbers, []) => Ok(numbers.iter().map(|&number| f32::from_le_bytes(number)).collect()),
                _ => Err(cut()),
            },
            TensorType::F16 if pairs().1.is_empty() => {
                Ok(pairs().0.iter().map(|&number| f16::from_le_bytes(number).to_f32()).collect())
            }
            TensorType::BF16 if pairs().1.is_empty() => {
                Ok(pairs().0.iter().map(|&number| bf16::from_le_bytes(number).to_f32()).collect())
            }
            TensorType::Q8_0 => match bytes.as_chunks::<BLOCK_BYTES>() {
                (blocks, []) => Ok(blocks.iter().flat_map(of_q8_0).collect()),
                _ => Err(cut()),
            },
            TensorType::F16 | TensorType::BF16 => Err(cut()),
            TensorType::Other(code) => Err(unknown(code)),
        }
    }
}

fn unknown(code: u32) -> GgufError {
    GgufError::Impossible { what: format!("numbers of ggml's type {code} for this program") }
}

/// A block of Q8_0. The largest number becomes 127 or -127. Halves are rounded away from zero, as by
/// C's `roundf`.
fn q8_0(values: &[f32; BLOCK]) -> [u8; BLOCK_BYTES] {
    let largest = values.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
    let scale = largest / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut block = [0; BLOCK_BYTES];
    block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    for (byte, value) in block[2..].iter_mut().zip(values) {
        *byte = (value * inverse).round() as i8 as u8;
    }
    block
}

fn of_q8_0(block: &[u8; BLOCK_BYTES]) -> [f32; BLOCK] {
    let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
    std::array::from_fn(|n| f32::from(block[2 + n] as i8) * scale)
}
