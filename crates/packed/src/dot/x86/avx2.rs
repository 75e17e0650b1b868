//! Sums in the instructions of AVX2.

use std::arch::x86_64::*;

use half::bf16;

use super::{HalvesOfGroups, halves, prefetch, prefetch_at, quarters, sum_eight};
use crate::codes::NibbleOrder;
use crate::dot::keys::Apart;
use crate::dot::{BLOCK, HALF, LANES, Tile, add_rest};
use crate::matrix::Rounding;
use crate::numbers::widen;
use crate::simd::round_avx2;
use crate::values::{Meaning, Piece};

/// Four sets of sums, each in two vectors.
struct Sums256([[__m256; 2]; 4]);

impl Sums256 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new() -> Sums256 {
        Sums256([[_mm256_setzero_ps(); 2]; 4])
    }

    /// Adds the products of eight even and eight odd elements of the half FIRST / 2 of a block: those
    /// of the lanes from 8 · UPPER on of two sets.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add<const FIRST: usize, const UPPER: usize>(&mut self, x: &[f32; HALF], [even, odd]: [__m256; 2]) {
        let (x_even, x_odd) = (&x[8 * UPPER..][..8], &x[LANES + 8 * UPPER..][..8]);
        // SAFETY: both slices are as long as what is loaded.
        let (x_even, x_odd) = unsafe { (_mm256_loadu_ps(x_even.as_ptr()), _mm256_loadu_ps(x_odd.as_ptr())) };
        self.0[FIRST][UPPER] = _mm256_fmadd_ps(x_even, even, self.0[FIRST][UPPER]);
        self.0[FIRST + 1][UPPER] = _mm256_fmadd_ps(x_odd, odd, self.0[FIRST + 1][UPPER]);
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn sum(self) -> f32 {
        let [a, b, c, d] = self.0;
        let half = |n: usize| _mm256_add_ps(_mm256_add_ps(a[n], b[n]), _mm256_add_ps(c[n], d[n]));
        sum_eight(_mm256_add_ps(half(0), half(1)))
    }
}

/// Tiles of vectors of eight elements.
pub(in crate::dot) struct Tile256;

impl Tile for Tile256 {
    #[inline(always)]
    fn sums<const O: usize, const T: usize>(&self, x: &[f32], w: &[f32], width: usize) -> [[f32; T]; O] {
        assert!(x.len() >= T * width && w.len() >= O * width, "rows of a tile");
        let mut products = [[0.0; T]; O];
        // Two rows of the weight at a time: there are sixteen registers.
        for (n, products) in products.chunks_mut(2).enumerate() {
            let w = w[2 * n * width..].as_ptr();
            // SAFETY: the tile is used where these instructions are there; the rows are as long as
            // asserted.
            match products {
                [first, second] => [*first, *second] = unsafe { tile_256(x.as_ptr(), w, width) },
                products => [products[0]] = unsafe { tile_256(x.as_ptr(), w, width) },
            }
        }
        products
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
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_256<const O: usize, const T: usize>(x: *const f32, w: *const f32, width: usize) -> [[f32; T]; O] {
    let mut sets = [[[[_mm256_setzero_ps(); 2]; 4]; T]; O];
    // One vector of all products at a time, so that they are in registers.
    for part in 0..8 {
        let mut sums = [[_mm256_setzero_ps(); T]; O];
        for at in (0..width / BLOCK).map(|block| block * BLOCK + part * 8) {
            // SAFETY: the elements are in whole blocks of the rows.
            let x: [__m256; T] = std::array::from_fn(|t| unsafe { _mm256_loadu_ps(x.add(t * width + at)) });
            for (o, sums) in sums.iter_mut().enumerate() {
                // SAFETY: as above.
                let w = unsafe { _mm256_loadu_ps(w.add(o * width + at)) };
                for (x, sum) in x.iter().zip(sums) {
                    *sum = _mm256_fmadd_ps(*x, w, *sum);
                }
            }
        }
        for (sets, sums) in sets.iter_mut().flatten().zip(sums.as_flattened()) {
            sets[part / 2][part % 2] = *sums;
        }
    }
    sets.map(|of_row| of_row.map(|sets| Sums256(sets).sum()))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::dot) fn f32_avx2(x: &[f32], w: &[f32]) -> f32 {
    let ((blocks, rest), (others, rest_of_w)) = (x.as_chunks::<BLOCK>(), w.as_chunks::<BLOCK>());
    let split = |w: &[f32; 16]| {
        prefetch(w);
        // SAFETY: the array has two vectors.
        let (low, high) = unsafe { (_mm256_loadu_ps(w.as_ptr()), _mm256_loadu_ps(w.as_ptr().add(8))) };
        // Pairs come out as 0 2 8 10 4 6 12 14; the last permutation sets quarters right.
        let (even, odd) = (_mm256_shuffle_ps::<0x88>(low, high), _mm256_shuffle_ps::<0xdd>(low, high));
        let in_order = |pairs| _mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(pairs));
        [_mm256_castpd_ps(in_order(even)), _mm256_castpd_ps(in_order(odd))]
    };
    let mut sums = Sums256::new();
    for (x, w) in blocks.iter().zip(others) {
        let (x, w) = (halves(x), quarters(w));
        sums.add::<0, 0>(x[0], split(w[0]));
        sums.add::<0, 1>(x[0], split(w[1]));
        sums.add::<2, 0>(x[1], split(w[2]));
        sums.add::<2, 1>(x[1], split(w[3]));
    }
    add_rest(sums.sum(), rest, rest_of_w.iter().copied())
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::dot) fn bf16_avx2(x: &[f32], w: &[bf16]) -> f32 {
    let ((blocks, rest), (others, rest_of_w)) = (x.as_chunks::<BLOCK>(), w.as_chunks::<BLOCK>());
    let split = |w: &[bf16; 16]| {
        // SAFETY: the array is as long as what is loaded.
        let pairs = unsafe { _mm256_loadu_si256(w.as_ptr().cast()) };
        let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(!0xffff));
        [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), _mm256_castsi256_ps(odd)]
    };
    let mut sums = Sums256::new();
    for (x, w) in blocks.iter().zip(others) {
        prefetch(&w[0]);
        prefetch(&w[HALF]);
        let (x, w) = (halves(x), quarters(w));
        sums.add::<0, 0>(x[0], split(w[0]));
        sums.add::<0, 1>(x[0], split(w[1]));
        sums.add::<2, 0>(x[1], split(w[2]));
        sums.add::<2, 1>(x[1], split(w[3]));
    }
    add_rest(sums.sum(), rest, rest_of_w.iter().map(|w| widen(*w)))
}

