//! Loss on held-back rows.

use finetune_dataset::{Dataset, Row};
use finetune_model::{Batch, BatchRow, LossSum, Model, ModelError};

use crate::error::TrainError;
use crate::ranks::Ranks;
use crate::share_assignment::ShareAssignment;

/// A row of a dataset as the model takes it.
pub(crate) fn batch_row(id: usize, row: &Row) -> BatchRow<'_> {
    BatchRow { id: id as u32, tokens: &row.tokens, trained: &row.trained }
}

/// Σ loss over all rows, without gradients, `micro_batch_size` rows at a time. `progress` is called
/// with the number of rows done.
///
/// # Errors
/// If the device fails or runs out of memory.
pub fn evaluate(
    model: &Model,
    data: &Dataset,
    micro_batch_size: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<LossSum, TrainError> {
    let mut total = LossSum::default();
    for batch in 0..data.rows.len().div_ceil(micro_batch_size) {
        let sums = batch_loss(model, data, micro_batch_size, batch)?;
        total.loss += sums.loss;
        total.trained_tokens += sums.trained_tokens;
        total.row_losses.extend(sums.row_losses);
        progress(total.row_losses.len());
    }
    Ok(total)
}

/// Batches for each share between two meetings of the ranks. There are few enough that all ranks
/// soon hear of a stop on one. There are enough that the meeting costs nothing beside the work.
const BATCHES_PER_SHARE: usize = 4;

/// As [`evaluate`], with a part of the batches on each rank. The batches do not depend on the
/// number of ranks, and neither do the bits of the result. `progress` is called before each batch,
/// with the number of rows done over all ranks. If it returns false on any rank, all ranks give up
/// and return `None`.
pub(crate) fn evaluate_together(
    model: &Model,
    data: &Dataset,
    micro_batch_size: usize,
    ranks: &Ranks,
    assignment: &ShareAssignment,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<LossSum>, TrainError> {
    let (rank, world) = (ranks.group().rank(), ranks.group().world());
    let count = data.rows.len().div_ceil(micro_batch_size);
    // For each batch: its loss, its trained tokens and the loss of each row, always of one length.
    let width = 2 + micro_batch_size;
    let mut total = LossSum::default();
    for first in (0..count).step_by(BATCHES_PER_SHARE * assignment.shares()) {
        let batches = (BATCHES_PER_SHARE * assignment.shares()).min(count - first);
        let bound = |share: usize| first + batches * share / assignment.shares();
        let part = |rank: usize| bound(assignment.shares_of(rank).start)..bound(assignment.shares_of(rank).end);
        let longest = (0..world).map(|rank| part(rank).len()).max().unwrap_or(0);
        let mut mine = vec![0.0; width * longest];
        let mut goes_on = true;
        for (place, batch) in mine.chunks_mut(width).zip(part(rank)) {
            ranks.group().keep_alive();
            goes_on = progress(total.row_losses.len());
            if !goes_on {
                break;
            }
            let sums = batch_loss(model, data, micro_batch_size, batch)?;
            (place[0], place[1]) = (sums.loss, sums.trained_tokens as f64);
            place[2..][..sums.row_losses.len()].copy_from_slice(&sums.row_losses);
        }
        mine.push(f64::from(u8::from(goes_on)));
        let all = ranks.gather(&mine)?;
        if all.chunks(mine.len()).any(|block| block[block.len() - 1] == 0.0) {
            return Ok(None);
        }
        for (rank, block) in all.chunks(mine.len()).enumerate() {
            for place in block.chunks(width).take(part(rank).len()) {
                let rows = micro_batch_size.min(data.rows.len() - total.row_losses.len());
                total.loss += place[0];
                total.trained_tokens += place[1] as u64;
                total.row_losses.extend(&place[2..][..rows]);
            }
        }
    }
    Ok(Some(total))
}

/// The sums of one batch.
fn batch_loss(model: &Model, data: &Dataset, micro_batch_size: usize, batch: usize) -> Result<LossSum, ModelError> {
    let first = batch * micro_batch_size;
    let rows = first..(first + micro_batch_size).min(data.rows.len());
    model.loss(&Batch { rows: rows.map(|row| batch_row(row, &data.rows[row])).collect() })
}
