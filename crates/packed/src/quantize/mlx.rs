//! MLX's affine form (`affine_quantize` in mlx/ops.cpp): `code · scale + bias` in groups of a row.

use finetune_store::Dtype;
use rayon::prelude::*;

use super::Stored;
use crate::codes::{Codes, NibbleOrder};
use crate::error::PackedError;
use crate::matrix::{Decoder, Groups, PackedMatrix, Rounding};

/// Columns of a group.
pub(super) const GROUP: usize = 64;

pub(super) fn quantize(
    values: &[f32],
    shape: [usize; 2],
    stored: Stored,
    bits: usize,
) -> Result<PackedMatrix, PackedError> {
    let columns = shape[1];
    let mut codes = vec![0; values.len() * bits / 8];
    let groups = values.len() / GROUP;
    let (mut scales, mut biases) = (vec![0f32; groups], vec![0f32; groups]);
    let outputs = (codes.par_chunks_mut(GROUP * bits / 8), scales.par_iter_mut(), biases.par_iter_mut());
    let too_wide = (values.par_chunks_exact(GROUP), outputs.0, outputs.1, outputs.2)
        .into_par_iter()
        .with_min_len(64)
        .enumerate()
        .filter_map(|(group, (values, codes, scale, bias))| {
            (*scale, *bias) = pack_group(values, bits, codes);
            (!scale.is_finite()).then_some(group)
        })
        .min();
    if let Some(group) = too_wide {
        let (row, column) = (group * GROUP / columns, group * GROUP % columns);
        let what =
            format!("elements {column} to {} of row {row} are further apart than f32 reaches", column + GROUP - 1);
        return Err(PackedError::cannot_quantize(what));
    }
    Ok(PackedMatrix {
        shape,
        codes: Codes::new(codes, bits, columns * bits, NibbleOrder::LowFirst),
        scales: stored.numbers(scales),
        groups: Groups::Blocks { rows: 1, columns: GROUP },
        decoder: Decoder::Affine { biases: stored.numbers(biases) },
        rounding: Rounding::None,
    })
}

/// Codes of a group; returns its scale and bias. The scale is negative if the largest value is
/// further from zero than the smallest: code 0 is the one that is further away, and exact.
fn pack_group(values: &[f32], bits: usize, codes: &mut [u8]) -> (f32, f32) {
    let largest_code = ((1 << bits) - 1) as f32;
    let (min, max) =
        values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), value| (min.min(*value), max.max(*value)));
    let from_min = min.abs() > max.abs();
    let scale = ((max - min) / largest_code).max(1e-7);
    let (scale, edge) = if from_min { (scale, min) } else { (-scale, max) };
    // Zero is made a code, if there is one that comes near it.
    let zero = (edge / scale).round_ties_even();
    let (scale, bias) = if zero != 0.0 { (edge / zero, edge) } else { (scale, 0.0) };
    // The codes are those of scale and bias in f32, which are rounded afterwards. Added to 2^23, a
    // number is rounded to an integer, which is then in the lowest bits.
    let code = |value: &f32| (((value - bias) / scale).clamp(0.0, largest_code) + 8_388_608.0).to_bits() as u8;
    let per_byte = 8 / bits;
    for (byte, values) in codes.iter_mut().zip(values.chunks_exact(per_byte)) {
        *byte = values.iter().enumerate().fold(0, |byte, (n, value)| byte | code(value) << (n * bits));
    }
    (scale, bias)
}

pub(super) fn tensors(
    [rows, columns]: [usize; 2],
    stored: Stored,
    bits: usize,
) -> Vec<(&'static str, Dtype, Vec<usize>)> {
    vec![
        ("weight", Dtype::U32, vec![rows, columns * bits / 32]),
        ("scales", stored.dtype(), vec![rows, columns / GROUP]),
        ("biases", stored.dtype(), vec![rows, columns / GROUP]),
    ]
}
