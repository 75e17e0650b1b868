//! What can be wrong with a dataset, a tokenizer or a chat template, said so that a person can act on it.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::load::Counts;
use crate::tokenizer::ChatTokenizer;

#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    #[error("cannot read {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{} is a directory without a train.jsonl", path.display())]
    NoTrainFile { path: PathBuf },
    #[error("{} is {what}; rows are read from JSONL, one JSON object on each line", path.display())]
    OtherKind {
        path: PathBuf,
        /// With its article.
        what: &'static str,
        /// What makes rows of it.
        remedy: String,
    },
    #[error("{} has {bytes} bytes; at most {limit} are read", path.display())]
    TooLarge { path: PathBuf, bytes: u64, limit: u64 },
    #[error("{}: {reason}", path.display())]
    BadModelFile { path: PathBuf, reason: String },
    #[error("the model directory has no tokenizer.json, which all rows but `tokens` rows need")]
    NoTokenizer,
    #[error("{} has no tokenizer.json{}", model_dir.display(), instead(found))]
    NoTokenizerFile { model_dir: PathBuf, found: Vec<String> },
    #[error("the tokenizer failed: {reason}")]
    Tokenizer { reason: String },
    #[error("chat template {origin}, line {line}: {reason}")]
    TemplateSyntax { origin: String, line: usize, reason: String },
    #[error("{reason}")]
    Template { reason: String },
    /// Ends the reading: the next row would run out of the same.
    #[error("chat template {origin}{}: {reason}", at_line(*line))]
    TemplateBounds { origin: String, line: Option<usize>, reason: String },
    /// Ends the reading.
    #[error("the tokenizer of {path} cannot be used: {reason}")]
    TokenizerBounds { path: String, reason: String },
    #[error("data.date is {date:?}, not a day as YYYY-MM-DD")]
    BadDate { date: String },
    #[error("the system gives this process no more threads: {reason}")]
    NoThreads { reason: String },
    #[error("this data needs a chat template, and the model directory {} has none", model_dir.display())]
    NoTemplate { model_dir: PathBuf },
    #[error("no rows in {}", listed(files))]
    NoRows { files: Vec<PathBuf> },
    #[error("all {rows} rows are longer than data.max_seq_len = {max_seq_len} tokens and were dropped")]
    AllDropped { rows: usize, max_seq_len: usize },
    #[error("{0}")]
    BadRows(Box<BadRows>),
}

/// Every row that cannot be used: the first few in full, the rest counted.
#[derive(Debug)]
pub struct BadRows {
    pub first: Vec<BadRow>,
    pub total: usize,
    /// What was counted over all rows, the bad ones included in `rows` and `zero_label`.
    pub counts: Counts,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadRow {
    pub file: PathBuf,
    /// From 1.
    pub line: u32,
    /// From 1, in bytes, where the place within the line is known.
    pub column: Option<usize>,
    pub reason: String,
    /// The key and type that should have been there.
    pub expected: Option<String>,
    /// The first bytes of the row.
    pub beginning: String,
}

impl fmt::Display for BadRow {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.file.display(), self.line)?;
        if let Some(column) = self.column {
            write!(formatter, ":{column}")?;
        }
        write!(formatter, ": {}", self.reason)?;
        if let Some(expected) = &self.expected {
            write!(formatter, "; expected {expected}")?;
        }
        if !self.beginning.is_empty() {
            write!(formatter, "\n    {}", self.beginning)?;
        }
        Ok(())
    }
}

impl fmt::Display for BadRows {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.total {
            1 => write!(formatter, "1 row cannot be used")?,
            total => write!(formatter, "{total} rows cannot be used")?,
        }
        for row in &self.first {
            write!(formatter, "\n  {row}")?;
        }
        match self.total - self.first.len().min(self.total) {
            0 => Ok(()),
            rest => write!(formatter, "\n  and {rest} more"),
        }
    }
}

