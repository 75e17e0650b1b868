//! Passes that go layer by layer with several micro-batches, in the order that the schedule says
//! ([`Stage::passes`](crate::Stage::passes)): gradient checkpointing, layers that are read from the disk, and layers
//! that other processes hold.

use std::borrow::Cow;

use burn::tensor::{Gradients, Tensor};
use finetune_kernels::devices::submit;
use finetune_kernels::operations;

use crate::batch::{Batch, LossSum};
use crate::decoder::between::Between;
use crate::decoder::pass::Context;
use crate::decoder::{self, head};
use crate::error::ModelError;
use crate::model::Model;
use crate::passes::backward::{Backward, Part};
use crate::passes::handed::Handed;
use crate::stage::Order;
use crate::tree::Layer;

/// A micro-batch on its way through the layers.
struct Pass<'a> {
    batch: &'a Batch<'a>,
    tokens: Vec<u32>,
    context: Context,
    /// What comes out of the layer that it is behind, [t, hidden].
    x: Tensor<2>,
    between: Between,
    /// The inputs of the layers that are differentiated, [t, hidden].
    inputs: Vec<Tensor<2>>,
}

/// A micro-batch on its way back.
struct WayBack<'a> {
    part: &'a Part<'a>,
    tokens: Vec<u32>,
    context: Context,
    inputs: Vec<Tensor<2>>,
    handed: Handed,
    /// The gradient of what comes out of the layer that it is behind, [t, hidden]. Before it has arrived from
    /// another process: anything of the same shape.
    d_out: Tensor<2>,
}

/// Starts a graph of its own.
fn leaf(tensor: Tensor<2>) -> Tensor<2> {
    tensor.autodiff().require_grad()
}

