//! What a model and its adaptation decide about memory, whatever its placement.

use std::collections::BTreeSet;

use finetune_model::{
    Adaptation, LayerKept, ModelConfig, Stage, TrainedElements, expected_tensors, footprint, kept_layers,
};

use super::{FLOAT, Sizes, StepShape, sizes};

/// Counting takes longer than the estimate: a mixture has tens of thousands of matrices.
pub(crate) struct Counted {
    pub(super) sizes: Sizes,
    /// What is trained of each part of the model; `None` if all weights are.
    trained: Option<TrainedElements>,
    /// What of it are modules that are trained in full.
    in_full: TrainedElements,
    /// What the layers that are differentiated keep.
    pub(super) layers: Vec<LayerKept>,
    /// The shapes [o, i] of the layers' matrices, each once.
    matrices: BTreeSet<[usize; 2]>,
}

impl Counted {
    pub(super) fn new(config: &ModelConfig, adaptation: Option<&Adaptation>) -> Counted {
        let modules_alone = |adaptation: &Adaptation| Adaptation { targets: Vec::new(), ..adaptation.clone() };
        let in_full = |adaptation| TrainedElements::of(config, &modules_alone(adaptation));
        let of_layers = |(name, shape): (String, Vec<usize>)| match *shape {
            [outputs, inputs] if name.contains(".layers.") => Some([outputs, inputs]),
            _ => None,
        };
        Counted {
            sizes: sizes(config, adaptation),
            trained: adaptation.map(|adaptation| TrainedElements::of(config, adaptation)),
            in_full: adaptation.map(in_full).unwrap_or_default(),
            layers: kept_layers(config, adaptation),
            matrices: expected_tensors(config).into_iter().filter_map(of_layers).collect(),
        }
    }

    /// Trained parameters of a process that holds these layers; `None`: all.
    pub(crate) fn trained_on(&self, stage: Option<&Stage>) -> u64 {
        self.trained.as_ref().zip(stage).map_or(self.sizes.trained, |(trained, stage)| trained.on(stage))
    }

    /// Bytes of trained parameters, their gradients and moments, on such a process.
    pub(super) fn trained_bytes(&self, stage: Option<&Stage>, step: &StepShape, cpu: bool) -> u64 {
        let trained = self.trained_on(stage);
        let in_full = stage.map_or(self.in_full.total(), |stage| self.in_full.on(stage));
        // On the CPU: values, gradients and two moments on the host; values, old and new, and gradients as tensors.
        // Of the gradients there are only those of one layer where layers are computed again. Of modules that are
        // trained in full beside LoRA ten times the values were measured.
        let copies = match (cpu, step.full, step.checkpointing) {
            (true, true, _) | (true, _, true) => 6,
            (true, false, false) => 7,
            // The host has the moments. On the card: values, old and new, gradients one by one and together.
            (false, ..) => 4,
        };
        let more_in_full = if cpu && !step.full { 10 - copies } else { 0 };
        // Gradients of each share. Where shares make steps alone each has parameters, two moments, and, where all meet,
        // its change: 14.4 vectors more were measured with four shares, 2.4 with one.
        let of_shares = step.shares.saturating_sub(1) + if step.alone { 4 * step.shares } else { 0 };
        let of_shares = if cpu { of_shares } else { 0 };
        FLOAT * (trained * (copies + of_shares) + in_full * more_in_full)
    }

    /// Bytes of the largest block of a weight that is decoded or widened to f32 while so many threads multiply.
    pub(super) fn widened(&self, config: &ModelConfig, step: &StepShape, threads: usize) -> u64 {
        let of_layers = self.matrices.iter().map(|shape| footprint::cpu_widened(*shape, threads)).max().unwrap_or(0);
        // Only the process with the last layer computes losses.
        let of_output = match step.trained_tokens {
            0 => 0,
            _ => footprint::cpu_widened_output([config.vocabulary, config.hidden_size], threads),
        };
        of_layers.max(of_output)
    }
}
