//! A few rows times the transposed rows of a weight: `out[t, o] = x[t] · w[o]`, as text is
//! generated token by token.
//!
//! The time is that of reading the weight once. One row of x is multiplied with numbers and codes
//! as they come from memory. For several rows of x, a row of the weight is read into f32 while it is
//! in the first-level cache, and multiplied with all of them there.
//!
//! An element is one sum in one order ([`finetune_packed::dot`]), whatever the number of rows, the
//! number of threads and the way the weight is held. What a model answers to one row therefore does
//! not depend on the rows that are computed with it.

use std::ops::Range;

use finetune_packed::dot::{Ahead, ROWS};
use finetune_packed::{InstructionSet, PackedMatrix};
use half::bf16;
use rayon::prelude::*;

use super::buffer::uninitialized;
use super::matmul::Matrix;
use super::weight::CpuWeight;

/// Most rows that the CPU multiplies with one row of a weight after the other. With more, tiles of the product are faster,
/// whose sums have another order.
pub const FEW_ROWS: usize = 16;
/// Products of fewer multiplications than this are not worth handing to another thread.
const SMALL: usize = 1 << 17;
/// More jobs than threads, so that one that starts late has less to do.
const JOBS_PER_THREAD: usize = 4;
/// Fewest outputs of a job: with many threads, smaller ones cost more to hand out than to compute.
const OUTPUTS_PER_JOB: usize = 64;

/// The rows of a weight as they lie in memory.
pub(super) enum Rows<'w> {
    /// In f32, so many elements apart.
    Floats {
        values: &'w [f32],
        stride: usize,
    },
    /// In bf16, one behind the other.
    Bf16(&'w [bf16]),
    Packed(&'w PackedMatrix),
    /// Any other way.
    Read(&'w CpuWeight),
}

impl Rows<'_> {
    /// `out[n] = x · w[first + n]`, for activations that are split.
    fn times_one(&self, set: InstructionSet, first: usize, x: &[f32], out: &mut [f32]) {
        let width = x.len();
        let rows = first..first + out.len();
        match self {
            Rows::Floats { values, stride } => {
                each(rows, out, |row| set.dot_f32(x, &values[row * stride..][..width]));
            }
            Rows::Bf16(values) => each(rows, out, |row| set.dot_bf16(x, &values[row * width..][..width])),
            Rows::Packed(matrix) => matrix.dot_rows(set, rows, x, out),
            Rows::Read(weight) => {
                let mut buffer = uninitialized(width);
                each(rows, out, |row| {
                    weight.read(row, 0, &mut buffer);
                    set.dot_f32(x, &buffer)
                });
            }
        }
    }

    /// `out[n, t] = x[t] · w[first + n]`, for activations [t, inputs] that are split. A product has the
    /// same bits whatever t is.
    pub(super) fn products(&self, set: InstructionSet, first: usize, x: &[f32], inputs: usize, out: &mut [f32]) {
        let rows = x.len() / inputs.max(1);
        if rows <= 1 {
            return self.times_one(set, first, x, out);
        }
        let mut some = uninitialized(ROWS * inputs);
        if let Rows::Packed(matrix) = self {
            let outputs = out.len() / rows;
            return matrix.split_rows(set, first..first + outputs, &mut some, &mut |n, some, ahead| {
                set.dot_each(x, some, inputs, ahead, &mut out[n * rows..][..some.len() / inputs * rows]);
            });
        }
        let mut buffer = uninitialized(inputs);
        for (n, out) in out.chunks_mut(ROWS * rows).enumerate() {
            let some = &mut some[..out.len() / rows * inputs];
            for (row, some) in some.chunks_mut(inputs.max(1)).enumerate() {
                self.read(set, first + n * ROWS + row, &mut buffer, some);
            }
            set.dot_each(x, some, inputs, self.behind(first + n * ROWS, some.len() / inputs, inputs), out);
        }
    }

    /// What will be read after so many rows, if it is known where that is.
    fn behind(&self, row: usize, rows: usize, width: usize) -> Ahead {
        match self {
            Rows::Floats { values, stride } => Ahead::of(&values[row * stride..][..(rows - 1) * stride + width]),
            Rows::Bf16(values) => Ahead::of(&values[row * width..][..rows * width]),
            Rows::Packed(_) | Rows::Read(_) => Ahead::NONE,
        }
    }

    /// Writes a row into `out`, split. `buffer` is as long as it.
    fn read(&self, set: InstructionSet, row: usize, buffer: &mut [f32], out: &mut [f32]) {
        let width = out.len();
        match self {
            Rows::Floats { values, stride } => return set.split(&values[row * stride..][..width], out),
            Rows::Bf16(values) => return set.split_bf16(&values[row * width..][..width], out),
            Rows::Packed(matrix) => return matrix.split_rows(set, row..row + 1, out, &mut |_, _, _| {}),
            Rows::Read(weight) => weight.read(row, 0, buffer),
        }
        set.split(buffer, out);
    }
}

fn each(rows: Range<usize>, out: &mut [f32], mut product: impl FnMut(usize) -> f32) {
    for (row, out) in rows.zip(out) {
        *out = product(row);
    }
}

/// `out = keep · out + scale · x Wᵀ`: x [t, i] with t up to [`FEW_ROWS`], w [o, i], out [t, o].
///
/// # Panics
/// If the sizes do not fit.
pub(crate) fn times_transposed(out: &mut [f32], keep: bool, scale: f32, x: Matrix, w: &CpuWeight) {
    let [outputs, inputs] = w.shape();
    assert_eq!(x.columns(), inputs, "inner dimensions differ");
    each_output(out, keep, scale, x, outputs, &w.rows());
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
    let (inputs, rows) = (x.columns(), x.rows());
    let set = InstructionSet::best();
    let mut split = uninitialized(rows * inputs);
    for (t, split) in split.chunks_mut(inputs.max(1)).enumerate() {
        set.split(x.row(t), split);
    }
    let job = |first: usize, products: &mut [f32]| w.products(set, first, &split, inputs, products);
    by_jobs(out, keep, scale, [rows, outputs, inputs], job);
}

/// `out = keep · out + scale · products`: `job` writes those of some outputs, from the given one on, with all
/// rows: [output, row].
pub(super) fn by_jobs(
    out: &mut [f32],
    keep: bool,
    scale: f32,
    [rows, outputs, inputs]: [usize; 3],
    job: impl Fn(usize, &mut [f32]) + Sync,
) {
    assert_eq!(out.len(), rows * outputs, "output of another size");
    if rows == 0 || outputs == 0 {
        return;
    }
    let all = |products: &mut [f32]| {
        if rows * outputs * inputs <= SMALL {
            return job(0, products);
        }
        let threads = rayon::current_num_threads();
        let outputs_per_job = outputs.div_ceil(JOBS_PER_THREAD * threads).max(OUTPUTS_PER_JOB);
        let jobs = products.par_chunks_mut(outputs_per_job * rows).enumerate();
        jobs.for_each(|(n, products)| job(n * outputs_per_job, products));
    };
    if rows == 1 && !keep && scale == 1.0 {
        return all(out);
    }
    let mut products = uninitialized(outputs * rows);
    all(&mut products);
    let finish = |out: &mut f32, sum: f32| *out = if keep { *out + scale * sum } else { scale * sum };
    for (t, out) in out.chunks_mut(outputs).enumerate() {
        for (out, products) in out.iter_mut().zip(products.chunks(rows)) {
            finish(out, products[t]);
        }
    }
}
