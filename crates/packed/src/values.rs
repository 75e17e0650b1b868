//! The arithmetic of [`PackedMatrix::value`](crate::PackedMatrix::value) as plain loops over many
//! codes. `simd.rs` compiles them for several instruction sets.

use crate::codes::{Codes, NibbleOrder};
use crate::matrix::Rounding;
use crate::numbers::e4m3;

/// Codes that are unpacked at a time.
pub(crate) const CODES: usize = 256;

/// The values of all E4M3 numbers.
static E4M3: [f32; 256] = {
    let (mut values, mut code) = ([0.0; 256], 0);
    while code < 256 {
        values[code] = e4m3(code as u8);
        code += 1;
    }
    values
};

/// [`Decoder`](crate::Decoder) without what differs from group to group.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Meaning<'a> {
    Affine,
    /// `zero`: the zero point, if all groups have the same.
    Shifted {
        zero: Option<u8>,
    },
    /// One value for each code.
    Table(&'a [f32]),
    /// The table of E4M3 numbers, whose values need no table.
    E4M3,
}

/// Codes of several groups that follow each other in a row.
#[derive(Clone, Copy)]
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
    /// One for each group, as the zero points and biases. A zero point, bias or factor that the
    /// meaning does not have is 0, -0 or 1, and changes no bit.
    pub(crate) scales: &'a [f32],
    pub(crate) zeros: &'a [f32],
    pub(crate) biases: &'a [f32],
    pub(crate) factor: f32,
    /// Whether scales have so few bits that f32 holds their products with codes of 8 bits.
    pub(crate) has_short_scales: bool,
}

/// What codes mean that have a scale each.
pub(crate) struct Each<'a> {
    pub(crate) meaning: Meaning<'a>,
    pub(crate) rounding: Rounding,
    /// One for each code, as the zero points and biases.
    pub(crate) scales: &'a [f32],
    pub(crate) zeros: &'a [f32],
    pub(crate) biases: &'a [f32],
    pub(crate) factor: f32,
}

impl<'a> Meaning<'a> {
    /// Of codes of so many bits.
    pub(crate) fn of_table(table: &'a [f32], bits: usize) -> Meaning<'a> {
        let is_e4m3 = || table.iter().zip(&E4M3).all(|(value, known)| value.to_bits() == known.to_bits());
        if bits == 8 && table.len() == 256 && is_e4m3() { Meaning::E4M3 } else { Meaning::Table(table) }
    }
}

/// Decodes codes of 5 to 8 bits.
#[inline(always)]
pub(crate) fn decode_long(piece: &Piece, out: &mut [f32]) {
    let mut buffer = [0; CODES];
    for (group, mut bit, out) in piece.groups(out) {
        for out in out.chunks_mut(CODES) {
            piece.decode_some(group, piece.codes.bytes_or_unpack(bit, &mut buffer[..out.len()]), out);
            bit += CODES * piece.codes.bits();
        }
    }
}

impl Piece<'_> {
    /// Each group's number, the bit where its codes begin, and the place of its values.
    #[inline(always)]
    pub(crate) fn groups<'a>(&self, out: &'a mut [f32]) -> GroupsOf<'a> {
        let (bit, bits) = (self.bit, self.codes.bits());
        GroupsOf { group: 0, bit, bits, length: self.first, period: self.period, out }
    }

    /// The values of codes of a group.
    #[inline(always)]
    pub(crate) fn decode_some(&self, group: usize, codes: &[u8], out: &mut [f32]) {
        let (scale, zero, bias, factor) = (self.scales[group], self.zeros[group], self.biases[group], self.factor);
        match self.meaning {
            Meaning::Affine => each(codes, out, |code| f32::from(code) * scale + bias),
            Meaning::Shifted { .. } => each(codes, out, |code| (f32::from(code) - zero) * scale * factor),
            Meaning::Table(table) => each(codes, out, |code| table[usize::from(code)] * scale),
            Meaning::E4M3 => each(codes, out, |code| e4m3_value(code) * scale),
        }
        round(self.rounding, out);
    }

    /// What [`Piece::values`] multiplies for each code of at most 4 bits, as often as it fits.
    pub(crate) fn factors(&self) -> [f32; 16] {
        let code = |n: usize| n & ((1 << self.codes.bits()) - 1);
        match self.meaning {
            Meaning::Table(table) => std::array::from_fn(|n| table.get(code(n)).copied().unwrap_or(f32::NAN)),
            _ => std::array::from_fn(|n| code(n) as f32),
        }
    }

    /// A group's values of all codes of at most 4 bits. Shorter codes are there several times, so
    /// that bits above them do not matter.
    #[inline(always)]
    pub(crate) fn values(&self, factors: &[f32; 16], group: usize) -> [f32; 16] {
        let (scale, zero, bias, factor) = (self.scales[group], self.zeros[group], self.biases[group], self.factor);
        let mut values = factors.map(|value| (value - zero) * scale * factor + bias);
        round(self.rounding, &mut values);
        values
    }
}

