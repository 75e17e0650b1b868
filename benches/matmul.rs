//! Matrix products of a training step, one thread: GFLOP/s of the `gemm` crate.
use std::time::Instant;
fn main() {
    for (m, k, n) in [
        (1024usize, 512usize, 512usize),
        (1024, 512, 1408),
        (1024, 1408, 512),
        (1024, 512, 8192),
        (1024, 512, 8),
        (1024, 8, 512),
        (8, 1024, 512),
    ] {
        let a = vec![0.5f32; m * k];
        let b = vec![0.25f32; k * n];
        let mut c = vec![0f32; m * n];
        for tb in [false, true] {
            let (brs, bcs) = if tb { (1isize, k as isize) } else { (n as isize, 1isize) };
            let mut best = f64::MAX;
            for _ in 0..10 {
                let t = Instant::now();
                unsafe {
                    gemm::gemm(
                        m,
                        n,
                        k,
                        c.as_mut_ptr(),
                        1,
                        n as isize,
                        false,
                        a.as_ptr(),
                        1,
                        k as isize,
                        b.as_ptr(),
                        bcs,
                        brs,
                        0.0,
                        1.0,
                        false,
                        false,
                        false,
                        gemm::Parallelism::None,
                    )
                };
                best = best.min(t.elapsed().as_secs_f64());
            }
            println!("{m}x{k}x{n} tb={tb}: {:.1} GFLOP/s", 2.0 * (m * n * k) as f64 / best / 1e9);
        }
    }
}
