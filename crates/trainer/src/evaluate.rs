//! Loss on held-back rows.

use finetune_dataset::{Dataset, Row};
use finetune_model::{Batch, BatchRow, LossSum, Model};

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
    let at_once = at_once(model, data, micro_batch_size);
    let batches: Vec<usize> = (0..data.rows.len().div_ceil(micro_batch_size)).collect();
    for batches in batches.chunks(at_once) {
        let batches: Vec<Batch<'_>> = batches.iter().map(|&n| batch_of(data, micro_batch_size, n)).collect();
        for sums in model.losses(&batches, &mut || true)?.into_iter().flatten() {
            total.loss += sums.loss;
            total.trained_tokens += sums.trained_tokens;
            total.row_losses.extend(sums.row_losses);
        }
        progress(total.row_losses.len());
    }
    Ok(total)
}

/// Most batches that go through layers from the disk together.
pub(crate) const FROM_DISK: usize = 16;

/// Bytes of hidden states, between two layers, that such batches may have.
const HIDDEN_BYTES: usize = 256 << 20;

/// Batches that go through each layer together: several where layers are read from the disk or held by other
/// ranks.
fn at_once(model: &Model, data: &Dataset, micro_batch_size: usize) -> usize {
    if !model.goes_layer_by_layer() {
        return 1;
    }
    let bytes = size_of::<f32>() * model.config.hidden_size * data.counts.longest * micro_batch_size;
    (HIDDEN_BYTES / bytes.max(1)).clamp(1, FROM_DISK)
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
    let (rank, world, stages) = (ranks.group().rank(), ranks.group().world(), ranks.stages());
    let count = data.rows.len().div_ceil(micro_batch_size);
    // For each batch: its loss, its trained tokens and the loss of each row, always of one length.
    let width = 2 + micro_batch_size;
    let mut total = LossSum::default();
    // Where a rank reads layers from the disk, more batches go through each.
    let reads_layers = ranks.largest(i32::from(model.goes_layer_by_layer()))? > 0;
    let per_share = if reads_layers { FROM_DISK } else { BATCHES_PER_SHARE };
    for first in (0..count).step_by(per_share * assignment.shares()) {
        let batches = (per_share * assignment.shares()).min(count - first);
        let bound = |share: usize| first + batches * share / assignment.shares();
        let part = |rank: usize| bound(assignment.shares_of(rank).start)..bound(assignment.shares_of(rank).end);
        let longest = (0..world).map(|rank| part(rank).len()).max().unwrap_or(0);
        let mut mine = vec![0.0; width * longest];
        let mut each = || {
            ranks.keep_alive();
            progress(total.row_losses.len())
        };
        let at_once = at_once(model, data, micro_batch_size);
        let mut goes_on = true;
        let batches: Vec<usize> = part(rank).collect();
        for (places, batches) in mine.chunks_mut(width * at_once).zip(batches.chunks(at_once)) {
            let batches: Vec<Batch<'_>> = batches.iter().map(|&n| batch_of(data, micro_batch_size, n)).collect();
            // A layer in memory takes no time that anyone would wait for. Ranks that hold a model together stop
            // together.
            let losses = match (model.as_last_says(each())?, model.reads_layers() && stages == 1) {
                (false, _) => None,
                (true, true) => model.losses(&batches, &mut each)?,
                (true, false) => model.losses(&batches, &mut || true)?,
            };
            let Some(all) = losses else {
                goes_on = false;
                break;
            };
            for (place, sums) in places.chunks_mut(width).zip(all) {
                (place[0], place[1]) = (sums.loss, sums.trained_tokens as f64);
                place[2..][..sums.row_losses.len()].copy_from_slice(&sums.row_losses);
            }
        }
        mine.push(f64::from(u8::from(goes_on)));
        let all = ranks.gather(&mine)?;
        if all.chunks(mine.len()).any(|block| block[block.len() - 1] == 0.0) {
            return Ok(None);
        }
        for (replica, blocks) in all.chunks(mine.len() * stages).enumerate() {
            // Of the ranks that hold a model together, one has losses, and the others have 0.
            let mut sum = vec![0.0; mine.len() - 1];
            for block in blocks.chunks(mine.len()) {
                sum.iter_mut().zip(block).for_each(|(sum, number)| *sum += number);
            }
            for place in sum.chunks(width).take(part(replica * stages).len()) {
                let rows = micro_batch_size.min(data.rows.len() - total.row_losses.len());
                total.loss += place[0];
                total.trained_tokens += place[1] as u64;
                total.row_losses.extend(&place[2..][..rows]);
            }
        }
    }
    Ok(Some(total))
}

/// The `n`th batch of all rows.
fn batch_of(data: &Dataset, micro_batch_size: usize, n: usize) -> Batch<'_> {
    let first = n * micro_batch_size;
    let rows = first..(first + micro_batch_size).min(data.rows.len());
    Batch { rows: rows.map(|row| batch_row(row, &data.rows[row])).collect() }
}
