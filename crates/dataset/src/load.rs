//! Files of rows to token rows with a mask: the whole way, in order.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use finetune_recipe::{Data, Format};
use rayon::prelude::*;

use crate::ends::Ends;
use crate::error::{BadRow, BadRows, DatasetError};
use crate::guard;
use crate::jsonl::{self, Line, Lines, RowProblem};
use crate::notes::Notes;
use crate::other_kinds;
use crate::reading::{End, Fitted, Outcome, Reading};
use crate::tokenizer::ChatTokenizer;

/// One row, ready to train on. Several may come from one line: a conversation whose template writes earlier turns anew is a row
/// for each of its answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub tokens: Vec<u32>,
    /// `trained[i]`: token `i` is a target, predicted from `tokens[..i]`. The first never is.
    pub trained: Vec<bool>,
    pub origin: Origin,
    /// Tokens before the answer: what the generation of a sample starts from.
    pub prompt_tokens: usize,
    /// For a person to read: the user message, or the prompt, that the first trained turn answers. Empty where it was not
    /// kept.
    pub prompt_text: String,
    /// The answer that the row trains on first: what a generated sample is held against. Empty where it was not kept.
    pub answer_text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Index into [`Dataset::files`].
    pub file: u32,
    /// From 1.
    pub line: u32,
}

/// What was read. `dropped` and `truncated` count the rows that were made of the lines, which are more than `rows` where a
/// line became several.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Rows read, blank lines not counted.
    pub rows: usize,
    /// Longer than `max_seq_len` and left out.
    pub dropped: usize,
    /// Longer than `max_seq_len` and cut.
    pub truncated: usize,
    /// Nothing to train on; each is also a bad row.
    pub zero_label: usize,
    pub tokens: u64,
    pub trained_tokens: u64,
    /// Tokens of the longest row.
    pub longest: usize,
    /// Rows in which every token is trained on: no prompt is masked.
    pub unmasked: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataset {
    pub rows: Vec<Row>,
    pub files: Vec<PathBuf>,
    pub counts: Counts,
    /// blake3 over the tokens and the mask of every row, in order. Ranks compare it, and a resume checks it.
    pub digest: String,
    /// What a person should know about how these rows were read, one line each.
    pub notices: Vec<String>,
    pub ends: Ends,
}

/// Bad rows that are shown in full.
const SHOWN_ROWS: usize = 10;

/// Bytes of a line that is read alone: what is made of it takes a hundred times as many for a while, and not once for each
/// core.
const LONG_LINE: usize = 1 << 20;

impl Dataset {
    /// Reads, renders, tokenizes and masks all rows of `files`, in order. `vocab_size` is the number of rows of the model's
    /// embedding. `keep_text` is how many of the first rows keep the texts that people read; of a large dataset these take as
    /// much memory as its tokens. `progress` is called now and then with the number of rows read so far. Rows of tokens need no
    /// tokenizer.
    ///
    /// All bad rows are collected into one [`DatasetError::BadRows`]. What no row can do anything about (a file of another
    /// kind, a template that ran out of its bounds) ends the reading at once.
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
        // Shared with threads that may be left behind: see `guard.rs`.
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

/// What became of the lines of a block, in order; an error if one of them stops the reading.
fn outcomes(reading: &Reading, block: &[Line]) -> Result<Vec<Outcome>, DatasetError> {
    let is_long = |line: &Line| line.bytes.len() > LONG_LINE;
    let mut read: Vec<Option<Result<Outcome, DatasetError>>> =
        block.par_iter().map(|line| if is_long(line) { None } else { reading.line(line) }).collect();
    for (line, outcome) in block.iter().zip(&mut read).filter(|(line, _)| is_long(line)) {
        *outcome = reading.line(line);
    }
    // Lines that were not read any more have none.
    read.into_iter().flatten().collect()
}

/// Names under which people keep the rows that are held back, the first of them ours.
const HELD_BACK: [&str; 6] = ["valid.jsonl", "validation.jsonl", "val.jsonl", "dev.jsonl", "eval.jsonl", "test.jsonl"];

/// Directories in `train` and `eval` become the files in them: `train.jsonl` to train on; `valid.jsonl` to evaluate, from a
/// training directory too if `eval` is empty and it has one. A directory that `eval` names may have its rows under another
/// usual name.
pub fn resolve_files(train: &[PathBuf], eval: &[PathBuf]) -> Result<(Vec<PathBuf>, Vec<PathBuf>), DatasetError> {
    let (mut train_files, mut eval_files) = (Vec::new(), Vec::new());
    for path in train {
        if !path.is_dir() {
            train_files.push(path.clone());
            continue;
        }
        let (file, valid) = (path.join("train.jsonl"), path.join(HELD_BACK[0]));
        if !file.is_file() {
            return Err(DatasetError::NoTrainFile { path: path.clone() });
        }
        train_files.push(file);
        if eval.is_empty() && valid.is_file() {
            eval_files.push(valid);
        }
    }
    let held_back = |path: &PathBuf| {
        let there = HELD_BACK.iter().map(|name| path.join(name)).find(|file| file.is_file());
        there.unwrap_or_else(|| path.join(HELD_BACK[0]))
    };
    eval_files.extend(eval.iter().map(|path| if path.is_dir() { held_back(path) } else { path.clone() }));
    for path in train_files.iter().chain(&eval_files) {
        readable(path)?;
        other_kinds::refuse(path)?;
    }
    Ok((train_files, eval_files))
}

/// Files beside the training rows of a directory that look like held-back rows and are not used.
pub fn unused_files(train: &[PathBuf], eval: &[PathBuf]) -> Vec<String> {
    if !eval.is_empty() {
        return Vec::new();
    }
    let without_valid = train.iter().filter(|path| path.is_dir() && !path.join(HELD_BACK[0]).is_file());
    let files = without_valid.filter_map(|path| HELD_BACK.iter().map(|name| path.join(name)).find(|it| it.is_file()));
    files.map(|file| format!("{} is not used: to evaluate on its rows, name it in data.eval", file.display())).collect()
}

fn readable(path: &Path) -> Result<(), DatasetError> {
    match std::fs::File::open(path) {
        Ok(_) => Ok(()),
        Err(source) => Err(DatasetError::Unreadable { path: path.to_owned(), source }),
    }
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
                let what = format!(
                    "this is a row of format {}, and the first row ({first}) is {}",
                    format.as_str(),
                    self.format.as_str()
                );
                let expected = format!("format {} in every row", self.format.as_str());
                return self.bad(file, line, RowProblem::new(what).expected(expected));
            }
        }
        self.notes.join(outcome.notes);
        match outcome.end {
            End::Rows(rows) => {
                let origin = Origin { file: file as u32, line: line.number };
                rows.into_iter().for_each(|fitted| self.keep(fitted, origin));
            }
            End::ZeroLabel(problem) => {
                self.counts.zero_label += 1;
                self.bad(file, line, problem);
            }
            End::Bad(problem) => self.bad(file, line, problem),
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
            let RowProblem { column, reason, expected } = problem;
            let (file, line, beginning) = (self.files[file].clone(), line.number, jsonl::beginning(&line.bytes));
            self.bad.push(BadRow { file, line, column, reason, expected, beginning });
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
