//! A micro-batch: rows in, sums of losses out.

use burn::tensor::Tensor;
use finetune_kernels::Targets;

use crate::error::ModelError;
use crate::readback::data;

/// One row of a micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct BatchRow<'a> {
    /// The row's number in its dataset, which keys its dropout.
    pub id: u32,
    /// The token ids.
    pub tokens: &'a [u32],
    /// Whether each token is a target, one flag per token.
    pub trained: &'a [bool],
}

/// Rows that go through the model together, whatever their lengths. Nothing is padded.
#[derive(Clone, Debug)]
pub struct Batch<'a> {
    /// The rows, in any order.
    pub rows: Vec<BatchRow<'a>>,
}

impl Batch<'_> {
    /// Targets of all rows.
    pub fn trained_tokens(&self) -> u64 {
        self.rows.iter().map(BatchRow::targets).sum()
    }

    /// Tokens of all rows.
    pub fn tokens(&self) -> u64 {
        self.rows.iter().map(|row| row.tokens.len() as u64).sum()
    }

    /// The tokens of all rows, one row after the other.
    pub(crate) fn flat_tokens(&self) -> Vec<u32> {
        self.rows.iter().flat_map(|row| row.tokens).copied().collect()
    }

    /// Token i of a row is predicted from position i - 1.
    pub(crate) fn targets(&self) -> Targets {
        let (mut positions, mut tokens) = (Vec::new(), Vec::new());
        let mut start = 0;
        for row in &self.rows {
            for i in (1..row.tokens.len()).filter(|&i| row.trained[i]) {
                positions.push(start + i as u32 - 1);
                tokens.push(row.tokens[i]);
            }
            start += row.tokens.len() as u32;
        }
        Targets::new(positions, tokens)
    }

    /// The sums of the losses [n] of the batch's targets.
    pub(crate) fn sums(&self, losses: Tensor<1>) -> Result<LossSum, ModelError> {
        let losses = data(losses.inner())?;
        let mut rest = losses.as_slice();
        let row_losses: Vec<f64> = self
            .rows
            .iter()
            .map(|row| {
                let (now, later) = rest.split_at(row.targets() as usize);
                rest = later;
                now.iter().map(|&loss| f64::from(loss)).sum()
            })
            .collect();
        let (loss, trained_tokens) = (row_losses.iter().sum(), losses.len() as u64);
        Ok(LossSum { loss, trained_tokens, row_losses, router_loss: 0.0 })
    }

    /// The sums of a batch without a target.
    pub(crate) fn no_losses(&self) -> LossSum {
        LossSum { row_losses: vec![0.0; self.rows.len()], ..LossSum::default() }
    }
}

impl BatchRow<'_> {
    /// How many of its tokens are targets. The first never is: nothing predicts it.
    pub(crate) fn targets(&self) -> u64 {
        self.trained.iter().skip(1).filter(|&&trained| trained).count() as u64
    }
}

/// Sums over trained tokens. Means are formed once, after all micro-batches and ranks are summed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LossSum {
    /// Σ -ln p(target) in nats, summed in f64.
    pub loss: f64,
    /// The number of targets.
    pub trained_tokens: u64,
    /// The part of each row in nats, in the batch's order.
    pub row_losses: Vec<f64>,
    /// Σ of the rows' auxiliary losses of routers, each as often as the row has targets, without the coefficient; 0
    /// unless [`Model::add_router_loss`](crate::Model::add_router_loss) asks for them.
    pub router_loss: f64,
}

impl LossSum {
    /// Indices of rows whose loss is not a finite number.
    pub fn bad_rows(&self) -> Vec<usize> {
        self.row_losses.iter().enumerate().filter(|(_, loss)| !loss.is_finite()).map(|(row, _)| row).collect()
    }
}

/// What dropout depends on besides the row. Nothing else in a step is random.
#[derive(Clone, Copy, Debug)]
pub struct Randomness {
    /// The recipe's seed.
    pub seed: u64,
    /// The step, from 0.
    pub step: u64,
}
