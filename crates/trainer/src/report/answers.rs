//! The part of the page about answers to held-back rows.

use std::fmt::Write;

use super::escape;
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
    page.push_str("<table class=\"answers\"><tr><th>prompt</th><th>expected</th><th>before</th><th>after</th></tr>");
    let empty = Vec::new();
    let later: &Vec<Sample> = after.as_ref().map_or(&empty, |after| &after.samples);
    for (n, sample) in before.samples.iter().enumerate() {
        let after = later.get(n).map_or(String::new(), |later| compared(&later.answer, &sample.expected));
        let _ = write!(
            page,
            "<tr title=\"{}\"><td data-name=\"prompt\">{}</td><td data-name=\"expected\">{}</td><td data-name=\"before\">{}</td><td data-name=\"after\">{after}</td></tr>",
            escape(&sample.row),
            escape(&sample.prompt),
            escape(&sample.expected),
            compared(&sample.answer, &sample.expected),
        );
    }
    page.push_str("</table>");
}

/// The answer with its difference from the expected one marked: all but the common beginning and
/// end.
fn compared(answer: &str, expected: &str) -> String {
    let (answer, expected) = (answer.trim(), expected.trim());
    let same = |(one, other): &(char, char)| one == other;
    let begin: usize = answer.chars().zip(expected.chars()).take_while(same).map(|(letter, _)| letter.len_utf8()).sum();
    let (head, rest) = answer.split_at(begin);
    let tail: usize = rest
        .chars()
        .rev()
        .zip(expected[begin..].chars().rev())
        .take_while(same)
        .map(|(letter, _)| letter.len_utf8())
        .sum();
    let (middle, tail) = rest.split_at(rest.len() - tail);
    match middle {
        // Missing text cannot be marked.
        "" => escape(answer),
        middle => format!("{}<mark>{}</mark>{}", escape(head), escape(middle), escape(tail)),
    }
}

#[cfg(test)]
mod tests {
    use super::compared;

    #[test]
    fn what_differs_is_marked() {
        for (answer, expected, want) in [
            ("Open from 10 to 20.", "Open from 15 to 20.", "Open from 1<mark>0</mark> to 20."),
            ("same", "same\n", "same"),
            ("", "something", ""),
            ("Open", "Open from 15.", "Open"),
            ("naïve été", "naïve âté", "naïve <mark>é</mark>té"),
            ("aaa", "aa", "aa<mark>a</mark>"),
            ("<b>", "x", "<mark>&lt;b&gt;</mark>"),
        ] {
            assert_eq!(compared(answer, expected), want, "{answer} against {expected}");
        }
    }
}
