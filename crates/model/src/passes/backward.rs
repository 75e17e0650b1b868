//! The backward pass of a micro-batch: at once, or layer by layer with gradient checkpointing.

use std::ops::Range;

use burn::tensor::{Gradients, Tensor, TensorData};
use finetune_kernels::operations;

use crate::adaptation::module_of;
use crate::batch::{Batch, LossSum, Randomness};
use crate::decoder::pass::Context;
use crate::decoder::{self, head};
use crate::error::ModelError;
use crate::model::{Model, Trained};
use crate::passes::handed::Handed;
use crate::readback::data;
use crate::tree::{Layer, Slot};

/// What is minimised: the sum of coefficient · loss over the targets of a micro-batch.
#[derive(Clone, Copy)]
pub enum Coefficients<'a> {
    /// All coefficients are 1: the sum of the losses.
    Ones,
    /// A function from the losses [n] of all targets, in the order of the rows, to their
    /// coefficients [n]. It is called once the losses are on the host, before the backward pass
    /// begins.
    Of(&'a dyn Fn(&[f32]) -> Vec<f32>),
}

/// How a micro-batch is differentiated.
#[derive(Clone, Copy)]
pub struct Backward<'a> {
    /// What dropout depends on besides the row.
    pub randomness: Randomness,
    /// Whether only the input of each layer is kept, and the layer computed again in the backward
    /// pass: the same bits in less memory.
    pub checkpointing: bool,
    /// A power of two that the backward pass starts from. The gradients are divided by it at the
    /// end. f16 cannot represent small gradients (Micikevicius et al. 2018, "Mixed precision
    /// training").
    pub loss_scale: f32,
    /// The coefficient of each loss in what is minimised.
    pub coefficients: Coefficients<'a>,
}

impl Model {
    /// Σ loss of a micro-batch. The gradient of what is minimised, with respect to the trained
    /// parameters, is added to `gradients` ([`Layout::len`](crate::Layout::len) elements).
    ///
    /// # Errors
    /// If the device fails or runs out of memory.
    ///
    /// # Panics
    /// If `gradients` do not have the layout's length.
    pub fn loss_and_gradients(
        &mut self,
        batch: &Batch<'_>,
        backward: Backward<'_>,
        gradients: &mut [f32],
    ) -> Result<LossSum, ModelError> {
        assert_eq!(gradients.len(), self.layout.len(), "gradients of another layout");
        if batch.trained_tokens() == 0 {
            return Ok(batch.no_losses());
        }
        let context = self.context(batch, Some(backward.randomness));
        if backward.checkpointing {
            return self.layer_by_layer(batch, &context, backward, gradients);
        }
        let h = decoder::hidden(&self.weights, &batch.flat_tokens(), &context)?;
        let losses = head::losses(&self.weights, h, batch.targets(), &context);
        self.look_at_memory();
        let found = backward.minimised(&losses)?.backward();
        self.look_at_memory();
        self.collect(found, backward.loss_scale, gradients)?;
        batch.sums(losses)
    }

    /// The same with gradient checkpointing: layers are computed again, from the last to the first.
    fn layer_by_layer(
        &mut self,
        batch: &Batch<'_>,
        context: &Context,
        backward: Backward<'_>,
        gradients: &mut [f32],
    ) -> Result<LossSum, ModelError> {
        let tokens = batch.flat_tokens();
        let first = self.first_trained_layer();
        // Untracked, because the graph would keep what checkpointing saves. The dropout is the
        // same.
        let untracked = context.untracked();
        let (x, mut between) = decoder::begin(&self.weights, &tokens, &untracked)?;
        // Inputs of the layers that are differentiated.
        let mut inputs = Vec::new();
        let mut keep = |n: usize, x: &Tensor<2>| inputs.extend((n >= first).then(|| x.clone()));
        let x = decoder::layers(&self.weights, x, &untracked, &mut between, None, &mut keep);
        let leaf = |tensor: Tensor<2>| tensor.autodiff().require_grad();
        let last = leaf(x);
        let losses = head::losses(&self.weights, last.clone(), batch.targets(), context);
        let mut found = backward.minimised(&losses)?.backward();
        self.look_at_memory();
        let mut d_out = last.grad_remove(&mut found).expect("the loss depends on the last layer");
        self.collect(found, backward.loss_scale, gradients)?;
        let mut handed = Handed::new(&self.weights, &between);
        for n in (first..self.weights.layers.len()).rev() {
            let input = leaf(inputs.pop().expect("an input for each layer"));
            let mut of_layer = handed.leaves(n);
            let out = decoder::layer(&self.weights.layers[n], n, input.clone(), context, &mut of_layer.between, None);
            let seed = operations::gradient_seed(out, d_out);
            let mut found = handed.seeded(n, seed, &of_layer.between).backward();
            self.look_at_memory();
            d_out = input.grad_remove(&mut found).expect("a layer's output depends on its input");
            handed.take(n, &of_layer, &mut found);
            self.collect(found, backward.loss_scale, gradients)?;
        }
        if self.trains_embedding() || self.trains_inputs() {
            let (embedded, between) = decoder::begin(&self.weights, &tokens, context)?;
            let seed = if self.trains_embedding() { Some(operations::gradient_seed(embedded, d_out)) } else { None };
            let found = handed.seeded_inputs(seed, &between).backward();
            self.collect(found, backward.loss_scale, gradients)?;
        }
        batch.sums(losses)
    }

