//! Sums in the instructions of AVX-512.

use std::arch::x86_64::*;

use half::bf16;

use super::{HalvesOfGroups, halves, halves_of_codes, prefetch, sum_eight};
use crate::codes::NibbleOrder;
use crate::dot::{BLOCK, HALF, LANES, Tile, add_rest};
use crate::matrix::Rounding;
use crate::numbers::widen;
use crate::simd::round_avx512;
use crate::values::{Meaning, Piece};

/// Four sets of sums.
struct Sums512([__m512; 4]);

impl Sums512 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn new() -> Sums512 {
        Sums512([_mm512_setzero_ps(); 4])
    }

    /// Adds the products of split activations and the half FIRST / 2 of a block, one for each lane of
    /// two sets.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn add<const FIRST: usize>(&mut self, x: &[f32; HALF], [even, odd]: [__m512; 2]) {
        // SAFETY: the array has two vectors.
        let (x_even, x_odd) = unsafe { (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(LANES))) };
        self.0[FIRST] = _mm512_fmadd_ps(x_even, even, self.0[FIRST]);
        self.0[FIRST + 1] = _mm512_fmadd_ps(x_odd, odd, self.0[FIRST + 1]);
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn sum(self) -> f32 {
        let [a, b, c, d] = self.0;
        sum_lanes(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)))
    }
}

/// The sum of all lanes of the sum of the sets.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn sum_lanes(lanes: __m512) -> f32 {
    sum_eight(_mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes)))
}

/// Tiles of vectors of sixteen elements.
pub(in crate::dot) struct Tile512;

impl Tile for Tile512 {
    #[inline(always)]
    fn sums<const O: usize, const T: usize>(&self, x: &[f32], w: &[f32], width: usize) -> [[f32; T]; O] {
        assert!(x.len() >= T * width && w.len() >= O * width, "rows of a tile");
        // SAFETY: the tile is used where these instructions are there; the rows are as long as asserted.
        unsafe { tile_512(x.as_ptr(), w.as_ptr(), width) }
    }
}

/// # Safety
/// There are T and O rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn tile_512<const O: usize, const T: usize>(x: *const f32, w: *const f32, width: usize) -> [[f32; T]; O] {
    // One set of all products at a time, so that they are in registers. Sets are added as soon as they are there:
    // a copy of all of them took a fifth of the time.
    // SAFETY: as this function's.
    let mut first = unsafe { set_of_tile::<O, T, 0>(x, w, width) };
    // SAFETY: as this function's.
    add_sets(&mut first, &unsafe { set_of_tile::<O, T, 1>(x, w, width) });
    // SAFETY: as this function's.
    let mut second = unsafe { set_of_tile::<O, T, 2>(x, w, width) };
    // SAFETY: as this function's.
    add_sets(&mut second, &unsafe { set_of_tile::<O, T, 3>(x, w, width) });
    add_sets(&mut first, &second);
    let mut products = [[0.0; T]; O];
    for (product, lanes) in products.as_flattened_mut().iter_mut().zip(first.as_flattened()) {
        *product = sum_lanes(*lanes);
    }
    products
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn add_sets<const O: usize, const T: usize>(sums: &mut [[__m512; T]; O], more: &[[__m512; T]; O]) {
    for (sum, more) in sums.as_flattened_mut().iter_mut().zip(more.as_flattened()) {
        *sum = _mm512_add_ps(*sum, *more);
    }
}

/// One set of the sums of a tile.
///
/// # Safety
/// There are T and O rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn set_of_tile<const O: usize, const T: usize, const SET: usize>(
    x: *const f32,
    w: *const f32,
    width: usize,
) -> [[__m512; T]; O] {
    let mut sums = [[_mm512_setzero_ps(); T]; O];
    for at in (0..width / BLOCK).map(|block| block * BLOCK + SET * LANES) {
        // SAFETY: the elements are in whole blocks of the rows.
        let x: [__m512; T] = std::array::from_fn(|t| unsafe { _mm512_loadu_ps(x.add(t * width + at)) });
        for (o, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            let w = unsafe { _mm512_loadu_ps(w.add(o * width + at)) };
            for (x, sum) in x.iter().zip(sums) {
                *sum = _mm512_fmadd_ps(*x, w, *sum);
            }
        }
    }
    sums
}

