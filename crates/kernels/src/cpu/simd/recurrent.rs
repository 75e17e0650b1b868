//! Steps of short convolutions and of the gated delta rule, vectorized.

#[cfg(target_arch = "x86_64")]
use super::InstructionSet;
use super::{LANES, exp};

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

/// Columns of a state that are computed together. What is summed for them stays in registers.
const COLUMNS: usize = 64;

/// The block of `COLUMNS` elements from `start` on.
#[inline(always)]
fn block(x: &[f32], start: usize) -> &[f32; COLUMNS] {
    x[start..].first_chunk().expect("a whole block")
}

#[inline(always)]
fn block_mut(x: &mut [f32], start: usize) -> &mut [f32; COLUMNS] {
    x[start..].first_chunk_mut().expect("a whole block")
}

vectorized! {
    /// One token of a gated delta rule: `state` [x, y], [q, k, v]. Writes the error, v - Sᵀ k after what is
    /// forgotten, and the result Sᵀ q.
    fn delta_step(
        state: &mut [f32], qkv: [&[f32]; 3], decay: f32, beta: f32, error: &mut [f32], out: &mut [f32]
    ) {
        let ([q, k, v], width) = (qkv, out.len());
        let whole = width - width % COLUMNS;
        for start in (0..whole).step_by(COLUMNS) {
            let mut wrong = *block(v, start);
            for (row, &k) in state.chunks_exact_mut(width).zip(k) {
                let row = block_mut(row, start);
                for j in 0..COLUMNS {
                    row[j] *= decay;
                    wrong[j] = (-row[j]).mul_add(k, wrong[j]);
                }
            }
            *block_mut(error, start) = wrong;
            let mut sums = [0.0; COLUMNS];
            for ((row, &k), &q) in state.chunks_exact_mut(width).zip(k).zip(q) {
                let (row, k) = (block_mut(row, start), beta * k);
                for j in 0..COLUMNS {
                    row[j] = k.mul_add(wrong[j], row[j]);
                    sums[j] = q.mul_add(row[j], sums[j]);
                }
            }
            *block_mut(out, start) = sums;
        }
        if whole == width {
            return;
        }
        error[whole..].copy_from_slice(&v[whole..]);
        for (row, &k) in state.chunks_exact_mut(width).zip(k) {
            for j in whole..width {
                row[j] *= decay;
                error[j] = (-row[j]).mul_add(k, error[j]);
            }
        }
        out[whole..].fill(0.0);
        for ((row, &k), &q) in state.chunks_exact_mut(width).zip(k).zip(q) {
            let k = beta * k;
            for j in whole..width {
                row[j] = k.mul_add(error[j], row[j]);
                out[j] = q.mul_add(row[j], out[j]);
            }
        }
    }
}

/// What the backward pass of a token reads: the state before it [x, y], its query and key, what is
/// forgotten, β, its error, and the gradient of its result.
#[derive(Clone, Copy)]
pub(crate) struct DeltaSeen<'a> {
    pub(crate) before: &'a [f32],
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) decay: f32,
    pub(crate) beta: f32,
    pub(crate) error: &'a [f32],
    pub(crate) d_out: &'a [f32],
}

/// Sums that the columns of a state share: sixteen lanes for each of its rows, and for the token.
pub(crate) struct DeltaSums {
    q: Vec<f32>,
    k: Vec<f32>,
    g: [f32; LANES],
    beta: [f32; LANES],
    half: Vec<f32>,
}

impl DeltaSums {
    /// For states of `rows` rows.
    pub(crate) fn new(rows: usize) -> DeltaSums {
        let lanes = || vec![0.0; rows * LANES];
        DeltaSums { q: lanes(), k: lanes(), g: [0.0; LANES], beta: [0.0; LANES], half: lanes() }
    }
}

vectorized! {
    /// The backward pass of [`delta_step`]. `d_state`: the gradient of the state behind the token, which
    /// becomes that of the state before it. The gradients of q and k are added to `gradients`, that of v is
    /// written. Returns those of g and beta.
    fn delta_step_backward(
        seen: DeltaSeen<'_>, d_state: &mut [f32], gradients: (&mut [f32], &mut [f32], &mut [f32]),
        sums: &mut DeltaSums
    ) -> (f32, f32) {
        let (d_q, d_k, d_v) = gradients;
        let width = seen.d_out.len();
        sums.q.fill(0.0);
        sums.k.fill(0.0);
        (sums.g, sums.beta) = ([0.0; LANES], [0.0; LANES]);
        let mut start = 0;
        while start + COLUMNS <= width {
            delta_columns_backward::<COLUMNS>(&seen, d_state, d_v, start, sums);
            start += COLUMNS;
        }
        while start + LANES <= width {
            delta_columns_backward::<LANES>(&seen, d_state, d_v, start, sums);
            start += LANES;
        }
        while start < width {
            delta_columns_backward::<1>(&seen, d_state, d_v, start, sums);
            start += 1;
        }
        add_sums_of_rows(d_q, &mut sums.q, &mut sums.half);
        add_sums_of_rows(d_k, &mut sums.k, &mut sums.half);
        (sums.g.iter().sum(), sums.beta.iter().sum())
    }
}