    /// The lowest layer with trained parameters. Nothing below it has to be differentiated.
    fn first_trained_layer(&mut self) -> usize {
        if self.trains_embedding() || self.trains_inputs() {
            return 0;
        }
        let layers = &mut self.weights.layers;
        let saved = match &self.trained {
            Trained::Adapter(adaptation) => adaptation.saved.as_slice(),
            _ => &[],
        };
        let is_trained = |layer: &mut Layer| {
            layer.linears().iter().any(|linear| linear.lora.is_some())
                || layer.slots().iter().any(|slot| saved.iter().any(|saved| saved == module_of(slot.name())))
        };
        layers.iter_mut().position(is_trained).unwrap_or(layers.len())
    }

    /// Whether the gradient has to reach the embedding.
    fn trains_embedding(&self) -> bool {
        match &self.trained {
            Trained::Nothing => false,
            Trained::All => true,
            Trained::Adapter(adaptation) => {
                self.weights.embedding_lora.is_some() || adaptation.saves(&self.weights.embedding.name)
            }
        }
    }

    /// Whether the gradient has to reach what makes the inputs that layers have of their own.
    fn trains_inputs(&self) -> bool {
        let per_layer = self.weights.per_layer.as_ref();
        per_layer.is_some_and(|per_layer| {
            let is_saved = |name: &str| match &self.trained {
                Trained::Adapter(adaptation) => adaptation.saves(name),
                Trained::All => true,
                Trained::Nothing => false,
            };
            per_layer.projection.lora.is_some()
                || is_saved(&per_layer.projection.weight.name)
                || is_saved(&per_layer.norm.gamma.name)
        })
    }

    /// Adds the gradients that were found, divided by the loss scale.
    fn collect(&mut self, mut found: Gradients, loss_scale: f32, gradients: &mut [f32]) -> Result<(), ModelError> {
        let mut parts: Vec<(Range<usize>, Tensor<1>)> = Vec::new();
        let mut start = 0;
        for slot in self.trained() {
            let range = start..start + slot.len();
            start = range.end;
            let gradient = match slot {
                Slot::Vector(vector) => vector.values().grad_remove(&mut found),
                Slot::Matrix(matrix) => {
                    matrix.dense().grad_remove(&mut found).map(|gradient| gradient.reshape([range.len()]))
                }
            };
            parts.extend(gradient.map(|gradient| (range, gradient)));
        }
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
        // A GPU returns all of them in one piece, because each read waits for the device.
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

impl Backward<'_> {
    /// What the backward pass starts from: Σ coefficient · loss · scale.
    fn minimised(&self, losses: &Tensor<1>) -> Result<Tensor<1>, ModelError> {
        let weighted = match self.coefficients {
            Coefficients::Ones => losses.clone(),
            Coefficients::Of(weigh) => {
                let coefficients = weigh(&data(losses.clone().inner())?);
                assert_eq!(coefficients.len(), losses.dims()[0], "a coefficient for each target");
                let coefficients = TensorData::new(coefficients, losses.dims());
                losses.clone() * Tensor::from_data(coefficients, &losses.device().inner()).autodiff()
            }
        };
        let sum = weighted.sum();
        Ok(if self.loss_scale == 1.0 { sum } else { sum * self.loss_scale })
    }
}
