//! MLX's mxfp4 (`fp_quantize` in mlx/ops.cpp): floats of 4 bits in groups that share a power of
//! two.

use finetune_store::Dtype;
use rayon::prelude::*;

use super::Stored;
use crate::codes::{Codes, NibbleOrder};
use crate::matrix::{Decoder, Groups, PackedMatrix, Rounding};
use crate::numbers::Numbers;

/// Columns of a group.
pub(super) const GROUP: usize = 32;

/// E2M1 (OCP Microscaling 1.0): the values of the codes; 8 to 15 are the negative ones.
const TABLE: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Between the magnitudes of [`TABLE`]. A number in the middle goes to the smaller one.
const MIDDLES: [f32; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];

pub(super) fn quantize(values: &[f32], shape: [usize; 2], stored: Stored) -> PackedMatrix {
    let mut codes = vec![0; values.len() / 2];
    let mut scales = vec![0; values.len() / GROUP];
    (values.par_chunks_exact(GROUP), codes.par_chunks_mut(GROUP / 2), scales.par_iter_mut())
        .into_par_iter()
        .with_min_len(64)
        .for_each(|(values, codes, scale)| *scale = pack_group(values, stored, codes));
    PackedMatrix {
        shape,
        codes: Codes::new(codes, 4, shape[1] * 4, NibbleOrder::LowFirst),
        scales: Numbers::E8M0(scales),
        groups: Groups::Blocks { rows: 1, columns: GROUP },
        decoder: Decoder::Table { table: TABLE.to_vec() },
        rounding: Rounding::None,
    }
}

/// Codes of a group; returns its scale.
///
/// The scale is the smallest power of two that leaves no number beyond 6. (Up to 0.32.2 MLX rounded
/// the power to the nearest instead, and cut the largest numbers.) The quotient by 6 is rounded to
/// the type of the matrix first, as there. mlx 0.32.4 has no scale below 2^-127 and writes 2^(256 +
/// n) in place of 2^n; here it is 2^-127.
fn pack_group(values: &[f32], stored: Stored, codes: &mut [u8]) -> u8 {
    let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let scale = match stored.round(largest / 6.0) {
        0.0 => 127,
        quotient => (power_above(quotient) + 127).clamp(0, 254) as u8,
    };
    let power = crate::numbers::e8m0(scale);
    let (mut magnitudes, mut ranks) = ([0f32; GROUP], [0; GROUP]);
    for (magnitude, value) in magnitudes.iter_mut().zip(values) {
        *magnitude = (value / power).abs();
    }
    super::ranks(&magnitudes, &MIDDLES, &mut ranks);
    for (rank, value) in ranks.iter_mut().zip(values) {
        // What becomes zero has no sign.
        *rank |= u32::from(*value < 0.0 && *rank > 0) << 3;
    }
    for (byte, [first, second]) in codes.iter_mut().zip(ranks.as_chunks().0) {
        *byte = (first | second << 4) as u8;
    }
    scale
}

/// The smallest n with 2^n >= `value`, a positive number.
fn power_above(value: f32) -> i32 {
    if value.is_normal() {
        let bits = value.to_bits();
        (bits >> 23) as i32 - 127 + i32::from(bits & 0x7f_ffff != 0)
    } else {
        // Multiples of 2^-149.
        value.to_bits().next_power_of_two().trailing_zeros() as i32 - 149
    }
}

pub(super) fn tensors([rows, columns]: [usize; 2]) -> Vec<(&'static str, Dtype, Vec<usize>)> {
    vec![("weight", Dtype::U32, vec![rows, columns / 8]), ("scales", Dtype::U8, vec![rows, columns / GROUP])]
}
