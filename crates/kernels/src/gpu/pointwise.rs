//! Kernels that work element by element, one unit each, and the functions that launch them.
//!
//! Arithmetic is f32, whatever the tensors hold. Every kernel checks its position against the
//! length of what it writes.

#![allow(clippy::too_many_arguments, reason = "a kernel takes its buffers and sizes one by one")]

use burn::backend::TensorMetadata;
use burn::tensor::{DType, Shape};
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use crate::arguments::Activation;

use super::tensor::{buffer, each_element, element, elements_of, empty, last, launch_elements as launch, same_shape};

/// `a + b`, of one shape and number type.
pub(super) fn add(a: &CubeTensor, b: &CubeTensor) -> CubeTensor {
    same_shape(&[a, b]);
    let out = empty(a, a.shape(), a.dtype);
    launch!(add_kernel, a.client, elements_of(a), buffer(a), buffer(b), buffer(&out), element(a.dtype));
    out
}

/// y [t, o] plus bias [o]. The bias is f32.
pub(super) fn add_bias(y: &CubeTensor, bias: &CubeTensor) -> CubeTensor {
    assert!(elements_of(bias) == last(y) && bias.dtype == DType::F32, "a bias for each output");
    let out = empty(y, y.shape(), y.dtype);
    launch!(add_bias_kernel, y.client, elements_of(y), buffer(y), buffer(bias), buffer(&out), element(y.dtype));
    out
}

/// The tensor in another number type, times a factor.
pub(super) fn scaled(x: &CubeTensor, dtype: DType, factor: f32) -> CubeTensor {
    if x.dtype == dtype && factor == 1.0 {
        return x.clone();
    }
    let out = empty(x, x.shape(), dtype);
    let types = [element(x.dtype), element(dtype)];
    launch!(scaled_kernel, x.client, elements_of(x), buffer(x), buffer(&out), factor, types);
    out
}

/// `activation(gate) · up`, of one shape and number type.
pub(super) fn gated(gate: &CubeTensor, up: &CubeTensor, activation: Activation) -> CubeTensor {
    same_shape(&[gate, up]);
    let out = empty(gate, gate.shape(), gate.dtype);
    let dtype = element(gate.dtype);
    let buffers = (buffer(gate), buffer(up), buffer(&out));
    launch!(gated_kernel, gate.client, elements_of(gate), buffers.0, buffers.1, buffers.2, kind(activation), dtype);
    out
}

/// (d_gate, d_up) of [`gated`].
pub(super) fn gated_backward(
    gate: &CubeTensor,
    up: &CubeTensor,
    d_out: &CubeTensor,
    activation: Activation,
) -> (CubeTensor, CubeTensor) {
    same_shape(&[gate, up, d_out]);
    let (d_gate, d_up) = (empty(gate, gate.shape(), gate.dtype), empty(gate, gate.shape(), gate.dtype));
    launch!(
        gated_backward_kernel,
        gate.client,
        elements_of(gate),
        buffer(gate),
        buffer(up),
        buffer(d_out),
        buffer(&d_gate),
        buffer(&d_up),
        kind(activation),
        element(gate.dtype),
    );
    (d_gate, d_up)
}

/// x [t, heads, width] turned by the angles of cosines and sines [t, width / 2] times `sign`: -1
/// turns back.
pub(super) fn rotate(x: &CubeTensor, cosines: &CubeTensor, sines: &CubeTensor, sign: f32) -> CubeTensor {
    let shape = x.shape();
    let (tokens, heads, half) = (shape[0], shape[1], shape[2] / 2);
    assert!([cosines, sines].iter().all(|table| elements_of(table) == tokens * half), "rope table of another shape");
    let out = empty(x, shape, x.dtype);
    launch!(
        rotate_kernel,
        x.client,
        elements_of(x) / 2,
        buffer(x),
        buffer(cosines),
        buffer(sines),
        buffer(&out),
        heads,
        half,
        sign,
        element(x.dtype),
    );
    out
}