/// [`delta_step_backward`] of the `N` columns from `start` on. Columns meet in no other place than in the sums
/// of the gradients of q, k, g and beta.
#[inline(always)]
fn delta_columns_backward<const N: usize>(
    seen: &DeltaSeen<'_>,
    d_state: &mut [f32],
    d_v: &mut [f32],
    start: usize,
    sums: &mut DeltaSums,
) {
    let DeltaSeen { before, q, k, decay, beta, error, d_out } = *seen;
    let width = d_out.len();
    let of = |x: &[f32]| -> [f32; N] { *x[start..].first_chunk().expect("a whole block") };
    let (error, d_out) = (of(error), of(d_out));
    // The gradients of β e, and of Sᵀ k.
    let (mut d_change, mut d_read) = ([0.0; N], [0.0; N]);
    let rows = before.chunks_exact(width).zip(d_state.chunks_exact_mut(width)).zip(q.iter().zip(k));
    let lanes = sums.q.chunks_exact_mut(LANES).zip(sums.k.chunks_exact_mut(LANES));
    for (((before, d_row), (&q, &k)), (sum_q, sum_k)) in rows.zip(lanes) {
        let (before, d_row) = (of(before), d_row[start..].first_chunk_mut::<N>().expect("a whole block"));
        let change = beta * k;
        let (mut of_q, mut of_k) = ([0.0; N], [0.0; N]);
        for j in 0..N {
            of_q[j] = change.mul_add(error[j], decay * before[j]) * d_out[j];
            d_row[j] = q.mul_add(d_out[j], d_row[j]);
            d_change[j] = k.mul_add(d_row[j], d_change[j]);
            of_k[j] = beta * (d_row[j] * error[j]);
        }
        add_to_lanes(sum_q, &of_q);
        add_to_lanes(sum_k, &of_k);
    }
    let mut of_beta = [0.0; N];
    for j in 0..N {
        of_beta[j] = d_change[j] * error[j];
        d_read[j] = -beta * d_change[j];
        d_v[start + j] = -d_read[j];
    }
    add_to_lanes(&mut sums.beta, &of_beta);
    let mut of_g = [0.0; N];
    let rows = before.chunks_exact(width).zip(d_state.chunks_exact_mut(width)).zip(k);
    for (((before, d_row), &k), sum_k) in rows.zip(sums.k.chunks_exact_mut(LANES)) {
        let (before, d_row) = (of(before), d_row[start..].first_chunk_mut::<N>().expect("a whole block"));
        let mut of_k = [0.0; N];
        for j in 0..N {
            let row = decay * before[j];
            let d = k.mul_add(d_read[j], d_row[j]);
            of_k[j] = row * d_read[j];
            of_g[j] = row.mul_add(d, of_g[j]);
            d_row[j] = d * decay;
        }
        add_to_lanes(sum_k, &of_k);
    }
    add_to_lanes(&mut sums.g, &of_g);
}

/// Adds a block to sixteen lanes.
#[inline(always)]
fn add_to_lanes<const N: usize>(lanes: &mut [f32], x: &[f32; N]) {
    let lanes = lanes.first_chunk_mut::<LANES>().expect("sixteen lanes");
    if N == COLUMNS {
        for l in 0..LANES {
            lanes[l] += (x[l] + x[l + LANES]) + (x[l + 2 * LANES] + x[l + 3 * LANES]);
        }
    } else {
        for l in 0..N {
            lanes[l] += x[l];
        }
    }
}

/// Adds the sum of each row's sixteen lanes to `out`. All rows are halved at once, as the sums of one row alone
/// would wait for each other.
#[inline(always)]
fn add_sums_of_rows(out: &mut [f32], lanes: &mut [f32], half: &mut [f32]) {
    let rows = out.len();
    halve::<8>(lanes, &mut half[..8 * rows]);
    halve::<4>(half, &mut lanes[..4 * rows]);
    halve::<2>(lanes, &mut half[..2 * rows]);
    halve::<1>(half, &mut lanes[..rows]);
    for (out, sum) in out.iter_mut().zip(lanes.iter()) {
        *out += sum;
    }
}

/// From rows of 2 N elements to rows of N.
#[inline(always)]
fn halve<const N: usize>(rows: &[f32], half: &mut [f32]) {
    let mut start = 0;
    while start + LANES <= half.len() {
        let (half, rows) = (&mut half[start..][..LANES], &rows[2 * start..][..2 * LANES]);
        for l in 0..LANES {
            let first = l / N * 2 * N + l % N;
            half[l] = rows[first] + rows[first + N];
        }
        // One vector at a time, by shuffles: several at once would be gathered element by element.
        start = std::hint::black_box(start + LANES);
    }
    for l in start..half.len() {
        let first = l / N * 2 * N + l % N;
        half[l] = rows[first] + rows[first + N];
    }
}
