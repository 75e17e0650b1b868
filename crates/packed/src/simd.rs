//! Instruction sets, and what is written in their own instructions: looking values up, transposing.

use crate::codes::{Codes, NibbleOrder};
use crate::decode::ROWS;
use crate::values::{Each, Piece, decode_each, decode_long, decode_short};

/// What code is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InstructionSet {
    /// What every processor of this architecture has. On aarch64 that is NEON.
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// With its parts F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Defines a function that is compiled for each instruction set, and called by its value.
macro_rules! for_each_set {
    (fn $name:ident($self:ident, $($argument:ident: $type:ty),*) { avx512: $avx512:expr, avx2: $avx2:expr, baseline: $baseline:expr $(,)? }) => {
        pub(crate) fn $name($self, $($argument: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($argument: $type),*) { $avx512 }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($argument: $type),*) { $avx2 }
                match $self {
                    // SAFETY: `InstructionSet::here` has found these instructions on this processor.
                    InstructionSet::Avx512 => return unsafe { avx512($($argument),*) },
                    // SAFETY: as above.
                    InstructionSet::Avx2 => return unsafe { avx2($($argument),*) },
                    InstructionSet::Baseline => {}
                }
            }
            $baseline
        }
    };
}

impl InstructionSet {
    /// Those of this processor, the best one first.
    pub(crate) fn here() -> impl Iterator<Item = InstructionSet> {
        #[cfg(target_arch = "x86_64")]
        let newer = {
            let avx2 = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
            let avx512 = avx2
                && std::is_x86_feature_detected!("avx512f")
                && std::is_x86_feature_detected!("avx512bw")
                && std::is_x86_feature_detected!("avx512dq")
                && std::is_x86_feature_detected!("avx512vl");
            [avx512.then_some(InstructionSet::Avx512), avx2.then_some(InstructionSet::Avx2)]
        };
        #[cfg(not(target_arch = "x86_64"))]
        let newer = [None; 0];
        newer.into_iter().flatten().chain([InstructionSet::Baseline])
    }

    /// The best one of this processor.
    pub(crate) fn best() -> InstructionSet {
        InstructionSet::here().next().unwrap_or(InstructionSet::Baseline)
    }

    for_each_set! {
        fn decode(self, piece: &Piece, out: &mut [f32]) {
            avx512: if piece.codes.bits() <= 4 { short_avx512(piece, out) } else { decode_long(piece, out) },
            avx2: if piece.codes.bits() <= 4 { short_avx2(piece, out) } else { decode_long(piece, out) },
            baseline: if piece.codes.bits() <= 4 { short(piece, out) } else { decode_long(piece, out) },
        }
    }

    for_each_set! {
        fn decode_each(self, form: &Each, codes: &[u8], scales: &[f32], offsets: &[f32], out: &mut [f32]) {
            avx512: decode_each(form, codes, scales, offsets, out),
            avx2: decode_each(form, codes, scales, offsets, out),
            baseline: decode_each(form, codes, scales, offsets, out),
        }
    }
}

impl InstructionSet {
    for_each_set! {
        fn transpose(self, block: &[f32], stride: usize, shape: [usize; 2], out: &mut [f32], out_stride: usize) {
            avx512: transpose_avx2(block, stride, shape, out, out_stride),
            avx2: transpose_avx2(block, stride, shape, out, out_stride),
            baseline: transpose(block, stride, shape, 0, out, out_stride),
        }
    }
}

/// `out[column · out_stride + row] = block[row · stride + column]` for `shape` rows and columns, from
/// a column on.
#[inline(always)]
fn transpose(block: &[f32], stride: usize, shape: [usize; 2], from: usize, out: &mut [f32], out_stride: usize) {
    let [rows, columns] = shape;
    for column in from..columns {
        for (row, out) in out[column * out_stride..][..rows].iter_mut().enumerate() {
            *out = block[row * stride + column];
        }
    }
}

/// Values of codes of at most 4 bits, one by one.
#[cold]
fn look_up_some(codes: &Codes, bit: usize, values: &[f32; 16], out: &mut [f32]) {
    for (n, out) in out.iter_mut().enumerate() {
        *out = values[usize::from(codes.at(bit + n * codes.bits()))];
    }
}

/// The codes before the first that begins with a byte, then those in whole pieces of `piece`, then the
/// rest, each with its bit.
#[inline(always)]
fn in_pieces(bit: usize, bits: usize, piece: usize, out: &mut [f32]) -> [(usize, &mut [f32]); 3] {
    let head = (0..8).find(|n| (bit + n * bits).is_multiple_of(8)).unwrap_or(0).min(out.len());
    let (head, rest) = out.split_at_mut(head);
    let (pieces, tail) = rest.split_at_mut(rest.len() / piece * piece);
    let second = bit + head.len() * bits;
    let third = second + pieces.len() * bits;
    [(bit, head), (second, pieces), (third, tail)]
}

