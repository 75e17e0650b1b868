//! The auxiliary loss that asks routers to use their experts evenly (Fedus et al. 2021, "Switch Transformers",
//! equations 4 to 6), as transformers' `load_balancing_loss_func` computes it.
//!
//! Of a row with `t` tokens, over all `l` layers with experts:
//!
//! ```text
//! loss = experts · Σ_e  (choices of e / (l · t)) · (Σ probability of e / (l · t))
//! ```
//!
//! Choices have no gradient. So the gradient of a token's probability is `experts · choices of e / (l · t)²`, which
//! needs the choices of all layers: it is known behind the forward pass, and each layer's backward pass is given it
//! there. Rows keep their own choices, so nothing depends on which rows lie together.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::Tensor;
use finetune_kernels::{LatePart, operations};
use rayon::prelude::*;

use crate::batch::Batch;
use crate::model::Model;

/// The balance of the routers in a pass over a micro-batch.
pub(crate) struct Balance {
    /// What the loss is multiplied by in what is minimised.
    coefficient: f64,
    /// (tokens, targets) of each row.
    rows: Vec<(usize, u64)>,
    /// Layers with experts.
    layers: usize,
    /// Experts of a layer.
    experts: usize,
    counted: Mutex<Counted>,
}

/// What the layers have added so far.
struct Counted {
    /// [row, expert]: how often the expert was chosen.
    choices: Vec<u64>,
    /// [row, expert]: Σ of its probabilities.
    probabilities: Vec<f64>,
    /// [row, expert]: the gradient of each token's probability, once all layers are counted.
    gradients: Option<Arc<[f64]>>,
    /// Layers whose gradients wait for those numbers, with the probabilities [t, expert] of their tokens.
    waiting: Vec<(Vec<f32>, LatePart)>,
}

impl Model {
    /// Adds the auxiliary loss of the routers to what is minimised from here on: of each row, `coefficient` times
    /// the loss, as often as the row has targets. Divided by all targets, as the losses of tokens are, that is the
    /// mean of the rows' losses as transformers computes them row by row. 0: nothing is added.
    ///
    /// # Panics
    /// If it is not 0, and the model has no such loss ([`crate::ModelConfig::no_router_loss`]).
    pub fn add_router_loss(&mut self, coefficient: f64) {
        assert!(coefficient == 0.0 || self.config.no_router_loss().is_none(), "a loss of routers");
        self.router_loss = coefficient;
    }

    /// For a pass with gradients; `None` where the loss counts nothing.
    pub(crate) fn balance(&self, batch: &Batch<'_>) -> Option<Arc<Balance>> {
        let experts = self.config.experts.as_ref().filter(|_| self.router_loss != 0.0)?.count;
        let layers = self.config.layers.iter().filter(|layer| layer.has_experts).count();
        let rows = batch.rows.iter().map(|row| (row.tokens.len(), row.targets())).collect();
        Some(Arc::new(Balance::new(self.router_loss, rows, layers, experts)))
    }
}

impl Balance {
    fn new(coefficient: f64, rows: Vec<(usize, u64)>, layers: usize, experts: usize) -> Balance {
        let places = rows.len() * experts;
        let counted = Counted {
            choices: vec![0; places],
            probabilities: vec![0.0; places],
            gradients: None,
            waiting: Vec::new(),
        };
        Balance { coefficient, rows, layers, experts, counted: Mutex::new(counted) }
    }

    fn counted(&self) -> MutexGuard<'_, Counted> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The logits [t, e] of a layer's router, with the gradient of the loss in their backward pass. `values`: the
    /// same on the host; `chosen` [t, k]: what the tokens have chosen. Layers are counted before
    /// [`Balance::settle`], each once.
    pub(crate) fn through(&self, logits: Tensor<2>, values: &[f32], chosen: &[u32], is_tracked: bool) -> Tensor<2> {
        let gradients = self.counted().gradients.clone();
        if gradients.is_some() && !is_tracked {
            return logits;
        }
        let probabilities = softmax(values, self.experts);
        if let Some(gradients) = gradients {
            let part = self.of_logits(&probabilities, &gradients);
            return operations::late_gradient(logits, LatePart::new(part.into()));
        }
        self.count(&probabilities, chosen);
        if !is_tracked {
            return logits;
        }
        let part = LatePart::default();
        let logits = operations::late_gradient(logits, LatePart::clone(&part));
        // Below the lowest trained layer there is no backward pass, and nobody else has the part.
        if Arc::strong_count(&part) > 1 {
            self.counted().waiting.push((probabilities, part));
        }
        logits
    }

