//! The backward pass of a micro-batch: at once, or layer by layer with gradient checkpointing.

use std::ops::Range;

use burn::tensor::{Gradients, Tensor};
use finetune_kernels::devices::submit;
use finetune_kernels::operations;

use crate::ModelError;
use crate::decoder::{self, Context};
use crate::model::{Batch, LossSum, Model, Randomness, Trained, data, flat_tokens, sums, targets};
use crate::weights::{Layer, Slot};

impl Model {
    /// Σ loss of a micro-batch; its gradient with respect to the trained parameters is added to `gradients`.
    ///
    /// With `checkpointing`, only the input of each layer is kept and the layer computed again on the way
    /// back: the same bits in less memory. The backward pass starts from `loss_scale`, a power of two, which is divided out
    /// of the gradients again: f16 has no small numbers (Micikevicius et al. 2018, "Mixed precision training").
    pub fn loss_and_gradients(
        &mut self,
        batch: &Batch<'_>,
        randomness: Randomness,
        checkpointing: bool,
        loss_scale: f32,
        gradients: &mut [f32],
    ) -> Result<LossSum, ModelError> {
        assert_eq!(gradients.len(), self.layout.len(), "gradients of another layout");
        if batch.trained_tokens() == 0 {
            return Ok(LossSum { row_losses: vec![0.0; batch.rows.len()], ..LossSum::default() });
        }
        let context = self.context(batch, Some(randomness));
        if checkpointing {
            return self.layer_by_layer(batch, &context, loss_scale, gradients);
        }
        let h = decoder::hidden(&self.weights, &self.config, &flat_tokens(batch), &context);
        let losses = self.output_losses(h, batch);
        self.look_at_memory();
        let found = scaled_sum(&losses, loss_scale).backward();
        self.look_at_memory();
        self.collect(found, loss_scale, gradients)?;
        sums(batch, losses)
    }

    /// The losses [n] of hidden states [t, hidden] that come out of the last layer.
    fn output_losses(&self, h: Tensor<2>, batch: &Batch<'_>) -> Tensor<1> {
        let h = operations::rms_norm(h, self.weights.norm.clone(), self.config.rms_norm_eps);
        operations::linear_cross_entropy(h, self.weights.output().clone(), targets(batch))
    }

    fn layer_by_layer(
        &mut self,
        batch: &Batch<'_>,
        context: &Context,
        loss_scale: f32,
        gradients: &mut [f32],
    ) -> Result<LossSum, ModelError> {
        let tokens = flat_tokens(batch);
        let first = self.first_trained_layer();
        let mut x = decoder::embed(&self.weights, &tokens, context).inner();
        // Inputs of the layers that the way back goes through.
        let mut inputs = Vec::new();
        // Untracked, or the graph would keep what this is meant not to keep; with the same dropout.
        let untracked = context.untracked();
        for (n, layer) in self.weights.layers.iter().enumerate() {
            if n >= first {
                inputs.push(x.clone());
            }
            x = decoder::layer(layer, &self.config, x, &untracked, None);
            submit(&self.placement.device);
        }
        let leaf = |tensor: Tensor<2>| tensor.autodiff().require_grad();
        let last = leaf(x);
        let losses = self.output_losses(last.clone(), batch);
        let mut found = scaled_sum(&losses, loss_scale).backward();
        self.look_at_memory();
        let mut d_out = last.grad_remove(&mut found).expect("the loss depends on the last layer");
        self.collect(found, loss_scale, gradients)?;
        for n in (first..self.weights.layers.len()).rev() {
            let input = leaf(inputs.pop().expect("an input for each layer"));
            let out = decoder::layer(&self.weights.layers[n], &self.config, input.clone(), context, None);
            let mut found = operations::gradient_seed(out, d_out).backward();
            self.look_at_memory();
            d_out = input.grad_remove(&mut found).expect("a layer's output depends on its input");
            self.collect(found, loss_scale, gradients)?;
        }
        if self.trained == Trained::All {
            let embedded = decoder::embed(&self.weights, &tokens, context);
            let found = operations::gradient_seed(embedded, d_out).backward();
            self.collect(found, loss_scale, gradients)?;
        }
        sums(batch, losses)
    }

    /// The lowest layer with trained parameters: nothing below it has to be differentiated.
    fn first_trained_layer(&self) -> usize {
        match self.trained {
            Trained::All => 0,
            _ => {
                let has_branch = |layer: &Layer| layer.linears().iter().any(|l| l.lora.is_some());
                self.weights.layers.iter().position(has_branch).unwrap_or(self.weights.layers.len())
            }
        }
    }

    /// Adds the gradients of the trained parameters that are there, divided by the loss scale.
    fn collect(&mut self, mut found: Gradients, loss_scale: f32, gradients: &mut [f32]) -> Result<(), ModelError> {
        let mut parts: Vec<(Range<usize>, Tensor<1>)> = Vec::new();
        let mut start = 0;
        self.visit_trained(&mut |_, slot| {
            let range = start..start + slot.len();
            start = range.end;
            let gradient = match slot {
                Slot::Vector(tensor) => tensor.grad_remove(&mut found),
                Slot::Matrix(tensor) => tensor.grad_remove(&mut found).map(|gradient| gradient.reshape([range.len()])),
            };
            parts.extend(gradient.map(|gradient| (range, gradient)));
        });
        let factor = 1.0 / loss_scale;
        let mut add = |range: Range<usize>, values: &[f32]| {
            for (sum, value) in gradients[range].iter_mut().zip(values) {
                *sum += value * factor;
            }
        };
        if self.placement.is_cpu() || parts.len() < 2 {
            for (range, part) in parts {
                add(range, &data(part)?);
            }
            return Ok(());
        }
        // From a GPU all of them come in one piece: each read waits for the device.
        let (ranges, parts): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        let all = data(Tensor::cat(parts, 0))?;
        let mut rest = all.as_slice();
        for range in ranges {
            let (now, later) = rest.split_at(range.len());
            add(range, now);
            rest = later;
        }
        Ok(())
    }
}

/// Σ losses · scale, where the backward pass starts.
fn scaled_sum(losses: &Tensor<1>, scale: f32) -> Tensor<1> {
    let sum = losses.clone().sum();
    if scale == 1.0 { sum } else { sum * scale }
}