/// [`Piece::groups`]
pub(crate) struct GroupsOf<'a> {
    group: usize,
    bit: usize,
    bits: usize,
    /// Elements of the next group.
    length: usize,
    period: usize,
    out: &'a mut [f32],
}

impl<'a> Iterator for GroupsOf<'a> {
    type Item = (usize, usize, &'a mut [f32]);

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        if self.out.is_empty() {
            return None;
        }
        let (now, later) = std::mem::take(&mut self.out).split_at_mut_checked(self.length)?;
        let (group, bit) = (self.group, self.bit);
        self.out = later;
        self.bit += now.len() * self.bits;
        self.group += 1;
        self.length = self.period.min(self.out.len());
        Some((group, bit, now))
    }
}

#[inline(always)]
fn each(codes: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = value(*code);
    }
}

/// Decodes codes that have a scale, a zero point and a bias each.
#[inline(always)]
pub(crate) fn decode_each(form: &Each, codes: &[u8], out: &mut [f32]) {
    let n = out.len();
    let (codes, scales, zeros, biases) = (&codes[..n], &form.scales[..n], &form.zeros[..n], &form.biases[..n]);
    for i in 0..n {
        let value = match form.meaning {
            Meaning::Affine | Meaning::Shifted { .. } => f32::from(codes[i]),
            Meaning::Table(table) => table[usize::from(codes[i])],
            Meaning::E4M3 => e4m3_value(codes[i]),
        };
        out[i] = (value - zeros[i]) * scales[i] * form.factor + biases[i];
    }
    round(form.rounding, out);
}

/// [`e4m3`] without branches, and without subnormal numbers of f32, which processors take long for.
#[inline(always)]
fn e4m3_value(code: u8) -> f32 {
    let code = u32::from(code);
    // Exponent and mantissa in the places of f32; the bias goes from 7 to 127.
    let places = (code & 0x7f) << 20;
    let normal = f32::from_bits(places + (120 << 23));
    let subnormal = f32::from_bits(places + (121 << 23)) - f32::from_bits(121 << 23);
    let magnitude = if code & 0x78 == 0 { subnormal } else { normal };
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
pub(crate) fn to_f16(value: f32) -> f32 {
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
    pub(crate) fn unpack(&self, bit: usize, out: &mut [u8]) {
        match self.bits() {
            2 => self.unpack_of::<2>(bit, out),
            3 => self.unpack_of::<3>(bit, out),
            4 => self.unpack_of::<4>(bit, out),
            5 => self.unpack_of::<5>(bit, out),
            6 => self.unpack_of::<6>(bit, out),
            _ => out.copy_from_slice(&self.bytes()[bit / 8..][..out.len()]),
        }
    }

    #[inline(always)]
    fn unpack_of<const BITS: usize>(&self, mut bit: usize, out: &mut [u8]) {
        // Eight codes fill whole bytes.
        let head = out.len().min((0..8).find(|n| (bit + n * BITS).is_multiple_of(8)).unwrap_or(0));
        let (head, rest) = out.split_at_mut(head);
        for out in head {
            *out = self.at(bit);
            bit += BITS;
        }
        let (eights, tail) = rest.as_chunks_mut::<8>();
        let bytes = self.bytes().get(bit / 8..).unwrap_or(&[]).as_chunks::<BITS>().0;
        let is_high_first = self.order() == NibbleOrder::HighFirst;
        for (out, bytes) in eights.iter_mut().zip(bytes) {
            let mut word = [0; 8];
            word[..BITS].copy_from_slice(bytes);
            let word = u64::from_le_bytes(word);
            let swapped = word >> 4 & 0x0f0f_0f0f | (word & 0x0f0f_0f0f) << 4;
            *out = spread::<BITS>(if is_high_first { swapped } else { word }).to_le_bytes();
        }
        bit += 8 * eights.len() * BITS;
        for out in tail {
            *out = self.at(bit);
            bit += BITS;
        }
    }

    /// As [`Codes::unpack`], from where they are if they are bytes already.
    #[inline(always)]
    pub(crate) fn bytes_or_unpack<'a>(&'a self, bit: usize, out: &'a mut [u8]) -> &'a [u8] {
        if self.bits() == 8 {
            return &self.bytes()[bit / 8..][..out.len()];
        }
        self.unpack(bit, out);
        out
    }
}

/// Eight codes of so many bits, one in each byte: halves move apart, then quarters, then eighths.
#[inline(always)]
fn spread<const BITS: usize>(word: u64) -> u64 {
    let mask = |length: usize| (1u64 << length) - 1;
    let word = word & mask(4 * BITS) | (word >> (4 * BITS) & mask(4 * BITS)) << 32;
    let halves = mask(2 * BITS) | mask(2 * BITS) << 32;
    let word = word & halves | (word >> (2 * BITS) & halves) << 16;
    let quarters = mask(BITS) * 0x0001_0001_0001_0001;
    word & quarters | (word >> BITS & quarters) << 8
}