    /// Adds the choices and probabilities of a layer, token by token: the sums of a row are the same whatever rows
    /// lie beside it.
    fn count(&self, probabilities: &[f32], chosen: &[u32]) {
        let (experts, tokens) = (self.experts, probabilities.len() / self.experts);
        let choices = chosen.len() / tokens.max(1);
        let mut counted = self.counted();
        let Counted { choices: counts, probabilities: sums, .. } = &mut *counted;
        let mut start = 0;
        let places = counts.chunks_mut(experts).zip(sums.chunks_mut(experts));
        for ((counts, sums), &(length, _)) in places.zip(&self.rows) {
            let end = start + length;
            for &expert in &chosen[start * choices..end * choices] {
                counts[expert as usize] += 1;
            }
            for of_token in probabilities[start * experts..end * experts].chunks(experts) {
                sums.iter_mut().zip(of_token).for_each(|(sum, probability)| *sum += f64::from(*probability));
            }
            start = end;
        }
    }

    /// Bytes of [`Balance::carried`].
    pub(crate) fn carried_bytes(&self) -> usize {
        self.rows.len() * self.experts * (size_of::<u64>() + size_of::<f64>())
    }

    /// What the layers have added so far, for the process that goes on with the next one.
    pub(crate) fn carried(&self) -> Vec<u8> {
        let counted = self.counted();
        let choices = counted.choices.iter().flat_map(|choices| choices.to_le_bytes());
        choices.chain(counted.probabilities.iter().flat_map(|sum| sum.to_le_bytes())).collect()
    }

    /// Goes on from what another process has carried here. Its sums begin with those that were made here before.
    pub(crate) fn go_on_from(&self, carried: &[u8]) {
        let mut counted = self.counted();
        let (choices, probabilities) = carried.split_at(carried.len() / 2);
        let eight = |bytes: &[u8]| bytes.try_into().expect("eight bytes");
        counted.choices = choices.chunks_exact(8).map(|bytes| u64::from_le_bytes(eight(bytes))).collect();
        counted.probabilities = probabilities.chunks_exact(8).map(|bytes| f64::from_le_bytes(eight(bytes))).collect();
    }

    /// Ends the forward pass: all layers are counted, and gradients are known. `scale`: the loss scale of the
    /// backward pass. Returns Σ loss · targets over the rows, without the coefficient.
    pub(crate) fn settle(&self, scale: f32) -> f64 {
        let mut counted = self.counted();
        let mut gradients = Vec::with_capacity(counted.choices.len());
        let mut sum = 0.0;
        let places = counted.choices.chunks(self.experts).zip(counted.probabilities.chunks(self.experts));
        for ((choices, probabilities), &(tokens, targets)) in places.zip(&self.rows) {
            // Of a row without tokens nothing was counted.
            let all = ((self.layers * tokens) as f64).max(1.0);
            let weight = targets as f64 * self.experts as f64 / (all * all);
            let products = choices.iter().zip(probabilities).map(|(choices, sum)| *choices as f64 * sum);
            sum += weight * products.sum::<f64>();
            let factor = weight * self.coefficient * f64::from(scale);
            gradients.extend(choices.iter().map(|&choices| factor * choices as f64));
        }
        let gradients: Arc<[f64]> = gradients.into();
        for (probabilities, part) in std::mem::take(&mut counted.waiting) {
            let set = part.set(self.of_logits(&probabilities, &gradients));
            debug_assert!(set.is_ok(), "each layer is counted once");
        }
        counted.gradients = Some(gradients);
        sum
    }

    /// The gradient of the logits [t, e] of a layer, from that of the probabilities, which are their softmax.
    fn of_logits(&self, probabilities: &[f32], gradients: &[f64]) -> Vec<f32> {
        let experts = self.experts;
        let row_of_token: Vec<usize> =
            self.rows.iter().enumerate().flat_map(|(row, &(length, _))| std::iter::repeat_n(row, length)).collect();
        let mut found = vec![0.0; probabilities.len()];
        let tokens = found.par_chunks_mut(experts).zip(probabilities.par_chunks(experts)).zip(&row_of_token);
        tokens.for_each(|((found, probabilities), &row)| {
            let gradients = &gradients[row * experts..(row + 1) * experts];
            let pairs = probabilities.iter().zip(gradients);
            let mean: f64 = pairs.clone().map(|(probability, gradient)| f64::from(*probability) * gradient).sum();
            for (found, (probability, gradient)) in found.iter_mut().zip(pairs) {
                *found = (f64::from(*probability) * (gradient - mean)) as f32;
            }
        });
        found
    }
}

/// The probabilities [t, e] of logits [t, e].
fn softmax(logits: &[f32], experts: usize) -> Vec<f32> {
    let mut probabilities = logits.to_vec();
    probabilities.par_chunks_mut(experts).for_each(|values| {
        let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        values.iter_mut().for_each(|value| *value = (*value - largest).exp());
        let sum: f64 = values.iter().map(|value| f64::from(*value)).sum();
        values.iter_mut().for_each(|value| *value = (f64::from(*value) / sum) as f32);
    });
    probabilities
}
