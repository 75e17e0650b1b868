//! The arithmetic of [`PackedMatrix::value`](crate::PackedMatrix::value) as plain loops over many
//! codes. `simd.rs` compiles them for several instruction sets.

use crate::codes::{Codes, NibbleOrder};
use crate::matrix::Rounding;
use crate::numbers::e4m3;

/// Codes that are unpacked at a time.
const CODES: usize = 256;

/// [`Decoder`](crate::Decoder) without what differs from group to group.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Meaning<'a> {
    Affine,
    Shifted {
        factor: f32,
    },
    /// One value for each code.
    Table(&'a [f32]),
    /// The table of E4M3 numbers, whose values need no table.
    E4M3,
}

/// Codes of several groups that follow each other in a row.
pub(crate) struct Piece<'a> {
    pub(crate) codes: &'a Codes,
    /// Where the first code begins: [`Codes::bit`].
    pub(crate) bit: usize,
    /// Elements of the first group.
    pub(crate) first: usize,
    /// Elements of the others; the last may have fewer.
    pub(crate) period: usize,
    pub(crate) meaning: Meaning<'a>,
    pub(crate) rounding: Rounding,
    /// One for each group.
    pub(crate) scales: &'a [f32],
    /// Biases or zero points.
    pub(crate) offsets: &'a [f32],
}

/// What codes mean that have a scale each.
pub(crate) struct Each<'a> {
    pub(crate) meaning: Meaning<'a>,
    pub(crate) rounding: Rounding,
}

impl<'a> Meaning<'a> {
    /// Of codes of so many bits.
    pub(crate) fn of_table(table: &'a [f32], bits: usize) -> Meaning<'a> {
        let is_e4m3 = || table.iter().zip(0u8..=255).all(|(value, code)| value.to_bits() == e4m3(code).to_bits());
        if bits == 8 && table.len() == 256 && is_e4m3() { Meaning::E4M3 } else { Meaning::Table(table) }
    }

    /// What is multiplied for each code of at most 4 bits, as often as it fits.
    fn factors(&self, bits: usize) -> [f32; 16] {
        let code = |n: usize| n & ((1 << bits) - 1);
        match self {
            Meaning::Table(table) => std::array::from_fn(|n| table.get(code(n)).copied().unwrap_or(f32::NAN)),
            _ => std::array::from_fn(|n| code(n) as f32),
        }
    }
}

/// A group's values of all codes of at most 4 bits. Shorter codes are there several times, so that
/// bits above them do not matter.
#[inline(always)]
fn values_of_group(piece: &Piece, factors: &[f32; 16], group: usize) -> [f32; 16] {
    let (scale, offset) = (piece.scales[group], piece.offsets[group]);
    let mut values = match piece.meaning {
        Meaning::Affine => factors.map(|code| code * scale + offset),
        Meaning::Shifted { factor } => factors.map(|code| (code - offset) * scale * factor),
        Meaning::Table(_) | Meaning::E4M3 => factors.map(|value| value * scale),
    };
    round(piece.rounding, &mut values);
    values
}

/// Decodes codes of at most 4 bits: `look_up(bit, values, out)` takes codes from `bit` on and writes
/// the value of each.
#[inline(always)]
pub(crate) fn decode_short(piece: &Piece, out: &mut [f32], look_up: impl Fn(usize, &[f32; 16], &mut [f32])) {
    let factors = piece.meaning.factors(piece.codes.bits());
    for_groups(piece, out, |group, bit, out| look_up(bit, &values_of_group(piece, &factors, group), out));
}

/// Decodes codes of 5 to 8 bits.
#[inline(always)]
pub(crate) fn decode_long(piece: &Piece, out: &mut [f32]) {
    for_groups(piece, out, |group, mut bit, out| {
        let (scale, offset) = (piece.scales[group], piece.offsets[group]);
        let mut buffer = [0; CODES];
        for out in out.chunks_mut(CODES) {
            let codes = piece.codes.bytes_or_unpack(bit, &mut buffer[..out.len()]);
            match piece.meaning {
                Meaning::Affine => each(codes, out, |code| f32::from(code) * scale + offset),
                Meaning::Shifted { factor } => each(codes, out, |code| (f32::from(code) - offset) * scale * factor),
                Meaning::Table(table) => each(codes, out, |code| table[usize::from(code)] * scale),
                Meaning::E4M3 => each(codes, out, |code| e4m3_value(code) * scale),
            }
            round(piece.rounding, out);
            bit += out.len() * piece.codes.bits();
        }
    });
}

/// Calls with each group's number, the bit where its codes begin, and the place of its values.
#[inline(always)]
fn for_groups(piece: &Piece, out: &mut [f32], mut decode: impl FnMut(usize, usize, &mut [f32])) {
    let (first, rest) = out.split_at_mut(piece.first.min(out.len()));
    let bits = piece.codes.bits();
    let mut bit = piece.bit + first.len() * bits;
    decode(0, piece.bit, first);
    for (group, out) in rest.chunks_mut(piece.period).enumerate() {
        decode(group + 1, bit, out);
        bit += out.len() * bits;
    }
}

#[inline(always)]
fn each(codes: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = value(*code);
    }
}

