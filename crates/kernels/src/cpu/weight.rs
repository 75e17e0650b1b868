//! Products with a weight as the CPU holds it: in f32, in 16 bits as the model's file has it, or
//! packed in a few bits an element.
//!
//! A weight that is not f32 is read a block at a time into f32, which is exact, and multiplied like
//! any other matrix. Blocks divide the columns of the result, never the sums: the bits are those of
//! the same weight held in f32.
//!
//! A few rows are multiplied with one row of the weight after the other, while that row is in the
//! first-level cache ([`super::few_rows`]).

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_flex::FlexTensor;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::bf16_product;
use super::buffer::{floats, uninitialized};
use super::few_rows::{self, FEW_ROWS, Rows};
use super::matmul::{Matrix, matmul};
use super::simd;
use crate::weight::{Held, PackedWeight};

/// Bytes of a weight in f32 at a time. This is little memory, and few passes over the result.
const BLOCK_BYTES: usize = 16 << 20;
/// Fewest columns of a block for each thread: a product must still be large enough to be split, see
/// [`super::matmul`].
const COLUMNS_PER_THREAD: usize = 272;
/// Elements that one thread reads at a time.
const JOB: usize = 1 << 16;

/// A weight [o, i]. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) enum CpuWeight {
    Tensor(FlexTensor),
    Packed(PackedWeight),
}

impl From<FlexTensor> for CpuWeight {
    fn from(tensor: FlexTensor) -> CpuWeight {
        CpuWeight::Tensor(tensor)
    }
}

impl From<PackedWeight> for CpuWeight {
    fn from(packed: PackedWeight) -> CpuWeight {
        CpuWeight::Packed(packed.in_memory())
    }
}

impl CpuWeight {
    /// [o, i]
    pub(crate) fn shape(&self) -> [usize; 2] {
        match self {
            CpuWeight::Tensor(tensor) => tensor.shape().dims::<2>(),
            CpuWeight::Packed(packed) => packed.shape(),
        }
    }

    /// The elements, if they are held in f32.
    pub(super) fn floats(&self) -> Option<&[f32]> {
        match self {
            CpuWeight::Tensor(tensor) if tensor.dtype() == DType::F32 => Some(floats(tensor)),
            CpuWeight::Packed(packed) => match &*packed.held {
                Held::F32(values) => Some(values),
                _ => None,
            },
            CpuWeight::Tensor(_) => None,
        }
    }

