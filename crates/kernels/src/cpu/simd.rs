//! Functions over rows of `f32`, compiled for AVX-512, and for AVX2 with FMA, on processors that
//! have them.
//!
//! They are plain loops that the compiler vectorizes. Sums run over sixteen lanes in a fixed order,
//! so their bits do not depend on the vector width. `mul_add` is a fused multiply-add everywhere.

#![expect(clippy::needless_range_loop, reason = "indices over slices of one length are the form that becomes vectors")]

#[cfg(target_arch = "x86_64")]
use finetune_packed::InstructionSet;

/// Defines a function that is also compiled for AVX-512, and for AVX2 with FMA. A call takes the
/// widest version that the processor has.
macro_rules! vectorized {
    ($(#[$meta:meta])* fn $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)? $body:block) => {
        $(#[$meta])*
        pub(crate) fn $name($($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body($($argument: $type),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                fn widest($($argument: $type),*) $(-> $result)? { body($($argument),*) }
                #[target_feature(enable = "avx2,fma")]
                fn wide($($argument: $type),*) $(-> $result)? { body($($argument),*) }
                #[expect(unsafe_code, reason = "functions for newer processors")]
                match InstructionSet::best() {
                    // SAFETY: the features that `widest` is compiled for were detected on this
                    // processor.
                    InstructionSet::Avx512 => return unsafe { widest($($argument),*) },
                    // SAFETY: as above, for `wide`.
                    InstructionSet::Avx2 => return unsafe { wide($($argument),*) },
                    _ => {}
                }
            }
            body($($argument),*)
        }
    };
}

mod cap;
mod recurrent;

pub(crate) use cap::{add_sink, capped_cross_entropy, soft_cap, soft_cap_backward};
pub(crate) use recurrent::{DeltaSeen, DeltaSums, add_products, delta_step, delta_step_backward, silu, silu_backward};

/// Partial sums of a row.
const LANES: usize = 16;

/// e^x within 2 units in the last place, for vector loops. Inputs are clamped to [-87, 88].
///
/// The method is that of expf in the Cephes library: x = k ln 2 + r, a polynomial of degree 6 for
/// e^r, and k added to the exponent bits.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    // Adding and subtracting 1.5 × 2^23 rounds to the nearest integer.
    let k = (x * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0;
    // ln 2 is subtracted in two parts, which keeps r exact to the last bit.
    let r = k.mul_add(-0.693_359_4, x);
    let r = k.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 0.166_666_66);
    let p = p.mul_add(r, 0.5);
    let y = p.mul_add(r * r, r) + 1.0;
    y * f32::from_bits((((k as i32) + 127) << 23) as u32)
}

#[inline(always)]
fn sum_lanes(x: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += chunk[i];
        }
    }
    lanes.iter().sum::<f32>() + rest
}

#[inline(always)]
fn dot_lanes(x: &[f32], y: &[f32]) -> f32 {
    let whole = x.len() / LANES * LANES;
    // With two sets of lanes, a fused multiply-add does not wait for the one before.
    let mut lanes = [[0f32; LANES]; 2];
    for (n, (a, b)) in x[..whole].chunks_exact(LANES).zip(y[..whole].chunks_exact(LANES)).enumerate() {
        let lanes = &mut lanes[n % 2];
        for i in 0..LANES {
            lanes[i] = a[i].mul_add(b[i], lanes[i]);
        }
    }
    let mut sum = 0.0;
    for i in 0..LANES {
        sum += lanes[0][i] + lanes[1][i];
    }
    for i in whole..x.len() {
        sum = x[i].mul_add(y[i], sum);
    }
    sum
}

#[inline(always)]
fn max_lanes(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let mut max = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    for lane in lanes {
        max = max.max(lane);
    }
    max
}

vectorized! {
    /// x · y
    fn dot(x: &[f32], y: &[f32]) -> f32 { dot_lanes(x, &y[..x.len()]) }
}

vectorized! {
    /// The numbers in f32, which is exact.
    fn widen(x: &[half::bf16], out: &mut [f32]) {
        let x = &x[..out.len()];
        // The `half` crate's own conversion quiets NaNs one by one.
        for i in 0..out.len() { out[i] = f32::from_bits(u32::from(x[i].to_bits()) << 16); }
    }
}

vectorized! {
    /// The numbers in bf16, rounded to the nearest, ties to even.
    fn narrow(x: &[f32], out: &mut [half::bf16]) {
        let x = &x[..out.len()];
        for i in 0..out.len() {
            let bits = x[i].to_bits();
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            // A NaN stays one.
            let bits = if x[i].is_nan() { bits >> 16 | 0x40 } else { rounded };
            out[i] = half::bf16::from_bits(bits as u16);
        }
    }
}