/// Eight codes in a number, from their lowest bits on.
#[inline(always)]
fn eight<const BITS: usize>(bytes: &[u8]) -> u32 {
    let mut word = [0; 4];
    word[..BITS].copy_from_slice(&bytes[..BITS]);
    u32::from_le_bytes(word)
}

/// How far each of eight codes is from the end of [`eight`].
#[inline(always)]
fn shifts(codes: &Codes) -> [i32; 8] {
    match codes.order() {
        NibbleOrder::LowFirst => std::array::from_fn(|n| (n * codes.bits()) as i32),
        NibbleOrder::HighFirst => std::array::from_fn(|n| (n * 4) as i32 ^ 4),
    }
}

/// Defines a function that decodes codes of at most 4 bits by `$look_up::<BITS>`.
macro_rules! short {
    ($(#[$features:meta])* fn $name:ident, $look_up:ident) => {
        $(#[$features])*
        pub(super) fn $name(piece: &Piece, out: &mut [f32]) {
            let (codes, shifts) = (piece.codes, shifts(piece.codes));
            match codes.bits() {
                2 => decode_short(piece, out, |bit, values, out| $look_up::<2>(codes, bit, &shifts, values, out)),
                3 => decode_short(piece, out, |bit, values, out| $look_up::<3>(codes, bit, &shifts, values, out)),
                _ => decode_short(piece, out, |bit, values, out| $look_up::<4>(codes, bit, &shifts, values, out)),
            }
        }
    };
}

short! { fn short, look_up }

/// Values of codes of BITS bits, from a bit on.
#[inline(always)]
fn look_up<const BITS: usize>(codes: &Codes, bit: usize, shifts: &[i32; 8], values: &[f32; 16], out: &mut [f32]) {
    let [head, (bit, eights), tail] = in_pieces(bit, BITS, 8, out);
    if !head.1.is_empty() {
        look_up_some(codes, head.0, values, head.1);
    }
    let bytes = codes.bytes().get(bit / 8..).unwrap_or(&[]);
    for (bytes, out) in bytes.chunks_exact(BITS).zip(eights.as_chunks_mut::<8>().0) {
        look_up_eight(eight::<BITS>(bytes), shifts, values, out);
    }
    if !tail.1.is_empty() {
        look_up_some(codes, tail.0, values, tail.1);
    }
}

#[cfg(not(target_arch = "aarch64"))]
#[inline(always)]
fn look_up_eight(word: u32, shifts: &[i32; 8], values: &[f32; 16], out: &mut [f32; 8]) {
    for (out, shift) in out.iter_mut().zip(shifts) {
        *out = values[(word >> shift & 15) as usize];
    }
}

#[cfg(target_arch = "x86_64")]
use x86::{short_avx2, short_avx512, transpose_avx2};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    short! {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn short_avx512, look_up_avx512
    }

    short! {
        #[target_feature(enable = "avx2,fma")]
        fn short_avx2, look_up_avx2
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn look_up_avx512<const BITS: usize>(
        codes: &Codes,
        bit: usize,
        shifts: &[i32; 8],
        values: &[f32; 16],
        out: &mut [f32],
    ) {
        let [head, (bit, sixteens), tail] = in_pieces(bit, BITS, 16, out);
        if !head.1.is_empty() {
            look_up_some(codes, head.0, values, head.1);
        }
        // SAFETY: both arrays are as long as what is loaded.
        let (values_here, shifts) = unsafe {
            (_mm512_loadu_ps(values.as_ptr()), _mm512_broadcast_i64x4(_mm256_loadu_si256(shifts.as_ptr().cast())))
        };
        let bytes = codes.bytes().get(bit / 8..).unwrap_or(&[]);
        for (bytes, out) in bytes.chunks_exact(2 * BITS).zip(sixteens.as_chunks_mut::<16>().0) {
            let first = _mm512_set1_epi32(eight::<BITS>(bytes) as i32);
            let both = _mm512_mask_set1_epi32(first, 0xff00, eight::<BITS>(&bytes[BITS..]) as i32);
            // A permutation takes the lowest four bits.
            let found = _mm512_permutexvar_ps(_mm512_srlv_epi32(both, shifts), values_here);
            // SAFETY: the array is as long as what is stored.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), found) };
        }
        if !tail.1.is_empty() {
            look_up_some(codes, tail.0, values, tail.1);
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn look_up_avx2<const BITS: usize>(
        codes: &Codes,
        bit: usize,
        shifts: &[i32; 8],
        values: &[f32; 16],
        out: &mut [f32],
    ) {
        let [head, (bit, eights), tail] = in_pieces(bit, BITS, 8, out);
        if !head.1.is_empty() {
            look_up_some(codes, head.0, values, head.1);
        }
        // SAFETY: all arrays are as long as what is loaded.
        let (low, high, shifts) = unsafe {
            let high = _mm256_loadu_ps(values[8..].as_ptr());
            (_mm256_loadu_ps(values.as_ptr()), high, _mm256_loadu_si256(shifts.as_ptr().cast()))
        };
        let bytes = codes.bytes().get(bit / 8..).unwrap_or(&[]);
        for (bytes, out) in bytes.chunks_exact(BITS).zip(eights.as_chunks_mut::<8>().0) {
            let code = _mm256_srlv_epi32(_mm256_set1_epi32(eight::<BITS>(bytes) as i32), shifts);
            // A permutation takes the lowest three bits, the blend the fourth as a sign.
            let mut found = _mm256_permutevar8x32_ps(low, code);
            if BITS == 4 {
                let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(code));
                found = _mm256_blendv_ps(found, _mm256_permutevar8x32_ps(high, code), fourth);
            }
            // SAFETY: the array is as long as what is stored.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), found) };
        }
        if !tail.1.is_empty() {
            look_up_some(codes, tail.0, values, tail.1);
        }
    }

    /// As [`transpose`] from the first column on, 8 × 8 elements at a time.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn transpose_avx2(block: &[f32], stride: usize, shape: [usize; 2], out: &mut [f32], out_stride: usize) {
        let whole = if shape[0] == ROWS { shape[1] / 8 * 8 } else { 0 };
        for column in (0..whole).step_by(8) {
            let row = |n: usize| {
                let row: &[f32; 8] = block[n * stride + column..].first_chunk().expect("eight columns are left");
                // SAFETY: the array is as long as what is loaded.
                unsafe { _mm256_loadu_ps(row.as_ptr()) }
            };
            let pair = |n: usize| (_mm256_unpacklo_ps(row(n), row(n + 1)), _mm256_unpackhi_ps(row(n), row(n + 1)));
            let four = |n: usize| {
                let ((a, b), (c, d)) = (pair(n), pair(n + 2));
                let (e, f) = (_mm256_shuffle_ps::<0x44>(a, c), _mm256_shuffle_ps::<0xee>(a, c));
                [e, f, _mm256_shuffle_ps::<0x44>(b, d), _mm256_shuffle_ps::<0xee>(b, d)]
            };
            let (upper, lower) = (four(0), four(4));
            for n in 0..4 {
                let low = _mm256_permute2f128_ps::<0x20>(upper[n], lower[n]);
                let high = _mm256_permute2f128_ps::<0x31>(upper[n], lower[n]);
                for (column, values) in [(column + n, low), (column + n + 4, high)] {
                    let out: &mut [f32; 8] = out[column * out_stride..].first_chunk_mut().expect("eight rows are left");
                    // SAFETY: the array is as long as what is stored.
                    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), values) };
                }
            }
        }
        transpose(block, stride, shape, whole, out, out_stride);
    }
}

