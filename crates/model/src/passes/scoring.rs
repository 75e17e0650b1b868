//! What the model thinks of the tokens of a prompt, while it reads them.

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::decoder::cache::KeyValueCache;
use crate::decoder::head;
use crate::decoder::pass::Context;
use crate::error::ModelError;
use crate::model::Model;
use crate::passes::choices::Choice;
use crate::passes::sampling::all_finite;
use crate::passes::token_rules::{ChosenToken, logprobs};
use crate::readback::data;

/// Rows whose logits are there at a time: a vocabulary of 150,000 takes 600 KB for each.
const ROWS: usize = 64;

impl Model {
    /// As [`Model::begin_read`], with the logarithms of probabilities of the tokens behind these, of which `next` is
    /// behind the last one, and of so many of the likeliest in their places: as if each had been chosen. The logits have
    /// the same bits. Without the output layer there are none. The text must not become so long that its positions are
    /// others.
    pub(crate) fn begin_scored(
        &self,
        tokens: &[u32],
        next: Option<u32>,
        cache: &mut KeyValueCache,
        top: usize,
    ) -> Result<(Option<Vec<f32>>, Vec<Choice>), ModelError> {
        let targets: Vec<u32> = tokens.iter().skip(1).copied().chain(next).collect();
        let is_long = self.config.is_long(cache.tokens().len() + tokens.len());
        let read = cache.read(tokens, &self.cache_windows(), |past, keys, layers| {
            let context = self.reading(self.ropes_behind(past, tokens.len()), keys, None);
            self.in_pool(|| {
                let x = self.last_layer(tokens, &context, layers)?;
                let scores = self.scores(&x, &targets, &context, top)?;
                Ok::<_, ModelError>((self.logits_behind(x, &[tokens.len() - 1], &context)?, scores))
            })
        })?;
        cache.is_long = is_long;
        Ok(read)
    }

    /// Of each target what is thought of it behind the hidden state in its place.
    fn scores(&self, x: &Tensor<2>, targets: &[u32], context: &Context, top: usize) -> Result<Vec<Choice>, ModelError> {
        let mut scores = Vec::with_capacity(targets.len());
        if !self.weights.holds_head() {
            return Ok(scores);
        }
        for (n, targets) in targets.chunks(ROWS).enumerate() {
            let rows = x.clone().narrow(0, n * ROWS, targets.len());
            let logits = data(head::logits(&self.weights, rows, context))?;
            let of_row = |(logits, target): (&[f32], &u32)| match all_finite(logits) {
                true => Some(Ok(ChosenToken { token: *target, logprobs: Some(logprobs(logits, *target, top)) })),
                false => Some(Err(ModelError::NotANumber { generated: 0 })),
            };
            let each = logits.par_chunks(logits.len() / targets.len()).zip(targets);
            scores.extend(each.map(of_row).collect::<Vec<_>>());
        }
        Ok(scores)
    }
}