vectorized! {
    /// y += scale · x
    fn add_scaled(y: &mut [f32], scale: f32, x: &[f32]) {
        let x = &x[..y.len()];
        for i in 0..y.len() { y[i] = scale.mul_add(x[i], y[i]); }
    }
}

vectorized! {
    /// y *= scale
    fn scale(y: &mut [f32], factor: f32) { for value in y.iter_mut() { *value *= factor; } }
}

vectorized! {
    /// out = silu(gate) · up
    fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
        let (gate, up) = (&gate[..out.len()], &up[..out.len()]);
        for i in 0..out.len() { out[i] = gate[i] / (1.0 + exp(-gate[i])) * up[i]; }
    }
}

vectorized! {
    /// Gradients of [`swiglu`] for its two inputs.
    fn swiglu_backward(gate: &[f32], up: &[f32], d_out: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
        let n = d_out.len();
        let (gate, up, d_gate, d_up) = (&gate[..n], &up[..n], &mut d_gate[..n], &mut d_up[..n]);
        for i in 0..n {
            let sigmoid = 1.0 / (1.0 + exp(-gate[i]));
            let silu = gate[i] * sigmoid;
            d_up[i] = d_out[i] * silu;
            d_gate[i] = d_out[i] * up[i] * (sigmoid + silu * (1.0 - sigmoid));
        }
    }
}

/// σ(2 √(2/π) (x + 0.044715 x³)), which is `(1 + tanh(√(2/π) …)) / 2`, and the derivative of what σ is
/// taken of.
#[inline(always)]
fn gelu_gate(x: f32) -> (f32, f32) {
    const FACTOR: f32 = 1.595_769;
    const CUBE: f32 = 0.044_715;
    let square = x * x;
    let inner = FACTOR * x * (CUBE * square + 1.0);
    (1.0 / (1.0 + exp(-inner)), FACTOR * (3.0 * CUBE * square + 1.0))
}

/// The clamped unit of gpt-oss: its slope inside of σ, and the limit of gate and up.
const SLOPE: f32 = 1.702;
const LIMIT: f32 = 7.0;

vectorized! {
    /// out = g σ(1.702 g) · (u + 1), with g at most 7 and u between -7 and 7
    fn clamped(gate: &[f32], up: &[f32], out: &mut [f32]) {
        let (gate, up) = (&gate[..out.len()], &up[..out.len()]);
        for i in 0..out.len() {
            let (g, u) = (gate[i].min(LIMIT), up[i].clamp(-LIMIT, LIMIT));
            out[i] = g / (1.0 + exp(-SLOPE * g)) * (u + 1.0);
        }
    }
}

vectorized! {
    /// Gradients of [`clamped`] for its two inputs.
    fn clamped_backward(gate: &[f32], up: &[f32], d_out: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
        let n = d_out.len();
        let (gate, up, d_gate, d_up) = (&gate[..n], &up[..n], &mut d_gate[..n], &mut d_up[..n]);
        for i in 0..n {
            let (g, u) = (gate[i].min(LIMIT), up[i].clamp(-LIMIT, LIMIT));
            let sigmoid = 1.0 / (1.0 + exp(-SLOPE * g));
            let activated = g * sigmoid;
            let slope = sigmoid + activated * (1.0 - sigmoid) * SLOPE;
            d_up[i] = if up[i] == u { d_out[i] * activated } else { 0.0 };
            d_gate[i] = if gate[i] == g { d_out[i] * (u + 1.0) * slope } else { 0.0 };
        }
    }
}

vectorized! {
    /// out = gelu(gate) · up, with GELU's approximation by tanh
    fn geglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
        let (gate, up) = (&gate[..out.len()], &up[..out.len()]);
        for i in 0..out.len() { out[i] = gate[i] * gelu_gate(gate[i]).0 * up[i]; }
    }
}

vectorized! {
    /// Gradients of [`geglu`] for its two inputs.
    fn geglu_backward(gate: &[f32], up: &[f32], d_out: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
        let n = d_out.len();
        let (gate, up, d_gate, d_up) = (&gate[..n], &up[..n], &mut d_gate[..n], &mut d_up[..n]);
        for i in 0..n {
            let (sigmoid, slope) = gelu_gate(gate[i]);
            let gelu = gate[i] * sigmoid;
            d_up[i] = d_out[i] * gelu;
            d_gate[i] = d_out[i] * up[i] * (sigmoid + gelu * (1.0 - sigmoid) * slope);
        }
    }
}

vectorized! {
    /// out = gamma · x / sqrt(mean(x²) + eps); returns the factor 1 / sqrt(…).
    fn rms_norm(x: &[f32], gamma: &[f32], eps: f32, out: &mut [f32]) -> f32 {
        let n = x.len();
        let (gamma, out) = (&gamma[..n], &mut out[..n]);
        let factor = 1.0 / (dot_lanes(x, x) / n as f32 + eps).sqrt();
        for i in 0..n { out[i] = gamma[i] * (x[i] * factor); }
        factor
    }
}

