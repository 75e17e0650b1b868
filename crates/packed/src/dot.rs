//! Products of activations with rows of a weight, as text is generated token by token: their time
//! is that of reading the weight once.
//!
//! A product is one sum in one order, however the weight is held. The elements of each [`BLOCK`] go
//! to four sets of sixteen lanes, by fused multiply-adds: the first two sets take the even and the
//! odd elements of its first half, the others those of its second half. In the end sets are added,
//! then the upper half of the lanes to the lower one until one is left, then the elements behind the
//! last whole block.
//!
//! Neighbours are apart because that is how they come out of memory: two codes of 4 bits in a byte,
//! two numbers of 16 bits in a word. Only the activations have to be rearranged, once
//! ([`InstructionSet::split`]).

#![expect(clippy::needless_range_loop, reason = "indices over arrays of one length are the form that becomes vectors")]

pub mod keys;
pub mod rounded;
#[cfg(target_arch = "x86_64")]
mod rows_of_codes;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use half::bf16;

use crate::matrix::PackedMatrix;
use crate::numbers::widen;
use crate::simd::{InstructionSet, for_each_set};

/// Elements that are added to all lanes once.
pub const BLOCK: usize = 64;
/// Elements whose neighbours are moved apart.
const HALF: usize = BLOCK / 2;
/// Sums of a set.
const LANES: usize = HALF / 2;

/// Of each half of a whole block, the even elements before the odd ones. Others stay.
#[inline(always)]
fn split_pairs<T: Copy>(x: &[T], out: &mut [f32], value: impl Fn(T) -> f32) {
    assert_eq!(x.len(), out.len(), "as many elements");
    let whole = x.len() / BLOCK * BLOCK;
    for (x, out) in x[..whole].as_chunks::<HALF>().0.iter().zip(out.as_chunks_mut::<HALF>().0) {
        for lane in 0..LANES {
            (out[lane], out[LANES + lane]) = (value(x[2 * lane]), value(x[2 * lane + 1]));
        }
    }
    for (x, out) in x[whole..].iter().zip(&mut out[whole..]) {
        *out = value(*x);
    }
}

/// Four sets of sums.
type Sets = [[f32; LANES]; 4];

/// The sum of all lanes.
#[inline(always)]
fn sum_lanes([a, b, c, d]: Sets) -> f32 {
    halve(std::array::from_fn(|n| (a[n] + b[n]) + (c[n] + d[n])))
}

/// The upper half of the lanes is added to the lower one until one is left.
#[inline(always)]
fn halve(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for n in 0..half {
            lanes[n] += lanes[n + half];
        }
    }
    lanes[0]
}

/// Adds the products behind the last whole block.
#[inline(always)]
fn add_rest(sum: f32, x: &[f32], w: impl Iterator<Item = f32>) -> f32 {
    x.iter().zip(w).fold(sum, |sum, (x, w)| x.mul_add(w, sum))
}

/// Rows of a weight that are multiplied at a time: with [`TILE`] rows of activations, their sums stay
/// in registers.
pub const ROWS: usize = 6;
/// Rows of activations that are multiplied at a time.
const TILE: usize = 4;

/// Sums the whole blocks of a tile: T rows of x and O of w, which begin with these slices, `width`
/// apart.
trait Tile {
    fn sums<const O: usize, const T: usize>(&self, x: &[f32], w: &[f32], width: usize) -> [[f32; T]; O];

    /// Asks for the line of this address, which need not be there.
    fn prefetch(&self, _address: *const i8) {}
}

/// The product of activations and elements that both are split, in whole blocks.
#[inline(always)]
fn dot_split(x: &[f32], w: &[f32]) -> f32 {
    let mut sets = Sets::default();
    for (x, w) in x.as_chunks::<BLOCK>().0.iter().zip(w.as_chunks::<BLOCK>().0) {
        for set in 0..4 {
            for lane in 0..LANES {
                let at = set * LANES + lane;
                sets[set][lane] = x[at].mul_add(w[at], sets[set][lane]);
            }
        }
    }
    sum_lanes(sets)
}

/// In plain loops, one product after the other.
struct PlainTile;

