//! bitsandbytes' NF4 (`quantize_4bit` in backends/default/ops.py): quantiles of a normal
//! distribution, scaled by the largest magnitude of a block.

use finetune_store::Dtype;
use rayon::prelude::*;
use serde_json::json;

use super::Stored;
use crate::codes::{Codes, NibbleOrder};
use crate::matrix::{Decoder, Groups, PackedMatrix};
use crate::numbers::Numbers;

/// Elements of a block of the matrix as one line: a block may go on in the next row.
pub(super) const BLOCK: usize = 64;

/// The values of the codes (QLoRA, appendix E; bitsandbytes' backends/utils.py).
const TABLE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The smallest magnitude that the reference divides by.
const SMALLEST: f32 = 1e-38;

pub(super) fn quantize(values: &[f32], shape: [usize; 2], stored: Stored) -> PackedMatrix {
    let middles: [f32; 15] = std::array::from_fn(|n| (TABLE[n] + TABLE[n + 1]) / 2.0);
    let mut codes = vec![0; values.len().div_ceil(2)];
    let mut scales = vec![0f32; values.len().div_ceil(BLOCK)];
    (values.par_chunks(BLOCK), codes.par_chunks_mut(BLOCK / 2), scales.par_iter_mut())
        .into_par_iter()
        .with_min_len(64)
        .for_each(|(values, codes, scale)| *scale = pack_block(values, &middles, codes));
    PackedMatrix {
        shape,
        codes: Codes::new(codes, 4, shape[1] * 4, NibbleOrder::HighFirst),
        scales: Numbers::F32(scales),
        groups: Groups::Flat { elements: BLOCK },
        decoder: Decoder::Table { table: TABLE.to_vec() },
        rounding: stored.rounding(),
    }
}

/// Codes of a block; returns its scale. A last block of fewer elements is divided where whole ones
/// are multiplied by the inverse, and its scale is never below [`SMALLEST`].
fn pack_block(values: &[f32], middles: &[f32; 15], codes: &mut [u8]) -> f32 {
    let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let divisor = largest.max(SMALLEST);
    let is_whole = values.len() == BLOCK;
    // Behind the last of an odd number of elements comes the code of zero.
    let (mut scaled, mut ranks) = ([0f32; BLOCK], [0; BLOCK]);
    for (scaled, value) in scaled.iter_mut().zip(values) {
        *scaled = if is_whole { value * (1.0 / divisor) } else { value / divisor }.clamp(-1.0, 1.0);
    }
    super::ranks(&scaled, middles, &mut ranks);
    for (byte, [first, second]) in codes.iter_mut().zip(ranks.as_chunks().0) {
        *byte = (first << 4 | second) as u8;
    }
    if is_whole { largest } else { divisor }
}

pub(super) fn tensors(shape: [usize; 2], stored: Stored) -> Vec<(&'static str, Dtype, Vec<usize>)> {
    let elements = shape[0] * shape[1];
    vec![
        ("weight", Dtype::U8, vec![elements.div_ceil(2), 1]),
        ("weight.absmax", Dtype::F32, vec![elements.div_ceil(BLOCK)]),
        ("weight.quant_map", Dtype::F32, vec![TABLE.len()]),
        ("weight.quant_state.bitsandbytes__nf4", Dtype::U8, vec![state(shape, stored).len()]),
    ]
}

pub(super) fn bytes(shape: [usize; 2], stored: Stored, codes: &[u8], scales: Vec<u8>) -> Vec<Vec<u8>> {
    let table = TABLE.iter().flat_map(|value| value.to_le_bytes()).collect();
    vec![codes.to_vec(), scales, table, state(shape, stored).into_bytes()]
}

/// The rest of bitsandbytes' `QuantState`, as `json.dumps` of Python writes it.
fn state([rows, columns]: [usize; 2], stored: Stored) -> String {
    let dtype = match stored {
        Stored::F32 => "float32",
        Stored::F16 => "float16",
        Stored::BF16 => "bfloat16",
    };
    format!(r#"{{"quant_type": "nf4", "blocksize": {BLOCK}, "dtype": {}, "shape": [{rows}, {columns}]}}"#, json!(dtype))
}