/// Decodes codes that have a scale and an offset each.
#[inline(always)]
pub(crate) fn decode_each(form: &Each, codes: &[u8], scales: &[f32], offsets: &[f32], out: &mut [f32]) {
    let values = out.iter_mut().zip(codes).zip(scales.iter().zip(offsets));
    match form.meaning {
        Meaning::Affine => values.for_each(|((out, code), (scale, offset))| *out = f32::from(*code) * scale + offset),
        Meaning::Shifted { factor } => {
            values.for_each(|((out, code), (scale, offset))| *out = (f32::from(*code) - offset) * scale * factor)
        }
        Meaning::Table(table) => values.for_each(|((out, code), (scale, _))| *out = table[usize::from(*code)] * scale),
        Meaning::E4M3 => values.for_each(|((out, code), (scale, _))| *out = e4m3_value(*code) * scale),
    }
    round(form.rounding, out);
}

/// [`e4m3`] without branches.
#[inline(always)]
fn e4m3_value(code: u8) -> f32 {
    let (code, power) = (u32::from(code), f32::from_bits((127 + 120) << 23));
    let magnitude = f32::from_bits((code & 0x7f) << 20) * power;
    let value = f32::from_bits(magnitude.to_bits() | (code & 0x80) << 24);
    if code & 0x7f == 0x7f { f32::NAN } else { value }
}

/// Rounds to the nearest number of a 16-bit type, as the `half` crate does.
#[inline(always)]
fn round(rounding: Rounding, values: &mut [f32]) {
    match rounding {
        Rounding::None => {}
        Rounding::BF16 => values.iter_mut().for_each(|value| *value = to_bf16(*value)),
        Rounding::F16 => values.iter_mut().for_each(|value| *value = to_f16(*value)),
    }
}

#[inline(always)]
fn to_bf16(value: f32) -> f32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
    f32::from_bits(if value.is_nan() { bits & 0xffff_0000 | 0x40_0000 } else { rounded })
}

#[inline(always)]
fn to_f16(value: f32) -> f32 {
    let (sign, bits) = (value.to_bits() & 0x8000_0000, value.to_bits() & 0x7fff_ffff);
    // 13 bits of the mantissa go. From 2^16 on there is only infinity.
    let normal = (bits + 0xfff + (bits >> 13 & 1)) & 0xffff_e000;
    let normal = if normal >= 0x4780_0000 { 0x7f80_0000 } else { normal };
    // Below 2^-14 numbers are multiples of 2^-24, the last place of 0.5 in f32.
    let small = ((f32::from_bits(bits) + 0.5) - 0.5).to_bits();
    let rounded = if bits < 0x3880_0000 { small } else { normal };
    f32::from_bits(sign | if value.is_nan() { bits & 0xffff_e000 | 0x40_0000 } else { rounded })
}

impl Codes {
    /// The code that begins at a bit: [`Codes::bit`].
    #[inline]
    pub(crate) fn at(&self, bit: usize) -> u8 {
        let bit = if self.order() == NibbleOrder::HighFirst { bit ^ 4 } else { bit };
        let byte = |n: usize| u32::from(self.bytes().get(n).copied().unwrap_or(0));
        let pair = byte(bit / 8) | byte(bit / 8 + 1) << 8;
        (pair >> (bit % 8) & ((1 << self.bits()) - 1)) as u8
    }

    /// Codes from a bit on, one in each byte of `out`.
    #[inline(always)]
    pub(crate) fn unpack(&self, mut bit: usize, out: &mut [u8]) {
        let bits = self.bits();
        // Eight codes fill whole bytes.
        let head = out.len().min((0..8).find(|n| (bit + n * bits).is_multiple_of(8)).unwrap_or(0));
        let (head, rest) = out.split_at_mut(head);
        for out in head {
            *out = self.at(bit);
            bit += bits;
        }
        let (eights, tail) = rest.as_chunks_mut::<8>();
        let bytes = self.bytes().get(bit / 8..).unwrap_or(&[]).chunks_exact(bits);
        for (out, bytes) in eights.iter_mut().zip(bytes) {
            let mut word = [0; 8];
            word[..bits].copy_from_slice(bytes);
            let word = u64::from_le_bytes(word);
            let swapped = word >> 4 & 0x0f0f_0f0f | (word & 0x0f0f_0f0f) << 4;
            let word = if self.order() == NibbleOrder::HighFirst { swapped } else { word };
            *out = spread(word, bits).to_le_bytes();
        }
        bit += 8 * eights.len() * bits;
        for out in tail {
            *out = self.at(bit);
            bit += bits;
        }
    }

    /// As [`Codes::unpack`], from where they are if they are bytes already.
    #[inline(always)]
    fn bytes_or_unpack<'a>(&'a self, bit: usize, out: &'a mut [u8]) -> &'a [u8] {
        if self.bits() == 8 {
            return &self.bytes()[bit / 8..][..out.len()];
        }
        self.unpack(bit, out);
        out
    }
}

/// Eight codes of so many bits, one in each byte: halves move apart, then quarters, then eighths.
#[inline(always)]
fn spread(word: u64, bits: usize) -> u64 {
    let mask = |length: usize| (1u64 << length) - 1;
    let word = word & mask(4 * bits) | (word >> (4 * bits) & mask(4 * bits)) << 32;
    let halves = mask(2 * bits) | mask(2 * bits) << 32;
    let word = word & halves | (word >> (2 * bits) & halves) << 16;
    let quarters = mask(bits) * 0x0001_0001_0001_0001;
    word & quarters | (word >> bits & quarters) << 8
}
