//! Products with a weight that the CPU holds in 16 bits, as the model's file does. It takes half
//! the memory of f32.
//!
//! A block of the weight at a time is widened to f32, which is exact, and multiplied like any other
//! matrix. Blocks divide the columns of the result, never the sums: the bits are those of the same
//! weight held in f32.

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_flex::FlexTensor;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::buffer::{floats, uninitialized};
use super::matmul::{Matrix, matmul};

/// Bytes of widened weight at a time. This is little memory, and few passes over the result.
pub(crate) const BLOCK_BYTES: usize = 16 << 20;
/// Fewest columns of a block for each thread: a product must still be large enough to be split, see
/// [`super::matmul`].
const COLUMNS_PER_THREAD: usize = 272;

/// `out = keep · out + scale · x Wᵀ`: x [t, i], w [o, i], out [t, o].
pub(crate) fn times_transposed(out: &mut [f32], keep: bool, scale: f32, x: Matrix, w: &FlexTensor) {
    let [outputs, inputs] = w.shape().dims::<2>();
    if w.dtype() == DType::F32 {
        return matmul(out, keep, scale, x, Matrix::new(floats(w), outputs, inputs).transposed());
    }
    by_blocks(out, outputs, inputs, keep, |columns, block, out| {
        widen_rows(w, columns.start * inputs, block);
        matmul(out, keep, scale, x, Matrix::new(block, columns.len(), inputs).transposed());
    });
}

/// `out = keep · out + scale · y W`: y [t, o], w [o, i], out [t, i].
pub(crate) fn times(out: &mut [f32], keep: bool, scale: f32, y: Matrix, w: &FlexTensor) {
    let [outputs, inputs] = w.shape().dims::<2>();
    if w.dtype() == DType::F32 {
        return matmul(out, keep, scale, y, Matrix::new(floats(w), outputs, inputs));
    }
    by_blocks(out, inputs, outputs, keep, |columns, block, out| {
        let width = columns.len();
        block.par_chunks_mut(width).enumerate().with_min_len(16).for_each(|(row, block)| {
            widen(w, row * inputs + columns.start, block);
        });
        matmul(out, keep, scale, y, Matrix::new(block, outputs, width));
    });
}

/// `out = y W` for a W of very many rows: y [t, v], w [v, i], out [t, i].
///
/// The sum goes over one block of rows after the other, whichever type W is held in. No more than
/// one block is widened at a time, and the bits do not depend on the type.
pub(crate) fn times_tall(out: &mut [f32], y: Matrix, w: &FlexTensor) {
    let [rows, inputs] = w.shape().dims::<2>();
    let step = (2 * BLOCK_BYTES / 4 / inputs.max(1)).max(1024);
    let mut widened = Vec::new();
    for start in (0..rows).step_by(step) {
        let count = step.min(rows - start);
        let block: &[f32] = if w.dtype() == DType::F32 {
            &floats(w)[start * inputs..(start + count) * inputs]
        } else {
            widened.resize(count * inputs, 0.0);
            widen_rows(w, start * inputs, &mut widened);
            &widened
        };
        matmul(out, start > 0, 1.0, y.column_range(start, count), Matrix::new(block, count, inputs));
    }
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
    let least = COLUMNS_PER_THREAD * rayon::current_num_threads();
    let wanted = (BLOCK_BYTES / 4 / sum.max(1)).max(least).min(columns.max(1));
    // Blocks have about the same width: a narrow last one would be summed in another order.
    let blocks = (columns / wanted).max(1);
    let start = |block: usize| block * columns / blocks;
    if blocks == 1 {
        return multiply(0..columns, &mut uninitialized(columns * sum), out);
    }
    let rows = out.len() / columns;
    let widest = columns.div_ceil(blocks);
    let (mut widened, mut part) = (uninitialized(widest * sum), uninitialized(rows * widest));
    for block in 0..blocks {
        let range = start(block)..start(block + 1);
        let part = &mut part[..rows * range.len()];
        if keep {
            for (part, out) in part.chunks_mut(range.len()).zip(out.chunks(columns)) {
                part.copy_from_slice(&out[range.clone()]);
            }
        }
        multiply(range.clone(), &mut widened[..range.len() * sum], part);
        for (part, out) in part.chunks(range.len()).zip(out.chunks_mut(columns)) {
            out[range.clone()].copy_from_slice(part);
        }
    }
}

/// Copies the elements of a weight of any type from `start` on into f32, on all threads.
pub(crate) fn copy_rows(w: &FlexTensor, start: usize, out: &mut [f32]) {
    if w.dtype() == DType::F32 {
        return out.copy_from_slice(&floats(w)[start..start + out.len()]);
    }
    widen_rows(w, start, out);
}

/// Widens the elements of a 16-bit tensor from `start` on, on all threads.
fn widen_rows(w: &FlexTensor, start: usize, out: &mut [f32]) {
    const JOB: usize = 1 << 16;
    out.par_chunks_mut(JOB).enumerate().for_each(|(job, out)| widen(w, start + job * JOB, out));
}

/// Widens the elements of a 16-bit tensor from `start` on, on this thread.
fn widen(w: &FlexTensor, start: usize, out: &mut [f32]) {
    match w.dtype() {
        DType::BF16 => {
            // The compiler turns this shift into vector instructions. The `half` crate's own
            // conversion quiets NaNs one by one.
            for (out, value) in out.iter_mut().zip(&w.storage::<bf16>()[start..]) {
                *out = f32::from_bits(u32::from(value.to_bits()) << 16);
            }
        }
        DType::F16 => {
            let end = start + out.len();
            w.storage::<f16>()[start..end].convert_to_f32_slice(out);
        }
        other => unreachable!("no weight is held in {other:?}"),
    }
}