vectorized! {
    /// d_x of [`rms_norm`]: with g = d_out · gamma and f the factor, f g - x f³ mean(g x).
    fn rms_norm_backward(x: &[f32], gamma: &[f32], factor: f32, d_out: &[f32], d_x: &mut [f32]) {
        let n = x.len();
        let (gamma, d_out, d_x) = (&gamma[..n], &d_out[..n], &mut d_x[..n]);
        for i in 0..n { d_x[i] = d_out[i] * gamma[i]; }
        let c = dot_lanes(d_x, x) * factor * factor * factor / n as f32;
        for i in 0..n { d_x[i] = d_x[i] * factor - x[i] * c; }
    }
}

vectorized! {
    /// d_gamma += d_out · x · factor
    fn rms_norm_gamma(x: &[f32], factor: f32, d_out: &[f32], d_gamma: &mut [f32]) {
        let n = x.len();
        let (d_out, d_gamma) = (&d_out[..n], &mut d_gamma[..n]);
        for i in 0..n { d_gamma[i] += d_out[i] * (x[i] * factor); }
    }
}

/// Keys of a block of [`key_scores`]: four vectors of sums, so that a multiply-add need not wait for
/// the one before.
const KEYS: usize = 32;
/// Elements of a key that a block of [`key_scores`] holds at a time: 8 KiB in all.
const DEPTH: usize = 64;

vectorized! {
    /// The scores q · k of a few queries with each key: q [n, d]; k [m, d] with `stride` elements
    /// from one key to the next; out [n, m].
    ///
    /// Each is a sum over d in its order. A block of keys is transposed first, so that sums of
    /// neighbouring keys are neighbours.
    fn key_scores(q: &[f32], k: &[f32], stride: usize, width: usize, out: &mut [f32]) {
        let queries = q.len() / width;
        let keys = out.len() / queries;
        let mut block = [[0f32; KEYS]; DEPTH];
        for first in (0..keys).step_by(KEYS) {
            let count = KEYS.min(keys - first);
            for start in (0..width).step_by(DEPTH) {
                let depth = DEPTH.min(width - start);
                let key = |n: usize| &k[(first + n) * stride + start..][..depth];
                // Four keys at a time become vector instructions.
                for n in (0..count / 4 * 4).step_by(4) {
                    let (a, b, c, d) = (key(n), key(n + 1), key(n + 2), key(n + 3));
                    for i in 0..depth { block[i][n..n + 4].copy_from_slice(&[a[i], b[i], c[i], d[i]]); }
                }
                for n in count / 4 * 4..count {
                    let key = key(n);
                    for i in 0..depth { block[i][n] = key[i]; }
                }
                for query in 0..queries {
                    let q = &q[query * width + start..][..depth];
                    let out = &mut out[query * keys + first..][..count];
                    let mut sums = [0f32; KEYS];
                    if start > 0 { sums[..count].copy_from_slice(out); }
                    for i in 0..depth {
                        for n in 0..KEYS { sums[n] = q[i].mul_add(block[i][n], sums[n]); }
                    }
                    out.copy_from_slice(&sums[..count]);
                }
            }
        }
    }
}

/// Rows of a block of [`weighted_sums`]: 32 of their columns, 8 KiB, are read from the first-level cache by
/// all but the first sum.
const ROWS: usize = 64;

vectorized! {
    /// Weighted sums of the same rows: weights [n, m]; v [m, d] with `stride` elements from one row
    /// to the next; out [n, d]. Each is a sum over m in its order.
    fn weighted_sums(weights: &[f32], v: &[f32], stride: usize, width: usize, out: &mut [f32]) {
        const COLUMNS: usize = 32;
        let rows = weights.len() / (out.len() / width);
        for first in (0..rows).step_by(ROWS) {
            let last = rows.min(first + ROWS);
            for start in (0..width).step_by(COLUMNS) {
                for (weights, out) in weights.chunks_exact(rows).zip(out.chunks_exact_mut(width)) {
                    let out = &mut out[start..width.min(start + COLUMNS)];
                    let columns = out.len();
                    let mut sums = [0f32; COLUMNS];
                    if first > 0 { sums[..columns].copy_from_slice(out); }
                    for row in first..last {
                        let (weight, v) = (weights[row], &v[row * stride + start..][..columns]);
                        if columns == COLUMNS {
                            for i in 0..COLUMNS { sums[i] = weight.mul_add(v[i], sums[i]); }
                        } else {
                            for i in 0..columns { sums[i] = weight.mul_add(v[i], sums[i]); }
                        }
                    }
                    out.copy_from_slice(&sums[..columns]);
                }
            }
        }
    }
}