/// The values of eight codes of a group. A zero point, bias or factor that the form does not have
/// changes no bit.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn values_avx2<const ROUNDED: bool>(piece: &Piece, group: usize, factors: __m256) -> __m256 {
    let (scale, zero) = (_mm256_set1_ps(piece.scales[group]), _mm256_set1_ps(piece.zeros[group]));
    let scaled = _mm256_mul_ps(_mm256_sub_ps(factors, zero), scale);
    let values = _mm256_mul_ps(scaled, _mm256_set1_ps(piece.factor));
    let values = _mm256_add_ps(values, _mm256_set1_ps(piece.biases[group]));
    if ROUNDED { round_avx2(piece.rounding, values) } else { values }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles_avx2<const ROUNDED: bool>(
    piece: &Piece,
    factors: &[f32; 16],
    blocks: usize,
    mut take: impl FnMut(usize, usize, [__m256; 2]),
) {
    // SAFETY: the array has two vectors.
    let factors = unsafe { [_mm256_loadu_ps(factors.as_ptr()), _mm256_loadu_ps(factors.as_ptr().add(8))] };
    // A shift instead of an exchange: the loop has no branch for the order.
    let is_high_first = piece.codes.order() == NibbleOrder::HighFirst;
    let of_even = _mm256_set1_epi32(if is_high_first { 4 } else { 0 });
    let of_odd = _mm256_sub_epi32(_mm256_set1_epi32(4), of_even);
    let bytes = piece.codes.bytes()[piece.bit / 8..][..blocks * HALF].as_chunks::<HALF>().0;
    let of_group = |group: usize| {
        let (low, high) = (factors[0], factors[1]);
        [values_avx2::<ROUNDED>(piece, group, low), values_avx2::<ROUNDED>(piece, group, high)]
    };
    let split = |values: [__m256; 2], bytes: &[u8; 8]| {
        // SAFETY: the array is as long as what is loaded.
        let pairs = _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) });
        let (even, odd) = (_mm256_srlv_epi32(pairs, of_even), _mm256_srlv_epi32(pairs, of_odd));
        [look_up_avx2(values, even), look_up_avx2(values, odd)]
    };
    let mut groups = HalvesOfGroups::new(piece);
    let mut values = of_group(0);
    for (block, bytes) in bytes.iter().enumerate() {
        prefetch(bytes);
        for (quarter, bytes) in bytes.as_chunks::<8>().0.iter().enumerate() {
            if quarter % 2 == 0 && groups.begins() {
                values = of_group(groups.group);
            }
            take(block, quarter, split(values, bytes));
        }
    }
}

/// Of sixteen values, those at the places that the lowest four bits name.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn look_up_avx2([low, high]: [__m256; 2], codes: __m256i) -> __m256 {
    // A permutation takes the lowest three bits, the blend the fourth as a sign.
    let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
    _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), fourth)
}

