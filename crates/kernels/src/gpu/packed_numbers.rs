//! Numbers inside kernels over packed matrices: those of a list, in the type that a file has them in,
//! and the nearest number of 16 bits.
//!
//! Numbers that are not f32 in memory are taken apart as integers, so that no device needs their
//! types. A value is rounded to 16 bits as an integer, too: what a conversion does in a shader is the
//! driver's choice.

#![allow(clippy::too_many_arguments, reason = "a list is given by its places")]

use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;

/// The types of `finetune_packed::Numbers`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum NumberKind {
    F32,
    F16,
    BF16,
    E8M0,
    E4M3,
    Product,
}

/// The numbers that a value is rounded to, to the nearest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Grid {
    F32,
    F16,
    BF16,
}

/// Byte `n` of a list that begins at word `start`.
#[cube]
pub(super) fn byte_of(tables: &[u32], start: usize, n: usize) -> u32 {
    (tables[start + n / 4] >> ((n % 4) as u32 * 8u32)) & 0xffu32
}

/// The 16 bits of number `n` of a list that begins at word `start`.
#[cube]
fn half_of(tables: &[u32], start: usize, n: usize) -> u32 {
    (tables[start + n / 2] >> ((n % 2) as u32 * 16u32)) & 0xffffu32
}

/// The value of the bits of an IEEE half.
#[cube]
pub(super) fn f16_value(bits: u32) -> f32 {
    let sign = (bits & 0x8000u32) << 16u32;
    let exponent = (bits >> 10u32) & 0x1fu32;
    let mantissa = bits & 0x3ffu32;
    let mut size = ((exponent + 112u32) << 23u32) | (mantissa << 13u32);
    if exponent == 0u32 {
        // Subnormal: multiples of 2^-24.
        size = u32::reinterpret(f32::cast_from(mantissa) * 5.960_464_5e-8f32);
    }
    if exponent == 31u32 {
        size = 0x7f80_0000u32 | (mantissa << 13u32);
    }
    f32::reinterpret(sign | size)
}

/// The value of an E4M3 number. Files with its NaN are refused.
#[cube]
fn e4m3_value(bits: u32) -> f32 {
    let sign = (bits & 0x80u32) << 24u32;
    let exponent = (bits >> 3u32) & 0xfu32;
    let mantissa = bits & 7u32;
    let mut size = ((exponent + 120u32) << 23u32) | (mantissa << 20u32);
    if exponent == 0u32 {
        // Subnormal: multiples of 2^-9.
        size = u32::reinterpret(f32::cast_from(mantissa) * 0.001_953_125f32);
    }
    f32::reinterpret(sign | size)
}

/// The value of an E8M0 number, 2^(bits - 127). Files with its NaN are refused.
#[cube]
fn e8m0_value(bits: u32) -> f32 {
    let mut size = bits << 23u32;
    if bits == 0u32 {
        size = 0x0040_0000u32;
    }
    f32::reinterpret(size)
}

/// The value of a byte with a sign.
#[cube]
fn signed_value(byte: u32) -> f32 {
    let mut value = f32::cast_from(byte);
    if byte >= 128u32 {
        value -= 256.0f32;
    }
    value
}

/// Number `n` of a list that begins at word `start`. For a product: `factors` is where its factors
/// begin, of which `share` share a number.
#[cube]
pub(super) fn number_of(
    tables: &[u32],
    start: usize,
    factors: usize,
    share: usize,
    n: usize,
    #[comptime] kind: NumberKind,
) -> f32 {
    if comptime!(kind == NumberKind::F32) {
        f32::reinterpret(tables[start + n])
    } else if comptime!(kind == NumberKind::F16) {
        f16_value(half_of(tables, start, n))
    } else if comptime!(kind == NumberKind::BF16) {
        f32::reinterpret(half_of(tables, start, n) << 16u32)
    } else if comptime!(kind == NumberKind::E8M0) {
        e8m0_value(byte_of(tables, start, n))
    } else if comptime!(kind == NumberKind::E4M3) {
        e4m3_value(byte_of(tables, start, n))
    } else {
        f16_value(half_of(tables, start, n / share)) * signed_value(byte_of(tables, factors, n))
    }
}

/// The nearest IEEE half, to even between two.
#[cube]
fn nearest_f16(value: f32) -> f32 {
    let bits = u32::reinterpret(value);
    let sign = bits & 0x8000_0000u32;
    let size = bits & 0x7fff_ffffu32;
    let mut nearest = (size + 0xfffu32 + ((size >> 13u32) & 1u32)) & 0xffff_e000u32;
    if size < 0x3880_0000u32 {
        // Below 2^-14: multiples of 2^-24, the last bit of numbers from 0.5 to 1.
        let steps = u32::reinterpret(f32::reinterpret(size) + 0.5f32) - 0x3f00_0000u32;
        nearest = u32::reinterpret(f32::cast_from(steps) * 5.960_464_5e-8f32);
    }
    if size >= 0x477f_f000u32 {
        // From 65520 on: infinity.
        nearest = 0x7f80_0000u32;
    }
    f32::reinterpret(sign | nearest)
}

/// The nearest bfloat16, to even between two.
#[cube]
fn nearest_bf16(value: f32) -> f32 {
    let bits = u32::reinterpret(value);
    f32::reinterpret((bits + 0x7fffu32 + ((bits >> 16u32) & 1u32)) & 0xffff_0000u32)
}

/// The nearest number of a grid.
#[cube]
pub(super) fn on_grid(value: f32, #[comptime] grid: Grid) -> f32 {
    if comptime!(grid == Grid::F16) {
        nearest_f16(value)
    } else if comptime!(grid == Grid::BF16) {
        nearest_bf16(value)
    } else {
        value
    }
}
