//! Matrix products: the single-threaded kernel of the `gemm` crate, split here over rayon's
//! threads.
//!
//! Work is split by rows and columns of the result, never along the summed dimension. Each element
//! is the same sum in the same order whatever the split: one thread and eight give the same bits.
//!
//! This rests on a property of the `gemm` crate. For products larger than 64 in either direction,
//! and only for those, its order of summation depends on the length of the sum alone. [`JOB`] keeps
//! every part above that size. A test checks it over many shapes and numbers of threads.
//!
//! Splitting here also scales better than the crate's own threading: 1.9 instead of 1.45 times on
//! two threads.

use rayon::prelude::*;

use super::few_rows::{self, FEW_ROWS};

/// A matrix in a borrowed slice: element (row, column) lies at
/// `row * row_stride + column * column_stride`.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix whose rows directly follow each other.
    ///
    /// # Panics
    /// If the matrix reaches beyond the slice.
    pub fn new(values: &'a [f32], rows: usize, columns: usize) -> Matrix<'a> {
        Matrix::strided(values, rows, columns, columns)
    }

    /// A row-major matrix with `row_stride` elements from one row to the next.
    ///
    /// # Panics
    /// If the matrix reaches beyond the slice.
    pub fn strided(values: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Matrix<'a> {
        if rows > 0 && columns > 0 {
            assert!((rows - 1) * row_stride + columns <= values.len(), "a matrix reaches beyond its slice");
        }
        Matrix { values, rows, columns, row_stride, column_stride: 1 }
    }

    /// The transposed matrix; nothing is moved.
    pub fn transposed(self) -> Matrix<'a> {
        Matrix {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Whether the elements of a row directly follow each other.
    pub(crate) fn has_whole_rows(&self) -> bool {
        self.column_stride == 1
    }

    /// A row whose elements directly follow each other.
    pub(crate) fn row(&self, row: usize) -> &'a [f32] {
        debug_assert!(self.has_whole_rows());
        &self.values[row * self.row_stride..][..self.columns]
    }

    fn row_range(self, start: usize, rows: usize) -> Matrix<'a> {
        Matrix { values: &self.values[start * self.row_stride..], rows, ..self }
    }

    pub(crate) fn column_range(self, start: usize, columns: usize) -> Matrix<'a> {
        Matrix { values: &self.values[start * self.column_stride..], columns, ..self }
    }
}

/// Fewest rows, and fewest columns, of a part of a product that is split.
///
/// Above 256, no part is small enough for the kernels that sum in another order. The other matrix
/// is packed again for each part, which costs a few percent at this size (13 % at 64 rows).
pub const JOB: usize = 272;
/// Products of fewer multiplications than this are not worth handing to another thread.
const SMALL: usize = 1 << 18;

/// `out = keep · out + scale · a b` on all threads, with `keep` as 0 or 1: a [m, k], b [k, n],
/// `out` row-major [m, n].
///
/// # Panics
/// If the sizes do not fit.
pub fn matmul(out: &mut [f32], keep: bool, scale: f32, a: Matrix, b: Matrix) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "inner dimensions differ");
    assert_eq!(out.len(), m * n, "output of another size");
    if m == 0 || n == 0 {
        return;
    }
    if m <= FEW_ROWS && a.has_whole_rows() && b.row_stride == 1 {
        return few_rows::times_transposed_f32(out, keep, scale, a, (b.values, n, b.column_stride));
    }
    if m * n * k <= SMALL {
        return single(out, n, keep, scale, a, b);
    }
    let threads = rayon::current_num_threads();
    let row_jobs = threads.min(m / JOB).max(1);
    let column_jobs = threads.div_ceil(row_jobs).min(n / JOB).max(1);
    if row_jobs * column_jobs == 1 {
        return single(out, n, keep, scale, a, b);
    }
    let start = |job: usize, jobs: usize, len: usize| job * len / jobs;
    let mut rest = out;
    let mut row_blocks = Vec::with_capacity(row_jobs);
    for job in 0..row_jobs {
        let rows = start(job, row_jobs, m)..start(job + 1, row_jobs, m);
        let (block, later) = rest.split_at_mut(rows.len() * n);
        row_blocks.push((rows, block));
        rest = later;
    }
    row_blocks.into_par_iter().for_each(|(rows, out)| {
        let a = a.row_range(rows.start, rows.len());
        if column_jobs == 1 {
            return single(out, n, keep, scale, a, b);
        }
        // Blocks of columns are not contiguous in `out`: each job works on its own copy.
        let columns = |job| start(job, column_jobs, n)..start(job + 1, column_jobs, n);
        let old: &[f32] = out;
        let blocks: Vec<Vec<f32>> = (0..column_jobs)
            .into_par_iter()
            .map(|job| {
                let columns = columns(job);
                let mut block = vec![0.0; rows.len() * columns.len()];
                if keep {
                    for (block, old) in block.chunks_mut(columns.len()).zip(old.chunks(n)) {
                        block.copy_from_slice(&old[columns.clone()]);
                    }
                }
                let b = b.column_range(columns.start, columns.len());
                single(&mut block, columns.len(), keep, scale, a, b);
                block
            })
            .collect();
        for (row, out) in out.chunks_mut(n).enumerate() {
            for (job, block) in blocks.iter().enumerate() {
                let columns = columns(job);
                out[columns.clone()].copy_from_slice(&block[row * columns.len()..][..columns.len()]);
            }
        }
    });
}