/// Calls `take` with the number of a block, that of its quarter, and the quarter's even and odd values, for the
/// first blocks of a row.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn each_quarter(piece: &Piece, factors: &[f32; 16], blocks: usize, take: impl FnMut(usize, usize, [__m256; 2])) {
    match (piece.codes.bits(), piece.rounding, piece.meaning) {
        (4, Rounding::None, _) => nibbles_avx2::<false>(piece, factors, blocks, take),
        (4, ..) => nibbles_avx2::<true>(piece, factors, blocks, take),
        (_, _, Meaning::Affine) => bytes_avx2::<true>(piece, blocks, take),
        _ => bytes_avx2::<false>(piece, blocks, take),
    }
}

/// The product of the whole blocks of a row.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::dot) fn row_avx2(piece: &Piece, factors: &[f32; 16], x: &[f32]) -> f32 {
    let x = x.as_chunks::<BLOCK>().0;
    let mut sums = Sums256::new();
    each_quarter(piece, factors, x.len(), |block, quarter, values| {
        let x = halves(&x[block]);
        match quarter {
            0 => sums.add::<0, 0>(x[0], values),
            1 => sums.add::<0, 1>(x[0], values),
            2 => sums.add::<2, 0>(x[1], values),
            _ => sums.add::<2, 1>(x[1], values),
        }
    });
    sums.sum()
}

/// The values of the whole blocks of a row, split.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::dot) fn split_avx2(piece: &Piece, factors: &[f32; 16], out: &mut [f32]) {
    let out = out.as_chunks_mut::<BLOCK>().0;
    each_quarter(piece, factors, out.len(), |block, quarter, [even, odd]| {
        let half = &mut out[block].as_chunks_mut::<HALF>().0[quarter / 2];
        let at = quarter % 2 * 8;
        // SAFETY: the array has four vectors, the first two of the even elements.
        unsafe {
            _mm256_storeu_ps(half.as_mut_ptr().add(at), even);
            _mm256_storeu_ps(half.as_mut_ptr().add(LANES + at), odd);
        }
    });
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bytes_avx2<const AFFINE: bool>(piece: &Piece, blocks: usize, mut take: impl FnMut(usize, usize, [__m256; 2])) {
    let bytes = piece.codes.bytes()[piece.bit / 8..][..blocks * BLOCK].as_chunks::<BLOCK>().0;
    let factor = _mm256_set1_ps(piece.factor);
    let of_group = |group: usize| {
        let offsets = if AFFINE { piece.biases } else { piece.zeros };
        [_mm256_set1_ps(piece.scales[group]), _mm256_set1_ps(offsets[group])]
    };
    let value = |[scale, offset]: [__m256; 2], code: __m256i| {
        let code = _mm256_cvtepi32_ps(code);
        if AFFINE {
            _mm256_add_ps(_mm256_mul_ps(code, scale), offset)
        } else {
            _mm256_mul_ps(_mm256_mul_ps(_mm256_sub_ps(code, offset), scale), factor)
        }
    };
    let split = |group: [__m256; 2], bytes: &[u8; HALF / 2]| {
        // SAFETY: the array is as long as what is loaded.
        let pairs = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
        let even = value(group, _mm256_and_si256(pairs, _mm256_set1_epi32(0xff)));
        [even, value(group, _mm256_srli_epi32::<8>(pairs))]
    };
    let mut groups = HalvesOfGroups::new(piece);
    let mut group = of_group(0);
    for (block, bytes) in bytes.iter().enumerate() {
        prefetch(bytes);
        for (quarter, bytes) in quarters(bytes).into_iter().enumerate() {
            if quarter % 2 == 0 && groups.begins() {
                group = of_group(groups.group);
            }
            take(block, quarter, split(group, bytes));
        }
    }
}

/// The products of a row of whole sixteens with the keys from `first` on, all of them. Returns how many.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::dot) fn keys_avx2(x: &[f32], keys: Apart<'_>, first: usize, out: &mut [f32]) -> usize {
    for (n, out) in out.iter_mut().enumerate() {
        let row = &keys.row(first + n)[..x.len()];
        let mut sums = [_mm256_setzero_ps(); 2];
        for at in (0..x.len()).step_by(LANES) {
            for (half, sum) in sums.iter_mut().enumerate() {
                let at = at + half * 8;
                // SAFETY: `x` and the row are whole sixteens of one length.
                let (x, row) = unsafe { (_mm256_loadu_ps(x.as_ptr().add(at)), _mm256_loadu_ps(row.as_ptr().add(at))) };
                *sum = _mm256_fmadd_ps(x, row, *sum);
            }
        }
        *out = sum_eight(_mm256_add_ps(sums[0], sums[1]));
    }
    out.len()
}