impl Model {
    /// Σ losses of several micro-batches without gradients or dropout, which go through one layer after the
    /// other. `each` is called before each part of the work; if it returns false, the result is `None`.
    ///
    /// # Errors
    /// If the device fails or runs out of memory, or if a layer cannot be read.
    pub fn losses(
        &self,
        batches: &[Batch<'_>],
        each: &mut dyn FnMut() -> bool,
    ) -> Result<Option<Vec<LossSum>>, ModelError> {
        let mut passes = Vec::new();
        for batch in batches.iter().filter(|batch| batch.trained_tokens() > 0) {
            passes.push(self.pass(batch, self.context(batch, None))?);
        }
        let next = self.weights.held().first().copied();
        if !passes.is_empty() && !self.through_layers(&mut passes, usize::MAX, next, each)? {
            return Ok(None);
        }
        let mut passes = passes.into_iter();
        let mut sums = Vec::new();
        for batch in batches {
            sums.push(match batch.trained_tokens() {
                0 => batch.no_losses(),
                _ if !self.weights.holds_head() => batch.no_losses(),
                _ => {
                    let Pass { x, context, .. } = passes.next().expect("one for each batch with targets");
                    batch.sums(head::losses(&self.weights, x, batch.targets(), &context))?
                }
            });
        }
        Ok(Some(sums))
    }

    /// [`Model::losses_and_gradients`] with layers that are computed again, from the last to the first.
    pub(super) fn layer_by_layer(
        &mut self,
        parts: &[Part<'_>],
        backward: Backward<'_>,
        sums: &mut [&mut [f32]],
        alive: &mut dyn FnMut(),
    ) -> Result<Vec<LossSum>, ModelError> {
        let (first, held) = (self.first_trained_layer(), self.weights.held());
        let parts_with_targets = || parts.iter().filter(|part| part.batch.trained_tokens() > 0);
        let mut passes = Vec::new();
        for part in parts_with_targets() {
            // Untracked, because the graph would keep what checkpointing saves. The dropout is the same.
            let context = self.context(&part.batch, Some(backward.randomness)).untracked();
            passes.push(self.pass(&part.batch, context)?);
        }
        if passes.is_empty() {
            return Ok(parts.iter().map(|part| part.batch.no_losses()).collect());
        }
        // Of the layers of the way back the last one is still there when it begins.
        let turn = held.iter().copied().filter(|&n| n >= first).rev().nth(1).or(held.first().copied());
        self.through_layers(&mut passes, first, turn, &mut || {
            alive();
            true
        })?;
        let (mut of_parts, mut back) = (Vec::new(), Vec::new());
        for (part, pass) in parts_with_targets().zip(passes) {
            alive();
            let (losses, way) = self.turn(part, pass, backward, sums)?;
            of_parts.push(losses);
            back.push(way);
        }
        self.back_through_layers(&mut back, first, backward, sums, alive)?;
        if self.weights.holds(0) {
            for way in back {
                self.back_to_embeddings(way, backward, sums)?;
            }
        }
        let mut of_parts = of_parts.into_iter();
        let of_part = |part: &Part<'_>| match part.batch.trained_tokens() {
            0 => part.batch.no_losses(),
            _ => of_parts.next().expect("one for each part with targets"),
        };
        Ok(parts.iter().map(of_part).collect())
    }

    /// In memory layers that follow each other cost nothing to come back to, and the next process waits for less.
    fn order(&self) -> Order {
        if self.reads_layers() { Order::Layers } else { Order::MicroBatches }
    }

    /// A micro-batch before the first layer.
    fn pass<'a>(&self, batch: &'a Batch<'a>, context: Context) -> Result<Pass<'a>, ModelError> {
        let tokens = batch.flat_tokens();
        let (x, between) = decoder::begin(&self.weights, &tokens, &context)?;
        Ok(Pass { batch, tokens, context, x, between, inputs: Vec::new() })
    }

    /// All layers that this process holds, with all micro-batches. The inputs of the layers from `kept` on are kept.
    /// Behind the last layer, `then` is the next one that is needed. Returns false as soon as `each` does.
    fn through_layers(
        &self,
        passes: &mut [Pass<'_>],
        kept: usize,
        then: Option<usize>,
        each: &mut dyn FnMut() -> bool,
    ) -> Result<bool, ModelError> {
        let acts = self.weights.of_stage(|stage, mine| stage.forward(mine, passes.len(), self.order()));
        let of_layers: Vec<_> = acts.chunk_by(|one, other| one.layer == other.layer).collect();
        for (place, acts) in of_layers.iter().enumerate() {
            let n = acts[0].layer;
            let behind = |by: usize| of_layers.get(place + by).map(|acts| acts[0].layer);
            let mut layer = self.weights.layer(n, behind(1).or(then))?;
            for (act, left) in acts.iter().zip((0..acts.len()).rev()) {
                let pass = &mut passes[act.micro_batch];
                if !each() {
                    return Ok(false);
                }
                pass.x = self.weights.arrived(n.checked_sub(1), pass.x.clone())?;
                let balance = pass.context.balance.as_deref();
                self.weights.counts_arrived(n.checked_sub(1), balance)?;
                if n >= kept {
                    pass.inputs.push(pass.x.clone());
                }
                pass.x = decoder::layer(&layer, n, pass.x.clone(), &pass.context, &mut pass.between, None)?;
                self.weights.expect_experts()?;
                if left == 0 {
                    layer = Cow::Borrowed(&self.weights.layers[n]);
                    self.weights.layer_ahead(behind(1), behind(2).or(then))?;
                }
                self.weights.leave(Some(n + 1), &pass.x)?;
                self.weights.counts_leave(Some(n + 1), balance)?;
                submit(&pass.x.device());
            }
        }
        Ok(true)
    }

    /// The loss of a micro-batch that is behind the last layer, and the beginning of its way back. A process
    /// without the last layer has no part in the loss.
    fn turn<'a>(
        &mut self,
        part: &'a Part<'a>,
        pass: Pass<'_>,
        backward: Backward<'_>,
        sums: &mut [&mut [f32]],
    ) -> Result<(LossSum, WayBack<'a>), ModelError> {
        let Pass { batch, tokens, context, x, between, inputs } = pass;
        // Choices of experts were counted on the way forward.
        let context = Context { expert_use: None, ..context.tracked() };
        self.weights.counts_of_all(context.balance.as_deref())?;
        let router_loss = backward.settled(&context);
        let handed = Handed::new(&self.weights, &between);
        if !self.weights.holds_head() {
            let way = WayBack { part, tokens, context, inputs, handed, d_out: x };
            return Ok((batch.no_losses(), way));
        }
        let last = leaf(x);
        let losses = head::losses(&self.weights, last.clone(), batch.targets(), &context);
        let mut found = backward.minimised(&losses)?.backward();
        self.look_at_memory();
        let d_out = last.grad_remove(&mut found).expect("the loss depends on the last layer");
        self.collect(found, backward.loss_scale, sums[part.sum])?;
        let sums = LossSum { router_loss, ..batch.sums(losses.inner())? };
        Ok((sums, WayBack { part, tokens, context, inputs, handed, d_out }))
    }

    /// All layers that are differentiated and that this process holds, with all micro-batches, from the last to the
    /// first.
    fn back_through_layers(
        &mut self,
        back: &mut [WayBack<'_>],
        first: usize,
        backward: Backward<'_>,
        sums: &mut [&mut [f32]],
        alive: &mut dyn FnMut(),
    ) -> Result<(), ModelError> {
        // The next pass begins with the first.
        let then = self.weights.held().first().copied();
        let acts = self.weights.of_stage(|stage, mine| stage.back(mine, back.len(), first, self.order()));
        let of_layers: Vec<_> = acts.chunk_by(|one, other| one.layer == other.layer).collect();
        for (place, acts) in of_layers.iter().enumerate() {
            let n = acts[0].layer;
            let behind = |by: usize| of_layers.get(place + by).map(|acts| acts[0].layer);
            let mut layer = self.weights.layer(n, behind(1).or(then))?.into_owned();
            for (act, left) in acts.iter().zip((0..acts.len()).rev()) {
                alive();
                let way = &mut back[act.micro_batch];
                way.d_out = self.weights.arrived(Some(n + 1), way.d_out.clone())?;
                let found = self.back_through(&layer, n, way)?;
                if left == 0 {
                    // Without the matrices that were read: the next layer takes their memory.
                    layer = self.weights.layers[n].clone();
                    self.weights.layer_ahead(behind(1), behind(2).or(then))?;
                }
                // From here on a GPU is waited for.
                if n > first {
                    self.weights.leave(n.checked_sub(1), &way.d_out)?;
                }
                self.collect(found, backward.loss_scale, sums[way.part.sum])?;
            }
        }
        Ok(())
    }

    /// Layer `n` again, and its backward pass: the gradients of what is trained in it.
    fn back_through(&mut self, layer: &Layer, n: usize, way: &mut WayBack<'_>) -> Result<Gradients, ModelError> {
        let input = leaf(way.inputs.pop().expect("an input for each layer"));
        let mut of_layer = way.handed.leaves(n);
        let out = decoder::layer(layer, n, input.clone(), &way.context, &mut of_layer.between, None)?;
        let seed = operations::gradient_seed(out, way.d_out.clone());
        let mut found = way.handed.seeded(n, seed, &of_layer.between).backward();
        self.weights.expect_experts()?;
        self.look_at_memory();
        way.d_out = input.grad_remove(&mut found).expect("a layer's output depends on its input");
        way.handed.take(n, &of_layer, &mut found);
        Ok(found)
    }

    /// The backward pass of the embeddings and of the inputs that layers have of their own.
    fn back_to_embeddings(
        &mut self,
        way: WayBack<'_>,
        backward: Backward<'_>,
        sums: &mut [&mut [f32]],
    ) -> Result<(), ModelError> {
        if !self.trains_embedding() && !self.trains_inputs() {
            return Ok(());
        }
        let (embedded, between) = decoder::begin(&self.weights, &way.tokens, &way.context)?;
        let seed = if self.trains_embedding() { Some(operations::gradient_seed(embedded, way.d_out)) } else { None };
        let found = way.handed.seeded_inputs(seed, &between).backward();
        self.collect(found, backward.loss_scale, sums[way.part.sum])
    }
}
