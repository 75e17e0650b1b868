//! The norm of gradients, and clipping by it.
//!
//! Each parameter has a sum of squares of its own, and these are added in the order of the layout. So the norm has
//! the same bits wherever parameters are, and for any number of threads.

use std::ops::Range;

use finetune_model::Layout;
use rayon::prelude::*;

/// Elements of a parameter that one task of the thread pool takes. Each task has a sum of its own, and these are
/// added in order.
const JOB: usize = 1 << 16;

/// Σ g² of each parameter, in f64, in the order of the layout.
pub(crate) fn squares(layout: &Layout, gradients: &[f32]) -> Vec<f64> {
    let sum = |gradients: &[f32]| gradients.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
    let ranges: Vec<_> = layout.iter().map(|parameter| parameter.range.clone()).collect();
    let of_parameter = |range: Range<usize>| -> f64 {
        let jobs: Vec<f64> = gradients[range].par_chunks(JOB).map(sum).collect();
        jobs.iter().sum()
    };
    ranges.into_par_iter().map(of_parameter).collect()
}

/// The norm sqrt(Σ g²) of all parameters, from the sums of each.
pub(crate) fn norm(squares: &[f64]) -> f64 {
    squares.iter().sum::<f64>().sqrt()
}

/// Scales gradients so that their norm is at most `limit`, as `torch.nn.utils.clip_grad_norm_`
/// does, with its 1e-6. A limit of 0 leaves them as they are.
pub(crate) fn clip(gradients: &mut [f32], norm: f64, limit: f64) {
    let factor = limit / (norm + 1e-6);
    if limit > 0.0 && factor < 1.0 {
        let factor = factor as f32;
        for gradient in gradients {
            *gradient *= factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gradients of very different size, so that another order of adding shows.
    fn gradients(layout: &Layout) -> Vec<f32> {
        let value = |n: usize| ((n * 2_654_435_761) % 1_000_003) as f32 * if n.is_multiple_of(3) { 1e-6 } else { 1.0 };
        (0..layout.len()).map(value).collect()
    }

    fn layout(sizes: &[usize]) -> Layout {
        let mut layout = Layout::default();
        sizes.iter().enumerate().for_each(|(n, &size)| layout.push(n.to_string(), vec![size]));
        layout
    }

    /// A parameter has the same sum of squares whatever lies before and behind it, and whatever the number of threads.
    #[test]
    fn sums_of_squares_do_not_depend_on_where_parameters_are() {
        let sizes = [5, 3 * JOB + 7, 1, 1000, JOB];
        let whole = layout(&sizes);
        let gradients = gradients(&whole);
        let all = squares(&whole, &gradients);
        for (parameter, sum) in whole.iter().zip(&all) {
            let alone = squares(&layout(&[parameter.range.len()]), &gradients[parameter.range.clone()]);
            assert_eq!(alone, [*sum], "parameter {}", parameter.name);
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
        assert_eq!(pool.install(|| squares(&whole, &gradients)), all);
        let plain = gradients.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt();
        assert!((norm(&all) / plain - 1.0).abs() < 1e-12, "{} {plain}", norm(&all));
    }

    #[test]
    fn clipping_is_that_of_torch() {
        // torch 2.9: `clip_grad_norm_([3, 4], 1)` leaves [0.6, 0.8] but for the 1e-6.
        let mut clipped = [3.0, 4.0];
        clip(&mut clipped, 5.0, 1.0);
        assert!((clipped[0] - 0.6).abs() < 1e-6 && (clipped[1] - 0.8).abs() < 1e-6, "{clipped:?}");
        for limit in [5.1, 0.0] {
            let mut kept = [3.0, 4.0];
            clip(&mut kept, 5.0, limit);
            assert_eq!(kept, [3.0, 4.0], "limit {limit}");
        }
    }
}
