//! Products of a few rows with rows of f32 that lie apart: of queries with the keys of a cache.
//!
//! A product is one sum in one order: sixteen lanes of fused multiply-adds, of which the upper half is added to
//! the lower one until one is left, then the elements behind the last whole sixteen.

#[cfg(target_arch = "x86_64")]
use super::x86::{avx2::keys_avx2, avx512::keys_avx512};
use super::{LANES, add_rest, halve};
use crate::simd::{InstructionSet, for_each_set};

/// Rows of f32 that lie `stride` elements apart, each `width` long.
#[derive(Clone, Copy, Debug)]
pub struct Apart<'a> {
    /// The first begins with the first element.
    pub values: &'a [f32],
    /// Elements from the start of one to that of the next.
    pub stride: usize,
    /// Elements of each.
    pub width: usize,
}

impl<'a> Apart<'a> {
    pub(super) fn row(&self, n: usize) -> &'a [f32] {
        &self.values[n * self.stride..][..self.width]
    }
}

impl InstructionSet {
    for_each_set! {
        /// The products of rows with others that lie apart: x [t, width] -> out [t, keys].
        ///
        /// # Panics
        /// If there are fewer keys than `out` has place for.
        pub fn dot_apart(self, x: &[f32], keys: Apart<'_>, out: &mut [f32]) {
            avx512: each_query(x, keys, out, |x, keys, n, out| keys_avx512(x, keys, n, out)),
            avx2: each_query(x, keys, out, |x, keys, n, out| keys_avx2(x, keys, n, out)),
            baseline: each_query(x, keys, out, |_, _, _, _| 0),
        }
    }
}

/// Keys whose products with all rows are made before those of the next: they stay in the first-level cache.
const AT_ONCE: usize = 64;

/// `some` makes the products of a row with the keys from n on, as many as it can in whole vectors, without the elements
/// behind the last whole sixteen, and returns how many.
#[inline(always)]
fn each_query(
    x: &[f32],
    keys: Apart<'_>,
    out: &mut [f32],
    some: impl Fn(&[f32], Apart<'_>, usize, &mut [f32]) -> usize,
) {
    let Some(rows) = x.len().checked_div(keys.width).filter(|rows| *rows > 0) else { return };
    let count = out.len() / rows;
    let whole = keys.width / LANES * LANES;
    for first in (0..count).step_by(AT_ONCE) {
        let last = count.min(first + AT_ONCE);
        for (x, out) in x.chunks_exact(keys.width).zip(out.chunks_exact_mut(count)) {
            let out = &mut out[first..last];
            let done = some(&x[..whole], keys, first, out);
            for (n, out) in out.iter_mut().enumerate() {
                let key = keys.row(first + n);
                if n >= done {
                    *out = lanes(&x[..whole], key);
                }
                *out = add_rest(*out, &x[whole..], key[whole..].iter().copied());
            }
        }
    }
}

/// The sum over whole sixteens.
#[inline(always)]
fn lanes(x: &[f32], key: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    for (x, key) in x.as_chunks::<LANES>().0.iter().zip(key.as_chunks::<LANES>().0) {
        for n in 0..LANES {
            sums[n] = x[n].mul_add(key[n], sums[n]);
        }
    }
    halve(sums)
}
