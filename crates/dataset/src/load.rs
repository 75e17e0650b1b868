//! Files of rows to rows of tokens with a mask, in order.

use std::path::PathBuf;
use std::sync::Arc;

use finetune_recipe::{Data, Format};
use rayon::prelude::*;

use crate::counts::Counts;
use crate::ends::Ends;
use crate::error::{BadRow, BadRows, DatasetError};
use crate::guard;
use crate::jsonl::{self, Line, Lines};
use crate::notes::Notes;
use crate::other_kinds;
use crate::problem::RowProblem;
use crate::reading::{Fitted, LineResult, Outcome, Reading};
use crate::token_row::{Origin, Row};
use crate::tokenizer::ChatTokenizer;

/// All rows of some files, ready to train on.
#[derive(Debug, Clone, PartialEq, Eq)]
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
}

/// Bad rows that are shown in full.
const SHOWN_ROWS: usize = 10;

/// Longer lines, in bytes, are read one at a time. Reading a line takes a hundred times its size in
/// memory for a while, which must not happen on every core at once.
const LONG_LINE: usize = 1 << 20;

impl Dataset {
    /// Reads, renders, tokenizes and masks all rows of `files`, in order.
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
        let tokenizer: Option<&ChatTokenizer> = tokenizer.into();
        files.iter().try_for_each(|path| other_kinds::refuse(path))?;
        // Shared, since threads that are left behind keep it: see `guard.rs`.
        let reading = Arc::new(Reading::new(data.clone(), tokenizer.cloned(), vocab_size)?);
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
        };
        for (index, path) in files.iter().enumerate() {
            let unreadable = |source| DatasetError::Unreadable { path: path.clone(), source };
            let mut lines = Lines::open(path).map_err(unreadable)?;
            loop {
                let block = lines.block().map_err(unreadable)?;
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
        collected.finish(data, tokenizer)
    }

    /// Where a row came from, as `file:line`.
    pub fn origin(&self, row: usize) -> String {
        let Some(Row { origin, .. }) = self.rows.get(row) else { return format!("row {row}") };
        match self.files.get(origin.file as usize) {
            Some(file) => format!("{}:{}", file.display(), origin.line),
            None => format!("line {}", origin.line),
        }
    }
}

/// What became of the lines of a block, in order.
///
/// # Errors
/// The error of a line that stops the reading.
fn outcomes(reading: &Reading, block: &[Line]) -> Result<Vec<Outcome>, DatasetError> {
    let is_long = |line: &Line| line.bytes.len() > LONG_LINE;
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
}

impl Collected<'_> {
    fn add(&mut self, file: usize, line: &Line, outcome: Outcome) {
        self.counts.rows += 1;
        if let Some(format) = outcome.format {
            if self.format == Format::Auto {
                self.format = format;
                self.first = Some(format!("{}:{}", self.files[file].display(), line.number));
            } else if self.format != format {
                let first = self.first.as_deref().unwrap_or("the recipe");
                let problem = RowProblem::OtherFormat { found: format, wanted: self.format, first: first.to_owned() };
                return self.bad(file, line, problem);
            }
        }
        self.notes.join(outcome.notes);
        match outcome.result {
            LineResult::Rows(rows) => {
                let origin = Origin { file: file as u32, line: line.number };
                rows.into_iter().for_each(|fitted| self.keep(fitted, origin));
            }
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

    fn bad(&mut self, file: usize, line: &Line, problem: RowProblem) {
        self.total_bad += 1;
        if self.bad.len() < SHOWN_ROWS {
            let (file, line, beginning) = (self.files[file].clone(), line.number, jsonl::beginning(&line.bytes));
            self.bad.push(BadRow { file, line, problem, beginning });
        }
    }

    fn finish(self, data: &Data, tokenizer: Option<&ChatTokenizer>) -> Result<Dataset, DatasetError> {
        if self.total_bad > 0 {
            let rows = BadRows { first: self.bad, total: self.total_bad, counts: self.counts };
            return Err(DatasetError::BadRows(Box::new(rows)));
        }
        if self.rows.is_empty() && self.counts.dropped > 0 {
            return Err(DatasetError::AllDropped { rows: self.counts.dropped, max_seq_len: data.max_seq_len });
        }
        if self.rows.is_empty() {
            return Err(DatasetError::NoRows { files: self.files.to_vec() });
        }
        let digest = digest(&self.rows);
        let notices = self.notes.notices(self.format.as_str(), tokenizer);
        let ends = self.notes.ends.into();
        Ok(Dataset { rows: self.rows, files: self.files.to_vec(), counts: self.counts, digest, notices, ends })
    }
}

fn digest(rows: &[Row]) -> String {
    let mut hasher = blake3::Hasher::new();
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
