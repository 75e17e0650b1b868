//! A few rows times the transposed rows of a weight: `out[t, o] = x[t] · w[o]`, as text is
//! generated token by token.
//!
//! The time is that of reading the weight once. A row of it is read into f32 while it is in the
//! first-level cache, and multiplied with every row of x there.
//!
//! An element is one sum in one order ([`simd::dot`]), whatever the number of rows, the number of
//! threads and the way the weight is held. What a model answers to one row therefore does not
//! depend on the rows that are computed with it.

use rayon::prelude::*;

use super::buffer::uninitialized;
use super::matmul::Matrix;
use super::simd;
use super::weight::CpuWeight;

/// Most rows of x. With more, tiles of the product are faster than rows.
pub(crate) const FEW_ROWS: usize = 8;
/// Outputs that one job computes.
const OUTPUTS_PER_JOB: usize = 64;
/// Products of fewer multiplications than this are not worth handing to another thread.
const SMALL: usize = 1 << 17;

/// Where the rows of a weight are.
enum Rows<'w> {
    /// In f32, so many elements apart.
    Floats { values: &'w [f32], stride: usize },
    /// In fewer bits.
    Read(&'w CpuWeight),
}

impl Rows<'_> {
    /// Row `o`, in `buffer` if it has to be read into f32.
    fn row<'b>(&'b self, o: usize, buffer: &'b mut [f32]) -> &'b [f32] {
        match self {
            Rows::Floats { values, stride } => &values[o * stride..][..buffer.len()],
            Rows::Read(weight) => {
                weight.read(o, 0, buffer);
                buffer
            }
        }
    }
}

/// `out = keep · out + scale · x Wᵀ`: x [t, i] with t up to [`FEW_ROWS`], w [o, i], out [t, o].
///
/// # Panics
/// If the sizes do not fit.
pub(crate) fn times_transposed(out: &mut [f32], keep: bool, scale: f32, x: Matrix, w: &CpuWeight) {
    let [outputs, inputs] = w.shape();
    assert_eq!(x.columns(), inputs, "inner dimensions differ");
    let rows = match w.floats() {
        Some(values) => Rows::Floats { values, stride: inputs },
        None => Rows::Read(w),
    };
    each_output(out, keep, scale, x, outputs, &rows);
}

/// As [`times_transposed`], for a matrix [o, i] in f32 with rows that lie `stride` apart.
pub(super) fn times_transposed_f32(
    out: &mut [f32],
    keep: bool,
    scale: f32,
    x: Matrix,
    (values, outputs, stride): (&[f32], usize, usize),
) {
    each_output(out, keep, scale, x, outputs, &Rows::Floats { values, stride });
}

fn each_output(out: &mut [f32], keep: bool, scale: f32, x: Matrix, outputs: usize, w: &Rows<'_>) {
    let inputs = x.columns();
    let rows = x.rows();
    assert_eq!(out.len(), rows * outputs, "output of another size");
    if rows == 0 || outputs == 0 {
        return;
    }
    let finish = |out: &mut f32, sum: f32| *out = if keep { *out + scale * sum } else { scale * sum };
    let job = |first: usize, sums: &mut [f32]| {
        let mut buffer = uninitialized(inputs);
        for (n, sums) in sums.chunks_mut(rows).enumerate() {
            let weight = w.row(first + n, &mut buffer);
            for (t, sum) in sums.iter_mut().enumerate() {
                *sum = simd::dot(x.row(t), weight);
            }
        }
    };
    // By output, so that a job writes one piece of it.
    let mut sums = uninitialized(outputs * rows);
    if rows * outputs * inputs <= SMALL {
        job(0, &mut sums);
    } else {
        let jobs = sums.par_chunks_mut(OUTPUTS_PER_JOB * rows).enumerate();
        jobs.for_each(|(n, sums)| job(n * OUTPUTS_PER_JOB, sums));
    }
    for (t, out) in out.chunks_mut(outputs).enumerate() {
        for (out, sums) in out.iter_mut().zip(sums.chunks(rows)) {
            finish(out, sums[t]);
        }
    }
}
