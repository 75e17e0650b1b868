//! A row of tokens with its mask.

use std::path::Path;

/// One row, ready to train on. A line of a file may become several: a conversation whose template
/// writes earlier turns in another way is a row for each of its answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Token ids, one for each position.
    pub tokens: Vec<u32>,
    /// As long as `tokens`. `trained[i]`: token `i` is a target, predicted from `tokens[..i]`. The
    /// first never is.
    pub trained: Vec<bool>,
    /// Where the row came from.
    pub origin: Origin,
    /// Tokens before the answer: what the generation of a sample starts from.
    pub prompt_tokens: usize,
    /// For a person to read: the user message, or the prompt, that the first trained turn answers.
    /// Empty if texts are not kept.
    pub prompt_text: String,
    /// The answer that the row trains on first, which a generated sample is compared with. Empty if
    /// texts are not kept.
    pub answer_text: String,
}

/// The row of a file that a row was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Index into `Dataset::files`.
    pub file: u32,
    /// The line that it begins on, from 1. 0 in Parquet, which has no lines.
    pub line: u32,
    /// Its number in the file, from 1. 0 if the line alone tells it.
    pub row: u32,
}

impl Origin {
    /// The place in a file: `rows.jsonl:12`, `rows.json:12 (row 3)`, `rows.parquet:row 3`.
    pub fn in_file(&self, file: &Path) -> String {
        place(file, self.line, None, self.row)
    }
}

/// A place in a file. `column`: from 1, if it is known.
pub(crate) fn place(file: &Path, line: u32, column: Option<usize>, row: u32) -> String {
    let file = file.display();
    let column = column.map(|column| format!(":{column}")).unwrap_or_default();
    match (line, row) {
        (line, 0) => format!("{file}:{line}{column}"),
        (0, row) => format!("{file}:row {row}"),
        (line, row) => format!("{file}:{line}{column} (row {row})"),
    }
}
