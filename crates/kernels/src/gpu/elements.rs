//! Kernels that work element by element, one unit each. Arithmetic is f32 whatever the tensors hold.

use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;

use super::rows::Block;

/// `out = a + b`
#[cube(launch_unchecked)]
pub(super) fn add<T: Float>(a: &[T], b: &[T], out: &mut [T], #[define(T)] _dtype: ElemType) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    out[i] = T::cast_from(f32::cast_from(a[i]) + f32::cast_from(b[i]));
}

/// `out[t, o] = y[t, o] + bias[o]`
#[cube(launch_unchecked)]
pub(super) fn add_bias<T: Float>(y: &[T], bias: &[f32], out: &mut [T], #[define(T)] _dtype: ElemType) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    out[i] = T::cast_from(f32::cast_from(y[i]) + bias[i % bias.len()]);
}

/// `out = x · factor`, in another number type.
#[cube(launch_unchecked)]
pub(super) fn scaled<I: Float, O: Float>(
    x: &[I],
    out: &mut [O],
    factor: f32,
    #[define(I, O)] _dtypes: [ElemType; 2],
) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    out[i] = O::cast_from(f32::cast_from(x[i]) * factor);
}

/// `silu(gate) · up`
#[cube(launch_unchecked)]
pub(super) fn swiglu<T: Float>(gate: &[T], up: &[T], out: &mut [T], #[define(T)] _dtype: ElemType) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    let g = f32::cast_from(gate[i]);
    out[i] = T::cast_from(g / (1.0f32 + (-g).exp()) * f32::cast_from(up[i]));
}

#[cube(launch_unchecked)]
pub(super) fn swiglu_backward<T: Float>(
    gate: &[T],
    up: &[T],
    d_out: &[T],
    d_gate: &mut [T],
    d_up: &mut [T],
    #[define(T)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= d_out.len() {
        terminate!();
    }
    let g = f32::cast_from(gate[i]);
    let d = f32::cast_from(d_out[i]);
    let sigmoid = 1.0f32 / (1.0f32 + (-g).exp());
    let silu = g * sigmoid;
    d_up[i] = T::cast_from(d * silu);
    d_gate[i] = T::cast_from(d * f32::cast_from(up[i]) * (sigmoid + silu * (1.0f32 - sigmoid)));
}

/// Rotary embedding of x [t, heads, width], a pair (i, i + width/2) per unit; tables are [t, width/2]. `sign` -1 turns
/// back, which is the backward pass.
#[cube(launch_unchecked)]
pub(super) fn rotate<T: Float>(
    x: &[T],
    cosines: &[f32],
    sines: &[f32],
    out: &mut [T],
    heads: usize,
    half: usize,
    sign: f32,
    #[define(T)] _dtype: ElemType,
) {
    let pair = ABSOLUTE_POS;
    if pair >= out.len() / 2 {
        terminate!();
    }
    let within = pair % half;
    let head = pair / half;
    let angle = head / heads * half + within;
    let at = head * half * 2 + within;
    let a = f32::cast_from(x[at]);
    let b = f32::cast_from(x[at + half]);
    let cosine = cosines[angle];
    let sine = sines[angle] * sign;
    out[at] = T::cast_from(a * cosine - b * sine);
    out[at + half] = T::cast_from(b * cosine + a * sine);
}

/// Rows of x, those of `positions`.
#[cube(launch_unchecked)]
pub(super) fn gather_rows<T: Float>(
    x: &[T],
    positions: &[u32],
    out: &mut [T],
    first: usize,
    width: usize,
    #[define(T)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    out[i] = x[positions[first + i / width] as usize * width + i % width];
}

/// `d_h[t] = Σ upstream[n] · d_rows[n] · scale` over the targets n of token t: `order[starts[t]]` to before
/// `order[starts[t + 1]]`.
#[cube(launch_unchecked)]
pub(super) fn scatter_rows<T: Float>(
    d_rows: &[f32],
    upstream: &[f32],
    starts: &[u32],
    order: &[u32],
    d_h: &mut [T],
    width: usize,
    scale: f32,
    #[define(T)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= d_h.len() {
        terminate!();
    }
    let token = i / width;
    let mut sum = 0.0f32;
    let mut place = starts[token] as usize;
    let end = starts[token + 1] as usize;
    while place < end {
        let n = order[place] as usize;
        sum += upstream[n] * d_rows[n * width + i % width];
        place += 1;
    }
    d_h[i] = T::cast_from(sum * scale);
}

/// Rows of x, each times its factor.
#[cube(launch_unchecked)]
pub(super) fn scale_rows<T: Float>(
    x: &[T],
    factors: &[f32],
    out: &mut [T],
    first: usize,
    width: usize,
    #[define(T)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    out[i] = T::cast_from(f32::cast_from(x[i]) * factors[first + i / width]);
}

