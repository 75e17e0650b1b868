//! The packed types of GGUF files, block by block.
//!
//! The layouts are those of ggml (`ggml-common.h`, `ggml-quants.c`). The values are those of gguf-py's
//! `quants.dequantize`, bit for bit: tests compare all types (`scripts/make_gguf_blocks_golden.py`).
//! Each row of a matrix is a whole number of blocks.

use half::f16;
use rayon::prelude::*;

use crate::codes::{Codes, NibbleOrder};
use crate::error::PackedError;
use crate::files::{mxfp4_blocks, parts_of_mxfp4};
use crate::matrix::{Decoder, Groups, PackedMatrix, Rounding, Zeros};
use crate::numbers::Numbers;

/// Elements of the largest block.
const LARGEST: usize = 256;
/// Blocks that a thread unpacks at a time.
const BLOCKS_AT_A_TIME: usize = 256;

/// A packed type of GGUF files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockType {
    /// 4 bits; a scale for 32 elements.
    Q4_0,
    /// 4 bits; a scale and a bias for 32 elements.
    Q4_1,
    /// 5 bits; a scale for 32 elements.
    Q5_0,
    /// 5 bits; a scale and a bias for 32 elements.
    Q5_1,
    /// 8 bits; a scale for 32 elements.
    Q8_0,
    /// 2 bits; factors of 4 bits for 16 elements, a scale and a bias for 256.
    Q2K,
    /// 3 bits; factors of 6 bits for 16 elements, a scale for 256.
    Q3K,
    /// 4 bits; factors of 6 bits for 32 elements, a scale and a bias for 256.
    Q4K,
    /// 5 bits; factors of 6 bits for 32 elements, a scale and a bias for 256.
    Q5K,
    /// 6 bits; factors of 8 bits for 16 elements, a scale for 256.
    Q6K,
    /// Floats of 4 bits; a power of two for 32 elements.
    Mxfp4,
}

/// Where the parts of a block lie, in bytes from its start.
struct Layout {
    /// Elements of a block.
    elements: usize,
    /// Bytes of a block.
    bytes: usize,
    /// Bits of a code.
    bits: usize,
    /// Elements that share a factor; all of the block where there are none.
    group: usize,
    /// The scale, in f16.
    scale: usize,
    /// The bias (Q4_1, Q5_1) or the scale of what is taken off (K types), in f16.
    minimum: Option<usize>,
    /// What is taken off a code.
    zero: u8,
    /// The low bits of the codes.
    low: usize,
    /// Their high bits; unused where the low ones are all.
    high: usize,
}

impl BlockType {
    /// Elements of a block.
    pub fn elements(self) -> usize {
        self.layout().elements
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        self.layout().bytes
    }

    /// Bytes that a matrix of this shape takes in memory once it is read.
    pub fn packed_bytes(self, [rows, columns]: [usize; 2]) -> usize {
        let Layout { elements, bits, group, minimum, .. } = self.layout();
        if self == BlockType::Mxfp4 {
            return rows * columns / 2 + rows * columns / 32;
        }
        let numbers = if minimum.is_some() { 2 } else { 1 };
        let factors = if group == elements { 0 } else { elements / group };
        rows * (columns / elements) * (elements * bits / 8 + numbers * (2 + factors))
    }

    fn layout(self) -> Layout {
        let small = |bytes, bits, minimum: Option<usize>, zero, high, low| Layout {
            elements: 32,
            bytes,
            bits,
            group: 32,
            scale: 0,
            minimum,
            zero,
            low,
            high,
        };
        let large = |bytes, bits, group, (scale, minimum), zero, high, low| Layout {
            elements: 256,
            bytes,
            bits,
            group,
            scale,
            minimum,
            zero,
            low,
            high,
        };
        match self {
            BlockType::Q4_0 => small(18, 4, None, 8, 0, 2),
            BlockType::Q4_1 => small(20, 4, Some(2), 0, 0, 4),
            BlockType::Q5_0 => small(22, 5, None, 16, 2, 6),
            BlockType::Q5_1 => small(24, 5, Some(2), 0, 4, 8),
            BlockType::Q8_0 => small(34, 8, None, 128, 0, 2),
            BlockType::Q2K => large(84, 2, 16, (80, Some(82)), 0, 0, 16),
            BlockType::Q3K => large(110, 3, 16, (108, None), 4, 0, 32),
            BlockType::Q4K => large(144, 4, 32, (0, Some(2)), 0, 0, 16),
            BlockType::Q5K => large(176, 5, 32, (0, Some(2)), 0, 16, 48),
            BlockType::Q6K => large(210, 6, 16, (208, None), 32, 128, 0),
            BlockType::Mxfp4 => small(17, 4, None, 0, 0, 1),
        }
    }

