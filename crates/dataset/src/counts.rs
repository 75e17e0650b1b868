//! What was read of a dataset, in numbers.

/// What was read. A line is one row, or several if its conversation became a sequence for each
/// answer or several sequences were packed into it. `dropped` and `truncated` count the latter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Lines read, blank ones not counted.
    pub rows: usize,
    /// Rows longer than `max_seq_len` that were left out.
    pub dropped: usize,
    /// Rows longer than `max_seq_len` that were cut.
    pub truncated: usize,
    /// Lines with nothing to train on. Each is also a bad row.
    pub zero_label: usize,
    /// Tokens of all rows.
    pub tokens: u64,
    /// Tokens of all rows that are targets.
    pub trained_tokens: u64,
    /// Tokens of the longest row.
    pub longest: usize,
    /// Rows in which every token is trained on: no prompt is masked.
    pub unmasked: usize,
}