/// Of each half of a whole block, the even elements before the odd ones. Others stay.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(in crate::dot) fn split_bf16_avx512(x: &[bf16], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "as many elements");
    let whole = x.len() / BLOCK * BLOCK;
    for (x, out) in x[..whole].as_chunks::<HALF>().0.iter().zip(out.as_chunks_mut::<HALF>().0) {
        // SAFETY: the array is as long as what is loaded.
        let pairs = unsafe { _mm512_loadu_si512(x.as_ptr().cast()) };
        let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs));
        let odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff)));
        // SAFETY: the array has two vectors.
        unsafe {
            _mm512_storeu_ps(out.as_mut_ptr(), even);
            _mm512_storeu_ps(out.as_mut_ptr().add(LANES), odd);
        }
    }
    for (x, out) in x[whole..].iter().zip(&mut out[whole..]) {
        *out = widen(*x);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(in crate::dot) fn f32_avx512(x: &[f32], w: &[f32]) -> f32 {
    let ((blocks, rest), (others, rest_of_w)) = (x.as_chunks::<BLOCK>(), w.as_chunks::<BLOCK>());
    let evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    let odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    let split = |w: &[f32; HALF]| {
        prefetch(&w[0]);
        prefetch(&w[LANES]);
        // SAFETY: the array has two vectors.
        let (low, high) = unsafe { (_mm512_loadu_ps(w.as_ptr()), _mm512_loadu_ps(w.as_ptr().add(LANES))) };
        [_mm512_permutex2var_ps(low, evens, high), _mm512_permutex2var_ps(low, odds, high)]
    };
    let mut sums = Sums512::new();
    for (x, w) in blocks.iter().zip(others) {
        let (x, w) = (halves(x), halves(w));
        sums.add::<0>(x[0], split(w[0]));
        sums.add::<2>(x[1], split(w[1]));
    }
    add_rest(sums.sum(), rest, rest_of_w.iter().copied())
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(in crate::dot) fn bf16_avx512(x: &[f32], w: &[bf16]) -> f32 {
    let ((blocks, rest), (others, rest_of_w)) = (x.as_chunks::<BLOCK>(), w.as_chunks::<BLOCK>());
    let split = |w: &[bf16; HALF]| {
        prefetch(w);
        // SAFETY: the array is as long as what is loaded.
        let pairs = unsafe { _mm512_loadu_si512(w.as_ptr().cast()) };
        let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff));
        [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(odd)]
    };
    let mut sums = Sums512::new();
    for (x, w) in blocks.iter().zip(others) {
        let (x, w) = (halves(x), halves(w));
        sums.add::<0>(x[0], split(w[0]));
        sums.add::<2>(x[1], split(w[1]));
    }
    add_rest(sums.sum(), rest, rest_of_w.iter().map(|w| widen(*w)))
}

