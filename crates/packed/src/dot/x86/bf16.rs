//! Codes that become numbers in bf16, and their products, in the instructions of AVX-512.

use std::arch::x86_64::*;

use half::bf16;

use super::some_rows::{EIGHT_SIGNED, LAST_OF_FOUR_BITS, SIGN, SomeRows, with_form};
use crate::codes::NibbleOrder;
use crate::dot::HALF;
use crate::dot::rounded::PIECE;
use crate::dot::rows_of_codes::TOGETHER;
use crate::values::Piece;

/// Brings whole blocks of activations into the order in which codes of 4 bits are unpacked: of the eight words of a half
/// of a block the first codes, then the second, third and fourth ones.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(in crate::dot) fn arrange(x: &mut [bf16]) {
    let places: [i16; HALF] = std::array::from_fn(|n| (n % 8 * 4 + n / 8) as i16);
    // SAFETY: the array is as long as what is loaded.
    let places = unsafe { _mm512_loadu_si512(places.as_ptr().cast()) };
    for x in x.as_chunks_mut::<HALF>().0 {
        // SAFETY: the array is as long as what is loaded and stored.
        unsafe {
            let arranged = _mm512_permutexvar_epi16(places, _mm512_loadu_si512(x.as_ptr().cast()));
            _mm512_storeu_si512(x.as_mut_ptr().cast(), arranged);
        }
    }
}

/// The values of the whole blocks of a row, rounded, as [`arrange`] has them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(in crate::dot) fn round_row(piece: &Piece, factors: &[f32; 16], out: &mut [bf16]) {
    let some = SomeRows::new(piece, factors, 1, out.len() / HALF);
    with_form!(some.round(out));
}

/// The products of activations, as [`arrange`] has them, with rows of whole blocks: `out[n]` with the n-th row of the
/// piece.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(in crate::dot) fn dot_rows(piece: &Piece, factors: &[f32; 16], x: &[bf16], out: &mut [f32]) {
    let some = SomeRows::new(piece, factors, out.len(), x.len() / HALF);
    with_form!(some.dot_all(x, out));
}

/// 32 numbers of 16 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn in_pairs(values: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes.
    unsafe { std::mem::transmute(values) }
}

/// The sum of the lanes of each of four vectors.
///
/// # Safety
/// The processor has to have the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,fma")]
pub fn totals([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
    let pair = |x, y| _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    let (ab, cd) = (pair(a, b), pair(c, d));
    // Each part of 128 bits holds the sums of its lanes of a, b, c and d.
    let parts = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
    let halves = _mm256_add_ps(_mm512_castps512_ps256(parts), _mm512_extractf32x8_ps::<1>(parts));
    let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
    let mut out = [0.0; 4];
    // SAFETY: the array has room for four floats.
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
    out
}

impl SomeRows<'_> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn round<const FORM: usize>(&self, out: &mut [bf16]) {
        let out = out.as_chunks_mut::<HALF>().0;
        self.each_half_bf16::<1, FORM>(0, |n, [values]| {
            // SAFETY: the array is as long as what is stored.
            unsafe { _mm512_storeu_si512(out[n].as_mut_ptr().cast(), values) };
        });
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn dot_all<const FORM: usize>(&self, x: &[bf16], out: &mut [f32]) {
        let x = x.as_chunks::<HALF>().0;
        let (fours, rest) = out.as_chunks_mut::<TOGETHER>();
        for (n, out) in fours.iter_mut().enumerate() {
            self.dot::<TOGETHER, FORM>(n * TOGETHER, x, out);
        }
        let first = fours.len() * TOGETHER;
        for (n, out) in rest.iter_mut().enumerate() {
            self.dot::<1, FORM>(first + n, x, std::array::from_mut(out));
        }
    }

    /// The products of N rows, at most four, from one on.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn dot<const N: usize, const FORM: usize>(&self, first: usize, x: &[[bf16; HALF]], out: &mut [f32; N]) {
        let mut sums = [_mm512_setzero_ps(); N];
        out.fill(0.0);
        self.each_half_bf16::<N, FORM>(first, |n, values| {
            // SAFETY: there are as many halves of x, and each is as long as what is loaded.
            let of_x = in_pairs(unsafe { _mm512_loadu_si512(x.as_ptr().add(n).cast()) });
            for (sum, values) in sums.iter_mut().zip(values) {
                *sum = _mm512_dpbf16_ps(*sum, of_x, in_pairs(values));
            }
            if n % PIECE == PIECE - 1 || n + 1 == x.len() {
                let mut four = [_mm512_setzero_ps(); 4];
                four[..N].copy_from_slice(&sums);
                out.iter_mut().zip(totals(four)).for_each(|(out, total)| *out += total);
                sums = [_mm512_setzero_ps(); N];
            }
        });
    }

    /// Calls `take` with the number of half of a block, from 0 on, and its values in N rows from one on, rounded.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn each_half_bf16<const N: usize, const FORM: usize>(
        &self,
        first: usize,
        mut take: impl FnMut(usize, [__m512i; N]),
    ) {
        if FORM <= LAST_OF_FOUR_BITS {
            // The eight words of a half are there four times. A permutation takes five bits of an index, of which the
            // fifth does not matter: the table is there twice.
            let shifts = match self.piece.codes.order() {
                NibbleOrder::LowFirst => [0, 4, 8, 12],
                NibbleOrder::HighFirst => [4, 0, 12, 8],
            };
            let shifts: [u16; HALF] = std::array::from_fn(|n| shifts[n / 8]);
            // SAFETY: the array is as long as what is loaded.
            let shifts = unsafe { _mm512_loadu_si512(shifts.as_ptr().cast()) };
            let table = |group: usize| {
                let values = self.table::<FORM>(group);
                // SAFETY: both are 32 numbers of 16 bits.
                unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(values, values)) }
            };
            return self.each_half::<N, 4, _>(first, _mm512_setzero_si512(), table, |n, codes, tables| {
                let mut values = [_mm512_setzero_si512(); N];
                for row in 0..N {
                    // SAFETY: `each_half` gives whole halves.
                    let words = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(codes[row].cast()) });
                    values[row] = _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, shifts), tables[row]);
                }
                take(n, values);
            });
        }
        let numbers = |group: usize| self.numbers::<FORM>(group);
        self.each_half::<N, 8, _>(first, [_mm512_setzero_ps(); 2], numbers, |n, codes, numbers| {
            let mut values = [_mm512_setzero_si512(); N];
            for row in 0..N {
                // SAFETY: `each_half` gives whole halves.
                let sixteen = |at: usize| unsafe { _mm_loadu_si128(codes[row].wrapping_add(at).cast()) };
                let [first, second] = [sixteen(0), sixteen(HALF / 2)].map(|codes| {
                    let signed = _mm_xor_si128(codes, _mm_set1_epi8(SIGN.cast_signed()));
                    let is_signed = FORM == EIGHT_SIGNED;
                    let codes = if is_signed { _mm512_cvtepi8_epi32(signed) } else { _mm512_cvtepu8_epi32(codes) };
                    self.value::<FORM>(numbers[row], codes)
                });
                // SAFETY: both are 32 numbers of 16 bits.
                values[row] = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first)) };
            }
            take(n, values);
        });
    }
}
