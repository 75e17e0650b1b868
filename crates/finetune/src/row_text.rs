//! A row as the model will see it: its text with the trained parts marked, and the tokens that end an
//! answer.

use std::fmt::Write as _;

use anstream::{AutoStream, ColorChoice};
use finetune_dataset::{ChatTokenizer, DatasetError, Row};
use finetune_trainer::numbers::counted;

use crate::output::printable;

/// How much of a row is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    Whole,
    /// The beginning and the end of what is long.
    Shortened,
}

/// Characters of a part that are shown of a shortened row, half at each end.
const LONGEST_PART: usize = 240;
/// Parts that are shown of a shortened row, half at each end.
const MOST_PARTS: usize = 8;

/// A row with its signs for what is trained on.
pub(crate) struct RowText<'a> {
    pub(crate) row: &'a Row,
    /// `None`: the row is shown as numbers.
    pub(crate) tokenizer: Option<&'a ChatTokenizer>,
    colors: bool,
}

impl<'a> RowText<'a> {
    /// With colors, if stdout shows them.
    pub(crate) fn new(row: &'a Row, tokenizer: Option<&'a ChatTokenizer>) -> RowText<'a> {
        let colors = AutoStream::choice(&std::io::stdout()) != ColorChoice::Never;
        RowText { row, tokenizer, colors }
    }

    /// Where the row came from, and how many of its tokens are trained on.
    pub(crate) fn heading(&self, origin: &str) -> String {
        let trained = self.row.trained.iter().filter(|&&trained| trained).count();
        let marked = if self.colors { "green and underlined" } else { "between ⟦ and ⟧" };
        let tokens = counted(self.row.tokens.len() as u64, "token");
        format!("{origin}: {tokens}, {trained} trained on ({marked})")
    }

    /// The row's text, with the trained parts marked. Consecutive tokens are decoded together, so
    /// that bytes form characters again. Control characters of a row are shown, not obeyed.
    pub(crate) fn text(&self, shown: Shown) -> Result<String, DatasetError> {
        let Row { tokens, trained, .. } = self.row;
        let (begin, end) = if self.colors { ("\x1b[32;4m", "\x1b[0m") } else { ("⟦", "⟧") };
        let places: Vec<usize> = (0..tokens.len()).collect();
        let parts: Vec<&[usize]> = places.chunk_by(|a, b| trained[*a] == trained[*b]).collect();
        let left_out = match shown {
            Shown::Shortened => MOST_PARTS / 2..parts.len().saturating_sub(MOST_PARTS / 2),
            Shown::Whole => 0..0,
        };
        let mut out = String::new();
        for (index, part) in parts.iter().enumerate() {
            if left_out.contains(&index) {
                if index == left_out.start {
                    let _ = write!(out, "[… {} …]", counted(left_out.len() as u64, "part"));
                }
                continue;
            }
            let ids: Vec<u32> = part.iter().map(|place| tokens[*place]).collect();
            let text = match self.tokenizer {
                Some(tokenizer) => tokenizer.decode(&ids, false)?,
                None => ids.iter().map(|id| format!("{id} ")).collect(),
            };
            let text = printable(&text);
            let text = if shown == Shown::Shortened { shortened(&text) } else { text.into_owned() };
            out += &match trained[part[0]] {
                // Each line by itself: whoever shows the lines may put something in front of them.
                true if self.colors => format!("{begin}{}{end}", text.replace('\n', &format!("{end}\n{begin}"))),
                true => format!("{begin}{text}{end}"),
                false => text,
            };
        }
        Ok(out)
    }
}

/// The beginning and the end of a long text.
fn shortened(text: &str) -> String {
    let half = LONGEST_PART / 2;
    let start = text.char_indices().nth(half).map(|(place, _)| place);
    let end = text.char_indices().rev().nth(half - 1).map(|(place, _)| place);
    match (start, end) {
        (Some(start), Some(end)) if start < end => format!("{}[…]{}", &text[..start], &text[end..]),
        _ => text.to_owned(),
    }
}

/// The tokens at which an answer ends. `learned`: those that the rows' answers end with.
pub(crate) fn stops(tokenizer: &ChatTokenizer, learned: &[u32]) -> String {
    let others = tokenizer.eos_ids().iter().filter(|id| !learned.contains(id));
    let name = |id: u32| tokenizer.id_to_token(id).unwrap_or_else(|| id.to_string());
    let learned: Vec<String> = learned.iter().map(|id| format!("{} (taught by the rows)", name(*id))).collect();
    let all: Vec<String> = learned.into_iter().chain(others.map(|id| name(*id))).collect();
    if all.is_empty() {
        "no token: the model's files name none".to_owned()
    } else {
        printable(&all.join(", ")).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use finetune_dataset::Origin;

    use super::*;

    fn row(trained: &[bool]) -> Row {
        Row {
            tokens: (0..trained.len() as u32).collect(),
            trained: trained.to_vec(),
            origin: Origin { file: 0, line: 1, row: 0 },
            prompt_tokens: 0,
            prompt_text: String::new(),
            answer_text: String::new(),
        }
    }

    fn text(row: &Row, shown: Shown) -> String {
        RowText { row, tokenizer: None, colors: false }.text(shown).expect("numbers")
    }

    #[test]
    fn trained_parts_are_marked() {
        let row = row(&[false, true, true, false]);
        assert_eq!(text(&row, Shown::Whole), "0 ⟦1 2 ⟧3 ");
        assert_eq!(text(&row, Shown::Shortened), "0 ⟦1 2 ⟧3 ");
    }

    #[test]
    fn a_shortened_row_has_both_ends() {
        let row = row(&[false; 400]);
        let short = text(&row, Shown::Shortened);
        assert!(short.starts_with("0 1 2 ") && short.contains("[…]") && short.ends_with("398 399 "), "{short}");
        assert_eq!(short.chars().count(), LONGEST_PART + "[…]".chars().count());
        let turns: Vec<bool> = (0..20).map(|place| place % 2 == 1).collect();
        let short = text(&self::row(&turns), Shown::Shortened);
        assert_eq!(short, "0 ⟦1 ⟧2 ⟦3 ⟧[… 12 parts …]16 ⟦17 ⟧18 ⟦19 ⟧");
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(shortened("é"), "é");
        let fitting = "é".repeat(LONGEST_PART);
        assert_eq!(shortened(&fitting), fitting);
        let long = shortened(&format!("a{fitting}"));
        let half = LONGEST_PART / 2;
        assert_eq!(long, format!("a{}[…]{}", "é".repeat(half - 1), "é".repeat(half)));
    }
}