    /// The codes of a block, in the order of its elements.
    fn codes(self, layout: &Layout, block: &[u8], out: &mut [u8; LARGEST]) {
        let (low, high) = (&block[layout.low..], &block[layout.high..]);
        let bit_of = |n: usize| high[n / 8] >> (n % 8) & 1;
        match self {
            BlockType::Q4_0 | BlockType::Q4_1 | BlockType::Mxfp4 => nibbles(&low[..16], out),
            BlockType::Q5_0 | BlockType::Q5_1 => {
                nibbles(&low[..16], out);
                out[..32].iter_mut().enumerate().for_each(|(n, code)| *code |= bit_of(n) << 4);
            }
            // Signed bytes, with 128 added.
            BlockType::Q8_0 => out[..32].iter_mut().zip(low).for_each(|(code, byte)| *code = byte ^ 0x80),
            BlockType::Q2K => pairs(&low[..64], 0, out),
            BlockType::Q3K => {
                pairs(&low[..64], 0, out);
                out.iter_mut().enumerate().for_each(|(n, code)| *code |= (high[n % 32] >> (n / 32) & 1) << 2);
            }
            BlockType::Q4K | BlockType::Q5K => {
                for (quarter, out) in low[..128].chunks_exact(32).zip(out.chunks_exact_mut(64)) {
                    nibbles(quarter, out);
                }
                if self == BlockType::Q5K {
                    out.iter_mut().enumerate().for_each(|(n, code)| *code |= (high[n % 32] >> (n / 32) & 1) << 4);
                }
            }
            BlockType::Q6K => {
                for (half, out) in low[..128].chunks_exact(64).zip(out.chunks_exact_mut(128)) {
                    nibbles(half, out);
                }
                let mut of_high = [0; LARGEST];
                pairs(&high[..64], 4, &mut of_high);
                out.iter_mut().zip(of_high).for_each(|(code, high)| *code |= high);
            }
        }
    }

    /// The factors of a block's groups: those of the scale, and those of what is taken off.
    fn factors(self, block: &[u8]) -> ([i8; 16], [i8; 16]) {
        let (mut scales, mut minimums) = ([0; 16], [0; 16]);
        match self {
            BlockType::Q2K => {
                for (n, byte) in block[..16].iter().enumerate() {
                    (scales[n], minimums[n]) = ((byte & 15) as i8, (byte >> 4) as i8);
                }
            }
            BlockType::Q3K => {
                let bytes = &block[96..108];
                for (n, scale) in scales.iter_mut().enumerate() {
                    let low = bytes[n % 8] >> (4 * (n / 8)) & 15;
                    let high = bytes[8 + n % 4] >> (2 * (n / 4)) & 3;
                    *scale = (low | high << 4) as i8 - 32;
                }
            }
            BlockType::Q4K | BlockType::Q5K => {
                let (of_scales, rest) = block[4..16].split_at(4);
                let (of_minimums, both) = rest.split_at(4);
                for n in 0..4 {
                    scales[n] = (of_scales[n] & 63) as i8;
                    minimums[n] = (of_minimums[n] & 63) as i8;
                    scales[4 + n] = (both[n] & 15 | of_scales[n] >> 2 & 48) as i8;
                    minimums[4 + n] = (both[n] >> 4 | of_minimums[n] >> 2 & 48) as i8;
                }
            }
            BlockType::Q6K => {
                scales.iter_mut().zip(&block[192..208]).for_each(|(scale, byte)| *scale = *byte as i8);
            }
            _ => {}
        }
        (scales, minimums)
    }
}

/// Codes of 4 bits: the low halves of all bytes, then their high halves.
fn nibbles(bytes: &[u8], out: &mut [u8]) {
    let (first, second) = out.split_at_mut(bytes.len());
    first.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte & 15);
    second.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte >> 4);
}

/// Codes of 2 bits, shifted to the left: of each 32 bytes the lowest two bits, then the next.
fn pairs(bytes: &[u8], shift: u32, out: &mut [u8; LARGEST]) {
    for (half, out) in bytes.chunks_exact(32).zip(out.chunks_exact_mut(128)) {
        for (place, out) in out.chunks_exact_mut(32).enumerate() {
            out.iter_mut().zip(half).for_each(|(code, byte)| *code = (byte >> (2 * place) & 3) << shift);
        }
    }
}

/// Writes codes as a stream of bits. Their number is a multiple of 8.
fn pack(codes: &[u8], bits: usize, out: &mut [u8]) {
    for (codes, out) in codes.chunks_exact(8).zip(out.chunks_exact_mut(bits)) {
        let stream = codes.iter().rev().fold(0_u64, |stream, &code| stream << bits | u64::from(code));
        out.copy_from_slice(&stream.to_le_bytes()[..bits]);
    }
}

