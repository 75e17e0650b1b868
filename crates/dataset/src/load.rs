//! Files of rows to rows of tokens with a mask, in order.

use std::path::PathBuf;
use std::sync::Arc;

use finetune_recipe::{Data, Format};
use rayon::prelude::*;

use crate::counts::Counts;
use crate::ends::Ends;
use crate::error::{BadRow, BadRows, DatasetError};
use crate::files;
use crate::guard;
use crate::kinds::FileKind;
use crate::notes::{Notes, Selection};
use crate::plan::Plan;
use crate::problem::RowProblem;
use crate::reading::{Fitted, LineResult, Outcome, Reading};
use crate::record::Record;
use crate::shares::Part;
use crate::source::Source;
use crate::token_row::{Origin, Row};
use crate::tokenizer::ChatTokenizer;

/// All rows of some files, ready to train on.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// The rows, in the order of the files and lines.
    pub rows: Vec<Row>,
    /// The files that they came from.
    pub files: Vec<PathBuf>,
    /// What was read, in numbers.
    pub counts: Counts,
    /// blake3 over the tokens and the mask of every row, in order: 64 hexadecimal digits. Ranks
    /// compare it, and a resume checks it.
    pub digest: String,
    /// What a person should know about how these rows were read, one line each.
    pub notices: Vec<String>,
    /// How the trained parts of chats end.
    pub ends: Ends,
    /// How often the rows of each file come in an epoch. Empty: each row once.
    pub weights: Vec<f64>,
}

/// Bad rows that are shown in full.
const SHOWN_ROWS: usize = 10;

/// Longer lines, in bytes, are read one at a time. Reading a line takes a hundred times its size in
/// memory for a while, which must not happen on every core at once.
const LONG_LINE: usize = 1 << 20;

impl Dataset {
    /// Reads, renders, tokenizes and masks all rows of `files`, in order.
    ///
    /// With `data.eval_share` these are the rows to train on: [`Dataset::load_part`] has the others.
    ///
    /// Rows of tokens need no tokenizer. `vocab_size` is the number of rows of the model's
    /// embedding. `keep_text` is how many of the first rows keep the texts that people read; for a
    /// large dataset these would take as much memory as its tokens. `progress` is called now and
    /// then with the number of rows read so far.
    ///
    /// # Errors
    /// All bad rows are collected into one [`DatasetError::BadRows`]. What is no fault of a single
    /// row ends the reading at once: a file of another kind, a template that ran out of its bounds.
    pub fn load<'a>(
        files: &[PathBuf],
        data: &Data,
        tokenizer: impl Into<Option<&'a ChatTokenizer>>,
        vocab_size: usize,
        keep_text: usize,
        progress: &dyn Fn(u64),
    ) -> Result<Self, DatasetError> {
        Self::load_part(files, data, Part::Train, tokenizer.into(), vocab_size, keep_text, progress)
    }

    /// As [`Dataset::load`], the rows of a part.
    ///
    /// # Errors
    /// As [`Dataset::load`]. [`DatasetError::EmptyShare`] if the part has no row.
    pub fn load_part(
        files: &[PathBuf],
        data: &Data,
        part: Part,
        tokenizer: Option<&ChatTokenizer>,
        vocab_size: usize,
        keep_text: usize,
        progress: &dyn Fn(u64),
    ) -> Result<Self, DatasetError> {
        files.iter().try_for_each(|path| FileKind::of(path).map(|_| ()))?;
        // Shared, since threads that are left behind keep it: see `guard.rs`.
        let reading = Arc::new(Reading::new(data.clone(), part, tokenizer.cloned(), vocab_size)?);
        let mut left = data.max_rows.unwrap_or(usize::MAX);
        let mut collected = Collected {
            files,
            format: data.format,
            first: None,
            rows: Vec::new(),
            bad: Vec::new(),
            total_bad: 0,
            counts: Counts::default(),
            notes: Notes::default(),
            keep_text,
            other_part: 0,
            part,
        };
        for (index, path) in files.iter().enumerate() {
            if left == 0 {
                break;
            }
            let mut source = Source::open(path)?;
            loop {
                let mut block = source.block()?;
                block.truncate(left);
                left -= block.len();
                if block.is_empty() {
                    break;
                }
                reading.keep_text(collected.rows.len() < keep_text);
                let with = reading.clone();
                let (block, outcomes) = guard::on_guarded_threads(move || {
                    let outcomes = outcomes(&with, &block);
                    (block, outcomes)
                })?;
                for (line, outcome) in block.iter().zip(outcomes?) {
                    collected.add(index, line, outcome);
                }
                progress(collected.counts.rows as u64);
            }
        }
        collected.finish(data, left == 0, tokenizer)
    }

    /// The order of training on these rows.
    ///
    /// # Panics
    /// As [`Plan::new`].
    pub fn plan(&self, global_batch_size: usize, seed: u64, shuffle: bool) -> Plan {
        if self.weights.is_empty() {
            return Plan::new(self.rows.len(), global_batch_size, seed, shuffle);
        }
        let mut parts = vec![0; self.files.len()];
        self.rows.iter().for_each(|row| parts[row.origin.file as usize] += 1);
        let parts: Vec<(usize, f64)> = parts.into_iter().zip(self.weights.iter().copied()).collect();
        Plan::weighted(&parts, global_batch_size, seed, shuffle)
    }

    /// Where a row came from, as `file:line`; in Parquet as `file:row 3`.
    pub fn origin(&self, row: usize) -> String {
        let Some(Row { origin, .. }) = self.rows.get(row) else { return format!("row {row}") };
        match self.files.get(origin.file as usize) {
            Some(file) => origin.in_file(file),
            None => format!("line {}", origin.line),
        }
    }
}

