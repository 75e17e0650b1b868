//! A row of tokens with its mask.

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

/// The line that a row was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Index into `Dataset::files`.
    pub file: u32,
    /// From 1.
    pub line: u32,
}
