//! bitsandbytes' int8 (`Int8Params` in nn/modules.py, `int8_vectorwise_quant`): a scale for each
//! row.

use finetune_store::Dtype;
use rayon::prelude::*;

use crate::codes::{Codes, NibbleOrder};
use crate::error::PackedError;
use crate::matrix::{Decoder, Groups, PackedMatrix, Rounding, Zeros};
use crate::numbers::Numbers;
use crate::values::to_f16;

/// 1/127 as the reference multiplies by it (`int8_vectorwise_dequant`).
const FACTOR: f32 = 7.874_016e-3;

/// Codes here are those of the file plus this: unsigned.
const ZERO: u8 = 128;

pub(super) fn quantize(values: &[f32], shape: [usize; 2]) -> Result<PackedMatrix, PackedError> {
    let [rows, columns] = shape;
    let mut codes = vec![0; values.len()];
    let mut scales = vec![0f32; rows];
    let beyond = (values.par_chunks(columns), codes.par_chunks_mut(columns), scales.par_iter_mut())
        .into_par_iter()
        .enumerate()
        .filter_map(|(row, (values, codes, scale))| {
            *scale = pack_row(values, codes);
            scale.is_infinite().then_some(row)
        })
        .min();
    if let Some(row) = beyond {
        let values = &values[row * columns..][..columns];
        let column = values.iter().position(|value| to_f16(*value).is_infinite()).unwrap_or(0);
        let what = format!("element {column} of row {row} is {}, and int8 is made from f16", values[column]);
        return Err(PackedError::cannot_quantize(what));
    }
    Ok(PackedMatrix {
        shape,
        codes: Codes::new(codes, 8, columns * 8, NibbleOrder::LowFirst),
        scales: Numbers::F32(scales),
        groups: Groups::Blocks { rows: 1, columns },
        decoder: Decoder::Shifted { zeros: Zeros::All(ZERO), factor: FACTOR },
        rounding: Rounding::None,
    })
}

/// Codes of a row; returns its scale, the largest magnitude. The reference makes every matrix f16
/// first.
fn pack_row(values: &[f32], codes: &mut [u8]) -> f32 {
    let largest = values.iter().fold(0f32, |largest, value| largest.max(to_f16(*value).abs()));
    if largest == 0.0 {
        codes.fill(ZERO);
        return 0.0;
    }
    // torch divides a number by a tensor in two roundings.
    let factor = (1.0 / largest) * 127.0;
    for (code, value) in codes.iter_mut().zip(values) {
        // Added to 1.5 · 2^23, a number is rounded to an integer, which is then in the lowest bits.
        *code = (to_f16(*value) * factor + 12_582_912.0).to_bits() as u8 ^ ZERO;
    }
    largest
}

pub(super) fn tensors([rows, columns]: [usize; 2]) -> Vec<(&'static str, Dtype, Vec<usize>)> {
    vec![
        ("weight", Dtype::I8, vec![rows, columns]),
        ("SCB", Dtype::F32, vec![rows]),
        // 0: row-major.
        ("weight_format", Dtype::U8, Vec::new()),
    ]
}

pub(super) fn bytes(codes: &[u8], scales: Vec<u8>) -> Vec<Vec<u8>> {
    vec![codes.iter().map(|code| code ^ ZERO).collect(), scales, vec![0]]
}