/// The values of sixteen codes of a group. A zero point, bias or factor that the form does not have
/// changes no bit.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn values_avx512<const ROUNDED: bool>(piece: &Piece, group: usize, factors: __m512) -> __m512 {
    let (scale, zero) = (_mm512_set1_ps(piece.scales[group]), _mm512_set1_ps(piece.zeros[group]));
    let scaled = _mm512_mul_ps(_mm512_sub_ps(factors, zero), scale);
    let values = _mm512_mul_ps(scaled, _mm512_set1_ps(piece.factor));
    let values = _mm512_add_ps(values, _mm512_set1_ps(piece.biases[group]));
    if ROUNDED { round_avx512(piece.rounding, values) } else { values }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn nibbles_avx512<const ROUNDED: bool>(piece: &Piece, factors: &[f32; 16], x: &[f32]) -> f32 {
    // SAFETY: the array is as long as what is loaded.
    let factors = unsafe { _mm512_loadu_ps(factors.as_ptr()) };
    let is_high_first = piece.codes.order() == NibbleOrder::HighFirst;
    let bytes = piece.codes.bytes()[piece.bit / 8..][..x.len() / 2].as_chunks::<HALF>().0;
    // A permutation takes the lowest four bits.
    let split = |values: __m512, bytes: &[u8; HALF / 2]| {
        // SAFETY: the array is as long as what is loaded.
        let low = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
        let high = _mm512_srli_epi32::<4>(low);
        let (even, odd) = if is_high_first { (high, low) } else { (low, high) };
        [_mm512_permutexvar_ps(even, values), _mm512_permutexvar_ps(odd, values)]
    };
    let mut groups = HalvesOfGroups::new(piece);
    let mut values = values_avx512::<ROUNDED>(piece, 0, factors);
    let mut sums = Sums512::new();
    for (x, bytes) in x.as_chunks::<BLOCK>().0.iter().zip(bytes) {
        prefetch(bytes);
        let (x, bytes) = (halves(x), halves_of_codes(bytes));
        if groups.begins() {
            values = values_avx512::<ROUNDED>(piece, groups.group, factors);
        }
        sums.add::<0>(x[0], split(values, bytes[0]));
        if groups.begins() {
            values = values_avx512::<ROUNDED>(piece, groups.group, factors);
        }
        sums.add::<2>(x[1], split(values, bytes[1]));
    }
    sums.sum()
}

/// The product of the whole blocks of a row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(in crate::dot) fn row_avx512(piece: &Piece, factors: &[f32; 16], x: &[f32]) -> f32 {
    match (piece.codes.bits(), piece.rounding, piece.meaning) {
        (4, Rounding::None, _) => nibbles_avx512::<false>(piece, factors, x),
        (4, ..) => nibbles_avx512::<true>(piece, factors, x),
        (_, _, Meaning::Affine) => bytes_avx512::<true>(piece, x),
        _ => bytes_avx512::<false>(piece, x),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn bytes_avx512<const AFFINE: bool>(piece: &Piece, x: &[f32]) -> f32 {
    let bytes = piece.codes.bytes()[piece.bit / 8..][..x.len()].as_chunks::<BLOCK>().0;
    let factor = _mm512_set1_ps(piece.factor);
    let of_group = |group: usize| {
        let offsets = if AFFINE { piece.biases } else { piece.zeros };
        [_mm512_set1_ps(piece.scales[group]), _mm512_set1_ps(offsets[group])]
    };
    let value = |[scale, offset]: [__m512; 2], code: __m512i| {
        let code = _mm512_cvtepi32_ps(code);
        if AFFINE {
            _mm512_add_ps(_mm512_mul_ps(code, scale), offset)
        } else {
            _mm512_mul_ps(_mm512_mul_ps(_mm512_sub_ps(code, offset), scale), factor)
        }
    };
    let split = |group: [__m512; 2], bytes: &[u8; HALF]| {
        // SAFETY: the array is as long as what is loaded.
        let pairs = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) });
        let even = value(group, _mm512_and_si512(pairs, _mm512_set1_epi32(0xff)));
        [even, value(group, _mm512_srli_epi32::<8>(pairs))]
    };
    let mut groups = HalvesOfGroups::new(piece);
    let mut group = of_group(0);
    let mut sums = Sums512::new();
    for (x, bytes) in x.as_chunks::<BLOCK>().0.iter().zip(bytes) {
        prefetch(bytes);
        let (x, bytes) = (halves(x), halves(bytes));
        if groups.begins() {
            group = of_group(groups.group);
        }
        sums.add::<0>(x[0], split(group, bytes[0]));
        if groups.begins() {
            group = of_group(groups.group);
        }
        sums.add::<2>(x[1], split(group, bytes[1]));
    }
    sums.sum()
}
