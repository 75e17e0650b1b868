//! Rows that were tokenized elsewhere, with the masks that say which of their tokens count.

use std::ops::Range;

use serde_json::{Map, Value};

use crate::format_problem::FormatProblem;
use crate::json::kind;

/// A sequence of tokens, and which of them are targets: two lists of one length.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Tokens {
    pub(crate) ids: Vec<u32>,
    pub(crate) trained: Vec<bool>,
}

/// Keys that are read.
pub(crate) const KEYS: [&str; 10] = [
    "input_ids",
    "labels",
    "attention_mask",
    "position_ids",
    "seq_lengths",
    "completion_mask",
    "assistant_masks",
    "loss_mask",
    // These have no use here.
    "token_type_ids",
    "length",
];

/// Masks of targets. As in TRL, the tokens that all of them mark are trained on.
const MASKS: [&str; 3] = ["completion_mask", "assistant_masks", "loss_mask"];

/// The label of a token outside the loss.
const IGNORED: i64 = -100;

/// The sequences of a row: one, unless several were packed into it.
pub(crate) fn read(row: &Map<String, Value>) -> Result<Vec<Tokens>, FormatProblem> {
    let Some(items) = numbers(row, "input_ids")? else { return Err(FormatProblem::Missing("input_ids".to_owned())) };
    if items.is_empty() {
        return Err(FormatProblem::Empty("input_ids".to_owned()));
    }
    let mut ids = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        match item.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => ids.push(id),
            None => return Err(wrong("input_ids", index, item, "a token id, 0 or more")),
        }
    }
    let kept = without_padding(row, ids.len())?;
    let mut trained = labels(row, &ids, &kept)?;
    for key in MASKS {
        if let Some(mask) = mask(row, key, ids.len())? {
            trained.iter_mut().zip(mask).for_each(|(trained, marked)| *trained = *trained && marked);
        }
    }
    let (ids, trained) = (&ids[kept.clone()], &trained[kept.clone()]);
    let sequences = packed(row, &kept, ids.len())?;
    let cut = |part: Range<usize>| Tokens { ids: ids[part.clone()].to_vec(), trained: trained[part].to_vec() };
    Ok(sequences.into_iter().map(cut).collect())
}

fn numbers<'a>(row: &'a Map<String, Value>, key: &str) -> Result<Option<&'a Vec<Value>>, FormatProblem> {
    match row.get(key) {
        Some(Value::Array(items)) => Ok(Some(items)),
        Some(Value::Null) | None => Ok(None),
        Some(other) => Err(FormatProblem::wrong(key, other, "a list of numbers")),
    }
}

/// A mask: 0 or 1 for each token.
fn mask(row: &Map<String, Value>, key: &'static str, length: usize) -> Result<Option<Vec<bool>>, FormatProblem> {
    let Some(items) = numbers(row, key)? else { return Ok(None) };
    if items.len() != length {
        return Err(FormatProblem::MaskLength { tokens: length, numbers: items.len(), key });
    }
    let mut mask = Vec::with_capacity(length);
    for (index, item) in items.iter().enumerate() {
        match (item.as_bool(), item.as_f64()) {
            (Some(marked), _) => mask.push(marked),
            (None, Some(number)) if number == 0.0 || number == 1.0 => mask.push(number == 1.0),
            _ => return Err(wrong(key, index, item, "0 or 1")),
        }
    }
    Ok(Some(mask))
}

/// The range of the tokens that are not padding. Rows have no padding here, since the trainer lays
/// them one behind the other.
fn without_padding(row: &Map<String, Value>, length: usize) -> Result<Range<usize>, FormatProblem> {
    let Some(attended) = mask(row, "attention_mask", length)? else { return Ok(0..length) };
    let Some(first) = attended.iter().position(|it| *it) else {
        return Err(FormatProblem::AllPadding);
    };
    let last = attended.iter().rposition(|it| *it).unwrap_or(first);
    match attended[first..=last].iter().position(|it| !*it) {
        None => Ok(first..last + 1),
        Some(place) => Err(FormatProblem::InnerPadding(first + place)),
    }
}

/// Which tokens are targets by their labels. Without labels all are. Labels of padding are ignored.
fn labels(row: &Map<String, Value>, ids: &[u32], kept: &Range<usize>) -> Result<Vec<bool>, FormatProblem> {
    let Some(labels) = numbers(row, "labels")? else { return Ok(vec![true; ids.len()]) };
    if labels.len() != ids.len() {
        return Err(FormatProblem::LabelCount { tokens: ids.len(), labels: labels.len() });
    }
    let mut trained = Vec::with_capacity(ids.len());
    for (index, (label, id)) in labels.iter().zip(ids).enumerate() {
        match label.as_i64() {
            Some(IGNORED) => trained.push(false),
            Some(label) if label == i64::from(*id) => trained.push(true),
            _ if !kept.contains(&index) => trained.push(false),
            _ => return Err(FormatProblem::OwnLabel { index, label: shown(label), id: *id }),
        }
    }
    Ok(trained)
}

/// The ranges of the sequences within the tokens that are kept. Positions begin again at 0 where a
/// packed sequence begins.
fn packed(row: &Map<String, Value>, kept: &Range<usize>, length: usize) -> Result<Vec<Range<usize>>, FormatProblem> {
    let mut starts = vec![0];
    if let Some(positions) = numbers(row, "position_ids")? {
        let Some(positions) = positions.get(kept.clone()) else {
            return Err(FormatProblem::PositionCount { tokens: length, positions: positions.len() });
        };
        starts = restarts(positions, kept.start)?;
    }
    if let Some(lengths) = numbers(row, "seq_lengths")? {
        let mut ends = Vec::new();
        let mut end = 0usize;
        for (index, item) in lengths.iter().enumerate() {
            match item.as_u64().and_then(|length| usize::try_from(length).ok()).filter(|length| *length > 0) {
                Some(length) => end = end.saturating_add(length),
                None => return Err(wrong("seq_lengths", index, item, "1 or more")),
            }
            ends.push(end);
        }
        if end != length {
            return Err(FormatProblem::SequenceLengths { sum: end, tokens: length });
        }
        let from_lengths: Vec<usize> = std::iter::once(0).chain(ends).take(lengths.len()).collect();
        if starts.len() > 1 && starts != from_lengths {
            return Err(FormatProblem::DifferentCuts);
        }
        starts = from_lengths;
    }
    let ends = starts.iter().copied().skip(1).chain([length]);
    Ok(starts.iter().copied().zip(ends).map(|(start, end)| start..end).collect())
}

/// The indices in `positions` at which positions begin again at 0. The first is that of token
/// `offset` of the row.
fn restarts(positions: &[Value], offset: usize) -> Result<Vec<usize>, FormatProblem> {
    let mut starts = Vec::new();
    let mut expected = 0;
    for (index, item) in positions.iter().enumerate() {
        let position = item.as_u64();
        if position == Some(0) {
            starts.push(index);
            expected = 0;
        } else if index == 0 || position != Some(expected) {
            let wanted = "0, 1, 2 and so on, from 0 again where a packed sequence begins";
            return Err(wrong("position_ids", offset + index, item, wanted));
        }
        expected += 1;
    }
    Ok(starts)
}

/// A number of a list that cannot be used.
fn wrong(key: &str, index: usize, found: &Value, wanted: &'static str) -> FormatProblem {
    FormatProblem::Wrong { path: format!("{key}[{index}]"), found: shown(found), wanted }
}

/// A number as it is, of anything else its type.
fn shown(value: &Value) -> String {
    if value.is_number() { value.to_string() } else { kind(value).to_owned() }
}