/// Rows `positions[first..first + count]` of x [t, width]: [count, width]. The caller has checked
/// that all positions are below t.
pub(super) fn gather_rows(x: &CubeTensor, positions: &CubeTensor, first: usize, count: usize) -> CubeTensor {
    assert!(first + count <= elements_of(positions), "a position for each row");
    let width = last(x);
    let out = empty(x, [count, width], x.dtype);
    launch!(
        gather_rows_kernel,
        x.client,
        elements_of(&out),
        buffer(x),
        buffer(positions),
        buffer(&out),
        first,
        width,
        element(x.dtype),
    );
    out
}

/// d_h of `shape`: for each token, the sum of `upstream · d_rows · scale` over its targets. The
/// targets of token t are `order[starts[t]..starts[t + 1]]`.
pub(super) fn scatter_rows(
    d_rows: &CubeTensor,
    upstream: &CubeTensor,
    starts: &CubeTensor,
    order: &CubeTensor,
    shape: [usize; 2],
    dtype: DType,
    scale: f32,
) -> CubeTensor {
    let [tokens, width] = shape;
    let targets = elements_of(order);
    assert!(elements_of(starts) == tokens + 1 && elements_of(upstream) == targets, "targets of these tokens");
    assert!(elements_of(d_rows) == targets * width, "a row for each target");
    let d_h = empty(d_rows, Shape::from(shape), dtype);
    launch!(
        scatter_rows_kernel,
        d_rows.client,
        tokens * width,
        buffer(d_rows),
        buffer(upstream),
        buffer(starts),
        buffer(order),
        buffer(&d_h),
        width,
        scale,
        element(dtype),
    );
    d_h
}

/// The rows of x, each times its factor. The factor of row n is `factors[first + n]`.
pub(super) fn scale_rows(x: &CubeTensor, factors: &CubeTensor, first: usize) -> CubeTensor {
    let width = last(x);
    assert!(first + elements_of(x) / width <= elements_of(factors), "a factor for each row");
    let out = empty(x, x.shape(), x.dtype);
    launch!(
        scale_rows_kernel,
        x.client,
        elements_of(x),
        buffer(x),
        buffer(factors),
        buffer(&out),
        first,
        width,
        element(x.dtype),
    );
    out
}

/// drop(x) of x [t, width]. `tokens` holds (row, position) of each token, `key` is that of the
/// module's stream.
pub(super) fn dropout(x: &CubeTensor, tokens: &CubeTensor, key: [u32; 2], probability: f32) -> CubeTensor {
    let width = last(x);
    assert_eq!(elements_of(tokens), 2 * elements_of(x) / width, "a row and a position for each token");
    let out = empty(x, x.shape(), x.dtype);
    launch!(
        dropout_kernel,
        x.client,
        elements_of(x),
        buffer(x),
        buffer(tokens),
        buffer(&out),
        width,
        key[0],
        key[1],
        probability,
        1.0 / (1.0 - probability),
        element(x.dtype),
    );
    out
}

/// `out = a + b`
#[cube(launch_unchecked)]
fn add_kernel<T: Float>(a: &[T], b: &[T], out: &mut [T], #[define(T)] _dtype: ElemType) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    out[i] = T::cast_from(f32::cast_from(a[i]) + f32::cast_from(b[i]));
}

/// `out[t, o] = y[t, o] + bias[o]`
#[cube(launch_unchecked)]
fn add_bias_kernel<T: Float>(y: &[T], bias: &[f32], out: &mut [T], #[define(T)] _dtype: ElemType) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    out[i] = T::cast_from(f32::cast_from(y[i]) + bias[i % bias.len()]);
}

/// `out = x · factor`, in another number type.
#[cube(launch_unchecked)]
fn scaled_kernel<I: Float, O: Float>(x: &[I], out: &mut [O], factor: f32, #[define(I, O)] _dtypes: [ElemType; 2]) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    out[i] = O::cast_from(f32::cast_from(x[i]) * factor);
}

/// Kinds of gated units, as kernels know them.
const SILU: u32 = 0;
const GELU: u32 = 1;
const CLAMPED: u32 = 2;

fn kind(activation: Activation) -> u32 {
    match activation {
        Activation::Silu => SILU,
        Activation::GeluTanh => GELU,
        Activation::Clamped => CLAMPED,
    }
}

