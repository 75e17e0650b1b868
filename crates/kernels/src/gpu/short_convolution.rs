//! Causal depthwise convolutions over a few tokens on a GPU, perhaps with SiLU behind them. The method is that
//! of `cpu/short_convolution.rs`. The kernel [c, k] is f32, sums are f32.

#![allow(clippy::too_many_arguments, reason = "a kernel takes its buffers and sizes one by one")]
#![allow(clippy::collapsible_if, reason = "an element is read only after its index was checked")]

use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::pointwise::scaled;
use super::reduce::{launch as launch_rows, sum_of_units};
use super::tensor::{
    buffer, each_element, each_row, element, elements_of, empty, last, launch_elements as launch, upload_u32,
};
use crate::fused::Fused;
use crate::operations::ShortConvolution;

/// Numbers of each token in [`Saved::places`].
const PLACES: usize = 3;

/// The inputs: u [t, c] and past [m · (k - 1), c] of one number type, w [c, k] in f32.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    u: CubeTensor,
    w: CubeTensor,
    past: CubeTensor,
    /// Of each token its place in its row, the number of its row, and how many tokens of it follow: u32
    /// [t, 3].
    places: CubeTensor,
    has_silu: bool,
}

impl Saved {
    fn new([u, w, past]: [CubeTensor; 3], rows: &Arc<[usize]>, has_silu: bool) -> Saved {
        let (tokens, channels) = (u.shape()[0], last(&u));
        let past = scaled(&past, u.dtype, 1.0);
        let w = scaled(&w, DType::F32, 1.0);
        assert!(w.shape()[0] == channels && rows.iter().sum::<usize>() == tokens, "a kernel of these channels");
        assert_eq!(elements_of(&past), rows.len() * (last(&w) - 1) * channels, "what was before each row");
        let of_row = |(row, &count): (usize, &usize)| (0..count).map(move |n| [n, row, count - 1 - n]);
        let places: Vec<u32> = rows.iter().enumerate().flat_map(of_row).flatten().map(|n| n as u32).collect();
        let places = upload_u32(&u, &places);
        Saved { u, w, past, places, has_silu }
    }

    /// The result; with `d_out` the gradient of what SiLU takes, in f32.
    fn convolved(&self, d_out: Option<&CubeTensor>) -> CubeTensor {
        let Saved { u, w, past, places, has_silu } = self;
        let out = empty(u, u.shape(), if d_out.is_some() { DType::F32 } else { u.dtype });
        // Without a gradient the kernel reads none, but needs one to bind.
        let gradient = d_out.unwrap_or(u);
        assert!(gradient.shape() == u.shape() && gradient.dtype == u.dtype, "a gradient of the result");
        launch!(
            convolution_kernel,
            u.client,
            elements_of(u),
            buffer(u),
            buffer(w),
            buffer(past),
            buffer(places),
            buffer(gradient),
            buffer(&out),
            last(u),
            last(w),
            *has_silu,
            d_out.is_some(),
            [element(u.dtype), element(out.dtype)],
        );
        out
    }
}

impl Fused<CubeBackend, 3> for ShortConvolution {
    type Saved = Saved;

    fn forward(self, tensors: [CubeTensor; 3], _: [bool; 3]) -> (CubeTensor, Saved) {
        let saved = Saved::new(tensors, &self.rows, self.has_silu);
        (saved.convolved(None), saved)
    }

    fn backward(saved: Saved, d_out: CubeTensor, [u_wanted, w_wanted, _]: [bool; 3]) -> [Option<CubeTensor>; 3] {
        let Saved { u, w, past, places, .. } = &saved;
        let (tokens, channels, taps) = (u.shape()[0], last(u), last(w));
        let d_inner = saved.convolved(Some(&d_out));
        let d_u = u_wanted.then(|| {
            let d_u = empty(u, u.shape(), u.dtype);
            launch!(
                input_gradient_kernel,
                u.client,
                elements_of(u),
                buffer(&d_inner),
                buffer(w),
                buffer(places),
                buffer(&d_u),
                channels,
                taps,
                element(u.dtype),
            );
            d_u
        });
        let d_w = w_wanted.then(|| {
            let d_w = empty(w, w.shape(), DType::F32);
            launch_rows!(
                kernel_gradient_kernel,
                u.client,
                channels * taps,
                tokens,
                [buffer(u), buffer(past), buffer(places), buffer(&d_inner), buffer(&d_w), tokens, channels, taps,],
                element(u.dtype)
            );
            d_w
        });
        [d_u, d_w, None]
    }
}