vectorized! {
    /// Turns scores into probabilities softmax(score · factor), in place. Returns
    /// ln Σ e^(score · factor), which is all that the backward pass needs to compute them again.
    fn softmax(scores: &mut [f32], factor: f32) -> f32 {
        let max = max_lanes(scores);
        for value in scores.iter_mut() { *value = exp((*value - max) * factor); }
        let total = sum_lanes(scores);
        let inverse = 1.0 / total;
        for value in scores.iter_mut() { *value *= inverse; }
        max * factor + total.ln()
    }
}

vectorized! {
    /// The probabilities again, in place, from the scores and what [`softmax`] returned.
    fn softmax_again(scores: &mut [f32], factor: f32, log_sum: f32) {
        for value in scores.iter_mut() { *value = exp(value.mul_add(factor, -log_sum)); }
    }
}

vectorized! {
    /// The gradients of the scores, p (d_p - delta) factor, in place of d_p.
    fn softmax_backward(probabilities: &[f32], d_probabilities: &mut [f32], delta: f32, factor: f32) {
        let p = &probabilities[..d_probabilities.len()];
        for i in 0..p.len() { d_probabilities[i] = p[i] * (d_probabilities[i] - delta) * factor; }
    }
}

vectorized! {
    /// The loss of one row of logits, -ln softmax(logits)[target]. The logits become
    /// softmax(logits) - one_hot(target).
    fn cross_entropy(logits: &mut [f32], target: usize) -> f32 {
        let max = max_lanes(logits);
        let wanted = logits[target] - max;
        for value in logits.iter_mut() { *value = exp(*value - max); }
        let total = sum_lanes(logits);
        let inverse = 1.0 / total;
        for value in logits.iter_mut() { *value *= inverse; }
        logits[target] -= 1.0;
        total.ln() - wanted
    }
}

vectorized! {
    /// The loss of one row of logits, without its gradient. The logits are overwritten.
    fn cross_entropy_loss(logits: &mut [f32], target: usize) -> f32 {
        let max = max_lanes(logits);
        let wanted = logits[target] - max;
        for value in logits.iter_mut() { *value = exp(*value - max); }
        sum_lanes(logits).ln() - wanted
    }
}

vectorized! {
    /// Rotates the pairs (x[i], x[i + d/2]) by the angles of these cosines and sines times `sign`:
    /// -1 turns back.
    fn rotate(x: &[f32], cosines: &[f32], sines: &[f32], sign: f32, out: &mut [f32]) {
        let half = x.len() / 2;
        let (a, b) = x.split_at(half);
        let (out_a, out_b) = out.split_at_mut(half);
        let (b, cosines, sines, out_b) = (&b[..half], &cosines[..half], &sines[..half], &mut out_b[..half]);
        for i in 0..half {
            let sine = sign * sines[i];
            out_a[i] = a[i] * cosines[i] - b[i] * sine;
            out_b[i] = b[i] * cosines[i] + a[i] * sine;
        }
    }
}

#[cfg(test)]
mod tests {
    /// Compared with f64, on values over the whole range of the function.
    #[test]
    fn exponential_is_within_two_units_in_the_last_place() {
        for n in -8_700..8_800 {
            let x = n as f32 * 0.01 + 0.003;
            let want = f64::from(x).exp();
            let error = (f64::from(super::exp(x)) - want).abs() / want;
            assert!(error < 2.4e-7, "exp({x}): relative error {error:e}");
        }
    }

    #[test]
    fn bf16_is_rounded_as_by_the_half_crate() {
        let bits = (0..=0xffff_u32).flat_map(|high| [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| high << 16 | low));
        let values: Vec<f32> = bits.map(f32::from_bits).collect();
        let mut narrow = vec![half::bf16::ZERO; values.len()];
        super::narrow(&values, &mut narrow);
        for (value, got) in values.iter().zip(&narrow) {
            let want = half::bf16::from_f32(*value);
            assert!(got.to_bits() == want.to_bits(), "{:08x}: {got:?} {want:?}", value.to_bits());
        }
        let mut wide = vec![0.0; narrow.len()];
        super::widen(&narrow, &mut wide);
        assert!(narrow.iter().zip(&wide).all(|(narrow, wide)| u32::from(narrow.to_bits()) << 16 == wide.to_bits()));
    }

    #[test]
    fn sums_do_not_lose_the_remainder() {
        for length in 0..70 {
            let x: Vec<f32> = (0..length).map(|i| i as f32).collect();
            let want = (0..length).sum::<usize>() as f32;
            assert_eq!(super::sum_lanes(&x), want, "length {length}");
            assert_eq!(super::dot(&x, &vec![1.0; length]), want, "length {length}");
        }
    }
}
