//! Products in bf16 with sums in f32, for processors whose bf16 instructions are faster than those
//! of f32.
//!
//! Both matrices are rounded to bf16. A tile of the result is four rows of the left one by six of
//! the right one; each of its elements is summed as [`finetune_packed::dot::rounded`] says, in sums that are padded with
//! zeros to whole steps. The order of a sum depends on its length and the form of the weight alone, also where the left
//! matrix has a few rows and the time is that of reading the weight once.

#[cfg(target_arch = "x86_64")]
use finetune_packed::InstructionSet;
use finetune_packed::dot::rounded::{PIECE, STEP};
use half::bf16;
use rayon::prelude::*;

use super::few_rows::{self, FEW_ROWS};
use super::matmul::Matrix;
use super::simd;
use super::weight::CpuWeight;

/// Bytes of the weight in bf16 at a time. They stay in the second-level cache.
const BLOCK_BYTES: usize = 512 << 10;
/// Rows and columns of a tile: 24 registers of sums.
const TILE: [usize; 2] = [4, 6];
/// Bytes that stay in the first-level cache beside what is multiplied: half of it.
const NEAR: usize = 16 << 10;
/// Rows of the result that one job computes.
const ROWS_PER_JOB: usize = 32;

/// Whether this processor multiplies bf16 faster than f32, as AMD's do from Zen 4 on. Intel's
/// instructions outside of AMX have half of the rate of f32 (measured: 85 and 174 GFLOP/s on one
/// core).
pub(crate) fn is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return InstructionSet::has_bf16() && is_amd();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    let id = std::arch::x86_64::__cpuid(0);
    [id.ebx, id.edx, id.ecx] == [b"Auth", b"enti", b"cAMD"].map(|part| u32::from_le_bytes(*part))
}

/// What is asked for while a tile is computed: nothing, or the rows behind those of b, into the first-level cache or the
/// second-level one.
#[derive(Clone, Copy)]
enum Ahead {
    Nothing,
    Near,
    Far,
}

impl Ahead {
    /// For so many rows of a, of so many elements.
    fn of(rows: usize, length: usize) -> Ahead {
        if (TILE[1] + rows) * length * size_of::<bf16>() <= NEAR { Ahead::Near } else { Ahead::Far }
    }
}

/// Rows in bf16, of which the kernel sums products.
struct Rows<'a> {
    values: &'a [bf16],
    /// Elements from one row to the next, and from one step of a row to the next.
    strides: [usize; 2],
    ahead: Ahead,
}