/// What a tap of a token reads: of u, or of what was before the row.
#[cube]
fn input_of<T: Float>(
    u: &[T],
    past: &[T],
    places: &[u32],
    token: usize,
    channel: usize,
    tap: usize,
    channels: usize,
    taps: usize,
) -> f32 {
    // The last tap is the token itself.
    let place = places[token * PLACES] as usize + tap;
    let mut value = 0.0f32;
    if place + 1 >= taps {
        value += f32::cast_from(u[(token + tap + 1 - taps) * channels + channel]);
    } else {
        let row = places[token * PLACES + 1] as usize;
        value += f32::cast_from(past[(row * (taps - 1) + place) * channels + channel]);
    }
    value
}

/// The convolution of each token and channel, behind SiLU if there is one; or the gradient of what SiLU takes.
#[cube(launch_unchecked)]
fn convolution_kernel<I: Float, O: Float>(
    u: &[I],
    w: &[f32],
    past: &[I],
    places: &[u32],
    d_out: &[I],
    out: &mut [O],
    channels: usize,
    taps: usize,
    #[comptime] has_silu: bool,
    #[comptime] is_backward: bool,
    #[define(I, O)] _dtypes: [ElemType; 2],
) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    let token = i / channels;
    let channel = i % channels;
    let mut value = 1.0f32;
    if comptime!(has_silu || !is_backward) {
        let mut sum = 0.0f32;
        for tap in 0..taps {
            sum += w[channel * taps + tap] * input_of::<I>(u, past, places, token, channel, tap, channels, taps);
        }
        value = sum;
        if comptime!(has_silu) {
            let sigmoid = 1.0f32 / (1.0f32 + (-sum).exp());
            value = sum * sigmoid;
            if comptime!(is_backward) {
                value = sigmoid + sum * sigmoid * (1.0f32 - sigmoid);
            }
        }
    }
    if comptime!(is_backward) {
        value *= f32::cast_from(d_out[i]);
    }
    out[i] = O::cast_from(value);
}

/// d_u of the convolution: a token is the last tap of its own sum, the tap before of the next one's, and so on
/// within its row.
#[cube(launch_unchecked)]
fn input_gradient_kernel<T: Float>(
    d_inner: &[f32],
    w: &[f32],
    places: &[u32],
    d_u: &mut [T],
    channels: usize,
    taps: usize,
    #[define(T)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= d_u.len() {
        terminate!();
    }
    let token = i / channels;
    let channel = i % channels;
    let follow = places[token * PLACES + 2] as usize;
    let mut sum = 0.0f32;
    for later in 0..taps {
        if later <= follow {
            sum += w[channel * taps + (taps - 1 - later)] * d_inner[(token + later) * channels + channel];
        }
    }
    d_u[i] = T::cast_from(sum);
}

/// d_w [c, k], one cube for each element: the sum over the tokens of what the tap reads times its gradient.
#[cube(launch_unchecked)]
fn kernel_gradient_kernel<T: Float>(
    u: &[T],
    past: &[T],
    places: &[u32],
    d_inner: &[f32],
    d_w: &mut [f32],
    tokens: usize,
    channels: usize,
    taps: usize,
    #[comptime] units: usize,
    #[define(T)] _dtype: ElemType,
) {
    let n = CUBE_POS;
    if n >= d_w.len() {
        terminate!();
    }
    let channel = n / taps;
    let tap = n % taps;
    let mut sum = 0.0f32;
    let mut token = UNIT_POS as usize;
    while token < tokens {
        sum +=
            input_of::<T>(u, past, places, token, channel, tap, channels, taps) * d_inner[token * channels + channel];
        token += units;
    }
    let total = sum_of_units(sum, units);
    if UNIT_POS == 0 {
        d_w[n] = total;
    }
}