    /// The rows, as they lie in memory.
    pub(super) fn rows(&self) -> Rows<'_> {
        let [_, columns] = self.shape();
        match self {
            CpuWeight::Tensor(tensor) => match tensor.dtype() {
                DType::F32 => Rows::Floats { values: floats(tensor), stride: columns },
                DType::BF16 => Rows::Bf16(tensor.storage::<bf16>()),
                _ => Rows::Read(self),
            },
            CpuWeight::Packed(packed) => match &*packed.held {
                Held::Host(matrix) => Rows::Packed(matrix),
                Held::Bf16(values) => Rows::Bf16(values),
                Held::F32(values) => Rows::Floats { values, stride: columns },
                _ => Rows::Read(self),
            },
        }
    }

    /// Some rows, if they lie in memory in bf16.
    pub(super) fn rows_in_bf16(&self, rows: std::ops::Range<usize>) -> Option<&[bf16]> {
        let [_, columns] = self.shape();
        match self.rows() {
            Rows::Bf16(values) => Some(&values[rows.start * columns..rows.end * columns]),
            _ => None,
        }
    }

    /// As [`finetune_packed::PackedMatrix::round_rows`]; `false` where it is not packed.
    pub(super) fn round_rows(&self, rows: std::ops::Range<usize>, stride: usize, out: &mut [bf16]) -> bool {
        match self.rows() {
            Rows::Packed(matrix) => matrix.round_rows(rows, stride, out),
            _ => false,
        }
    }

    /// As [`finetune_packed::PackedMatrix::arrange`]; nothing where it is not packed.
    pub(super) fn arrange(&self, x: &mut [bf16]) {
        if let Rows::Packed(matrix) = self.rows() {
            matrix.arrange(x);
        }
    }

    /// As [`finetune_packed::PackedMatrix::dot_rounded`]; `false` where it is not packed.
    pub(super) fn dot_rounded(&self, rows: std::ops::Range<usize>, x: &[bf16], out: &mut [f32]) -> bool {
        match self.rows() {
            Rows::Packed(matrix) => matrix.dot_rounded(rows, x, out),
            _ => false,
        }
    }

    /// Whether products are those of bf16.
    fn in_bf16(&self) -> bool {
        matches!(self, CpuWeight::Packed(packed) if packed.in_bf16)
    }

    /// Writes the columns of a row from `start` on into `out`, on this thread.
    pub(super) fn read(&self, row: usize, start: usize, out: &mut [f32]) {
        let [_, columns] = self.shape();
        let range = row * columns + start..row * columns + start + out.len();
        match self {
            CpuWeight::Tensor(tensor) => match tensor.dtype() {
                DType::F32 => out.copy_from_slice(&floats(tensor)[range]),
                DType::BF16 => simd::widen(&tensor.storage::<bf16>()[range], out),
                DType::F16 => tensor.storage::<f16>()[range].convert_to_f32_slice(out),
                other => unreachable!("no weight is held in {other:?}"),
            },
            CpuWeight::Packed(packed) => match &*packed.held {
                Held::Host(matrix) => matrix.decode_row(row, start..start + out.len(), out),
                Held::Bf16(values) => simd::widen(&values[range], out),
                Held::F16(values) => values[range].convert_to_f32_slice(out),
                Held::F32(values) => out.copy_from_slice(&values[range]),
                Held::OnShelf(..) => unreachable!("a weight is read before it is multiplied"),
                #[cfg(gpu_backend)]
                Held::Gpu(_) | Held::DenseOnGpu(_) => unreachable!("a weight on a GPU is multiplied there"),
            },
        }
    }

    /// Writes whole rows from `first` on into `out`, on all threads.
    pub(super) fn read_rows(&self, first: usize, out: &mut [f32]) {
        let [_, columns] = self.shape();
        self.read_blocks(columns, out, |row, out| self.read(first + row, 0, out));
    }

    /// Calls `read` with the number and the elements of each row of `width` elements of `out`, on
    /// all threads.
    fn read_blocks(&self, width: usize, out: &mut [f32], read: impl Fn(usize, &mut [f32]) + Sync) {
        if width == 0 {
            return;
        }
        let least = JOB.div_ceil(width);
        out.par_chunks_mut(width).enumerate().with_min_len(least).for_each(|(row, out)| read(row, out));
    }
}

/// `out = keep · out + scale · x Wᵀ`: x [t, i], w [o, i], out [t, o].
pub(crate) fn times_transposed(out: &mut [f32], keep: bool, scale: f32, x: Matrix, w: &CpuWeight) {
    let [outputs, inputs] = w.shape();
    if w.in_bf16() && x.has_whole_rows() {
        return bf16_product::times_transposed(out, keep, scale, x, w);
    }
    if x.rows() <= FEW_ROWS && x.has_whole_rows() {
        return few_rows::times_transposed(out, keep, scale, x, w);
    }
    if let Some(values) = w.floats() {
        return matmul(out, keep, scale, x, Matrix::new(values, outputs, inputs).transposed());
    }
    by_blocks(out, outputs, inputs, keep, |columns, block, out| {
        w.read_rows(columns.start, block);
        matmul(out, keep, scale, x, Matrix::new(block, columns.len(), inputs).transposed());
    });
}

/// `out = keep · out + scale · y W`: y [t, o], w [o, i], out [t, i].
pub(crate) fn times(out: &mut [f32], keep: bool, scale: f32, y: Matrix, w: &CpuWeight) {
    let [outputs, inputs] = w.shape();
    if w.in_bf16() && y.has_whole_rows() {
        return bf16_product::times(out, keep, scale, y, w, 0..outputs);
    }
    if let Some(values) = w.floats() {
        return matmul(out, keep, scale, y, Matrix::new(values, outputs, inputs));
    }
    by_blocks(out, inputs, outputs, keep, |columns, block, out| {
        let width = columns.len();
        w.read_blocks(width, block, |row, block| w.read(row, columns.start, block));
        matmul(out, keep, scale, y, Matrix::new(block, outputs, width));
    });
}

