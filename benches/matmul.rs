//! Matrix products of a training step: `cargo bench -p finetune-kernels --bench matmul`
//! (RAYON_NUM_THREADS sets the threads).
//!
//! Prints GFLOP/s, best of ten, for activations [m, k] times a weight in its file layout [n, k],
//! and times its transpose.

use std::time::Instant;

use finetune_kernels::matmul::{Matrix, matmul};

/// (m, k, n): attention, feed-forward in and out, output layer, LoRA in and out, a token of
/// generation.
const SHAPES: [(usize, usize, usize); 7] = [
    (1024, 512, 512),
    (1024, 512, 1408),
    (1024, 1408, 512),
    (1024, 512, 8192),
    (1024, 512, 8),
    (1024, 8, 512),
    (1, 1024, 4096),
];

fn main() {
    println!("{:>18}  {:>12}  {:>12}  GFLOP/s", "m x k x n", "x Wt", "x W");
    for (m, k, n) in SHAPES {
        let (x, w) = (vec![0.5; m * k], vec![0.25; k * n]);
        let mut out = vec![0.0; m * n];
        let mut rate = |w: Matrix| {
            let mut best = f64::INFINITY;
            for _ in 0..10 {
                let start = Instant::now();
                matmul(&mut out, false, 1.0, Matrix::new(&x, m, k), w);
                best = best.min(start.elapsed().as_secs_f64());
            }
            2.0 * (m * n * k) as f64 / best / 1e9
        };
        let (transposed, plain) = (rate(Matrix::new(&w, n, k).transposed()), rate(Matrix::new(&w, k, n)));
        println!("{:>18}  {transposed:>12.1}  {plain:>12.1}", format!("{m} x {k} x {n}"));
    }
}
