//! Soft caps of scores and logits, and sinks of attention.

#[cfg(target_arch = "x86_64")]
use super::InstructionSet;
use super::{cross_entropy, exp};

/// tanh x within 2 units in the last place, for vector loops.
///
/// The method is that of tanhf in the Cephes library: a polynomial near 0, and e^2x elsewhere.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    let square = x * x;
    let p = (-5.704_988_7e-3f32).mul_add(square, 2.063_908_8e-2);
    let p = p.mul_add(square, -5.373_971_5e-2);
    let p = p.mul_add(square, 0.133_314_42);
    let p = p.mul_add(square, -0.333_332_8);
    let near = (p * square).mul_add(x, x);
    let size = x.abs();
    let far = (1.0 - 2.0 / (exp(2.0 * size) + 1.0)).copysign(x);
    if size < 0.625 { near } else { far }
}

vectorized! {
    /// cap · tanh(x · factor / cap), in place.
    fn soft_cap(x: &mut [f32], factor: f32, cap: f32) {
        let inner = factor / cap;
        for value in x.iter_mut() { *value = cap * tanh(*value * inner); }
    }
}

vectorized! {
    /// Multiplies gradients of capped values by the slope of the cap, 1 - (capped / cap)².
    fn soft_cap_backward(capped: &[f32], cap: f32, d: &mut [f32]) {
        let capped = &capped[..d.len()];
        for i in 0..d.len() {
            let part = capped[i] / cap;
            d[i] *= 1.0 - part * part;
        }
    }
}

/// Probabilities of keys once a sink takes part, in place; `log_sum` is that of the keys alone. Returns
/// that of both.
pub(crate) fn add_sink(probabilities: &mut [f32], log_sum: f32, sink: f32) -> f32 {
    let (low, high) = if sink > log_sum { (log_sum, sink) } else { (sink, log_sum) };
    let both = high + (low - high).exp().ln_1p();
    super::scale(probabilities, (log_sum - both).exp());
    both
}

/// As [`cross_entropy`], of logits that are capped first. They become the gradients of the logits before
/// the cap.
pub(crate) fn capped_cross_entropy(logits: &mut [f32], target: usize, cap: f32) -> f32 {
    soft_cap(logits, 1.0, cap);
    let mut slopes = vec![1.0; logits.len()];
    soft_cap_backward(logits, cap, &mut slopes);
    let loss = cross_entropy(logits, target);
    logits.iter_mut().zip(&slopes).for_each(|(logit, slope)| *logit *= slope);
    loss
}

#[cfg(test)]
mod tests {
    /// Compared with f64.
    #[test]
    fn tanh_is_within_a_few_units_in_the_last_place() {
        for n in -4_000..4_000 {
            let x = n as f32 * 0.005 + 0.001;
            let want = f64::from(x).tanh();
            let error = (f64::from(super::tanh(x)) - want).abs() / want.abs();
            assert!(error < 3e-7, "tanh({x}): relative error {error:e}");
        }
    }
}
