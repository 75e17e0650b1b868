//! Codes that become numbers in f32, and their products, in the instructions of AVX-512.

use std::arch::x86_64::*;

use super::avx512::Sums512;
use super::some_rows::{
    EIGHT_AFFINE, EIGHT_SHIFTED, EIGHT_SIGNED, FOUR_AFFINE, FOUR_AFFINE_AT_ONCE, FOUR_ROUNDED, FOUR_SHIFTED,
    FOUR_SIGNED, LAST_OF_FOUR_BITS, SIGN, SomeRows, with_form,
};
use crate::codes::NibbleOrder;
use crate::dot::rows_of_codes::TOGETHER;
use crate::dot::{BLOCK, HALF, LANES};
use crate::simd::round_avx512;
use crate::values::Piece;

/// The products of split activations with the whole blocks of rows: `out[n]` with the n-th row of the piece.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(in crate::dot) fn dot_rows_avx512(piece: &Piece, factors: &[f32; 16], x: &[f32], out: &mut [f32]) {
    let some = SomeRows::new(piece, factors, out.len(), x.len() / BLOCK * 2);
    with_form!(some.dot_all_f32(x, out));
}

/// The values of the whole blocks of a row, split.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(in crate::dot) fn split_avx512(piece: &Piece, factors: &[f32; 16], out: &mut [f32]) {
    let some = SomeRows::new(piece, factors, 1, out.len() / BLOCK * 2);
    with_form!(some.split_f32(out));
}

