//! Prompts that go through one layer after the other together: where layers are read from the disk, each is read once
//! for all of them, and not once for each.
//!
//! Each prompt has products and attention of its own, so that it has the bits that it has alone.

use burn::tensor::Tensor;
use finetune_kernels::Segments;
use finetune_kernels::devices::submit;

use crate::decoder;
use crate::decoder::between::Between;
use crate::decoder::cache::{KeyValueCache, LayerCache, fill};
use crate::decoder::pass::Context;
use crate::error::ModelError;
use crate::model::Model;

/// A prompt on its way through the layers.
struct Pass {
    context: Context,
    /// What comes out of the layer that it is behind, [t, hidden].
    x: Tensor<2>,
    between: Between,
}

impl Model {
    /// Whether prompts are well read layer by layer: layers come from the disk, and no other process has a part in
    /// the passes, which would have to take them in the same order.
    pub(crate) fn reads_prompts_by_layer(&self) -> bool {
        let is_alone = self.weights.stage.is_none() && self.weights.sliced.is_none();
        self.reads_layers() && is_alone && !self.config.is_long(usize::MAX)
    }

    /// Logits [v] of the token after each of these prompts, and the caches with their keys and values. None is empty.
    ///
    /// # Errors
    /// If a layer cannot be read, or the device fails.
    pub(crate) fn read_by_layer(&self, prompts: &[&[u32]]) -> Result<(Vec<Vec<f32>>, Vec<KeyValueCache>), ModelError> {
        fill(prompts, &self.cache_windows(), |caches| self.in_pool(|| self.through_layers_together(prompts, caches)))
    }

    fn through_layers_together(
        &self,
        prompts: &[&[u32]],
        caches: &mut [Vec<LayerCache>],
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        let weights = &self.weights;
        let mut passes = prompts.iter().map(|prompt| self.before_layers(prompt)).collect::<Result<Vec<_>, _>>()?;
        let layers = weights.layers.len();
        for n in 0..layers {
            // The next pass begins with the first.
            let layer = weights.layer(n, Some((n + 1) % layers))?;
            for (pass, caches) in passes.iter_mut().zip(&mut *caches) {
                let Pass { context, x, between } = pass;
                *x = decoder::layer(&layer, n, x.clone(), context, between, Some(&mut caches[n]))?;
                weights.expect_experts()?;
                submit(&x.device());
            }
        }
        let logits = |(pass, prompt): (Pass, &&[u32])| {
            let logits = self.logits_behind(pass.x, &[prompt.len() - 1], &pass.context)?;
            Ok(logits.expect("no other process has the output layer"))
        };
        passes.into_iter().zip(prompts).map(logits).collect()
    }

    fn before_layers(&self, prompt: &[u32]) -> Result<Pass, ModelError> {
        let keys = Segments::rows(&[prompt.len()]).into();
        let context = self.reading(self.ropes_behind(0, prompt.len()), keys, None);
        let (x, between) = decoder::begin(&self.weights, prompt, &context)?;
        Ok(Pass { context, x, between })
    }
}
