//! Rotary position embedding in Hugging Face's layout: element i of a head turns together with element i + d/2.

use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::buffer::{floats, tensor, uninitialized};
use crate::on_device::OnDevice;
use crate::simd;

const JOB_TOKENS: usize = 32;

/// Cosines and sines of the angles of each token of a micro-batch. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// [t, d/2], row-major.
    pub(crate) cosines: Arc<[f32]>,
    /// [t, d/2], row-major.
    pub(crate) sines: Arc<[f32]>,
    pub(crate) half: usize,
    #[cfg_attr(not(any(feature = "gpu", target_os = "macos")), expect(dead_code, reason = "GPUs only"))]
    pub(crate) on_device: OnDevice,
}

impl RopeTable {
    /// Angles `position · frequency`: the product in f32, as transformers forms it; its cosine and sine
    /// rounded once from f64; both multiplied by `scale` (1 for all but YaRN-like scalings).
    pub fn new(positions: &[u32], frequencies: &[f32], scale: f32) -> RopeTable {
        let angles = || positions.iter().flat_map(|&p| frequencies.iter().map(move |&f| f64::from(p as f32 * f)));
        RopeTable {
            cosines: angles().map(|a| a.cos() as f32 * scale).collect(),
            sines: angles().map(|a| a.sin() as f32 * scale).collect(),
            half: frequencies.len(),
            on_device: OnDevice::default(),
        }
    }
}

/// `x` [t, heads, d], contiguous; `sign` 1 turns, -1 turns back (which is the backward pass).
pub(crate) fn rotate(x: &FlexTensor, table: &RopeTable, sign: f32) -> FlexTensor {
    let [tokens, heads, width] = x.shape().dims::<3>();
    let half = table.half;
    assert!(width == 2 * half && table.cosines.len() == tokens * half, "rope table of another shape");
    let xs = floats(x);
    let mut out = uninitialized(xs.len());
    let job = JOB_TOKENS * heads * width;
    out.par_chunks_mut(job).zip(xs.par_chunks(job)).enumerate().for_each(|(n, (out, x))| {
        let tokens = out.chunks_mut(heads * width).zip(x.chunks(heads * width)).enumerate();
        for (t, (out, x)) in tokens {
            let at = (n * JOB_TOKENS + t) * half;
            let (cosines, sines) = (&table.cosines[at..at + half], &table.sines[at..at + half]);
            for (out, x) in out.chunks_mut(width).zip(x.chunks(width)) {
                simd::rotate(x, cosines, sines, sign, out);
            }
        }
    });
    tensor(out, x.shape())
}