impl SomeRows<'_> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn dot_all_f32<const FORM: usize>(&self, x: &[f32], out: &mut [f32]) {
        let (fours, rest) = out.as_chunks_mut::<TOGETHER>();
        for (n, out) in fours.iter_mut().enumerate() {
            self.dot_f32::<TOGETHER, FORM>(n * TOGETHER, x, out);
        }
        let first = fours.len() * TOGETHER;
        for (n, out) in rest.iter_mut().enumerate() {
            self.dot_f32::<1, FORM>(first + n, x, std::array::from_mut(out));
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn split_f32<const FORM: usize>(&self, out: &mut [f32]) {
        let out = out.as_chunks_mut::<HALF>().0;
        self.each_half_f32::<1, FORM>(0, |n, [[even, odd]]| {
            // SAFETY: the array has two vectors.
            unsafe {
                _mm512_storeu_ps(out[n].as_mut_ptr(), even);
                _mm512_storeu_ps(out[n].as_mut_ptr().add(LANES), odd);
            }
        });
    }

    /// The products of N rows from one on.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn dot_f32<const N: usize, const FORM: usize>(&self, first: usize, x: &[f32], out: &mut [f32; N]) {
        let x = x.as_chunks::<HALF>().0;
        let mut sums = [Sums512::new(); N];
        self.each_half_f32::<N, FORM>(first, |n, values| {
            for (sums, values) in sums.iter_mut().zip(values) {
                match n % 2 {
                    0 => sums.add::<0>(&x[n], values),
                    _ => sums.add::<2>(&x[n], values),
                }
            }
        });
        for (out, sums) in out.iter_mut().zip(sums) {
            *out = sums.sum();
        }
    }

    /// Calls `take` with the number of half of a block, from 0 on, and its even and odd values in N rows from one on.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn each_half_f32<const N: usize, const FORM: usize>(
        &self,
        first: usize,
        mut take: impl FnMut(usize, [[__m512; 2]; N]),
    ) {
        if FORM <= LAST_OF_FOUR_BITS {
            // A shift instead of an exchange: the loop has no branch for the order.
            let is_high_first = self.piece.codes.order() == NibbleOrder::HighFirst;
            let of_even = _mm512_set1_epi32(if is_high_first { 4 } else { 0 });
            let of_odd = _mm512_sub_epi32(_mm512_set1_epi32(4), of_even);
            let table = |group: usize| self.table::<FORM>(group);
            return self.each_half::<N, 4, _>(first, _mm512_setzero_ps(), table, |n, codes, tables| {
                let mut values = [[_mm512_setzero_ps(); 2]; N];
                for row in 0..N {
                    // SAFETY: `each_half` gives whole halves.
                    let pairs = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(codes[row].cast()) });
                    // A permutation takes the lowest four bits.
                    let (even, odd) = (_mm512_srlv_epi32(pairs, of_even), _mm512_srlv_epi32(pairs, of_odd));
                    values[row] = [_mm512_permutexvar_ps(even, tables[row]), _mm512_permutexvar_ps(odd, tables[row])];
                }
                take(n, values);
            });
        }
        let numbers = |group: usize| self.numbers::<FORM>(group);
        self.each_half::<N, 8, _>(first, [_mm512_setzero_ps(); 2], numbers, |n, codes, numbers| {
            let mut values = [[_mm512_setzero_ps(); 2]; N];
            for row in 0..N {
                // SAFETY: `each_half` gives whole halves.
                let pairs = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(codes[row].cast()) });
                let mut codes = [_mm512_and_si512(pairs, _mm512_set1_epi32(0xff)), _mm512_srli_epi32::<8>(pairs)];
                if FORM == EIGHT_SIGNED {
                    codes = codes.map(|codes| _mm512_sub_epi32(codes, _mm512_set1_epi32(i32::from(SIGN))));
                }
                values[row] = codes.map(|codes| self.value::<FORM>(numbers[row], codes));
            }
            take(n, values);
        });
    }

    /// The values of all codes of a group, of 4 bits. A zero point, bias or factor that the form does not have changes no
    /// bit.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) fn table<const FORM: usize>(&self, group: usize) -> __m512 {
        let piece = self.piece;
        // SAFETY: `new` has seen numbers for every group; the array is as long as what is loaded.
        let (factors, [scale, zero, bias]) = unsafe {
            let numbers = [piece.scales, piece.zeros, piece.biases].map(|numbers| *numbers.get_unchecked(group));
            (_mm512_loadu_ps(self.factors.as_ptr()), numbers)
        };
        if FORM == FOUR_AFFINE_AT_ONCE {
            return _mm512_fmadd_ps(factors, _mm512_set1_ps(scale), _mm512_set1_ps(bias));
        }
        if FORM == FOUR_AFFINE {
            return _mm512_add_ps(_mm512_mul_ps(factors, _mm512_set1_ps(scale)), _mm512_set1_ps(bias));
        }
        if FORM == FOUR_SIGNED {
            return _mm512_mul_ps(factors, _mm512_set1_ps(scale));
        }
        let scaled = _mm512_mul_ps(_mm512_sub_ps(factors, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
        if FORM == FOUR_SHIFTED {
            return scaled;
        }
        let values = _mm512_mul_ps(scaled, _mm512_set1_ps(piece.factor));
        if FORM == FOUR_ROUNDED {
            round_avx512(piece.rounding, _mm512_add_ps(values, _mm512_set1_ps(bias)))
        } else {
            values
        }
    }

    /// The scale of a group of 8 bits, and its bias or zero point.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) fn numbers<const FORM: usize>(&self, group: usize) -> [__m512; 2] {
        let piece = self.piece;
        // SAFETY: `new` has seen numbers for every group.
        let [scale, zero, bias] =
            unsafe { [piece.scales, piece.zeros, piece.biases].map(|numbers| *numbers.get_unchecked(group)) };
        let offset = if FORM == EIGHT_SHIFTED { zero } else { bias };
        [_mm512_set1_ps(scale), _mm512_set1_ps(offset)]
    }

    /// The values of sixteen codes of 8 bits.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) fn value<const FORM: usize>(&self, [scale, offset]: [__m512; 2], codes: __m512i) -> __m512 {
        let code = _mm512_cvtepi32_ps(codes);
        match FORM {
            EIGHT_SIGNED => _mm512_mul_ps(code, scale),
            EIGHT_AFFINE => _mm512_add_ps(_mm512_mul_ps(code, scale), offset),
            EIGHT_SHIFTED => {
                let scaled = _mm512_mul_ps(_mm512_sub_ps(code, offset), scale);
                _mm512_mul_ps(scaled, _mm512_set1_ps(self.piece.factor))
            }
            _ => _mm512_fmadd_ps(code, scale, offset),
        }
    }
}