/// [`matmul`] on the calling thread alone, into rows that lie `out_stride` elements apart.
///
/// # Panics
/// If the sizes do not fit.
pub fn single(out: &mut [f32], out_stride: usize, keep: bool, scale: f32, a: Matrix, b: Matrix) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "inner dimensions differ");
    if m == 0 || n == 0 {
        return;
    }
    assert!(out_stride >= n && (m - 1) * out_stride + n <= out.len(), "output reaches beyond its slice");
    let fits = |x: &Matrix| {
        x.rows == 0
            || x.columns == 0
            || (x.rows - 1) * x.row_stride + (x.columns - 1) * x.column_stride < x.values.len()
    };
    assert!(fits(&a) && fits(&b), "a matrix reaches beyond its slice");
    #[expect(unsafe_code, reason = "the gemm crate takes pointers")]
    // SAFETY: the assertions above keep every element that the call reads or writes inside its
    // slice. `out` is borrowed mutably, so it overlaps neither `a` nor `b`.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            keep,
            a.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Floating-point operations per second that all threads reach on a product of a training step's
/// size. The call measures it: three products, of which the fastest counts.
pub fn rate() -> f64 {
    const SIZE: usize = 768;
    let (a, b) = (vec![0.5; SIZE * SIZE], vec![0.25; SIZE * SIZE]);
    let mut out = vec![0.0; SIZE * SIZE];
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let start = std::time::Instant::now();
        matmul(&mut out, false, 1.0, Matrix::new(&a, SIZE, SIZE), Matrix::new(&b, SIZE, SIZE));
        best = best.min(start.elapsed().as_secs_f64());
    }
    2.0 * (SIZE as f64).powi(3) / best
}

#[cfg(test)]
mod tests {
    use super::*;
    use finetune_random::Stream;

    fn naive(a: Matrix, b: Matrix) -> Vec<f64> {
        let mut out = vec![0.0; a.rows * b.columns];
        for i in 0..a.rows {
            for j in 0..b.columns {
                out[i * b.columns + j] = (0..a.columns)
                    .map(|k| {
                        f64::from(a.values[i * a.row_stride + k * a.column_stride])
                            * f64::from(b.values[k * b.row_stride + j * b.column_stride])
                    })
                    .sum();
            }
        }
        out
    }

    /// Every path (small batch, small product, split by rows, split by columns) in each layout,
    /// against f64.
    #[test]
    fn products_match_f64() {
        let shapes = [
            (1, 70, 33),
            (3, 1000, 300),
            (7, 9, 5),
            (600, 70, 40),
            (40, 2100, 33),
            (5, 0, 3),
            (64, 64, 64),
            (300, 8, 700),
        ];
        for (m, n, k) in shapes {
            for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
                let stream = Stream::new(m as u64, 1, n as u64, k as u32);
                let values = stream.normal(m * k + k * n, 1.0);
                let (a_values, b_values) = values.split_at(m * k);
                let a = if ta { Matrix::new(a_values, k, m).transposed() } else { Matrix::new(a_values, m, k) };
                let b = if tb { Matrix::new(b_values, n, k).transposed() } else { Matrix::new(b_values, k, n) };
                let want = naive(a, b);
                for keep in [false, true] {
                    let mut out = vec![1.0; m * n];
                    matmul(&mut out, keep, 0.5, a, b);
                    for (got, want) in out.iter().zip(&want) {
                        let want = 0.5 * want + if keep { 1.0 } else { 0.0 };
                        let bound = 1e-5 * (k as f64).sqrt();
                        assert!((f64::from(*got) - want).abs() < bound, "{m}x{n}x{k} {ta} {tb} {keep}: {got} {want}");
                    }
                }
            }
        }
    }

    /// Shapes of LoRA products (few outputs, long sums), of layers and of output layers, split by
    /// rows, by columns or both.
    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let pools: Vec<_> = [1, 2, 3, 8, 16]
            .map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool"))
            .into();
        let mut cases = 0;
        for m in [55, 64, 272, 544, 545, 700, 1024] {
            for n in [1, 2, 3, 8, 16, 64, 300, 560, 1000] {
                for k in [8, 513, 896, 1500] {
                    let values = Stream::new(m as u64, 1, n as u64, k as u32).uniform(m * k + k * n, 1.0);
                    let (a, b) = values.split_at(m * k);
                    for keep in [false, true] {
                        for transposed in [false, true] {
                            let run = |pool: &rayon::ThreadPool| {
                                let mut out = vec![0.5; m * n];
                                let b =
                                    if transposed { Matrix::new(b, n, k).transposed() } else { Matrix::new(b, k, n) };
                                pool.install(|| matmul(&mut out, keep, 0.7, Matrix::new(a, m, k), b));
                                out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
                            };
                            let one = run(&pools[0]);
                            for pool in &pools[1..] {
                                let threads = pool.current_num_threads();
                                assert!(
                                    run(pool) == one,
                                    "{m}x{n}x{k} keep {keep} transposed {transposed}: {threads} threads"
                                );
                                cases += 1;
                            }
                        }
                    }
                }
            }
        }
        assert_eq!(cases, 7 * 9 * 4 * 4 * 4);
    }
}