/// The activation is `x σ(inner(x))`: the value of `inner`.
#[cube]
fn inner(x: f32, #[comptime] kind: u32) -> f32 {
    let mut value = x;
    if comptime!(kind == GELU) {
        value = 1.595_769f32 * x * (0.044_715f32 * x * x + 1.0f32);
    }
    if comptime!(kind == CLAMPED) {
        value = 1.702f32 * x;
    }
    value
}

/// The derivative of [`inner`].
#[cube]
fn inner_slope(x: f32, #[comptime] kind: u32) -> f32 {
    let mut slope = 1.0f32;
    if comptime!(kind == GELU) {
        slope = 1.595_769f32 * (0.134_145f32 * x * x + 1.0f32);
    }
    if comptime!(kind == CLAMPED) {
        slope = 1.702f32;
    }
    slope
}

/// What the activation takes of the gate.
#[cube]
fn gate_of(x: f32, #[comptime] kind: u32) -> f32 {
    let mut value = x;
    if comptime!(kind == CLAMPED) {
        value = min(x, 7.0f32);
    }
    value
}

/// What the activated gate is multiplied by.
#[cube]
fn up_of(x: f32, #[comptime] kind: u32) -> f32 {
    let mut value = x;
    if comptime!(kind == CLAMPED) {
        value = min(max(x, -7.0f32), 7.0f32) + 1.0f32;
    }
    value
}

/// `activation(gate) · up`
#[cube(launch_unchecked)]
fn gated_kernel<T: Float>(gate: &[T], up: &[T], out: &mut [T], #[comptime] kind: u32, #[define(T)] _dtype: ElemType) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    let g = gate_of(f32::cast_from(gate[i]), kind);
    let u = up_of(f32::cast_from(up[i]), kind);
    out[i] = T::cast_from(g / (1.0f32 + (-inner(g, kind)).exp()) * u);
}

/// The gradients of [`gated_kernel`] for its two inputs.
#[cube(launch_unchecked)]
fn gated_backward_kernel<T: Float>(
    gate: &[T],
    up: &[T],
    d_out: &[T],
    d_gate: &mut [T],
    d_up: &mut [T],
    #[comptime] kind: u32,
    #[define(T)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= d_out.len() {
        terminate!();
    }
    let (whole_g, whole_u) = (f32::cast_from(gate[i]), f32::cast_from(up[i]));
    let g = gate_of(whole_g, kind);
    let u = up_of(whole_u, kind);
    let d = f32::cast_from(d_out[i]);
    let sigmoid = 1.0f32 / (1.0f32 + (-inner(g, kind)).exp());
    let activated = g * sigmoid;
    let slope = sigmoid + activated * (1.0f32 - sigmoid) * inner_slope(g, kind);
    let mut of_gate = d * u * slope;
    let mut of_up = d * activated;
    if comptime!(kind == CLAMPED) {
        // Beyond the limits nothing changes.
        if whole_g > 7.0f32 {
            of_gate = 0.0f32;
        }
        if whole_u.abs() > 7.0f32 {
            of_up = 0.0f32;
        }
    }
    d_gate[i] = T::cast_from(of_gate);
    d_up[i] = T::cast_from(of_up);
}

/// Rotary embedding of x [t, heads, width], a pair (i, i + width/2) per unit. Tables are
/// [t, width/2]. `sign` -1 turns back, which is the backward pass.
#[cube(launch_unchecked)]
fn rotate_kernel<T: Float>(
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

/// The rows of x at `positions`, from entry `first` on.
#[cube(launch_unchecked)]
fn gather_rows_kernel<T: Float>(
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

/// `d_h[t] = Σ upstream[n] · d_rows[n] · scale` over the targets n of token t,
/// `order[starts[t]..starts[t + 1]]`.
#[cube(launch_unchecked)]
fn scatter_rows_kernel<T: Float>(
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

/// The rows of x, each times its factor.
#[cube(launch_unchecked)]
fn scale_rows_kernel<T: Float>(
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

/// Word `word` of the block of Philox4x32-10 (Salmon et al. 2011) that finetune-random computes for
/// the counter (column, position, row, 0).
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
fn dropout_kernel<T: Float>(
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