/// What became of the lines of a block, in order.
///
/// # Errors
/// The error of a line that stops the reading.
fn outcomes(reading: &Reading, block: &[Record]) -> Result<Vec<Outcome>, DatasetError> {
    let is_long = |line: &Record| line.bytes() > LONG_LINE;
    let mut read: Vec<Option<Result<Outcome, DatasetError>>> =
        block.par_iter().map(|line| if is_long(line) { None } else { reading.line(line) }).collect();
    for (line, outcome) in block.iter().zip(&mut read).filter(|(line, _)| is_long(line)) {
        *outcome = reading.line(line);
    }
    // Lines behind the one that stopped the reading have no outcome.
    read.into_iter().flatten().collect()
}

/// Rows so far, in order.
struct Collected<'a> {
    files: &'a [PathBuf],
    /// `Auto` until the first row.
    format: Format,
    /// The row that decided the format.
    first: Option<String>,
    rows: Vec<Row>,
    bad: Vec<BadRow>,
    total_bad: usize,
    counts: Counts,
    notes: Notes,
    keep_text: usize,
    /// Rows of the other part.
    other_part: usize,
    part: Part,
}

impl Collected<'_> {
    fn add(&mut self, file: usize, line: &Record, outcome: Outcome) {
        match outcome.result {
            LineResult::OtherPart => self.other_part += 1,
            _ => self.counts.rows += 1,
        }
        let origin = Origin { file: file as u32, line: line.line, row: line.row };
        if let Some(format) = outcome.format {
            if self.format == Format::Auto {
                self.format = format;
                self.first = Some(origin.in_file(&self.files[file]));
            } else if self.format != format {
                let first = self.first.as_deref().unwrap_or("the recipe");
                let problem = RowProblem::OtherFormat { found: format, wanted: self.format, first: first.to_owned() };
                return self.bad(file, line, problem);
            }
        }
        self.notes.join(outcome.notes, &|| origin.in_file(&self.files[file]));
        match outcome.result {
            LineResult::Rows(rows) => rows.into_iter().for_each(|fitted| self.keep(fitted, origin)),
            LineResult::OtherPart => {}
            LineResult::ZeroLabel(problem) => {
                self.counts.zero_label += 1;
                self.bad(file, line, problem);
            }
            LineResult::Bad(problem) => self.bad(file, line, problem),
        }
    }

    fn keep(&mut self, fitted: Fitted, origin: Origin) {
        let Fitted::Kept { mut row, truncated } = fitted else {
            self.counts.dropped += 1;
            return;
        };
        row.origin = origin;
        if self.rows.len() >= self.keep_text {
            (row.prompt_text, row.answer_text) = (String::new(), String::new());
        }
        let trained = row.trained.iter().filter(|trained| **trained).count();
        self.counts.truncated += usize::from(truncated);
        self.counts.tokens += row.tokens.len() as u64;
        self.counts.trained_tokens += trained as u64;
        self.counts.longest = self.counts.longest.max(row.tokens.len());
        self.counts.unmasked += usize::from(trained + 1 == row.tokens.len());
        self.rows.push(row);
    }

    fn bad(&mut self, file: usize, line: &Record, problem: RowProblem) {
        self.total_bad += 1;
        if self.bad.len() < SHOWN_ROWS {
            let below = problem.below();
            let before = if below == 0 { line.column as usize - 1 } else { 0 };
            self.bad.push(BadRow {
                file: self.files[file].clone(),
                line: if line.line == 0 { 0 } else { line.line.saturating_add(below as u32) },
                row: line.row,
                column: problem.column().map(|column| column + before),
                problem,
                beginning: line.beginning(),
            });
        }
    }

    /// `cut`: `data.max_rows` has ended the reading.
    fn finish(self, data: &Data, cut: bool, tokenizer: Option<&ChatTokenizer>) -> Result<Dataset, DatasetError> {
        if self.total_bad > 0 {
            let rows = BadRows { first: self.bad, total: self.total_bad, counts: self.counts };
            return Err(DatasetError::BadRows(Box::new(rows)));
        }
        if self.rows.is_empty() && self.counts.dropped > 0 {
            return Err(DatasetError::AllDropped { rows: self.counts.dropped, max_seq_len: data.max_seq_len });
        }
        if let (true, Some(share)) = (self.rows.is_empty() && self.other_part > 0, data.eval_share) {
            let held_back = self.part == Part::HeldBack;
            return Err(DatasetError::EmptyShare { share, rows: self.other_part, held_back });
        }
        if self.rows.is_empty() {
            return Err(DatasetError::NoRows { files: self.files.to_vec() });
        }
        let weights = if self.part == Part::Train { files::weights(data, self.files) } else { Vec::new() };
        let digest = digest(&self.rows, &weights);
        let selection = Selection {
            max_rows: data.max_rows.filter(|_| cut && self.part == Part::Train),
            share: data.eval_share.filter(|_| self.part == Part::Train),
            held_back: self.other_part,
            rows: self.counts.rows + self.other_part,
        };
        let mut notices = selection.notices();
        notices.extend(self.notes.notices(self.format.as_str(), tokenizer));
        let ends = self.notes.ends.into();
        let (rows, files) = (self.rows, self.files.to_vec());
        Ok(Dataset { rows, files, counts: self.counts, digest, notices, ends, weights })
    }
}

/// Weights that are given count too: they decide how often each row is trained on.
fn digest(rows: &[Row], weights: &[f64]) -> String {
    let mut hasher = blake3::Hasher::new();
    if !weights.is_empty() {
        hasher.update(b"weights");
        rows.iter().for_each(|row| {
            hasher.update(&weights[row.origin.file as usize].to_le_bytes());
        });
    }
    let mut bytes = Vec::new();
    for row in rows {
        bytes.clear();
        bytes.extend_from_slice(&(row.tokens.len() as u64).to_le_bytes());
        bytes.extend(row.tokens.iter().flat_map(|token| token.to_le_bytes()));
        bytes.extend(row.trained.iter().map(|trained| u8::from(*trained)));
        hasher.update(&bytes);
    }
    hasher.finalize().to_hex().to_string()
}
