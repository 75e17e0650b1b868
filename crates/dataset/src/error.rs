//! What can be wrong with a dataset, a tokenizer or a chat template, said so that a person can act
//! on it.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use finetune_advice::Advice;
use finetune_store::Holding;

use crate::counts::Counts;
use crate::problem::{Remedy, RowProblem};
use crate::template_problem::TemplateProblem;

/// An error of this crate. [`DatasetError::hints`] says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// A file of rows or of the model cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A directory is named for training and has no rows.
    #[error("{} is a directory without a train.jsonl", path.display())]
    NoTrainFile {
        /// The directory.
        path: PathBuf,
    },
    /// A file is something else than lines of JSON objects.
    #[error("{} is {what}; rows are read from JSONL, one JSON object on each line", path.display())]
    OtherKind {
        /// The file.
        path: PathBuf,
        /// What it is, with the article.
        what: &'static str,
        /// What makes rows of it.
        remedy: String,
    },
    /// A file of the model is larger than is read.
    #[error("{} has {bytes} bytes; at most {limit} are read", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
        /// The largest size that is read, in bytes.
        limit: u64,
    },
    /// A file of the model is damaged, or disagrees with another.
    #[error("{}: {reason}", path.display())]
    BadModelFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Something else lies in the place of a file of the model: git's pointer, or a web page.
    #[error("{}: {}", path.display(), holding.describe())]
    StandIn {
        /// The file.
        path: PathBuf,
        /// What lies there.
        holding: Holding,
    },
    /// The rows need a tokenizer, and there is none.
    #[error("the model directory has no tokenizer.json, which all rows but `tokens` rows need")]
    NoTokenizer,
    /// A model directory has no tokenizer.json.
    #[error("{} has no tokenizer.json{}", model_dir.display(), instead(found))]
    NoTokenizerFile {
        /// The directory.
        model_dir: PathBuf,
        /// Files of other kinds of tokenizers that it has.
        found: Vec<String>,
    },
    /// The tokenizer gives no tokens for a text, or no text for tokens.
    #[error("the tokenizer failed: {reason}")]
    Tokenizer {
        /// What the tokenizer says.
        reason: String,
    },
    /// A chat template cannot be compiled.
    #[error("chat template {origin}, line {line}: {reason}")]
    TemplateSyntax {
        /// The file of the template.
        origin: String,
        /// The line, from 1.
        line: usize,
        /// What the engine says.
        reason: String,
    },
    /// A chat template gives no text for a conversation.
    #[error("{0}")]
    Template(TemplateProblem),
    /// A chat template ran out of its bounds. It ends the reading: the next row would end in the
    /// same way.
    #[error("chat template {origin}{}: {reason}", at_line(*line))]
    TemplateBounds {
        /// The file of the template.
        origin: String,
        /// The line, from 1, if it is known.
        line: Option<usize>,
        /// What the template ran out of.
        reason: String,
    },
    /// A tokenizer ran out of its bounds, or panicked. It ends the reading.
    #[error("the tokenizer of {path} cannot be used: {reason}")]
    TokenizerBounds {
        /// The file of the tokenizer.
        path: String,
        /// What the tokenizer ran out of.
        reason: String,
    },
    /// llama.cpp cannot split text as the tokenizer does.
    #[error("{}: {what}", path.display())]
    NotForLlamaCpp {
        /// The file of the tokenizer.
        path: PathBuf,
        /// What llama.cpp does not have.
        what: String,
    },
    /// `data.date` is no day.
    #[error("data.date is {date:?}, not a day as YYYY-MM-DD")]
    BadDate {
        /// What the recipe says.
        date: String,
    },
    /// The threads that read rows cannot be started.
    #[error("the system gives this process no more threads: {reason}")]
    NoThreads {
        /// What the system says.
        reason: String,
    },
    /// Chats need a template, and the model has none.
    #[error("this data needs a chat template, and the model directory {} has none", model_dir.display())]
    NoTemplate {
        /// The directory.
        model_dir: PathBuf,
    },
    /// The files hold no rows.
    #[error("no rows in {}", listed(files))]
    NoRows {
        /// The files.
        files: Vec<PathBuf>,
    },
    /// Every row was dropped for its length.
    #[error("all {rows} rows are longer than data.max_seq_len = {max_seq_len} tokens and were dropped")]
    AllDropped {
        /// Rows that were dropped.
        rows: usize,
        /// Tokens that a row may have.
        max_seq_len: usize,
    },
    /// Rows cannot be used.
    #[error("{0}")]
    BadRows(Box<BadRows>),
}

/// The rows that cannot be used.
#[derive(Debug)]
pub struct BadRows {
    /// The first few, in full.
    pub first: Vec<BadRow>,
    /// How many there are.
    pub total: usize,
    /// What was counted over all rows. `rows` and `zero_label` include the bad ones.
    pub counts: Counts,
}

/// A row that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadRow {
    /// The file that it is in.
    pub file: PathBuf,
    /// Its line, from 1.
    pub line: u32,
    /// Why it cannot be used.
    pub problem: RowProblem,
    /// Its first characters, at most 81.
    pub beginning: String,
}

impl fmt::Display for BadRow {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.file.display(), self.line)?;
        if let Some(column) = self.problem.column() {
            write!(formatter, ":{column}")?;
        }
        write!(formatter, ": {}", self.problem)?;
        if let Some(expected) = self.problem.expected() {
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

/// A path of two names may be meant as a dataset of the hub. A URL is recognized also after the
/// recipe's directory was put in front of it and a slash was lost.
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

impl Advice for DatasetError {
    fn hints(&self) -> Vec<String> {
        let hints: &[&str] = match self {
            Self::Unreadable { path, .. } => return unreadable_hints(path),
            Self::NoTrainFile { .. } => {
                &["name a .jsonl file in data.train, or a directory that holds train.jsonl (and valid.jsonl)"]
            }
            Self::TooLarge { .. } => &["is this the file you meant?"],
            Self::StandIn { path, holding } => return vec![stand_in_hint(path, *holding)],
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
            Self::TemplateSyntax { .. } | Self::Template(_) => {
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
            Self::NotForLlamaCpp { .. } => {
                &["--format merged writes a model directory, which newer converters of llama.cpp may read"]
            }
            Self::NoTokenizer => &["put the tokenizer.json of the model into its directory"],
            Self::Tokenizer { .. } => &[],
        };
        hints.iter().map(|hint| (*hint).to_owned()).collect()
    }
}

fn stand_in_hint(path: &Path, holding: Holding) -> String {
    let directory = path.parent().unwrap_or(Path::new(".")).display();
    if holding == Holding::LfsPointer {
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
        let remedies: BTreeSet<Remedy> = self.first.iter().filter_map(|row| row.problem.remedy()).collect();
        let mut hints: Vec<String> = remedies.into_iter().map(|remedy| remedy.text().to_owned()).collect();
        hints.extend(self.without_them());
        hints
    }

    /// How to go on without the bad rows, if they are few and all of them are shown.
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
