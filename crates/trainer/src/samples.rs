//! Answers of the model to held-back rows, before and after training.

use std::path::Path;

use finetune_dataset::{ChatTokenizer, Dataset};
use finetune_model::{Generation, Model, RowRequest, Sampling};
use finetune_store::{RealDisk, StoreError, replace_file};
use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::ranks::Ranks;

/// The file's name in the run directory.
pub(crate) const SAMPLES_FILE: &str = "samples.json";

/// One held-back row with what the model answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// file:line of the row.
    pub row: String,
    /// The text that the model continues.
    pub prompt: String,
    /// The answer in the data.
    pub expected: String,
    /// The model's answer.
    pub answer: String,
}

/// Answers to held-back rows at one point of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    /// The rows that are shown.
    pub samples: Vec<Sample>,
    /// Rows answered word for word as expected, and rows scored. `None` if the recipe does not ask.
    pub exact: Option<(usize, usize)>,
}

/// Answers before and after training, as kept in the run directory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct BeforeAfter {
    pub(crate) before: Option<Answers>,
    pub(crate) after: Option<Answers>,
}

impl BeforeAfter {
    /// The answers of a run directory; empty if there are none, or if they cannot be read.
    pub(crate) fn read(run: &Path) -> BeforeAfter {
        let text = std::fs::read_to_string(run.join(SAMPLES_FILE)).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    pub(crate) fn write(&self, run: &Path) -> Result<(), StoreError> {
        let text = serde_json::to_vec_pretty(self).expect("plain data");
        replace_file(&RealDisk, &run.join(SAMPLES_FILE), &text)
    }
}

impl Answers {
    /// Empties the file of an earlier run: a run that starts from the beginning has no answers yet.
    pub(crate) fn forget(run: &Path) -> Result<(), StoreError> {
        if run.join(SAMPLES_FILE).is_file() { BeforeAfter::default().write(run) } else { Ok(()) }
    }
}

/// How many rows are answered, how many of them shown and scored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SampleSettings {
    /// Rows that are shown with their answers (`eval.samples`).
    pub(crate) shown: usize,
    /// Rows that are compared with the expected answers (`eval.exact_match`).
    pub(crate) scored: usize,
    /// The most tokens of an answer.
    pub(crate) max_new_tokens: usize,
}

impl SampleSettings {
    /// Rows that are answered.
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

/// Greedy answers to the first rows of the data, several rows at once. Each row is answered by one
/// of the ranks, or by those that hold one model together. `progress` is called with rows done, at
/// the beginning and after every token. If it returns false on any rank, all ranks return `None`.
pub(crate) fn answer(
    model: &Model,
    data: &Dataset,
    tokenizer: &ChatTokenizer,
    settings: SampleSettings,
    ranks: &Ranks,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<Answers>, TrainError> {
    let (replica, replicas) = (ranks.replica(), ranks.replicas());
    let mine: Vec<usize> = (replica..settings.rows(data)).step_by(replicas).collect();
    let mut progress = |done| progress(replica + done * replicas);
    let mut answers = answer_rows(model, data, tokenizer, settings, &mine, &mut progress)?;
    if let Some(answers) = answers.as_mut().filter(|_| !model.has_losses()) {
        // All ranks that hold a model together have the same ones.
        answers.clear();
    }
    let text = serde_json::to_string(&answers).expect("plain data");
    let mut all = Vec::new();
    for text in ranks.gather_texts(&text)? {
        let answers: Option<Vec<Answered>> = serde_json::from_str(&text).expect("as written above");
        let Some(answers) = answers else { return Ok(None) };
        all.extend(answers);
    }
    all.sort_by_key(|answered| answered.row);
    let scored = settings.scored.min(data.rows.len());
    let exact = all[..scored].iter().filter(|answered| answered.exact).count();
    let samples = all.into_iter().take(settings.shown).map(|Answered { row, answer, .. }| {
        let (prompt, expected) = (data.rows[row].prompt_text.clone(), data.rows[row].answer_text.clone());
        Sample { row: data.origin(row), prompt, expected, answer }
    });
    Ok(Some(Answers { samples: samples.collect(), exact: (scored > 0).then_some((exact, scored)) }))
}

/// Answers these rows. `None` if `progress` returns false.
fn answer_rows(
    model: &Model,
    data: &Dataset,
    tokenizer: &ChatTokenizer,
    settings: SampleSettings,
    rows: &[usize],
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<Vec<Answered>>, TrainError> {
    let parts = |row: usize| data.rows[row].tokens.split_at(data.rows[row].prompt_tokens);
    let ends: Vec<_> = rows.iter().map(|&row| end_ids(tokenizer, parts(row).1)).collect::<Result<_, _>>()?;
    let requests: Vec<RowRequest<'_>> = rows
        .iter()
        .zip(&ends)
        .map(|(&row, ends)| RowRequest {
            prompt: parts(row).0,
            max_new_tokens: settings.max_new_tokens,
            sampling: Sampling::GREEDY,
            end_ids: ends,
        })
        .collect();
    let mut answers = Vec::new();
    while answers.len() < rows.len() {
        let begun = answers.len();
        if !model.as_last_says(progress(begun))? {
            return Ok(None);
        }
        let now = &requests[begun..][..model.rows_at_once(&requests[begun..])];
        let mut goes_on = true;
        let generations = model.generate_rows(now, &mut |_, _| {
            // Ranks that hold a model together make every pass together, so none stops within one.
            goes_on = (goes_on && progress(begun)) || model.placement().stage().is_some();
            goes_on
        })?;
        if !goes_on {
            return Ok(None);
        }
        for (&row, generation) in rows[begun..].iter().zip(&generations) {
            answers.push(answered(data, tokenizer, row, generation)?);
        }
    }
    Ok(Some(answers))
}

/// What was generated after a row's prompt.
fn answered(
    data: &Dataset,
    tokenizer: &ChatTokenizer,
    row: usize,
    generation: &Generation,
) -> Result<Answered, TrainError> {
    let answer = tokenizer.decode(&generation.tokens, true)?;
    // An answer that ran into the limit never counts as exact, even if it begins with the expected
    // one.
    let exact = generation.stopped_by.is_some() && answer.trim() == data.rows[row].answer_text.trim();
    Ok(Answered { row, answer, exact })
}

/// The tokens that end an answer: the model's own end tokens, and the special token that ends the
/// expected answer. If a chat template is put on a base model, the model's files do not know its
/// end of turn.
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
