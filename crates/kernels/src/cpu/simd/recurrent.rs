//! Steps of short convolutions and of the gated delta rule, vectorized.

#[cfg(target_arch = "x86_64")]
use super::InstructionSet;
use super::{dot_lanes, exp};

vectorized! {
    /// out += x · w, element by element.
    fn add_products(out: &mut [f32], x: &[f32], w: &[f32]) {
        let (x, w) = (&x[..out.len()], &w[..out.len()]);
        for i in 0..out.len() { out[i] = x[i].mul_add(w[i], out[i]); }
    }
}

vectorized! {
    /// x σ(x), in place.
    fn silu(x: &mut [f32]) {
        for i in 0..x.len() { x[i] /= 1.0 + exp(-x[i]); }
    }
}

vectorized! {
    /// The gradient of x of [`silu`], in the place of x.
    fn silu_backward(x: &mut [f32], d_out: &[f32]) {
        let d_out = &d_out[..x.len()];
        for i in 0..x.len() {
            let sigmoid = 1.0 / (1.0 + exp(-x[i]));
            x[i] = d_out[i] * (sigmoid + x[i] * sigmoid * (1.0 - sigmoid));
        }
    }
}

vectorized! {
    /// One token of a gated delta rule: `state` [x, y], [q, k, v]. Writes the error, v - Sᵀ k after what is
    /// forgotten, and the result Sᵀ q.
    fn delta_step(
        state: &mut [f32], qkv: [&[f32]; 3], decay: f32, beta: f32, error: &mut [f32], out: &mut [f32]
    ) {
        let ([q, k, v], width) = (qkv, out.len());
        let (v, error) = (&v[..width], &mut error[..width]);
        error.copy_from_slice(v);
        for (row, &k) in state.chunks_exact_mut(width).zip(k) {
            for j in 0..width {
                row[j] *= decay;
                error[j] = (-row[j]).mul_add(k, error[j]);
            }
        }
        out.fill(0.0);
        for ((row, &k), &q) in state.chunks_exact_mut(width).zip(k).zip(q) {
            let k = beta * k;
            for j in 0..width {
                row[j] = k.mul_add(error[j], row[j]);
                out[j] = q.mul_add(row[j], out[j]);
            }
        }
    }
}

vectorized! {
    /// The backward pass of [`delta_step`]. `states`: the state before the token, and the gradient of the
    /// state behind it, which becomes that of the state before it. `seen`: the error, and the gradient of
    /// the result. The gradients of q and k are added to `gradients`, that of v is written. Returns those of
    /// g and beta.
    fn delta_step_backward(
        states: (&[f32], &mut [f32]), qk: [&[f32]; 2], decay: f32, beta: f32, seen: (&[f32], &[f32]),
        gradients: (&mut [f32], &mut [f32], &mut [f32])
    ) -> (f32, f32) {
        let ((before, d_state), [q, k], (error, d_out), (d_q, d_k, d_v)) = (states, qk, seen, gradients);
        let width = d_out.len();
        let error = &error[..width];
        // A row of the state behind the token, the gradient of β e, and that of Sᵀ k.
        let mut buffers = vec![0.0; 3 * width];
        let (row, rest) = buffers.split_at_mut(width);
        let (d_change, d_read) = rest.split_at_mut(width);
        for i in 0..k.len() {
            let (before, d_row) = (&before[i * width..][..width], &mut d_state[i * width..][..width]);
            let change = beta * k[i];
            for j in 0..width {
                row[j] = change.mul_add(error[j], decay * before[j]);
                d_row[j] = q[i].mul_add(d_out[j], d_row[j]);
                d_change[j] = k[i].mul_add(d_row[j], d_change[j]);
            }
            d_q[i] += dot_lanes(row, d_out);
            d_k[i] += beta * dot_lanes(d_row, error);
        }
        let d_beta = dot_lanes(d_change, error);
        for j in 0..width {
            d_v[j] = beta * d_change[j];
            d_read[j] = -d_v[j];
        }
        let mut d_g = 0.0;
        for i in 0..k.len() {
            let (before, d_row) = (&before[i * width..][..width], &mut d_state[i * width..][..width]);
            for j in 0..width {
                row[j] = decay * before[j];
                d_row[j] = k[i].mul_add(d_read[j], d_row[j]);
            }
            d_k[i] += dot_lanes(row, d_read);
            d_g += dot_lanes(row, d_row);
            for j in 0..width { d_row[j] *= decay; }
        }
        (d_g, d_beta)
    }
}