impl<'a> Rows<'a> {
    fn new(values: &'a [bf16], strides: [usize; 2]) -> Rows<'a> {
        Rows { values, strides, ahead: Ahead::Nothing }
    }
}

/// A matrix [rows, k] rounded to bf16, with zeros up to whole tiles and steps. `arrange` brings each row into the order
/// that it is multiplied in.
fn rounded(x: Matrix<'_>, arrange: impl Fn(&mut [bf16]) + Sync) -> Vec<bf16> {
    let k = x.columns().next_multiple_of(STEP);
    let mut out = vec![bf16::ZERO; x.rows().next_multiple_of(TILE[0]) * k];
    let rows = out.par_chunks_mut(k.max(1)).take(x.rows()).enumerate();
    rows.for_each(|(row, out)| {
        let out = &mut out[..x.columns()];
        simd::narrow(x.row(row), out);
        arrange(out);
    });
    out
}

/// `out = keep · out + scale · x Wᵀ`: x [t, i], w [o, i], out [t, o].
pub(crate) fn times_transposed(out: &mut [f32], keep: bool, scale: f32, x: Matrix<'_>, w: &CpuWeight) {
    let [outputs, inputs] = w.shape();
    let length = inputs.next_multiple_of(STEP);
    let a = rounded(x, |row| w.arrange(row));
    if x.rows() <= FEW_ROWS {
        let sizes = [x.rows(), outputs, inputs];
        return few_rows::by_jobs(out, keep, scale, sizes, |first, out| few_products(&a, x.rows(), w, first, out));
    }
    let mut rounded = Vec::new();
    by_blocks(outputs, length, |first, count| {
        let is_whole = length == inputs && count.is_multiple_of(TILE[1]);
        let as_they_are = if is_whole { w.rows_in_bf16(first..first + count) } else { None };
        let block = as_they_are.unwrap_or_else(|| {
            // What is behind the rows, up to a whole tile, makes sums that nothing reads.
            rounded.resize(count.next_multiple_of(TILE[1]) * length, bf16::ZERO);
            let tiles = rounded.par_chunks_mut(TILE[1] * length).enumerate();
            tiles.for_each(|(tile, out)| {
                let row = first + tile * TILE[1];
                read_rounded(w, row..(row + TILE[1]).min(first + count), length, out);
            });
            &rounded
        });
        let ahead = if as_they_are.is_some() { Ahead::Far } else { Ahead::Nothing };
        let b = Rows { values: block, strides: [length, STEP], ahead };
        add_block(out, keep, scale, &a, &b, length / STEP, [outputs, first, count]);
    });
}

/// Writes some rows of a weight into `out`, rounded, `length` apart.
fn read_rounded(w: &CpuWeight, rows: std::ops::Range<usize>, length: usize, out: &mut [bf16]) {
    if w.round_rows(rows.clone(), length, out) {
        return;
    }
    let mut read = vec![0.0; w.shape()[1]];
    for (row, out) in rows.zip(out.chunks_mut(length)) {
        w.read(row, 0, &mut read);
        simd::narrow(&read, &mut out[..read.len()]);
    }
}

/// `out[n, t] = a[t] · w[first + n]`, for so many rows of a.
fn few_products(a: &[bf16], rows: usize, w: &CpuWeight, first: usize, out: &mut [f32]) {
    let [_, inputs] = w.shape();
    let length = inputs.next_multiple_of(STEP);
    let outputs = first..first + out.len() / rows;
    if rows == 1 && w.dot_rounded(outputs.clone(), &a[..inputs], out) {
        return;
    }
    let whole = outputs.len() / TILE[1] * TILE[1];
    let as_they_are = if length == inputs { w.rows_in_bf16(first..first + whole) } else { None };
    if let Some(values) = as_they_are {
        few_tiles(a, rows, values, length, Ahead::of(rows, length), &mut out[..whole * rows]);
    }
    // The others are rounded first, as many at a time as stay near.
    let at_once = (NEAR / 2 / length.max(1)).max(TILE[1]) / TILE[1] * TILE[1];
    let done = if as_they_are.is_some() { whole } else { 0 };
    let mut block = vec![bf16::ZERO; at_once.min((outputs.len() - done).next_multiple_of(TILE[1])) * length];
    for (n, out) in out[done * rows..].chunks_mut(at_once * rows).enumerate() {
        let begin = first + done + n * at_once;
        read_rounded(w, begin..begin + out.len() / rows, length, &mut block);
        few_tiles(a, rows, &block, length, Ahead::Nothing, out);
    }
}

/// The products of so many rows of a with those of b, of which there may be more than `out` has room for, up to a whole
/// tile.
fn few_tiles(a: &[bf16], rows: usize, b: &[bf16], length: usize, ahead: Ahead, out: &mut [f32]) {
    for (n, out) in out.chunks_mut(TILE[1] * rows).enumerate() {
        let mut b = Rows { values: &b[n * TILE[1] * length..], strides: [length, STEP], ahead };
        for t in (0..rows).step_by(TILE[0]) {
            let a = Rows::new(&a[t * length..], [length, STEP]);
            let out = &mut out[t..];
            match rows - t {
                1 => few_tile::<1>(&a, &b, length / STEP, rows, out),
                2 => few_tile::<2>(&a, &b, length / STEP, rows, out),
                3 => few_tile::<3>(&a, &b, length / STEP, rows, out),
                _ => few_tile::<4>(&a, &b, length / STEP, rows, out),
            }
            b.ahead = Ahead::Nothing;
        }
    }
}

/// Writes the products of T rows of a with those of b, of which each has so many steps. Those of one row of b lie next
/// to each other in `out`, those of the next one `width` behind them.
fn few_tile<const T: usize>(a: &Rows<'_>, b: &Rows<'_>, steps: usize, width: usize, out: &mut [f32]) {
    let mut sums = [[0.0; TILE[1]]; T];
    for piece in (0..steps).step_by(PIECE) {
        let tile = tile::<T>(a, b, piece..(piece + PIECE).min(steps));
        for (sum, more) in sums.as_flattened_mut().iter_mut().zip(tile.as_flattened()) {
            *sum += more;
        }
    }
    for (column, out) in out.chunks_mut(width).enumerate() {
        for (out, sums) in out.iter_mut().zip(&sums) {
            *out = sums[column];
        }
    }
}

/// `out = keep · out + scale · y W` with some rows of W: y [t, rows], w [o, i], out [t, i].
pub(crate) fn times(
    out: &mut [f32],
    keep: bool,
    scale: f32,
    y: Matrix<'_>,
    w: &CpuWeight,
    rows: std::ops::Range<usize>,
) {
    let [_, inputs] = w.shape();
    let length = rows.len().next_multiple_of(STEP);
    let a = rounded(y, |_| {});
    by_blocks(inputs, length, |first, count| {
        // Step by step, each with the rows of the transposed weight one after the other.
        let width = count.next_multiple_of(TILE[1]) * STEP;
        let mut block = vec![bf16::ZERO; width / STEP * length];
        let steps = block.par_chunks_mut(width).enumerate();
        steps.for_each_init(
            || vec![0.0; count],
            |read, (step, out)| {
                for row in step * STEP..((step + 1) * STEP).min(rows.len()) {
                    w.read(rows.start + row, first, read);
                    for (column, value) in read.iter().enumerate() {
                        out[column * STEP + row % STEP] = bf16::from_f32(*value);
                    }
                }
            },
        );
        let b = Rows::new(&block, [STEP, width]);
        add_block(out, keep, scale, &a, &b, length / STEP, [inputs, first, count]);
    });
}

/// Calls `multiply` with the first of some columns of the result, and their number: so many that as many rows of `length`
/// elements stay in the second-level cache. All but the last are whole tiles.
fn by_blocks(columns: usize, length: usize, mut multiply: impl FnMut(usize, usize)) {
    let most = (BLOCK_BYTES / 2 / length.max(1)).max(1).next_multiple_of(TILE[1]);
    for first in (0..columns).step_by(most) {
        let count = most.min(columns - first);
        multiply(first, count);
    }
}

/// Columns `first` to `first + count` of the result, which has `columns` of them, from the rows of a
/// and b. A sum has `steps` steps.
fn add_block(
    out: &mut [f32],
    keep: bool,
    scale: f32,
    a: &[bf16],
    b: &Rows<'_>,
    steps: usize,
    [columns, first, count]: [usize; 3],
) {
    let (length, width) = (steps * STEP, count.next_multiple_of(TILE[1]));
    out.par_chunks_mut(ROWS_PER_JOB * columns).enumerate().for_each(|(job, out)| {
        let rows = out.len() / columns;
        let a = &a[job * ROWS_PER_JOB * length..][..rows.next_multiple_of(TILE[0]) * length];
        let mut sums = vec![0.0; a.len() / length.max(1) * width];
        for piece in (0..steps).step_by(PIECE) {
            let range = piece..(piece + PIECE).min(steps);
            for column in (0..width).step_by(TILE[1]) {
                for row in (0..a.len() / length.max(1)).step_by(TILE[0]) {
                    let a = Rows::new(&a[row * length..], [length, STEP]);
                    // The first rows wait for those of b, the others find them in the cache.
                    let ahead = if job == 0 && row == 0 { b.ahead } else { Ahead::Nothing };
                    let b = Rows { values: &b.values[column * b.strides[0]..], ahead, ..*b };
                    let tile = tile::<{ TILE[0] }>(&a, &b, range.clone());
                    for (i, tile) in tile.iter().enumerate() {
                        let sums = &mut sums[(row + i) * width + column..][..TILE[1]];
                        sums.iter_mut().zip(tile).for_each(|(sum, more)| *sum += more);
                    }
                }
            }
        }
        for (out, sums) in out.chunks_mut(columns).zip(sums.chunks(width)) {
            for (out, sum) in out[first..first + count].iter_mut().zip(sums) {
                *out = if keep { *out + scale * sum } else { scale * sum };
            }
        }
    });
}

/// The products of T rows of a, at most four, and six of b, summed over some steps.
fn tile<const T: usize>(a: &Rows<'_>, b: &Rows<'_>, steps: std::ops::Range<usize>) -> [[f32; TILE[1]]; T] {
    let last = |rows: &Rows<'_>, count: usize| {
        (count - 1) * rows.strides[0] + steps.end.saturating_sub(1) * rows.strides[1] + STEP
    };
    assert!(last(a, T) <= a.values.len() && last(b, TILE[1]) <= b.values.len(), "a tile beyond its rows");
    #[cfg(target_arch = "x86_64")]
    if InstructionSet::has_bf16() {
        #[expect(unsafe_code, reason = "bf16 instructions")]
        // SAFETY: the processor has the instructions. The assertion above keeps every element that
        // is read inside its slice.
        return unsafe {
            match b.ahead {
                Ahead::Nothing => x86::tile::<T, { x86::NOTHING }>(a, b, steps),
                Ahead::Near => x86::tile::<T, { x86::NEAR }>(a, b, steps),
                Ahead::Far => x86::tile::<T, { x86::FAR }>(a, b, steps),
            }
        };
    }
    let at = |rows: &Rows<'_>, row: usize, step: usize, n: usize| {
        rows.values[row * rows.strides[0] + step * rows.strides[1] + n].to_f32()
    };
    std::array::from_fn(|i| {
        std::array::from_fn(|j| {
            let products = steps.clone().flat_map(|step| (0..STEP).map(move |n| (step, n)));
            products.map(|(step, n)| at(a, i, step, n) * at(b, j, step, n)).sum()
        })
    })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use finetune_packed::dot::rounded::totals;

    use super::{Rows, STEP, TILE};

    /// The hints of [`super::Ahead`]. That of nothing is never given.
    pub(super) const NOTHING: i32 = _MM_HINT_NTA;
    pub(super) const NEAR: i32 = _MM_HINT_T0;
    pub(super) const FAR: i32 = _MM_HINT_T1;

    /// See [`super::tile`].
    ///
    /// # Safety
    /// Every element of the tile's rows and steps has to be inside its slice.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,fma")]
    #[expect(unsafe_code, reason = "loads without bounds checks")]
    pub(super) unsafe fn tile<const T: usize, const AHEAD: i32>(
        a: &Rows<'_>,
        b: &Rows<'_>,
        steps: std::ops::Range<usize>,
    ) -> [[f32; TILE[1]]; T] {
        let mut sums = [[_mm512_setzero_ps(); TILE[1]]; T];
        let load = |rows: &Rows<'_>, row: usize, step: usize| {
            let start = row * rows.strides[0] + step * rows.strides[1];
            debug_assert!(start + STEP <= rows.values.len());
            // SAFETY: the caller keeps the step inside the slice. A register of 32 bf16 and one of
            // 64 bytes are the same bits.
            unsafe {
                let bytes = _mm512_loadu_si512(rows.values.as_ptr().add(start).cast());
                std::mem::transmute::<__m512i, __m512bh>(bytes)
            }
        };
        for step in steps {
            let right: [__m512bh; TILE[1]] = std::array::from_fn(|j| {
                if AHEAD != NOTHING {
                    // In the order in which the lines lie: in that of the steps it took longer than not to ask.
                    let line = TILE[1] * b.strides[0] + (step * TILE[1] + j) * STEP;
                    _mm_prefetch::<AHEAD>(b.values.as_ptr().wrapping_add(line).cast());
                }
                load(b, j, step)
            });
            for (i, sums) in sums.iter_mut().enumerate() {
                let left = load(a, i, step);
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = _mm512_dpbf16_ps(*sum, left, right);
                }
            }
        }
        let mut out = [[0.0; TILE[1]]; T];
        for (out, sums) in out.as_flattened_mut().chunks_mut(4).zip(sums.as_flattened().chunks(4)) {
            let four = std::array::from_fn(|n| sums.get(n).copied().unwrap_or(_mm512_setzero_ps()));
            out.copy_from_slice(&totals(four)[..out.len()]);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};
    use burn_flex::FlexTensor;
    use finetune_packed::{Scheme, Stored, quantize};
    use finetune_random::Stream;

    use super::*;
    use crate::PackedWeight;

    /// Shapes that fill no tile, no step and no piece, with the instructions where the processor has
    /// them: within f32's rounding of the products of the rounded matrices.
    #[test]
    fn products_of_bf16_match_f64() {
        for [t, o, i] in
            [[9, 7, 33], [1, 70, 64], [16, 33, 1100], [40, 300, 70], [33, 65, 1100], [64, 12, 32], [70, 900, 640]]
        {
            let stream = Stream::new(t as u64, 1, o as u64, i as u32);
            let values = stream.normal(t * i + o * i + t * o, 1.0);
            let (xs, rest) = values.split_at(t * i);
            let (ws, ys) = rest.split_at(o * i);
            let tensor = FlexTensor::from_data(TensorData::new(ws.to_vec(), [o, i]));
            let w = CpuWeight::from(tensor);
            let round = |value: f32| f64::from(bf16::from_f32(value).to_f32());
            for keep in [false, true] {
                let start = if keep { 1.0 } else { 0.0 };
                let mut out = vec![1.0; t * o];
                times_transposed(&mut out, keep, 0.5, Matrix::new(xs, t, i), &w);
                let want = |m: usize, n: usize| -> f64 {
                    start + 0.5 * (0..i).map(|k| round(xs[m * i + k]) * round(ws[n * i + k])).sum::<f64>()
                };
                expect_close(&out, o, want, i);
                let mut out = vec![1.0; t * i];
                times(&mut out, keep, 0.5, Matrix::new(ys, t, o), &w, 0..o);
                let want = |m: usize, n: usize| -> f64 {
                    start + 0.5 * (0..o).map(|k| round(ys[m * o + k]) * round(ws[k * i + n])).sum::<f64>()
                };
                expect_close(&out, i, want, o);
            }
        }
    }

    /// A row has the same bits alone, among a few and among many, with rows of the weight that are used as they lie in
    /// memory, with ones that are rounded first, and with codes that are multiplied as they are unpacked.
    #[test]
    fn a_row_has_the_same_bits_whatever_is_multiplied_with_it() {
        for [o, i] in [[70, 64], [13, 1100], [600, 2080], [70, 1600]] {
            let stream = Stream::new(o as u64, 2, i as u64, 0);
            let values = stream.normal(70 * i + o * i, 1.0);
            let (xs, ws) = values.split_at(70 * i);
            let rounded: Vec<bf16> = ws.iter().map(|w| bf16::from_f32(*w)).collect();
            let in_memory = CpuWeight::from(PackedWeight::bf16(rounded, [o, i]));
            let in_f32 = CpuWeight::from(FlexTensor::from_data(TensorData::new(ws.to_vec(), [o, i])));
            // Those of groups do not fit into each width.
            let schemes = [Scheme::Mlx4, Scheme::Mlx8, Scheme::Nf4, Scheme::Mxfp4, Scheme::Int8].into_iter();
            let matrices = schemes.filter_map(|scheme| quantize(scheme, ws, [o, i], Stored::BF16).ok());
            let packed = matrices.map(|matrix| CpuWeight::from(PackedWeight::new(matrix, &Device::default())));
            for w in [in_memory, in_f32].into_iter().chain(packed) {
                let w = &w;
                let products = |t: usize| {
                    let mut out = vec![0.0; t * o];
                    times_transposed(&mut out, false, 1.0, Matrix::new(&xs[..t * i], t, i), w);
                    out
                };
                let many = products(70);
                for t in [1, 2, 3, 4, 5, 7, 15, 16, 17] {
                    assert!(products(t) == many[..t * o], "{t} rows of {i} times {o}");
                }
            }
        }
    }

    fn expect_close(out: &[f32], columns: usize, want: impl Fn(usize, usize) -> f64, length: usize) {
        for (n, &got) in out.iter().enumerate() {
            let want = want(n / columns, n % columns);
            let bound = 1e-5 * (length as f64).sqrt();
            assert!((f64::from(got) - want).abs() < bound, "element {n}, sum of {length}: {got} instead of {want}");
        }
    }
}