/// `out = y W` for a W of very many rows: y [t, v], w [v, i], out [t, i].
///
/// The sum goes over one block of rows after the other, whichever way W is held. No more than one
/// block is read at a time, and the bits do not depend on how it is held.
pub(crate) fn times_tall(out: &mut [f32], y: Matrix, w: &CpuWeight) {
    let [rows, inputs] = w.shape();
    let step = rows_of_tall(inputs);
    let mut read = Vec::new();
    for start in (0..rows).step_by(step) {
        let count = step.min(rows - start);
        if w.in_bf16() && y.has_whole_rows() {
            bf16_product::times(out, start > 0, 1.0, y.column_range(start, count), w, start..start + count);
            continue;
        }
        let block: &[f32] = match w.floats() {
            Some(values) => &values[start * inputs..(start + count) * inputs],
            None => {
                read.resize(count * inputs, 0.0);
                w.read_rows(start, &mut read);
                &read
            }
        };
        matmul(out, start > 0, 1.0, y.column_range(start, count), Matrix::new(block, count, inputs));
    }
}

/// Rows of so many inputs that [`times_tall`] reads at a time.
fn rows_of_tall(inputs: usize) -> usize {
    (2 * BLOCK_BYTES / 4 / inputs.max(1)).max(1024)
}

/// The number of blocks that the columns of a result are computed in, each a sum of so many products.
fn blocks(columns: usize, sum: usize, threads: usize) -> usize {
    let wanted = (BLOCK_BYTES / 4 / sum.max(1)).max(COLUMNS_PER_THREAD * threads).min(columns.max(1));
    // Blocks have about the same width: a narrow last one would be summed in another order.
    (columns / wanted).max(1)
}

/// Bytes of a weight [o, i] in f32 at a time, in products either way.
pub(crate) fn read_at_a_time([outputs, inputs]: [usize; 2], threads: usize) -> usize {
    let of = |columns: usize, sum: usize| 4 * sum * columns.div_ceil(blocks(columns, sum, threads));
    of(outputs, inputs).max(of(inputs, outputs))
}

/// Bytes of an output layer [v, i] in f32 at a time: where logits are made, and in [`times_tall`].
pub(crate) fn read_of_output([rows, inputs]: [usize; 2], threads: usize) -> usize {
    let of_logits = rows.div_ceil(blocks(rows, inputs, threads));
    4 * inputs * of_logits.max(rows_of_tall(inputs).min(rows))
}

/// Calls `multiply` with each range of the result's columns, a buffer of `sum` floats per column,
/// and the range's block of the result.
fn by_blocks(
    out: &mut [f32],
    columns: usize,
    sum: usize,
    keep: bool,
    mut multiply: impl FnMut(std::ops::Range<usize>, &mut [f32], &mut [f32]),
) {
    let blocks = blocks(columns, sum, rayon::current_num_threads());
    let start = |block: usize| block * columns / blocks;
    if blocks == 1 {
        return multiply(0..columns, &mut uninitialized(columns * sum), out);
    }
    let rows = out.len() / columns;
    let widest = columns.div_ceil(blocks);
    let (mut read, mut part) = (uninitialized(widest * sum), uninitialized(rows * widest));
    for block in 0..blocks {
        let range = start(block)..start(block + 1);
        let part = &mut part[..rows * range.len()];
        if keep {
            for (part, out) in part.chunks_mut(range.len()).zip(out.chunks(columns)) {
                part.copy_from_slice(&out[range.clone()]);
            }
        }
        multiply(range.clone(), &mut read[..range.len() * sum], part);
        for (part, out) in part.chunks(range.len()).zip(out.chunks_mut(columns)) {
            out[range.clone()].copy_from_slice(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the estimate counts is what products take, either way: the whole weight, or a block of it.
    #[test]
    fn the_largest_block_is_as_counted() {
        for shape in [[64, 96], [4096, 1200], [1200, 4096], [20_000, 4096]] {
            let most = |columns: usize, sum: usize| {
                let mut bytes = 0;
                by_blocks(&mut vec![0.0; columns], columns, sum, false, |_, block, part| {
                    part.fill(0.0);
                    bytes = bytes.max(4 * block.len());
                });
                bytes
            };
            let [outputs, inputs] = shape;
            let taken = most(outputs, inputs).max(most(inputs, outputs));
            assert_eq!(taken, read_at_a_time(shape, rayon::current_num_threads()), "{shape:?}");
        }
    }
}