fn listed(files: &[PathBuf]) -> String {
    files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn at_line(line: Option<usize>) -> String {
    line.map(|line| format!(", line {line}")).unwrap_or_default()
}

/// A name with a slash and nothing else may be a dataset of the hub, and a URL is one whatever the path has made of it.
fn unreadable_hints(path: &Path) -> Vec<String> {
    let text = path.to_string_lossy();
    let relative = text.strip_prefix("./").unwrap_or(&text);
    let parts = relative.split('/').filter(|part| !part.is_empty()).count();
    let mut hints = vec!["paths in a recipe are relative to the recipe file".to_owned()];
    if relative.contains("http:/") || relative.contains("https:/") {
        hints = vec!["nothing is downloaded: fetch the file, and name it in data.train".to_owned()];
    } else if parts == 2 && path.is_relative() && path.extension().is_none() {
        hints.push(format!(
            "datasets of the hub are not downloaded: `hf download --repo-type dataset {relative}` fetches one; rows are read from JSONL"
        ));
    }
    hints
}

fn instead(found: &[String]) -> String {
    if found.is_empty() { String::new() } else { format!("; it has {} instead", found.join(" and ")) }
}

impl DatasetError {
    /// Says of a model directory without a tokenizer what it has instead; any other error stays as it is.
    pub fn in_model(self, model_dir: &Path) -> DatasetError {
        match self {
            Self::NoTokenizer => ChatTokenizer::missing(model_dir),
            other => other,
        }
    }

    /// What to do about it, most likely first.
    pub fn hints(&self) -> Vec<String> {
        let hints: &[&str] = match self {
            Self::Unreadable { path, .. } => return unreadable_hints(path),
            Self::NoTrainFile { .. } => {
                &["name a .jsonl file in data.train, or a directory that holds train.jsonl (and valid.jsonl)"]
            }
            Self::TooLarge { .. } => &["is this the file you meant?"],
            Self::BadModelFile { path, reason } if reason.contains("in place of the file") => {
                return vec![stand_in_hint(path, reason)];
            }
            Self::NoTokenizerFile { model_dir, found } => return tokenizer_hints(model_dir, found),
            Self::TemplateBounds { .. } => &[
                "a chat template is a program that comes with the model: is this model from someone you trust?",
                "name a template of your own with data.chat_template = \"template.jinja\"",
            ],
            Self::TokenizerBounds { .. } => {
                &["download the model directory again, or take its tokenizer.json from the model it was made of"]
            }
            Self::BadDate { .. } => &["write it as date = \"2025-01-31\""],
            Self::NoThreads { .. } => {
                &["raise the limit on processes (ulimit -u, or --pids-limit of a container), or set RAYON_NUM_THREADS"]
            }
            Self::BadModelFile { .. } => &["download the model directory again: the file may be incomplete"],
            Self::TemplateSyntax { .. } | Self::Template { .. } => {
                &["name a template of your own with data.chat_template = \"template.jinja\""]
            }
            Self::NoTemplate { .. } => &[
                "base models often have no chat template: name one with data.chat_template = \"template.jinja\"",
                "or use rows that need none: text, or prompt_completion with plain strings",
            ],
            Self::NoRows { .. } => &["each line of a dataset is one JSON object, as {\"messages\": [...]}"],
            Self::AllDropped { .. } => &["raise data.max_seq_len, or cut rows with data.overlong = \"truncate\""],
            Self::BadRows(rows) => return rows.hints(),
            Self::OtherKind { remedy, .. } => return vec![remedy.clone()],
            Self::NoTokenizer => &["put the tokenizer.json of the model into its directory"],
            Self::Tokenizer { .. } => &[],
        };
        hints.iter().map(|hint| (*hint).to_owned()).collect()
    }
}

fn stand_in_hint(path: &Path, reason: &str) -> String {
    let directory = path.parent().unwrap_or(Path::new(".")).display();
    if reason.contains("git-lfs") {
        format!(
            "the model was cloned without git-lfs: run `git lfs install` and `git lfs pull` in {directory}, or download the file"
        )
    } else {
        format!("download the file again, signed in if the model asks for it, into {directory}")
    }
}

fn tokenizer_hints(model_dir: &Path, found: &[String]) -> Vec<String> {
    let directory = model_dir.display();
    if found.is_empty() {
        return vec![format!("put the tokenizer.json of the model into {directory}")];
    }
    vec![
        format!(
            "tokenizer.json is made of these files by: python -c \"from transformers import AutoTokenizer; \
             AutoTokenizer.from_pretrained('{directory}').save_pretrained('{directory}')\""
        ),
        "or take the tokenizer.json of a newer copy of the same model".to_owned(),
    ]
}

impl BadRows {
    fn hints(&self) -> Vec<String> {
        let any = |text: &str| self.first.iter().any(|row| row.reason.contains(text));
        let mut hints = Vec::new();
        if any("data.max_seq_len") {
            hints.push("raise data.max_seq_len, or set data.overlong to \"truncate\" or \"drop\"".to_owned());
        }
        if any("the chat template does not render") {
            hints.push("name a template with {% generation %} blocks in data.chat_template".to_owned());
        }
        if any("the first row") {
            hints.push("one dataset has one format: convert the rows, or name the format with data.format".to_owned());
        }
        if any("not below the vocabulary") {
            hints.push(
                "the tokenizer has tokens that the model's embedding lacks: use the tokenizer of this model".to_owned(),
            );
        }
        hints.extend(self.without_them());
        hints
    }

    /// How to go on without the bad rows, where they are few and all of them shown.
    fn without_them(&self) -> Option<String> {
        let first = self.first.first()?;
        if self.total != self.first.len() || self.total.saturating_mul(4) > self.counts.rows {
            return None;
        }
        if self.first.iter().any(|row| row.file != first.file) {
            return Some("to go on without these rows, leave their lines out of the files".to_owned());
        }
        let lines: Vec<String> = self.first.iter().map(|row| format!("{}d", row.line)).collect();
        let file = first.file.display().to_string().replace('\'', "'\\''");
        Some(format!("to go on without: sed '{}' '{file}' > rest.jsonl, and name that in the recipe", lines.join(";")))
    }
}
