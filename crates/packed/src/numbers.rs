//! Scales and biases, in the type that their file has them in.

use half::{bf16, f16};

/// A list of numbers. Each is exact in f32.
#[derive(Clone, Debug)]
pub enum Numbers {
    /// f32
    F32(Vec<f32>),
    /// IEEE half
    F16(Vec<f16>),
    /// bfloat16
    BF16(Vec<bf16>),
    /// Powers of two, 2^(n - 127) (OCP Microscaling 1.0, "E8M0").
    E8M0(Vec<u8>),
    /// Floats of 8 bits, 4 of exponent, without infinities (OCP 8-bit floating point, "E4M3").
    E4M3(Vec<u8>),
    /// `factors[n] · scales[n / per]`, rounded to f32 once: the two levels of GGUF's K types.
    Product {
        /// One for each `per` factors.
        scales: Vec<f16>,
        /// Small integers.
        factors: Vec<i8>,
        /// How many factors share a scale.
        per: usize,
    },
}

impl Numbers {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Numbers::F32(values) => values.len(),
            Numbers::F16(values) => values.len(),
            Numbers::BF16(values) => values.len(),
            Numbers::E8M0(values) | Numbers::E4M3(values) => values.len(),
            Numbers::Product { factors, .. } => factors.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether each has at most 11 significant bits.
    pub(crate) fn are_short(&self) -> bool {
        !matches!(self, Numbers::F32(_) | Numbers::Product { .. })
    }

    /// The `n`th number.
    #[inline]
    pub fn get(&self, n: usize) -> f32 {
        match self {
            Numbers::F32(values) => values[n],
            Numbers::F16(values) => values[n].to_f32(),
            Numbers::BF16(values) => values[n].to_f32(),
            Numbers::E8M0(values) => e8m0(values[n]),
            Numbers::E4M3(values) => e4m3(values[n]),
            Numbers::Product { scales, factors, per } => scales[n / per].to_f32() * f32::from(factors[n]),
        }
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        match self {
            Numbers::F32(values) => 4 * values.len(),
            Numbers::F16(values) => 2 * values.len(),
            Numbers::BF16(values) => 2 * values.len(),
            Numbers::E8M0(values) | Numbers::E4M3(values) => values.len(),
            Numbers::Product { scales, factors, .. } => 2 * scales.len() + factors.len(),
        }
    }
}

/// The number in f32, which is exact, without branches. The `half` crate converts eight in a call.
#[inline(always)]
pub(crate) fn widen_f16(number: f16) -> f32 {
    let bits = u32::from(number.to_bits());
    let (sign, magnitude) = ((bits & 0x8000) << 16, bits & 0x7fff);
    // Exponent and mantissa in the places of f32; the bias goes from 15 to 127.
    let normal = (magnitude << 13) + (112 << 23);
    let subnormal = (f32::from_bits((magnitude << 13) + (113 << 23)) - f32::from_bits(113 << 23)).to_bits();
    let special = magnitude << 13 | 0x7f80_0000 | u32::from(magnitude > 0x7c00) << 22;
    let finite = if magnitude < 0x400 { subnormal } else { normal };
    f32::from_bits(sign | if magnitude < 0x7c00 { finite } else { special })
}

/// The number in f32, which is exact. The `half` crate's own conversion quiets NaNs, one by one.
#[inline(always)]
pub(crate) fn widen(number: bf16) -> f32 {
    f32::from_bits(u32::from(number.to_bits()) << 16)
}

/// The values of numbers, as many as there is room for.
#[inline(always)]
pub(crate) fn each<T>(from: &[T], out: &mut [f32], value: impl Fn(&T) -> f32) {
    for (out, from) in out.iter_mut().zip(from) {
        *out = value(from);
    }
}

/// 2^(code - 127); NaN for 255.
pub(crate) fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        code => f32::from_bits(u32::from(code) << 23),
    }
}

/// The value of an E4M3 number; NaN for 0x7f and 0xff.
pub(crate) const fn e4m3(code: u8) -> f32 {
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    // Exponent and mantissa in the places of f32; the power moves the bias from 127 to 7, and makes
    // subnormal numbers normal. It is exact.
    let magnitude = f32::from_bits(((code & 0x7f) as u32) << 20) * f32::from_bits((127 + 120) << 23);
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::InstructionSet;

    #[test]
    fn every_half_is_widened_as_the_half_crate_does() {
        let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        for set in InstructionSet::here() {
            let mut out = vec![0.0; all.len()];
            set.widen_f16(&all, &mut out);
            for (number, out) in all.iter().zip(out) {
                assert_eq!(out.to_bits(), number.to_f32().to_bits(), "{set:?}, {:#06x}", number.to_bits());
            }
        }
    }
}
