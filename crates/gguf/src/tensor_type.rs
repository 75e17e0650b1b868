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

/// The number type of a tensor. Of the packed ones only [`TensorType::Q8_0`] is made of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorType {
    /// Float of 32 bits.
    F32,
    /// Float of 16 bits (IEEE half).
    F16,
    /// Float of 16 bits with the exponent of `F32`.
    BF16,
    /// Codes of 4 bits, 32 of which share a scale.
    Q4_0,
    /// Codes of 4 bits, 32 of which share a scale and a bias.
    Q4_1,
    /// Codes of 5 bits, 32 of which share a scale.
    Q5_0,
    /// Codes of 5 bits, 32 of which share a scale and a bias.
    Q5_1,
    /// Signed bytes, [`BLOCK`] of which share a scale.
    Q8_0,
    /// Codes of 2 bits in two levels of groups, 16 and 256.
    Q2K,
    /// Codes of 3 bits in two levels of groups, 16 and 256.
    Q3K,
    /// Codes of 4 bits in two levels of groups, 32 and 256.
    Q4K,
    /// Codes of 5 bits in two levels of groups, 32 and 256.
    Q5K,
    /// Codes of 6 bits in two levels of groups, 16 and 256.
    Q6K,
    /// Floats of 4 bits, 32 of which share a power of two.
    Mxfp4,
    /// A type that is not read here, by its number.
    Other(u32),
}

/// A type that is read: its number in a file, ggml's name, the elements and bytes of its blocks.
struct Known {
    kind: TensorType,
    code: u32,
    name: &'static str,
    elements: usize,
    bytes: u64,
}

const fn known(kind: TensorType, code: u32, name: &'static str, elements: usize, bytes: u64) -> Known {
    Known { kind, code, name, elements, bytes }
}

const KNOWN: [Known; 14] = [
    known(TensorType::F32, 0, "f32", 1, 4),
    known(TensorType::F16, 1, "f16", 1, 2),
    known(TensorType::BF16, 30, "bf16", 1, 2),
    known(TensorType::Q4_0, 2, "q4_0", 32, 18),
    known(TensorType::Q4_1, 3, "q4_1", 32, 20),
    known(TensorType::Q5_0, 6, "q5_0", 32, 22),
    known(TensorType::Q5_1, 7, "q5_1", 32, 24),
    known(TensorType::Q8_0, 8, "q8_0", BLOCK, BLOCK_BYTES as u64),
    known(TensorType::Q2K, 10, "q2_k", 256, 84),
    known(TensorType::Q3K, 11, "q3_k", 256, 110),
    known(TensorType::Q4K, 12, "q4_k", 256, 144),
    known(TensorType::Q5K, 13, "q5_k", 256, 176),
    known(TensorType::Q6K, 14, "q6_k", 256, 210),
    known(TensorType::Mxfp4, 39, "mxfp4", 32, 17),
];

/// Names of types that are not read.
const OTHERS: [(u32, &str); 19] = [
    (9, "q8_1"),
    (15, "q8_k"),
    (16, "iq2_xxs"),
    (17, "iq2_xs"),
    (18, "iq3_xxs"),
    (19, "iq1_s"),
    (20, "iq4_nl"),
    (21, "iq3_s"),
    (22, "iq2_s"),
    (23, "iq4_xs"),
    (24, "i8"),
    (25, "i16"),
    (26, "i32"),
    (27, "i64"),
    (28, "f64"),
    (29, "iq1_m"),
    (34, "tq1_0"),
    (35, "tq2_0"),
    (40, "nvfp4"),
];

impl TensorType {
    fn known(self) -> Option<&'static Known> {
        KNOWN.iter().find(|known| known.kind == self)
    }

    pub(crate) fn of_code(code: u32) -> TensorType {
        KNOWN.iter().find(|known| known.code == code).map_or(TensorType::Other(code), |known| known.kind)
    }

    pub(crate) fn code(self) -> u32 {
        match self {
            TensorType::Other(code) => code,
            kind => kind.known().map_or(0, |known| known.code),
        }
    }

    /// ggml's name in lower case, such as `q8_0`.
    pub fn name(self) -> &'static str {
        match self {
            TensorType::Other(code) => {
                OTHERS.iter().find(|(known, _)| *known == code).map_or("of another type", |(_, name)| *name)
            }
            kind => kind.known().map_or("of another type", |known| known.name),
        }
    }

    /// Elements and bytes of a block; 1 element for floats. `None`: the type is not read.
    pub fn block(self) -> Option<(usize, usize)> {
        self.known().map(|known| (known.elements, known.bytes as usize))
    }

    /// Bytes of a tensor of this shape, the outermost dimension first. `None`: the type is not
    /// known, the size overflows, or rows are no whole number of blocks.
    pub fn bytes(self, shape: &[usize]) -> Option<u64> {
        let known = self.known()?;
        let count = shape.iter().try_fold(1_u64, |count, &length| count.checked_mul(length as u64))?;
        let whole = known.elements == 1 || shape.last().is_some_and(|row| row.is_multiple_of(known.elements));
        (count / known.elements as u64).checked_mul(known.bytes).filter(|_| whole)
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
            kind => Err(unknown(kind)),
        }
    }

    /// The numbers of a tensor's bytes, in a type that is written here. What the other blocks mean
    /// is `finetune-packed`'s.
    ///
    /// # Errors
    /// [`GgufError::Impossible`] for another type, or bytes that are no whole numbers.
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
            kind => Err(unknown(kind)),
        }
    }
}

fn unknown(kind: TensorType) -> GgufError {
    GgufError::Impossible { what: format!("numbers of ggml's type {} ({}) for this program", kind.code(), kind.name()) }
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
