//! Loss on held-back rows, and answers to some of them before and after training.

use std::path::Path;

use finetune_dataset::{ChatTokenizer, Dataset, Row};
use finetune_model::{Batch, BatchRow, LossSum, Model, ModelError, Sampling};
use finetune_store::{RealDisk, StoreError, replace_file};
use serde::{Deserialize, Serialize};

use crate::deal::Deal;
use crate::error::TrainError;
use crate::ranks::Ranks;

pub(crate) const ANSWERS_FILE: &str = "samples.json";

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

/// Batches for each share before the ranks meet: often enough that all hear soon of a stop on one, seldom enough that the
/// meeting costs nothing beside the work.
const BATCHES_PER_SHARE: usize = 4;

/// [`evaluate`], a part of the batches on each rank. The batches are the same whatever the number of ranks, and so are all
/// bits of the result. `progress` is told rows done over all ranks, before each batch; where it says not to go on, on any rank,
/// all give up: `None`.
pub(crate) fn evaluate_together(
    model: &Model,
    data: &Dataset,
    micro_batch_size: usize,
    ranks: &Ranks,
    deal: &Deal,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<LossSum>, TrainError> {
    let (rank, world) = (ranks.group().rank(), ranks.group().world());
    let count = data.rows.len().div_ceil(micro_batch_size);
    // Of each batch its loss, its trained tokens and the loss of each row, all of one length.
    let width = 2 + micro_batch_size;
    let mut total = LossSum::default();
    for first in (0..count).step_by(BATCHES_PER_SHARE * deal.shares()) {
        let batches = (BATCHES_PER_SHARE * deal.shares()).min(count - first);
        let bound = |share: usize| first + batches * share / deal.shares();
        let part = |rank: usize| bound(deal.of(rank).start)..bound(deal.of(rank).end);
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

/// A rank's answer to a row.
#[derive(Serialize, Deserialize)]
struct Answered {
    row: usize,
    answer: String,
    exact: bool,
}

/// Greedy answers to the first rows of the data, each given by one of the ranks; `None` once `progress`, told rows done, says
/// not to go on.
pub(crate) fn answer(
    model: &Model,
    data: &Dataset,
    tokenizer: &ChatTokenizer,
    questions: Questions,
    ranks: &Ranks,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<Answers>, TrainError> {
    let mine = (ranks.group().rank()..questions.rows(data)).step_by(ranks.group().world());
    let mut answers = Some(Vec::new());
    for row in mine {
        if !progress(row) {
            answers = None;
        }
        let Some(answers) = &mut answers else { break };
        answers.push(answer_row(model, &data.rows[row], tokenizer, questions.max_new_tokens, row)?);
    }
    let text = serde_json::to_string(&answers).expect("plain data");
    let mut all = Vec::new();
    for text in ranks.gather_texts(&text)? {
        let answers: Option<Vec<Answered>> = serde_json::from_str(&text).expect("as written above");
        let Some(answers) = answers else { return Ok(None) };
        all.extend(answers);
    }
    all.sort_by_key(|answered| answered.row);
    let scored = questions.scored.min(data.rows.len());
    let exact = all[..scored].iter().filter(|answered| answered.exact).count();
    let samples = all.into_iter().take(questions.shown).map(|Answered { row, answer, .. }| {
        let (prompt, expected) = (data.rows[row].prompt_text.clone(), data.rows[row].answer_text.clone());
        Sample { row: data.origin(row), prompt, expected, answer }
    });
    Ok(Some(Answers { samples: samples.collect(), exact: (scored > 0).then_some((exact, scored)) }))
}

fn answer_row(
    model: &Model,
    row: &Row,
    tokenizer: &ChatTokenizer,
    max_new_tokens: usize,
    number: usize,
) -> Result<Answered, TrainError> {
    let (prompt, expected) = row.tokens.split_at(row.prompt_tokens);
    let ends = end_ids(tokenizer, expected)?;
    let generation = model.generate(prompt, max_new_tokens, Sampling::GREEDY, &ends, &mut |_| {})?;
    let answer = tokenizer.decode(&generation.tokens, true)?;
    // An answer that ran into the limit is not the expected one, even if it begins with it.
    let exact = generation.stopped_by.is_some() && answer.trim() == row.answer_text.trim();
    Ok(Answered { row: number, answer, exact })
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
