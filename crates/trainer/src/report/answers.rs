//! The part of the page about answers to held-back rows.

use std::fmt::Write;

use super::page::escape;
use super::word_diff::compared;
use crate::samples::{Answers, BeforeAfter, Sample};

/// Writes prompts, expected answers, and the model's answers before and after; nothing if none were
/// asked for.
pub(super) fn answers(page: &mut String, kept: &BeforeAfter) {
    let (Some(before), after) = (&kept.before, &kept.after) else { return };
    page.push_str("<h2>Answers to held-back rows</h2>");
    let score = |answers: &Answers| answers.exact.map(|(right, of)| format!("{right} of {of} word for word"));
    let scores = [("before", Some(before)), ("after", after.as_ref())];
    for (when, score) in scores.iter().filter_map(|(when, answers)| answers.and_then(score).map(|score| (when, score)))
    {
        let _ = write!(page, "<p>{when} training: <b>{score}</b></p>");
    }
    if before.samples.is_empty() {
        return;
    }
    let later: &[Sample] = after.as_ref().map_or(&[], |after| &after.samples);
    // There is no column for what is still to come.
    let header = if later.is_empty() { "" } else { "<th>after</th>" };
    let _ = write!(page, "<table class=\"answers\"><tr><th>prompt</th><th>expected</th><th>before</th>{header}</tr>");
    for (n, sample) in before.samples.iter().enumerate() {
        let after = later.get(n).map_or(String::new(), |later| {
            format!("<td data-name=\"after\">{}</td>", compared(&later.answer, &sample.expected))
        });
        let _ = write!(
            page,
            "<tr title=\"{}\"><td data-name=\"prompt\">{}</td><td data-name=\"expected\">{}</td><td data-name=\"before\">{}</td>{after}</tr>",
            escape(&sample.row),
            escape(&sample.prompt),
            escape(&sample.expected),
            compared(&sample.answer, &sample.expected),
        );
    }
    page.push_str("</table>");
}