/// A matrix [rows, columns] of a GGUF file, from the bytes of its blocks, row after row.
///
/// # Errors
/// [`PackedError::Malformed`] if the rows are no whole blocks, if the bytes are not those of the
/// shape, or if a scale is not finite.
pub fn from_blocks(kind: BlockType, shape: [usize; 2], bytes: &[u8]) -> Result<PackedMatrix, PackedError> {
    let layout = kind.layout();
    let [rows, columns] = shape;
    if !columns.is_multiple_of(layout.elements) {
        let what = format!("rows of {columns} elements are no whole blocks of {}", layout.elements);
        return Err(PackedError::malformed(what));
    }
    let blocks = rows.checked_mul(columns / layout.elements);
    if blocks.and_then(|blocks| blocks.checked_mul(layout.bytes)) != Some(bytes.len()) {
        return Err(PackedError::malformed(format!("{} bytes for the shape {shape:?}", bytes.len())));
    }
    let of_block = layout.elements * layout.bits / 8;
    let mut codes = vec![0; bytes.len() / layout.bytes * of_block];
    let from = bytes.par_chunks(BLOCKS_AT_A_TIME * layout.bytes);
    codes.par_chunks_mut(BLOCKS_AT_A_TIME * of_block).zip(from).for_each(|(out, blocks)| {
        let mut unpacked = [0; LARGEST];
        for (out, block) in out.chunks_exact_mut(of_block).zip(blocks.chunks_exact(layout.bytes)) {
            kind.codes(&layout, block, &mut unpacked);
            pack(&unpacked[..layout.elements], layout.bits, out);
        }
    });
    if kind == BlockType::Mxfp4 {
        // The scale is a byte: the exponent of a power of two.
        let scales = bytes.chunks_exact(layout.bytes).map(|block| block[0]).collect();
        return mxfp4_blocks(codes, scales, shape);
    }
    let scales = halves(&layout, bytes, layout.scale, columns, "scale")?;
    let minimums = layout.minimum.map(|place| halves(&layout, bytes, place, columns, "minimum")).transpose()?;
    let (scales, biases) = if layout.group == layout.elements {
        (Numbers::F16(scales), minimums.map(Numbers::F16))
    } else {
        levels(kind, &layout, bytes, scales, minimums)
    };
    let decoder = match biases {
        Some(biases) => Decoder::Affine { biases },
        None => Decoder::Shifted { zeros: Zeros::All(layout.zero), factor: 1.0 },
    };
    Ok(PackedMatrix {
        shape,
        codes: Codes::new(codes, layout.bits, columns * layout.bits, NibbleOrder::LowFirst),
        scales,
        groups: Groups::Blocks { rows: 1, columns: layout.group },
        decoder,
        rounding: Rounding::None,
    })
}

/// The bytes of the blocks that [`from_blocks`] makes a matrix in MXFP4 of: codes and powers of two stay, the order of
/// the codes within a block is ggml's. `None`: it is packed otherwise.
pub fn to_mxfp4_blocks(matrix: &PackedMatrix) -> Option<Vec<u8>> {
    let (codes, scales) = parts_of_mxfp4(matrix)?;
    let bytes = BlockType::Mxfp4.bytes();
    let mut blocks = vec![0; scales.len() * bytes];
    let parts = codes.par_chunks_exact(bytes - 1).zip(scales);
    blocks.par_chunks_exact_mut(bytes).zip(parts).with_min_len(BLOCKS_AT_A_TIME).for_each(|(block, (codes, scale))| {
        let code = |n: usize| codes[n / 2] >> (4 * (n % 2)) & 15;
        block[0] = *scale;
        for (n, byte) in block[1..].iter_mut().enumerate() {
            *byte = code(n) | code(n + 16) << 4;
        }
    });
    Some(blocks)
}

/// The two levels of the K types. What they take off a product is added here, with the other sign,
/// which gives the same bits.
fn levels(
    kind: BlockType,
    layout: &Layout,
    bytes: &[u8],
    scales: Vec<f16>,
    minimums: Option<Vec<f16>>,
) -> (Numbers, Option<Numbers>) {
    let per = layout.elements / layout.group;
    let factors: Vec<_> = bytes.par_chunks_exact(layout.bytes).map(|block| kind.factors(block)).collect();
    let of_scales = factors.iter().flat_map(|(scales, _)| &scales[..per]).copied().collect();
    let biases = minimums.map(|minimums| Numbers::Product {
        scales: minimums.into_iter().map(|minimum| -minimum).collect(),
        factors: factors.iter().flat_map(|(_, minimums)| &minimums[..per]).copied().collect(),
        per,
    });
    (Numbers::Product { scales, factors: of_scales, per }, biases)
}

/// One number of each block, which must be finite.
fn halves(layout: &Layout, bytes: &[u8], place: usize, columns: usize, what: &str) -> Result<Vec<f16>, PackedError> {
    let of_block = |block: &[u8]| f16::from_le_bytes([block[place], block[place + 1]]);
    let numbers: Vec<f16> = bytes.par_chunks_exact(layout.bytes).map(of_block).collect();
    match numbers.iter().position(|number| !number.is_finite()) {
        None => Ok(numbers),
        Some(block) => {
            let (of_row, number) = (columns / layout.elements, numbers[block]);
            let (row, block) = (block / of_row, block % of_row);
            Err(PackedError::malformed(format!("the {what} of block {block} of row {row} is {number}")))
        }
    }
}
