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
//! ([`split_pairs`]).

#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use half::bf16;

use crate::matrix::PackedMatrix;
#[cfg(target_arch = "x86_64")]
use crate::matrix::{Decoder, Groups, Rounding};
use crate::simd::{InstructionSet, for_each_set};
#[cfg(target_arch = "x86_64")]
use crate::values::Piece;

/// Elements that are added to all lanes once.
pub const BLOCK: usize = 64;
/// Elements whose neighbours are moved apart.
const HALF: usize = BLOCK / 2;
/// Sums of a set.
const LANES: usize = HALF / 2;

/// Of each half of a whole block, the even elements before the odd ones. Others stay.
///
/// # Panics
/// If the lengths differ.
pub fn split_pairs(x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "as many elements");
    let whole = x.len() / BLOCK * BLOCK;
    for (x, out) in x[..whole].chunks_exact(HALF).zip(out.chunks_exact_mut(HALF)) {
        let (even, odd) = out.split_at_mut(LANES);
        for (pair, (even, odd)) in x.as_chunks::<2>().0.iter().zip(even.iter_mut().zip(odd)) {
            [*even, *odd] = *pair;
        }
    }
    out[whole..].copy_from_slice(&x[whole..]);
}

/// Four sets of sums.
type Sets = [[f32; LANES]; 4];

/// The sum of all lanes and of the products behind the last whole block.
#[inline(always)]
fn total(sets: Sets, x: &[f32], w: impl Iterator<Item = f32>) -> f32 {
    let [a, b, c, d] = sets;
    let mut lanes: [f32; LANES] = std::array::from_fn(|n| (a[n] + b[n]) + (c[n] + d[n]));
    for half in [8, 4, 2, 1] {
        for n in 0..half {
            lanes[n] += lanes[n + half];
        }
    }
    let mut sum = lanes[0];
    for (x, w) in x.iter().zip(w) {
        sum = x.mul_add(w, sum);
    }
    sum
}

/// The product of activations and elements that both are split.
#[inline(always)]
fn dot_split(x: &[f32], w: &[f32]) -> f32 {
    let (blocks, rest) = x.as_chunks::<BLOCK>();
    let (others, rest_of_w) = w.as_chunks::<BLOCK>();
    let mut sets = Sets::default();
    for (x, w) in blocks.iter().zip(others) {
        for set in 0..4 {
            for lane in 0..LANES {
                let at = set * LANES + lane;
                sets[set][lane] = x[at].mul_add(w[at], sets[set][lane]);
            }
        }
    }
    total(sets, rest, rest_of_w.iter().copied())
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
    total(sets, rest, rest_of_w.iter().map(|w| value(*w)))
}

/// The number in f32, which is exact.
#[inline(always)]
pub(crate) fn widen(number: bf16) -> f32 {
    f32::from_bits(u32::from(number.to_bits()) << 16)
}

#[cfg(target_arch = "x86_64")]
use x86::{bf16_avx2, bf16_avx512, bytes_avx2, bytes_avx512, f32_avx2, f32_avx512, nibbles_avx2, nibbles_avx512};

impl InstructionSet {
    for_each_set! {
        /// x · w, both split.
        pub fn dot(self, x: &[f32], w: &[f32]) -> f32 {
            avx512: dot_split(x, w),
            avx2: dot_split(x, w),
            baseline: dot_split(x, w),
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
        /// Adds the products with codes of 4 bits to all lanes.
        fn add_nibbles(self, piece: &Piece, factors: &[f32; 16], x: &[f32], sets: &mut Sets) {
            avx512: nibbles_avx512(piece, factors, x, sets),
            avx2: nibbles_avx2(piece, factors, x, sets),
            baseline: unreachable!("it has no version for {:?} {x:?} {factors:?}", (piece.bit, sets)),
        }
    }

    for_each_set! {
        /// Adds the products with codes of 8 bits to all lanes.
        fn add_bytes(self, piece: &Piece, x: &[f32], sets: &mut Sets) {
            avx512: bytes_avx512(piece, x, sets),
            avx2: bytes_avx2(piece, x, sets),
            baseline: unreachable!("it has no version for {:?} {x:?}", (piece.bit, sets)),
        }
    }
}

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
        if set != InstructionSet::Baseline
            && let Some(groups) = self.groups_of_halves()
        {
            return self.dot_rows_unpacked(set, groups, rows, x, out);
        }
        let mut row = vec![0.0; width];
        for (n, out) in rows.zip(out) {
            self.decode_row_with(set, n, 0..width, &mut row);
            *out = set.dot_f32(x, &row);
        }
    }
}

/// Groups of a row that are whole halves of a block.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct GroupsOfHalves {
    /// Elements of a group.
    period: usize,
    /// Groups of a row.
    count: usize,
    /// Rows that share them.
    rows: usize,
}

#[cfg(target_arch = "x86_64")]
impl PackedMatrix {
    /// The groups, if codes can be multiplied as they are unpacked.
    fn groups_of_halves(&self) -> Option<GroupsOfHalves> {
        let [_, width] = self.shape;
        let (period, rows, is_whole) = match self.groups {
            Groups::Blocks { rows, columns } => (columns.min(width), rows, true),
            Groups::Flat { elements } => (elements, 1, width.is_multiple_of(elements)),
            Groups::OfColumns { .. } => return None,
        };
        let is_table = matches!(self.decoder, Decoder::Table { .. });
        let has_form = match self.codes.bits() {
            4 => true,
            8 => !is_table && self.rounding == Rounding::None,
            _ => false,
        };
        let begins_with_a_byte = self.codes.row_bits().is_multiple_of(8);
        let of_halves = is_whole && (period.is_multiple_of(HALF) || period == width);
        let fits = has_form && begins_with_a_byte && of_halves && width >= BLOCK;
        fits.then(|| GroupsOfHalves { period, count: width.div_ceil(period), rows })
    }

    fn dot_rows_unpacked(
        &self,
        set: InstructionSet,
        groups: GroupsOfHalves,
        rows: Range<usize>,
        x: &[f32],
        out: &mut [f32],
    ) {
        let GroupsOfHalves { period, count, rows: sharing } = groups;
        let (whole, rest_of_x) = x.split_at(x.len() / BLOCK * BLOCK);
        let (mut scales, mut zeros, mut biases) = (vec![0f32; count], vec![0f32; count], vec![-0f32; count]);
        let mut rest = vec![0f32; rest_of_x.len()];
        let ((meaning, factor), codes, rounding) = (self.meaning(), &self.codes, self.rounding);
        let mut factors = None;
        for (row, out) in rows.zip(out) {
            let group = row / sharing * count;
            self.scales.read(group, &mut scales);
            self.read_offsets(group, &mut zeros, &mut biases);
            let (scales, zeros, biases) = (&scales[..], &zeros[..], &biases[..]);
            let bit = codes.bit(row, 0);
            let piece = Piece { codes, bit, first: period, period, meaning, rounding, scales, zeros, biases, factor };
            let mut sets = Sets::default();
            if codes.bits() == 4 {
                let factors = factors.get_or_insert_with(|| piece.factors());
                set.add_nibbles(&piece, factors, whole, &mut sets);
            } else {
                set.add_bytes(&piece, whole, &mut sets);
            }
            if !rest.is_empty() {
                self.decode_row_with(set, row, whole.len()..x.len(), &mut rest);
            }
            *out = total(sets, rest_of_x, rest.iter().copied());
        }
    }
}
