//! Passes without gradients over whole rows: losses and logits.

use std::collections::BTreeMap;

use finetune_kernels::{RopeTable, Segments};

use crate::adaptation::Adaptation;
use crate::batch::{Batch, BatchRow, LossSum, Randomness};
use crate::config::Rope;
use crate::decoder::pass::{BatchDropout, Context};
use crate::decoder::{self, head};
use crate::error::ModelError;
use crate::model::{Model, Trained};
use crate::readback::data;

impl Model {
    /// Σ loss of a micro-batch, without gradients or dropout.
    ///
    /// # Errors
    /// If the device fails or runs out of memory, or if a layer cannot be read.
    pub fn loss(&self, batch: &Batch<'_>) -> Result<LossSum, ModelError> {
        let sums = self.losses(std::slice::from_ref(batch), &mut || true)?;
        Ok(sums.expect("nothing ends it").remove(0))
    }

    /// Logits [t, v] of one row, row-major, for tests, probes and comparisons.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, or the device fails.
    pub fn logits(&self, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        self.check_tokens(tokens)?;
        let trained = vec![false; tokens.len()];
        let batch = Batch { rows: vec![BatchRow { id: 0, tokens, trained: &trained }] };
        let context = self.context(&batch, None);
        let h = decoder::hidden(&self.weights, tokens, &context)?;
        data(head::logits(&self.weights, h, &context))
    }

    /// What a pass over the batch depends on. `training`: the randomness of a pass with gradients.
    pub(crate) fn context(&self, batch: &Batch<'_>, training: Option<Randomness>) -> Context {
        let lengths: Vec<usize> = batch.rows.iter().map(|row| row.tokens.len()).collect();
        let positions: Vec<u32> = lengths.iter().flat_map(|&length| 0..length as u32).collect();
        let dropout = match (&self.trained, training) {
            (Trained::Adapter(Adaptation { dropout, .. }), Some(randomness)) if *dropout > 0.0 => {
                let ids = batch.rows.iter().flat_map(|row| std::iter::repeat_n(row.id, row.tokens.len()));
                Some(BatchDropout {
                    probability: *dropout as f32,
                    randomness,
                    tokens: ids.zip(positions.iter().copied()).collect(),
                })
            }
            _ => None,
        };
        Context {
            ropes: self.rope_tables(&positions, lengths.iter().map(|&length| (length, length))),
            segments: Segments::rows(&lengths),
            windowed: BTreeMap::new(),
            compute: self.placement.compute(),
            training: training.is_some(),
            dropout,
            expert_use: training.map(|_| self.expert_use.clone()),
            balance: training.and_then(|_| self.balance(batch)),
            sliced: self.weights.sliced.clone(),
            branches: None,
        }
    }

    /// Tables of the rotary embeddings at these positions. `rows`: of each row how many of the positions are
    /// its own, and how many tokens it has in all.
    pub(crate) fn rope_tables(
        &self,
        positions: &[u32],
        rows: impl Iterator<Item = (usize, usize)> + Clone,
    ) -> Vec<RopeTable> {
        let ropes = self.config.ropes.iter().zip(&self.frequencies);
        let table = |(rope, frequencies): (&Rope, &[Vec<f32>; 2])| {
            let of_rows = rows.clone().flat_map(|(own, tokens)| std::iter::repeat_n(rope.is_long(tokens), own));
            let each = positions.iter().zip(of_rows);
            let each = each.map(|(&position, is_long)| (position, frequencies[usize::from(is_long)].as_slice()));
            RopeTable::of_each(each, rope.width / 2, |position| rope.factor(position))
        };
        ropes.map(table).collect()
    }

    /// Refuses tokens that are not in the vocabulary.
    pub(crate) fn check_tokens(&self, tokens: &[u32]) -> Result<(), ModelError> {
        let vocabulary = self.config.vocabulary;
        match tokens.iter().find(|&&token| token as usize >= vocabulary) {
            Some(&token) => Err(ModelError::Token { token, vocabulary }),
            None => Ok(()),
        }
    }
}