/// Queries (or keys) `first` to `first + rows` of x [t, heads, width] as [heads, rows, width]; zeros beyond the last.
#[cube(launch_unchecked)]
pub(super) fn heads_first<T: Float>(
    x: &[T],
    out: &mut [T],
    first: usize,
    rows: usize,
    heads: usize,
    width: usize,
    #[define(T)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    let column = i % width;
    let row = i / width % rows + first;
    let head = i / width / rows;
    let at = (row * heads + head) * width + column;
    if at < x.len() {
        out[i] = x[at];
    } else {
        out[i] = T::cast_from(0.0f32);
    }
}

/// The way back: x [heads, rows, width] into rows `first` and on of out [t, heads, width].
#[cube(launch_unchecked)]
pub(super) fn tokens_first<I: Float, O: Float>(
    x: &[I],
    out: &mut [O],
    first: usize,
    rows: usize,
    heads: usize,
    width: usize,
    #[define(I, O)] _dtypes: [ElemType; 2],
) {
    let i = ABSOLUTE_POS;
    if i >= x.len() {
        terminate!();
    }
    let column = i % width;
    let row = i / width % rows + first;
    let head = i / width / rows;
    let at = (row * heads + head) * width + column;
    if at < out.len() {
        out[at] = O::cast_from(f32::cast_from(x[i]));
    }
}

/// Adds x [heads, rows, width] to rows `first` and on of sums [heads, all_rows, width].
#[cube(launch_unchecked)]
pub(super) fn add_rows(x: &[f32], sums: &mut [f32], first: usize, rows: usize, all_rows: usize, width: usize) {
    let i = ABSOLUTE_POS;
    if i >= x.len() {
        terminate!();
    }
    let column = i % width;
    let row = i / width % rows + first;
    let head = i / width / rows;
    let at = (head * all_rows + row) * width + column;
    sums[at] = sums[at] + x[i];
}

/// Probabilities of a block again, from its scores and log-sums, and the gradient of the scores
/// `p · (d_p - delta) · scale`. See [`super::rows::softmax`].
#[cube(launch_unchecked)]
pub(super) fn softmax_backward<T: Float>(
    scores: &[f32],
    d_probabilities: &[f32],
    starts: &[u32],
    ends: &[u32],
    log_sums: &[f32],
    deltas: &[f32],
    probabilities: &mut [T],
    d_scores: &mut [T],
    block: Block,
    heads: usize,
    scale: f32,
    #[define(T)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= scores.len() {
        terminate!();
    }
    let row = i / block.keys;
    let key = i % block.keys + block.first_key;
    let query = block.first_query + row % block.queries;
    let head = row / block.queries;
    let mut probability = 0.0f32;
    let mut gradient = 0.0f32;
    if query < block.all_queries {
        if key >= starts[query] as usize {
            if key < ends[query] as usize {
                probability = (scores[i] * scale - log_sums[head * block.all_queries + query]).exp();
                gradient = probability * (d_probabilities[i] - deltas[query * heads + head]) * scale;
            }
        }
    }
    probabilities[i] = T::cast_from(probability);
    d_scores[i] = T::cast_from(gradient);
}

/// Philox4x32-10's round, see finetune-random.
#[cube]
fn philox_word(column: u32, position: u32, row: u32, key0: u32, key1: u32, word: u32) -> u32 {
    let mut c0 = column;
    let mut c1 = position;
    let mut c2 = row;
    let mut c3 = 0u32;
    let mut k0 = key0;
    let mut k1 = key1;
    for _ in 0..10u32 {
        let a_low = c0 * 0xD251_1F53u32;
        let a_high = u32::mul_hi(c0, 0xD251_1F53u32);
        let b_low = c2 * 0xCD9E_8D57u32;
        let b_high = u32::mul_hi(c2, 0xCD9E_8D57u32);
        c0 = b_high ^ c1 ^ k0;
        c1 = b_low;
        c2 = a_high ^ c3 ^ k1;
        c3 = a_low;
        k0 += 0x9E37_79B9u32;
        k1 += 0xBB67_AE85u32;
    }
    let mut out = c0;
    if word == 1 {
        out = c1;
    }
    if word == 2 {
        out = c2;
    }
    if word == 3 {
        out = c3;
    }
    out
}

/// Dropout with the mask that the CPU draws: `tokens` holds (row, position) of each token.
#[cube(launch_unchecked)]
pub(super) fn dropout<T: Float>(
    x: &[T],
    tokens: &[u32],
    out: &mut [T],
    width: usize,
    key0: u32,
    key1: u32,
    probability: f32,
    keep_factor: f32,
    #[define(T)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    let token = i / width;
    let column = (i % width) as u32;
    let word = philox_word(column / 4, tokens[token * 2 + 1], tokens[token * 2], key0, key1, column % 4);
    let unit = f32::cast_from(word >> 8) / 16_777_216.0f32;
    let mut value = 0.0f32;
    if unit >= probability {
        value = f32::cast_from(x[i]) * keep_factor;
    }
    out[i] = T::cast_from(value);
}
