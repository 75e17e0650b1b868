//! Sums in the instructions of AVX-512.

use std::arch::x86_64::*;

use half::bf16;

use super::{halves, prefetch, prefetch_at, sum_eight};
use crate::dot::keys::Apart;
use crate::dot::{BLOCK, HALF, LANES, Tile, add_rest};
use crate::numbers::widen;

/// Four sets of sums.
#[derive(Clone, Copy)]
pub(super) struct Sums512([__m512; 4]);

impl Sums512 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) fn new() -> Sums512 {
        Sums512([_mm512_setzero_ps(); 4])
    }

    /// Adds the products of split activations and the half FIRST / 2 of a block, one for each lane of
    /// two sets.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) fn add<const FIRST: usize>(&mut self, x: &[f32; HALF], [even, odd]: [__m512; 2]) {
        // SAFETY: the array has two vectors.
        let (x_even, x_odd) = unsafe { (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(LANES))) };
        self.0[FIRST] = _mm512_fmadd_ps(x_even, even, self.0[FIRST]);
        self.0[FIRST + 1] = _mm512_fmadd_ps(x_odd, odd, self.0[FIRST + 1]);
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) fn sum(self) -> f32 {
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

    #[inline(always)]
    fn prefetch(&self, address: *const i8) {
        // SAFETY: the tile is used where these instructions are there.
        unsafe { prefetch_at(address) };
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
    for (products, sums) in products.as_flattened_mut().chunks_mut(LANES).zip(first.as_flattened().chunks(LANES)) {
        if sums.len() < LANES / 2 {
            products.iter_mut().zip(sums).for_each(|(product, lanes)| *product = sum_lanes(*lanes));
            continue;
        }
        let place = |n: usize| sums.get(n % 4 * 4 + n / 4).copied().unwrap_or(_mm512_setzero_ps());
        let mut all = [0.0; LANES];
        // SAFETY: the array is a vector.
        unsafe { _mm512_storeu_ps(all.as_mut_ptr(), sum_each(std::array::from_fn(place))) };
        products.copy_from_slice(&all[..sums.len()]);
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
        prefetch(x);
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

/// The products of a row of whole vectors with the keys from `first` on, sixteen at a time. Returns how many.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(in crate::dot) fn keys_avx512(x: &[f32], keys: Apart<'_>, first: usize, out: &mut [f32]) -> usize {
    let (sixteens, _) = out.as_chunks_mut::<LANES>();
    for (n, out) in sixteens.iter_mut().enumerate() {
        // In the order in which `sum_each` takes them: the rest of four of the place, and its quarter.
        let row = |place: usize| &keys.row(first + n * LANES + place % 4 * 4 + place / 4)[..x.len()];
        let rows: [&[f32]; LANES] = std::array::from_fn(row);
        let mut sums = [_mm512_setzero_ps(); LANES];
        for at in (0..x.len()).step_by(LANES) {
            // SAFETY: `x` and the rows are whole vectors of one length.
            let x = unsafe { _mm512_loadu_ps(x.as_ptr().add(at)) };
            for (sum, row) in sums.iter_mut().zip(rows) {
                // SAFETY: as above.
                *sum = _mm512_fmadd_ps(x, unsafe { _mm512_loadu_ps(row.as_ptr().add(at)) }, *sum);
            }
        }
        // SAFETY: the array is a vector.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum_each(sums)) };
    }
    sixteens.len() * LANES
}

/// The sum of all lanes of each vector, halves added to halves as in [`sum_lanes`]. Four vectors that follow each other
/// give the sums of one lane in each quarter.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn sum_each(sums: [__m512; LANES]) -> __m512 {
    // Two vectors whose eight lanes are of two rows each, then four whose four are.
    let eight = |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
    let four = |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
    let quarter = |n: usize| four(eight(sums[n], sums[n + 1]), eight(sums[n + 2], sums[n + 3]));
    let two = |a, b| _mm512_add_ps(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xee>(a, b));
    let one = |a, b| _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b));
    one(two(quarter(0), quarter(4)), two(quarter(8), quarter(12)))
}
