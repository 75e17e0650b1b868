//! What operations take beside tensors. Both backends read these.

use std::sync::Arc;

use finetune_random::Stream;

use crate::on_device::OnDevice;
use crate::segments::Segments;

/// Dropout of a LoRA branch's input. The mask is a function of (stream, row, position, column) alone, so it
/// is made again in the backward pass, and does not depend on the micro-batch or the rank that a row is in.
#[derive(Clone, Debug)]
pub struct Dropout {
    pub probability: f32,
    pub stream: Stream,
    /// For each token: the row of the dataset it belongs to, and its position in it.
    pub tokens: Arc<[(u32, u32)]>,
}

/// Cosines and sines of the angles of each token of a micro-batch. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// [t, d/2], row-major.
    pub(crate) cosines: Arc<[f32]>,
    /// [t, d/2], row-major.
    pub(crate) sines: Arc<[f32]>,
    pub(crate) half: usize,
    #[cfg_attr(not(gpu_backend), expect(dead_code, reason = "GPUs only"))]
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

/// Which keys a query sees, and how scores are scaled.
#[derive(Clone, Debug)]
pub struct AttentionShape {
    pub segments: Segments,
    /// Scores are multiplied by this, 1 / sqrt(d) in all families here.
    pub scale: f32,
    /// A query sees this many keys up to and including its own (Mistral); all of them where `None`.
    pub window: Option<usize>,
}

/// Which tokens of the micro-batch are predicted from, and what they should predict. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Targets {
    pub(crate) positions: Arc<[u32]>,
    pub(crate) tokens: Arc<[u32]>,
    #[cfg_attr(not(gpu_backend), expect(dead_code, reason = "GPUs only"))]
    pub(crate) on_device: OnDevice,
}

impl Targets {
    /// `positions[n]` indexes the tokens of the micro-batch; `tokens[n]` is the token that follows it.
    pub fn new(positions: Vec<u32>, tokens: Vec<u32>) -> Targets {
        assert_eq!(positions.len(), tokens.len(), "one target for each position");
        Targets { positions: positions.into(), tokens: tokens.into(), on_device: OnDevice::default() }
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}