#[cfg(target_arch = "aarch64")]
#[inline(always)]
fn look_up_eight(word: u32, shifts: &[i32; 8], values: &[f32; 16], out: &mut [f32; 8]) {
    use std::arch::aarch64::*;
    // SAFETY: NEON is part of every aarch64 processor that this is compiled for, and all arrays are as
    // long as what is loaded and stored.
    unsafe {
        // The sixteen values as 64 bytes, which one instruction looks up.
        let bytes = values.as_ptr().cast::<u8>();
        let table =
            uint8x16x4_t(vld1q_u8(bytes), vld1q_u8(bytes.add(16)), vld1q_u8(bytes.add(32)), vld1q_u8(bytes.add(48)));
        for half in [0, 4] {
            // A shift to the left by a negative number is one to the right.
            let shifts = vnegq_s32(vld1q_s32(shifts.as_ptr().add(half)));
            let code = vandq_u32(vshlq_u32(vdupq_n_u32(word), shifts), vdupq_n_u32(15));
            // Byte n of value c is byte 4 c + n of the table.
            let index = vmlaq_u32(vdupq_n_u32(0x0302_0100), code, vdupq_n_u32(0x0404_0404));
            let found = vqtbl4q_u8(table, vreinterpretq_u8_u32(index));
            vst1q_f32(out.as_mut_ptr().add(half), vreinterpretq_f32_u8(found));
        }
    }
}
