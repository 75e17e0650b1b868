//! What operations take beside tensors. Both backends read these.

use std::sync::Arc;

use finetune_random::Stream;

use crate::on_device::OnDevice;
use crate::segments::Segments;

/// Dropout of a LoRA branch's input.
///
/// The mask is a function of (stream, row, position, column) alone. It is therefore computed again
/// in the backward pass, and does not depend on the micro-batch or the rank that a row is in.
#[derive(Clone, Debug)]
pub struct Dropout {
    /// The probability that an element is dropped, in [0, 1).
    pub probability: f32,
    /// The random numbers of the step and the module.
    pub stream: Stream,
    /// For each of t tokens: the row of the dataset that it belongs to, and its position in that
    /// row.
    pub tokens: Arc<[(u32, u32)]>,
}

/// Cosines and sines of the rotary angles of each token of a micro-batch. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// [t, d/2], row-major.
    pub(crate) cosines: Arc<[f32]>,
    /// [t, d/2], row-major.
    pub(crate) sines: Arc<[f32]>,
    /// d/2.
    pub(crate) half: usize,
    #[cfg_attr(not(gpu_backend), expect(dead_code, reason = "GPUs only"))]
    pub(crate) on_device: OnDevice,
}

impl RopeTable {
    /// The table of the angles `position · frequency`, for positions [t] and frequencies [d/2] in
    /// radians per token.
    ///
    /// The product is formed in f32, as transformers does. Its cosine and sine are rounded once
    /// from f64, then multiplied by the `factor` of the position (1 for all but YaRN-like scalings).
    pub fn new(positions: &[u32], frequencies: &[f32], factor: impl Fn(u32) -> f32) -> RopeTable {
        RopeTable::of_each(positions.iter().map(|&position| (position, frequencies)), frequencies.len(), factor)
    }

    /// The same, with the frequencies [half] of each position.
    pub fn of_each<'a>(
        positions: impl Iterator<Item = (u32, &'a [f32])> + Clone,
        half: usize,
        factor: impl Fn(u32) -> f32,
    ) -> RopeTable {
        let angles = || {
            let each = positions.clone().map(|(position, frequencies)| (position, frequencies, factor(position)));
            each.flat_map(|(p, frequencies, factor)| {
                frequencies.iter().map(move |&f| (f64::from(p as f32 * f), factor))
            })
        };
        RopeTable {
            cosines: angles().map(|(a, factor)| a.cos() as f32 * factor).collect(),
            sines: angles().map(|(a, factor)| a.sin() as f32 * factor).collect(),
            half,
            on_device: OnDevice::default(),
        }
    }

    /// Elements of a head that it turns, d.
    pub fn width(&self) -> usize {
        2 * self.half
    }
}

/// What a gated feed-forward part applies to its gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x σ(x)` (Shazeer 2020, "GLU Variants Improve Transformer": SwiGLU).
    Silu,
    /// `x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`, the approximation of GELU by tanh (Hendrycks and
    /// Gimpel 2016).
    GeluTanh,
    /// `g σ(1.702 g) (u + 1)` of gate and up, with g at most 7 and u between -7 and 7 (OpenAI 2025,
    /// "gpt-oss").
    Clamped,
}

/// Which keys a query sees, and how scores are scaled.
#[derive(Clone, Debug)]
pub struct AttentionShape {
    /// The rows: queries see keys of their own row only.
    pub segments: Segments,
    /// The factor of the scores, 1 / sqrt(d) in most families.
    pub scale: f32,
    /// The number of keys that a query sees, up to and including its own (Mistral's sliding
    /// window). `None`: all keys up to its own.
    pub window: Option<usize>,
    /// What scores are bounded to, by `cap · tanh(score / cap)` (Bello et al. 2016; Gemma 2). `None`: they
    /// are not.
    pub softcap: Option<f32>,
}

/// The tokens of a micro-batch that are predicted from, and the tokens to predict. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Targets {
    pub(crate) positions: Arc<[u32]>,
    pub(crate) tokens: Arc<[u32]>,
    /// What their logits are bounded to, as [`AttentionShape::softcap`].
    pub(crate) softcap: Option<f32>,
    #[cfg_attr(not(gpu_backend), expect(dead_code, reason = "GPUs only"))]
    pub(crate) on_device: OnDevice,
}

impl Targets {
    /// n targets: `positions[n]` is an index into the t tokens of the micro-batch, `tokens[n]` the
    /// token that follows it.
    ///
    /// # Panics
    /// If the lists differ in length.
    pub fn new(positions: Vec<u32>, tokens: Vec<u32>) -> Targets {
        assert_eq!(positions.len(), tokens.len(), "one target for each position");
        Targets { positions: positions.into(), tokens: tokens.into(), softcap: None, on_device: OnDevice::default() }
    }

    /// The same, of logits that are bounded by `cap · tanh(logit / cap)`.
    pub fn capped(self, softcap: Option<f32>) -> Targets {
        Targets { softcap, ..self }
    }

    /// The number of targets, n.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are no targets.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}
