//! Codes that become numbers in bf16, in the instructions of AVX-512.

use std::arch::x86_64::*;

use half::bf16;

use super::avx512::{each_half, values_avx512};
use super::{HalvesOfGroups, prefetch};
use crate::codes::NibbleOrder;
use crate::dot::HALF;
use crate::matrix::Rounding;
use crate::values::Piece;

/// The values of the whole blocks of a row, rounded.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(in crate::dot) fn round_row(piece: &Piece, factors: &[f32; 16], out: &mut [bf16]) {
    let out = out.as_chunks_mut::<HALF>().0;
    match (piece.codes.bits(), piece.rounding) {
        (4, Rounding::None) => nibbles::<false>(piece, factors, out),
        (4, _) => nibbles::<true>(piece, factors, out),
        _ => bytes(piece, factors, out),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn nibbles<const ROUNDED: bool>(piece: &Piece, factors: &[f32; 16], out: &mut [[bf16; HALF]]) {
    // SAFETY: the array is as long as what is loaded.
    let factors = unsafe { _mm512_loadu_ps(factors.as_ptr()) };
    // The lower half of a word has the code that comes first, the upper one the other. A permutation takes five bits of
    // an index, of which the fifth does not matter: the table is there twice.
    let of_both = |first, second| (_mm512_set1_epi32(first), _mm512_set1_epi32(second));
    let (right, left) = match piece.codes.order() {
        NibbleOrder::LowFirst => of_both(0, 12),
        NibbleOrder::HighFirst => of_both(4, 16),
    };
    let table_of = |group: usize| {
        let rounded = _mm512_cvtneps_pbh(values_avx512::<ROUNDED>(piece, group, factors));
        // SAFETY: both are sixteen numbers of 16 bits.
        _mm512_broadcast_i64x4(unsafe { std::mem::transmute::<__m256bh, __m256i>(rounded) })
    };
    let bytes = piece.codes.bytes()[piece.bit / 8..][..out.len() * HALF / 2].as_chunks::<{ HALF / 2 }>().0;
    let mut groups = HalvesOfGroups::new(piece);
    let mut table = table_of(0);
    for (n, (bytes, out)) in bytes.iter().zip(out).enumerate() {
        // Four of them are a line.
        if n % 4 == 0 {
            prefetch(bytes);
        }
        if groups.begins() {
            table = table_of(groups.group);
        }
        // SAFETY: the array is as long as what is loaded.
        let pairs = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
        let codes = _mm512_or_si512(_mm512_srlv_epi32(pairs, right), _mm512_sllv_epi32(pairs, left));
        // SAFETY: the array is as long as what is stored.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutexvar_epi16(codes, table)) };
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn bytes(piece: &Piece, factors: &[f32; 16], out: &mut [[bf16; HALF]]) {
    // Numbers n and n + 16 become neighbours.
    let places: [i16; HALF] = std::array::from_fn(|n| (n / 2 + n % 2 * (HALF / 2)) as i16);
    // SAFETY: the array is as long as what is loaded.
    let places = unsafe { _mm512_loadu_si512(places.as_ptr().cast()) };
    each_half(piece, factors, out.len() / 2, |block, half, [even, odd]| {
        let rounded = _mm512_cvtne2ps_pbh(odd, even);
        // SAFETY: both are 32 numbers of 16 bits.
        let rounded = unsafe { std::mem::transmute::<__m512bh, __m512i>(rounded) };
        let out = &mut out[2 * block + half];
        // SAFETY: the array is as long as what is stored.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutexvar_epi16(places, rounded)) };
    });
}
