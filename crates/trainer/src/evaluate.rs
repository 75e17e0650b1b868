//! Loss on held-back rows, and answers to some of them before and after training.

use std::ops::Range;
use std::path::Path;

use finetune_allreduce::{GroupError, segment};
use finetune_dataset::{ChatTokenizer, Dataset, Row};
use finetune_model::{Batch, BatchRow, LossSum, Model, Sampling};
use finetune_store::{RealDisk, StoreError, replace_file};
use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::ranks::Ranks;

const ANSWERS_FILE: &str = "samples.json";

/// One held-back row with what the model answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// file:line of the row.
    pub row: String,
    pub prompt: String,
    pub expected: String,
    pub answer: String,
}

/// Answers to held-back rows at one point of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    pub samples: Vec<Sample>,
    /// Rows answered word for word as expected, of how many. `None` where the recipe does not ask.
    pub exact: Option<(usize, usize)>,
}

/// Answers before and after training, as kept in the run directory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct BeforeAfter {
    pub(crate) before: Option<Answers>,
    pub(crate) after: Option<Answers>,
}

impl BeforeAfter {
    pub(crate) fn read(run: &Path) -> BeforeAfter {
        let text = std::fs::read_to_string(run.join(ANSWERS_FILE)).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    pub(crate) fn write(&self, run: &Path) -> Result<(), StoreError> {
        let text = serde_json::to_vec_pretty(self).expect("plain data");
        replace_file(&RealDisk, &run.join(ANSWERS_FILE), &text)
    }
}

impl Answers {
    /// A run that starts from the beginning has no answers yet.
    pub(crate) fn forget(run: &Path) -> Result<(), StoreError> {
        if run.join(ANSWERS_FILE).is_file() { BeforeAfter::default().write(run) } else { Ok(()) }
    }
}

pub(crate) fn batch_row(id: usize, row: &Row) -> BatchRow<'_> {
    BatchRow { id: id as u32, tokens: &row.tokens, trained: &row.trained }
}

/// Σ loss over all rows, `micro_batch_size` at a time. `progress` is told rows done.
pub fn evaluate(model: &Model, data: &Dataset, micro_batch_size: usize, progress: &mut dyn FnMut(usize)) -> LossSum {
    let batches = 0..data.rows.len().div_ceil(micro_batch_size);
    let mut total = LossSum::default();
    for sums in batch_losses(model, data, micro_batch_size, batches) {
        total.loss += sums.loss;
        total.trained_tokens += sums.trained_tokens;
        total.row_losses.extend(sums.row_losses);
        progress(total.row_losses.len());
    }
    total
}

/// [`evaluate`], a part of the batches on each rank. The batches are the same whatever the number of ranks, and so are all
/// bits of the result.
pub(crate) fn evaluate_together(
    model: &Model,
    data: &Dataset,
    micro_batch_size: usize,
    ranks: &Ranks,
) -> Result<LossSum, GroupError> {
    let (rank, world) = (ranks.group().rank(), ranks.group().world());
    let count = data.rows.len().div_ceil(micro_batch_size);
    let part = |rank: usize| segment(count, world, rank);
    // Of each batch its loss, its trained tokens and the loss of each row, all of one length.
    let width = 2 + micro_batch_size;
    let mut mine = vec![0.0; width * count.div_ceil(world)];
    for (place, sums) in mine.chunks_mut(width).zip(batch_losses(model, data, micro_batch_size, part(rank))) {
        (place[0], place[1]) = (sums.loss, sums.trained_tokens as f64);
        place[2..][..sums.row_losses.len()].copy_from_slice(&sums.row_losses);
    }
    let all = ranks.gather(&mine)?;
    let mut total = LossSum::default();
    for (rank, block) in all.chunks(mine.len().max(1)).enumerate() {
        for place in block.chunks(width).take(part(rank).len()) {
            let rows = micro_batch_size.min(data.rows.len() - total.row_losses.len());
            total.loss += place[0];
            total.trained_tokens += place[1] as u64;
            total.row_losses.extend(&place[2..][..rows]);
        }
    }
    Ok(total)
}

/// The sums of some batches, one after the other.
fn batch_losses<'a>(
    model: &'a Model,
    data: &'a Dataset,
    micro_batch_size: usize,
    batches: Range<usize>,
) -> impl Iterator<Item = LossSum> + 'a {
    batches.map(move |batch| {
        let first = batch * micro_batch_size;
        let rows = first..(first + micro_batch_size).min(data.rows.len());
        model.loss(&Batch { rows: rows.map(|row| batch_row(row, &data.rows[row])).collect() })
    })
}

/// How many rows are answered, how many of them shown and scored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Questions {
    pub(crate) shown: usize,
    pub(crate) scored: usize,
    pub(crate) max_new_tokens: usize,
}

impl Questions {
    pub(crate) fn rows(&self, data: &Dataset) -> usize {
        self.shown.max(self.scored).min(data.rows.len())
    }
}

/// Greedy answers to the first rows of the data; `None` once `progress`, told rows done, says not to go on.
pub(crate) fn answer(
    model: &Model,
    data: &Dataset,
    tokenizer: &ChatTokenizer,
    questions: Questions,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<Answers>, TrainError> {
    let (mut samples, mut exact) = (Vec::new(), 0);
    let scored = questions.scored.min(data.rows.len());
    for n in 0..questions.rows(data) {
        if !progress(n) {
            return Ok(None);
        }
        let row = &data.rows[n];
        let (prompt, expected) = row.tokens.split_at(row.prompt_tokens);
        let ends = end_ids(tokenizer, expected)?;
        let generation = model.generate(prompt, questions.max_new_tokens, Sampling::GREEDY, &ends, &mut |_| {})?;
        let answer = tokenizer.decode(&generation.tokens, true)?;
        // An answer that ran into the limit is not the expected one, even if it begins with it.
        let ended = generation.stopped_by.is_some();
        if n < scored && ended && answer.trim() == row.answer_text.trim() {
            exact += 1;
        }
        if n < questions.shown {
            let (row_name, prompt) = (data.origin(n), row.prompt_text.clone());
            samples.push(Sample { row: row_name, prompt, expected: row.answer_text.clone(), answer });
        }
    }
    Ok(Some(Answers { samples, exact: (scored > 0).then_some((exact, scored)) }))
}

/// What ends an answer: the model's own end tokens, and the special token that ends the expected answer. A chat
/// template put on a base model has an end of turn that the model's files do not know as an end.
fn end_ids(tokenizer: &ChatTokenizer, expected: &[u32]) -> Result<Vec<u32>, TrainError> {
    let mut ends = tokenizer.eos_ids().to_vec();
    for &token in expected {
        if tokenizer.decode(&[token], true)?.is_empty() && !tokenizer.decode(&[token], false)?.is_empty() {
            ends.push(token);
            break;
        }
    }
    Ok(ends)
}
