//! Instruction sets, and what is written in their own instructions: looking values up.

use std::sync::OnceLock;

use half::{bf16, f16};

use crate::codes::{Codes, NibbleOrder};
use crate::numbers::{each, widen, widen_f16};
use crate::values::{Each, Piece, decode_each, decode_long};

/// What decoding and products are compiled for. All have the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InstructionSet {
    /// What every processor of this architecture has. On aarch64 that is NEON.
    Baseline,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512, with its parts F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Defines a function that is compiled for each instruction set, and called by its value.
macro_rules! for_each_set {
    ($(#[$meta:meta])* $visibility:vis fn $name:ident($self:ident, $($argument:ident: $type:ty),*) $(-> $result:ty)? { avx512: $avx512:expr, avx2: $avx2:expr, baseline: $baseline:expr $(,)? }) => {
        $(#[$meta])*
        $visibility fn $name($self, $($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn avx512($($argument: $type),*) $(-> $result)? { $avx512 }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($argument: $type),*) $(-> $result)? { $avx2 }
                match $self {
                    // SAFETY: `InstructionSet::here` has found these instructions on this
                    // processor.
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
pub(crate) use for_each_set;

impl InstructionSet {
    /// Those of this processor, the best one first.
    pub fn here() -> impl Iterator<Item = InstructionSet> {
        #[cfg(target_arch = "x86_64")]
        let newer = {
            let avx2 = std::is_x86_feature_detected!("avx2")
                && std::is_x86_feature_detected!("fma")
                && std::is_x86_feature_detected!("f16c");
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

    /// Whether this processor has the instructions of AVX-512 that round to bf16 and multiply it.
    #[cfg(target_arch = "x86_64")]
    pub fn has_bf16() -> bool {
        InstructionSet::best() == InstructionSet::Avx512 && std::is_x86_feature_detected!("avx512bf16")
    }

    /// The best one of this processor.
    pub fn best() -> InstructionSet {
        static BEST: OnceLock<InstructionSet> = OnceLock::new();
        *BEST.get_or_init(|| InstructionSet::here().next().unwrap_or(InstructionSet::Baseline))
    }

    for_each_set! {
        pub(crate) fn decode(self, piece: &Piece, out: &mut [f32]) {
            avx512: if piece.codes.bits() <= 4 { short_avx512(piece, out) } else { long_avx512(piece, out) },
            avx2: if piece.codes.bits() <= 4 { short_avx2(piece, out) } else { long_avx2(piece, out) },
            baseline: if piece.codes.bits() <= 4 { short(piece, out) } else { decode_long(piece, out) },
        }
    }

    for_each_set! {
        pub(crate) fn decode_each(self, form: &Each, codes: &[u8], out: &mut [f32]) {
            avx512: decode_each(form, codes, out),
            avx2: decode_each(form, codes, out),
            baseline: decode_each(form, codes, out),
        }
    }

    for_each_set! {
        /// As many numbers as there is room for, in f32.
        pub(crate) fn widen_f16(self, numbers: &[f16], out: &mut [f32]) {
            avx512: each(numbers, out, |number| widen_f16(*number)),
            avx2: each(numbers, out, |number| widen_f16(*number)),
            baseline: each(numbers, out, |number| widen_f16(*number)),
        }
    }

    for_each_set! {
        /// As many numbers as there is room for, in f32.
        pub(crate) fn widen(self, numbers: &[bf16], out: &mut [f32]) {
            avx512: each(numbers, out, |number| widen(*number)),
            avx2: each(numbers, out, |number| widen(*number)),
            baseline: each(numbers, out, |number| widen(*number)),
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

/// The codes before the first that begins with a byte, then those in whole pieces of `piece`, then
/// the rest, each with its bit.
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

/// Decodes codes of at most 4 bits.
fn short(piece: &Piece, out: &mut [f32]) {
    let (codes, factors, shifts) = (piece.codes, piece.factors(), shifts(piece.codes));
    for (group, bit, out) in piece.groups(out) {
        let values = piece.values(&factors, group);
        match codes.bits() {
            2 => look_up::<2>(codes, bit, &shifts, &values, out),
            3 => look_up::<3>(codes, bit, &shifts, &values, out),
            _ => look_up::<4>(codes, bit, &shifts, &values, out),
        }
    }
}

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
use x86::{long_avx2, long_avx512, short_avx2, short_avx512};
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{round_avx2, round_avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;
    use crate::matrix::Rounding;
    use crate::values::{CODES, Meaning};

    /// Decodes codes of at most 4 bits, sixteen at a time.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) fn short_avx512(piece: &Piece, out: &mut [f32]) {
        match piece.codes.bits() {
            2 => short_avx512_of::<2>(piece, out),
            3 => short_avx512_of::<3>(piece, out),
            _ => short_avx512_of::<4>(piece, out),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn short_avx512_of<const BITS: usize>(piece: &Piece, out: &mut [f32]) {
        let codes = piece.codes;
        // SAFETY: both arrays are as long as what is loaded.
        let (factors, shifts) = unsafe {
            let shifts = _mm256_loadu_si256(shifts(codes).as_ptr().cast());
            (_mm512_loadu_ps(piece.factors().as_ptr()), _mm512_broadcast_i64x4(shifts))
        };
        // What the compiler knows of shifts spares it a comparison.
        let shifts = _mm512_and_si512(shifts, _mm512_set1_epi32(31));
        let factor = _mm512_set1_ps(piece.factor);
        for (group, bit, out) in piece.groups(out) {
            let (scale, zero) = (_mm512_set1_ps(piece.scales[group]), _mm512_set1_ps(piece.zeros[group]));
            let values = _mm512_mul_ps(_mm512_mul_ps(_mm512_sub_ps(factors, zero), scale), factor);
            let values = round_avx512(piece.rounding, _mm512_add_ps(values, _mm512_set1_ps(piece.biases[group])));
            let [head, (bit, sixteens), tail] = in_pieces(bit, BITS, 16, out);
            let bytes = codes.bytes().get(bit / 8..).unwrap_or(&[]);
            for (bytes, out) in bytes.chunks_exact(2 * BITS).zip(sixteens.as_chunks_mut::<16>().0) {
                let first = _mm512_set1_epi32(eight::<BITS>(bytes) as i32);
                let both = _mm512_mask_set1_epi32(first, 0xff00, eight::<BITS>(&bytes[BITS..]) as i32);
                // A permutation takes the lowest four bits.
                let found = _mm512_permutexvar_ps(_mm512_srlv_epi32(both, shifts), values);
                // SAFETY: the array is as long as what is stored.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr(), found) };
            }
            if !head.1.is_empty() || !tail.1.is_empty() {
                let mut table = [0f32; 16];
                // SAFETY: the array is as long as what is stored.
                unsafe { _mm512_storeu_ps(table.as_mut_ptr(), values) };
                look_up_some(codes, head.0, &table, head.1);
                look_up_some(codes, tail.0, &table, tail.1);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(crate) fn round_avx512(rounding: Rounding, values: __m512) -> __m512 {
        match rounding {
            Rounding::None => values,
            Rounding::F16 => _mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values)),
            Rounding::BF16 => {
                let bits = _mm512_castps_si512(values);
                let last = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let added = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
                let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
                let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
                let rounded = _mm512_mask_mov_epi32(added, is_nan, quiet);
                _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(!0xffff)))
            }
        }
    }

    /// Decodes codes of at most 4 bits, eight at a time.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn short_avx2(piece: &Piece, out: &mut [f32]) {
        match piece.codes.bits() {
            2 => short_avx2_of::<2>(piece, out),
            3 => short_avx2_of::<3>(piece, out),
            _ => short_avx2_of::<4>(piece, out),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn short_avx2_of<const BITS: usize>(piece: &Piece, out: &mut [f32]) {
        let (codes, factors) = (piece.codes, piece.factors());
        // SAFETY: all arrays are as long as what is loaded.
        let (low, high, shifts) = unsafe {
            let shifts = _mm256_loadu_si256(shifts(codes).as_ptr().cast());
            (_mm256_loadu_ps(factors.as_ptr()), _mm256_loadu_ps(factors[8..].as_ptr()), shifts)
        };
        // What the compiler knows of shifts spares it a comparison.
        let shifts = _mm256_and_si256(shifts, _mm256_set1_epi32(31));
        for (group, bit, out) in piece.groups(out) {
            let (low, high) = (values_avx2(piece, group, low), values_avx2(piece, group, high));
            let [head, (bit, eights), tail] = in_pieces(bit, BITS, 8, out);
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
            if !head.1.is_empty() || !tail.1.is_empty() {
                let mut table = [0f32; 16];
                // SAFETY: both halves of the array are as long as what is stored.
                unsafe {
                    _mm256_storeu_ps(table.as_mut_ptr(), low);
                    _mm256_storeu_ps(table[8..].as_mut_ptr(), high);
                }
                look_up_some(codes, head.0, &table, head.1);
                look_up_some(codes, tail.0, &table, tail.1);
            }
        }
    }

    /// [`Piece::values`] of eight codes.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn values_avx2(piece: &Piece, group: usize, factors: __m256) -> __m256 {
        let (scale, zero) = (_mm256_set1_ps(piece.scales[group]), _mm256_set1_ps(piece.zeros[group]));
        let scaled = _mm256_mul_ps(_mm256_sub_ps(factors, zero), scale);
        let values = _mm256_mul_ps(scaled, _mm256_set1_ps(piece.factor));
        round_avx2(piece.rounding, _mm256_add_ps(values, _mm256_set1_ps(piece.biases[group])))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn round_avx2(rounding: Rounding, values: __m256) -> __m256 {
        match rounding {
            Rounding::None => values,
            Rounding::F16 => _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values)),
            Rounding::BF16 => {
                let bits = _mm256_castps_si256(values);
                let last = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let added = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
                let is_nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(values, values);
                let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
                let rounded = _mm256_blendv_epi8(added, quiet, _mm256_castps_si256(is_nan));
                _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(!0xffff)))
            }
        }
    }

    /// Decodes codes of 5 to 8 bits.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) fn long_avx512(piece: &Piece, out: &mut [f32]) {
        match piece.meaning {
            Meaning::Affine => long_avx512_of::<true>(piece, out),
            Meaning::Shifted { .. } => long_avx512_of::<false>(piece, out),
            Meaning::Table(_) | Meaning::E4M3 => decode_long(piece, out),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn long_avx512_of<const IS_AFFINE: bool>(piece: &Piece, out: &mut [f32]) {
        let (mut buffer, factor) = ([0; CODES], _mm512_set1_ps(piece.factor));
        for (group, mut bit, out) in piece.groups(out) {
            let (scale, zero) = (_mm512_set1_ps(piece.scales[group]), _mm512_set1_ps(piece.zeros[group]));
            let bias = _mm512_set1_ps(piece.biases[group]);
            for out in out.chunks_mut(CODES) {
                let codes = piece.codes.bytes_or_unpack(bit, &mut buffer[..out.len()]);
                let (outs, rest) = out.as_chunks_mut::<16>();
                let (codes, codes_of_rest) = codes.as_chunks::<16>();
                for (out, codes) in outs.iter_mut().zip(codes) {
                    // SAFETY: the array is as long as what is loaded.
                    let codes = unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast())) };
                    let code = _mm512_cvtepi32_ps(codes);
                    let value = if IS_AFFINE {
                        _mm512_add_ps(_mm512_mul_ps(code, scale), bias)
                    } else {
                        _mm512_mul_ps(_mm512_mul_ps(_mm512_sub_ps(code, zero), scale), factor)
                    };
                    // SAFETY: the array is as long as what is stored.
                    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), round_avx512(piece.rounding, value)) };
                }
                piece.decode_some(group, codes_of_rest, rest);
                bit += CODES * piece.codes.bits();
            }
        }
    }

    /// Decodes codes of 5 to 8 bits.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn long_avx2(piece: &Piece, out: &mut [f32]) {
        match piece.meaning {
            Meaning::Affine => long_avx2_of::<true>(piece, out),
            Meaning::Shifted { .. } => long_avx2_of::<false>(piece, out),
            Meaning::Table(_) | Meaning::E4M3 => decode_long(piece, out),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn long_avx2_of<const IS_AFFINE: bool>(piece: &Piece, out: &mut [f32]) {
        let (mut buffer, factor) = ([0; CODES], _mm256_set1_ps(piece.factor));
        for (group, mut bit, out) in piece.groups(out) {
            let (scale, zero) = (_mm256_set1_ps(piece.scales[group]), _mm256_set1_ps(piece.zeros[group]));
            let bias = _mm256_set1_ps(piece.biases[group]);
            for out in out.chunks_mut(CODES) {
                let codes = piece.codes.bytes_or_unpack(bit, &mut buffer[..out.len()]);
                let (outs, rest) = out.as_chunks_mut::<8>();
                let (codes, codes_of_rest) = codes.as_chunks::<8>();
                for (out, codes) in outs.iter_mut().zip(codes) {
                    // SAFETY: the array is as long as what is loaded.
                    let codes = unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.as_ptr().cast())) };
                    let code = _mm256_cvtepi32_ps(codes);
                    let value = if IS_AFFINE {
                        _mm256_add_ps(_mm256_mul_ps(code, scale), bias)
                    } else {
                        _mm256_mul_ps(_mm256_mul_ps(_mm256_sub_ps(code, zero), scale), factor)
                    };
                    // SAFETY: the array is as long as what is stored.
                    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), round_avx2(piece.rounding, value)) };
                }
                piece.decode_some(group, codes_of_rest, rest);
                bit += CODES * piece.codes.bits();
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
#[inline(always)]
fn look_up_eight(word: u32, shifts: &[i32; 8], values: &[f32; 16], out: &mut [f32; 8]) {
    use std::arch::aarch64::*;
    // SAFETY: NEON is part of every aarch64 processor that this is compiled for, and all arrays are
    // as long as what is loaded and stored.
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
