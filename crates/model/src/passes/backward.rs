//! The backward pass of a micro-batch, and how the gradients of trained parameters are collected.

use std::ops::Range;

use burn::tensor::{Gradients, Tensor, TensorData};

use crate::adaptation::module_of;
use crate::batch::{Batch, LossSum, Randomness};
use crate::decoder::pass::Context;
use crate::decoder::{self, head};
use crate::error::ModelError;
use crate::model::{Model, Trained};
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

/// A micro-batch, and the number of the sum that its gradients are added to.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// Its rows.
    pub batch: Batch<'a>,
    /// The number of the sum.
    pub sum: usize,
}

impl Model {
    /// Σ loss of a micro-batch. The gradient of what is minimised, with respect to the trained
    /// parameters, is added to `gradients` ([`Layout::len`](crate::Layout::len) elements).
    ///
    /// # Errors
    /// If the device fails or runs out of memory, or if a layer cannot be read.
    ///
    /// # Panics
    /// If `gradients` do not have the layout's length.
    pub fn loss_and_gradients(
        &mut self,
        batch: &Batch<'_>,
        backward: Backward<'_>,
        gradients: &mut [f32],
    ) -> Result<LossSum, ModelError> {
        let part = Part { batch: batch.clone(), sum: 0 };
        let mut sums = self.losses_and_gradients(&[part], backward, &mut [gradients], &mut || ())?;
        Ok(sums.remove(0))
    }

    /// [`Model::loss_and_gradients`] of several micro-batches, each with the sum of gradients that its own
    /// are added to. `alive` is called before each part of the work.
    ///
    /// With gradient checkpointing, and where layers are read from the disk or held by other processes, the
    /// micro-batches go through one layer after the other. Every parameter gets the gradients of the micro-batches in their order, so that
    /// the bits are those of one micro-batch after the other.
    ///
    /// # Errors
    /// As [`Model::loss_and_gradients`].
    ///
    /// # Panics
    /// If gradients do not have the layout's length.
    pub fn losses_and_gradients(
        &mut self,
        parts: &[Part<'_>],
        backward: Backward<'_>,
        sums: &mut [&mut [f32]],
        alive: &mut dyn FnMut(),
    ) -> Result<Vec<LossSum>, ModelError> {
        for sum in &*sums {
            assert_eq!(sum.len(), self.layout.len(), "gradients of another layout");
        }
        if backward.checkpointing || self.reads_layers() || self.weights.stage.is_some() {
            return self.layer_by_layer(parts, backward, sums, alive);
        }
        let one_graph = |part: &Part<'_>| {
            alive();
            self.in_one_graph(&part.batch, backward, sums[part.sum])
        };
        parts.iter().map(one_graph).collect()
    }

    /// A micro-batch with a graph over all layers.
    fn in_one_graph(
        &mut self,
        batch: &Batch<'_>,
        backward: Backward<'_>,
        gradients: &mut [f32],
    ) -> Result<LossSum, ModelError> {
        if batch.trained_tokens() == 0 {
            return Ok(batch.no_losses());
        }
        let context = self.context(batch, Some(backward.randomness));
        let h = decoder::hidden(&self.weights, &batch.flat_tokens(), &context)?;
        let losses = head::losses(&self.weights, h, batch.targets(), &context);
        let router_loss = backward.settled(&context);
        self.look_at_memory();
        let found = backward.minimised(&losses)?.backward();
        self.look_at_memory();
        self.collect(found, backward.loss_scale, gradients)?;
        Ok(LossSum { router_loss, ..batch.sums(losses.inner())? })
    }

    /// The lowest layer with trained parameters. Nothing below it has to be differentiated.
    pub(super) fn first_trained_layer(&mut self) -> usize {
        if self.trains_embedding() || self.trains_inputs() {
            return 0;
        }
        let layers = &mut self.weights.layers;
        let saved = match &self.trained {
            Trained::Adapter(adaptation) => adaptation.saved.as_slice(),
            _ => &[],
        };
        let is_trained = |layer: &mut Layer| {
            layer.places().iter().any(|place| place.lora.is_some())
                || layer.slots().iter().any(|slot| saved.iter().any(|saved| saved == module_of(slot.name())))
        };
        layers.iter_mut().position(is_trained).unwrap_or(layers.len())
    }

    /// Whether the gradient has to reach the embedding.
    pub(super) fn trains_embedding(&self) -> bool {
        match &self.trained {
            Trained::Nothing => false,
            Trained::All => true,
            Trained::Adapter(adaptation) => {
                self.weights.embedding_lora.is_some() || adaptation.saves(&self.weights.embedding.name)
            }
        }
    }

    /// Whether the gradient has to reach what makes the inputs that layers have of their own.
    pub(super) fn trains_inputs(&self) -> bool {
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
    pub(super) fn collect(
        &mut self,
        mut found: Gradients,
        loss_scale: f32,
        gradients: &mut [f32],
    ) -> Result<(), ModelError> {
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
    /// Ends the forward pass of the routers' auxiliary loss: [`Balance::settle`](crate::decoder::balance::Balance).
    pub(super) fn settled(&self, context: &Context) -> f64 {
        context.balance.as_ref().map_or(0.0, |balance| balance.settle(self.loss_scale))
    }

    /// What the backward pass starts from: Σ coefficient · loss · scale.
    pub(super) fn minimised(&self, losses: &Tensor<1>) -> Result<Tensor<1>, ModelError> {
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
