//! Causal depthwise convolutions over a few tokens, perhaps with SiLU behind them.

use std::sync::Arc;

use burn::backend::{Flex, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::buffer::{floats, tensor, uninitialized};
use super::simd;
use crate::fused::Fused;
use crate::operations::ShortConvolution;

/// What each token reads: for each of its taps the row of u, or of the past.
struct Taps {
    /// [t, k]: an index into u, or -1 - an index into the past.
    places: Vec<isize>,
    count: usize,
}

impl Taps {
    fn new(rows: &[usize], count: usize) -> Taps {
        let mut places = Vec::new();
        let mut start = 0;
        for (row, &tokens) in rows.iter().enumerate() {
            for token in 0..tokens {
                for tap in 0..count {
                    let place = (token + tap) as isize - (count as isize - 1);
                    places.push(match place {
                        0.. => start as isize + place,
                        _ => -1 - (row as isize * (count as isize - 1) + (count as isize - 1) + place),
                    });
                }
            }
            start += tokens;
        }
        Taps { places, count }
    }

    fn of(&self, token: usize) -> &[isize] {
        &self.places[token * self.count..(token + 1) * self.count]
    }
}

/// w [c, k] tap by tap, [k, c].
fn by_tap(w: &[f32], taps: usize) -> Vec<f32> {
    let channels = w.len() / taps;
    (0..taps).flat_map(|tap| (0..channels).map(move |channel| w[channel * taps + tap])).collect()
}

/// The convolution of a token, [c].
fn convolve(u: &[f32], past: &[f32], w: &[f32], taps: &[isize], out: &mut [f32]) {
    let width = out.len();
    out.fill(0.0);
    for (&place, w) in taps.iter().zip(w.chunks(width)) {
        let x = match place {
            0.. => &u[place as usize * width..][..width],
            _ => &past[(-1 - place) as usize * width..][..width],
        };
        simd::add_products(out, x, w);
    }
}

impl Fused<Flex, 3> for ShortConvolution {
    type Saved = ([FlexTensor; 3], Arc<[usize]>, bool);

    fn forward(self, [u, w, past]: [FlexTensor; 3], _: [bool; 3]) -> (FlexTensor, Self::Saved) {
        let [tokens, width] = u.shape().dims::<2>();
        let [_, taps] = w.shape().dims::<2>();
        let (places, by_tap) = (Taps::new(&self.rows, taps), by_tap(floats(&w), taps));
        let mut out = uninitialized(tokens * width);
        out.par_chunks_mut(width).enumerate().for_each(|(token, out)| {
            convolve(floats(&u), floats(&past), &by_tap, places.of(token), out);
            if self.has_silu {
                simd::silu(out);
            }
        });
        (tensor(out, [tokens, width]), ([u, w, past], self.rows, self.has_silu))
    }

    fn backward(
        ([u, w, past], rows, has_silu): Self::Saved,
        d_out: FlexTensor,
        [u_wanted, w_wanted, _]: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let [tokens, width] = u.shape().dims::<2>();
        let [_, taps] = w.shape().dims::<2>();
        let (places, by_tap) = (Taps::new(&rows, taps), by_tap(floats(&w), taps));
        let mut d_inner = uninitialized(tokens * width);
        d_inner.par_chunks_mut(width).zip(floats(&d_out).par_chunks(width)).enumerate().for_each(
            |(token, (d_inner, d_out))| {
                if !has_silu {
                    return d_inner.copy_from_slice(d_out);
                }
                convolve(floats(&u), floats(&past), &by_tap, places.of(token), d_inner);
                simd::silu_backward(d_inner, d_out);
            },
        );
        let d_u = u_wanted.then(|| {
            // A token is tap k - 1 of its own convolution, k - 2 of the next one's, ...
            let mut ends = Vec::with_capacity(tokens);
            let mut end = 0;
            for &count in rows.iter() {
                end += count;
                ends.extend(std::iter::repeat_n(end, count));
            }
            let mut d_u = vec![0.0; tokens * width];
            d_u.par_chunks_mut(width).enumerate().for_each(|(token, d_u)| {
                for later in 0..taps.min(ends[token] - token) {
                    let w = &by_tap[(taps - 1 - later) * width..][..width];
                    simd::add_products(d_u, &d_inner[(token + later) * width..][..width], w);
                }
            });
            tensor(d_u, [tokens, width])
        });
        let d_w = w_wanted.then(|| {
            let mut of_taps = vec![0.0; taps * width];
            of_taps.par_chunks_mut(width).enumerate().for_each(|(tap, d_w)| {
                for token in 0..tokens {
                    let x = match places.of(token)[tap] {
                        place @ 0.. => &floats(&u)[place as usize * width..][..width],
                        place => &floats(&past)[(-1 - place) as usize * width..][..width],
                    };
                    simd::add_products(d_w, x, &d_inner[token * width..][..width]);
                }
            });
            let by_channel = (0..width).flat_map(|channel| (0..taps).map(move |tap| (tap, channel)));
            tensor(by_channel.map(|(tap, channel)| of_taps[tap * width + channel]).collect(), [width, taps])
        });
        [d_u, d_w, None]
    }
}