impl Tile for PlainTile {
    #[inline(always)]
    fn sums<const O: usize, const T: usize>(&self, x: &[f32], w: &[f32], width: usize) -> [[f32; T]; O] {
        let whole = width / BLOCK * BLOCK;
        std::array::from_fn(|o| std::array::from_fn(|t| dot_split(&x[t * width..][..whole], &w[o * width..][..whole])))
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// Memory that will be read soon. It is asked for while products are made, and need not be there.
#[derive(Clone, Copy, Debug)]
pub struct Ahead {
    start: *const i8,
    bytes: usize,
}

impl Ahead {
    /// As many bytes as `now` has, from its end on.
    pub fn of<T>(now: &[T]) -> Ahead {
        Ahead { start: now.as_ptr_range().end.cast(), bytes: size_of_val(now) }
    }

    /// Nothing.
    pub const NONE: Ahead = Ahead { start: std::ptr::null(), bytes: 0 };

    /// Asks for the n-th of so many parts.
    #[inline(always)]
    fn ask(self, tile: &impl Tile, n: usize, parts: usize) {
        for at in (self.bytes * n / parts..self.bytes * (n + 1) / parts).step_by(LINE) {
            tile.prefetch(self.start.wrapping_add(at));
        }
    }
}

/// `out[o, t] = x[t] · w[o]`, all split: x [t, i], w [o, i].
#[inline(always)]
fn dot_tiles(tile: &impl Tile, x: &[f32], w: &[f32], width: usize, ahead: Ahead, out: &mut [f32]) {
    let (rows, outputs) = (x.len() / width.max(1), w.len() / width.max(1));
    assert_eq!(out.len(), rows * outputs, "a product for each two rows");
    let (fours, sixes) = (rows / TILE * TILE, outputs / ROWS * ROWS);
    for o in (0..sixes).step_by(ROWS) {
        for t in (0..fours).step_by(TILE) {
            ahead.ask(tile, o / ROWS * (fours / TILE) + t / TILE, (fours / TILE) * (sixes / ROWS));
            dot_tile::<ROWS, TILE>(tile, [x, w], [t, o], width, rows, out);
        }
        for t in fours..rows {
            dot_tile::<ROWS, 1>(tile, [x, w], [t, o], width, rows, out);
        }
    }
    for o in sixes..outputs {
        for t in (0..fours).step_by(TILE) {
            dot_tile::<1, TILE>(tile, [x, w], [t, o], width, rows, out);
        }
        for t in fours..rows {
            dot_tile::<1, 1>(tile, [x, w], [t, o], width, rows, out);
        }
    }
}

/// The products of T rows of x and O of w, from rows t and o on.
#[inline(always)]
fn dot_tile<const O: usize, const T: usize>(
    tile: &impl Tile,
    [x, w]: [&[f32]; 2],
    [t, o]: [usize; 2],
    width: usize,
    rows: usize,
    out: &mut [f32],
) {
    let (x, w) = (&x[t * width..][..T * width], &w[o * width..][..O * width]);
    let whole = width / BLOCK * BLOCK;
    for (n, sums) in tile.sums::<O, T>(x, w, width).into_iter().enumerate() {
        let w = &w[n * width..][whole..width];
        for (m, sum) in sums.into_iter().enumerate() {
            let x = &x[m * width..][whole..width];
            out[(o + n) * rows + t + m] = add_rest(sum, x, w.iter().copied());
        }
    }
}

/// The product of split activations and numbers as they lie in memory.
#[inline(always)]
fn dot_numbers<T: Copy>(x: &[f32], w: &[T], value: impl Fn(T) -> f32) -> f32 {
    let (blocks, rest) = x.as_chunks::<BLOCK>();
    let (others, rest_of_w) = w.as_chunks::<BLOCK>();
    let mut sets = Sets::default();
    for (x, w) in blocks.iter().zip(others) {
        for set in 0..4 {
            for lane in 0..LANES {
                let w = value(w[set / 2 * HALF + 2 * lane + set % 2]);
                sets[set][lane] = x[set * LANES + lane].mul_add(w, sets[set][lane]);
            }
        }
    }
    add_rest(sum_lanes(sets), rest, rest_of_w.iter().map(|w| value(*w)))
}

#[cfg(target_arch = "x86_64")]
use rows_of_codes::RowsOfCodes;
#[cfg(target_arch = "x86_64")]
use x86::avx2::{Tile256, bf16_avx2, f32_avx2, row_avx2, split_avx2};
#[cfg(target_arch = "x86_64")]
use x86::avx512::{Tile512, bf16_avx512, f32_avx512, split_bf16_avx512};
#[cfg(target_arch = "x86_64")]
use x86::codes512::{dot_rows_avx512, split_avx512};

impl InstructionSet {
    for_each_set! {
        /// Of each half of a whole block, the even elements before the odd ones. Others stay.
        ///
        /// # Panics
        /// If the lengths differ.
        pub fn split(self, x: &[f32], out: &mut [f32]) {
            avx512: split_pairs(x, out, |x| x),
            avx2: split_pairs(x, out, |x| x),
            baseline: split_pairs(x, out, |x| x),
        }
    }

    for_each_set! {
        /// As [`InstructionSet::split`].
        ///
        /// # Panics
        /// If the lengths differ.
        pub fn split_bf16(self, x: &[bf16], out: &mut [f32]) {
            avx512: split_bf16_avx512(x, out),
            avx2: split_pairs(x, out, widen),
            baseline: split_pairs(x, out, widen),
        }
    }

    for_each_set! {
        /// The products of rows of activations with rows of a weight, all split: x [t, width],
        /// w [o, width] -> out [o, t]. [`ROWS`] rows of the weight are multiplied together. `ahead`: what will be
        /// read then.
        ///
        /// # Panics
        /// If the lengths do not fit.
        pub fn dot_each(self, x: &[f32], w: &[f32], width: usize, ahead: Ahead, out: &mut [f32]) {
            avx512: dot_tiles(&Tile512, x, w, width, ahead, out),
            avx2: dot_tiles(&Tile256, x, w, width, ahead, out),
            baseline: dot_tiles(&PlainTile, x, w, width, ahead, out),
        }
    }

    for_each_set! {
        /// x · w for split activations and a row as it is.
        pub fn dot_f32(self, x: &[f32], w: &[f32]) -> f32 {
            avx512: f32_avx512(x, w),
            avx2: f32_avx2(x, w),
            baseline: dot_numbers(x, w, |w| w),
        }
    }

    for_each_set! {
        /// x · w for split activations and a row as it is.
        pub fn dot_bf16(self, x: &[f32], w: &[bf16]) -> f32 {
            avx512: bf16_avx512(x, w),
            avx2: bf16_avx2(x, w),
            baseline: dot_numbers(x, w, widen),
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl InstructionSet {
    for_each_set! {
        /// [`PackedMatrix::dot_rows`] of codes that are multiplied as they are unpacked.
        fn dot_codes(self, codes: &RowsOfCodes, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
            avx512: codes.dot(rows, x, out, |piece, factors, x, out| dot_rows_avx512(piece, factors, x, out)),
            avx2: codes.dot(rows, x, out, |piece, factors, x, out| {
                for (piece, out) in codes.rows_of(piece).zip(out) {
                    *out = row_avx2(&piece, factors, x);
                }
            }),
            baseline: codes.matrix.dot_decoded(InstructionSet::Baseline, rows, x, out),
        }
    }

    for_each_set! {
        /// [`PackedMatrix::split_rows`] of codes that are split as they are unpacked.
        fn split_codes(self, codes: &RowsOfCodes, rows: Range<usize>, some: &mut [f32], then: Then<'_>) {
            avx512: codes.split(rows, some, then, |piece, factors, out| split_avx512(piece, factors, out)),
            avx2: codes.split(rows, some, then, |piece, factors, out| split_avx2(piece, factors, out)),
            baseline: codes.matrix.split_decoded(InstructionSet::Baseline, rows, some, then),
        }
    }
}

/// What is done with some rows: the number of the first one, counted from the first of all, their values, and the
/// codes of those behind them.
pub type Then<'a> = &'a mut dyn FnMut(usize, &[f32], Ahead);

impl PackedMatrix {
    /// The products of split activations with some rows: `out[n] = x · w[rows.start + n]`. They have
    /// the bits of [`InstructionSet::dot_f32`] with each row's values.
    ///
    /// # Panics
    /// If the range is beyond the matrix, `x` is not as long as a row, or `out` as the range.
    pub fn dot_rows(&self, set: InstructionSet, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
        let [height, width] = self.shape;
        assert!(rows.end <= height && x.len() == width, "rows {rows:?} of {height}, {} of {width} columns", x.len());
        assert_eq!(out.len(), rows.len(), "a product for each row");
        #[cfg(target_arch = "x86_64")]
        if let Some(codes) = RowsOfCodes::of(self) {
            return set.dot_codes(&codes, rows, x, out);
        }
        self.dot_decoded(set, rows, x, out);
    }

    /// Reads some rows into `some`, split, as many at a time as fit, and calls `then` with them each time.
    ///
    /// # Panics
    /// If the range is beyond the matrix, or a row does not fit.
    pub fn split_rows(&self, set: InstructionSet, rows: Range<usize>, some: &mut [f32], then: Then<'_>) {
        let [height, width] = self.shape;
        assert!(rows.end <= height && some.len() >= width, "rows {rows:?} of {height}, {} for {width}", some.len());
        #[cfg(target_arch = "x86_64")]
        if let Some(codes) = RowsOfCodes::of(self) {
            return set.split_codes(&codes, rows, some, then);
        }
        self.split_decoded(set, rows, some, then);
    }

    /// [`PackedMatrix::split_rows`], of rows that are decoded first.
    fn split_decoded(&self, set: InstructionSet, rows: Range<usize>, some: &mut [f32], then: Then<'_>) {
        let width = self.shape[1].max(1);
        let at_once = some.len() / width;
        let mut row = vec![0.0; width];
        for first in rows.clone().step_by(at_once) {
            let now = first..rows.end.min(first + at_once);
            let some = &mut some[..now.len() * width];
            for (n, out) in now.zip(some.chunks_exact_mut(width)) {
                self.decode_row_with(set, n, 0..self.shape[1], &mut row[..self.shape[1]]);
                set.split(&row, out);
            }
            then(first - rows.start, some, Ahead::NONE);
        }
    }

    /// [`PackedMatrix::dot_rows`], of rows that are decoded into memory one by one.
    fn dot_decoded(&self, set: InstructionSet, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
        let mut row = vec![0.0; x.len()];
        for (n, out) in rows.zip(out) {
            self.decode_row_with(set, n, 0..x.len(), &mut row);
            *out = set.dot_f32(x, &row);
        }
    }
}
