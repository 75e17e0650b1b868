//! What can be wrong with a dataset, a tokenizer or a chat template, said so that a person can act
//! on it.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use finetune_advice::Advice;
use finetune_recipe::HUB_ROWS;
use finetune_store::Holding;

use crate::counts::Counts;
use crate::files;
use crate::kinds::{self, FileKind, Kind};
use crate::problem::{Remedy, RowProblem};
use crate::template_problem::TemplateProblem;
use crate::token_row::place;

/// An error of this crate. [`DatasetError::hints`] says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// A file of rows or of the model cannot be read.
    #[error("{}", files::unreadable(path, source))]
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
    /// A directory has the rows of a split under several names.
    #[error("{} has the rows of {split} in several files: {}", path.display(), found.join(", "))]
    SeveralFiles {
        /// The directory.
        path: PathBuf,
        /// `train`, or a name of held-back rows.
        split: &'static str,
        /// Names of the files.
        found: Vec<String>,
    },
    /// A file of a split that lies in numbered files is missing.
    #[error("{} has {there} of {wanted} files of {split}: {missing} is missing", path.display())]
    MissingShard {
        /// The directory.
        path: PathBuf,
        /// `train`, or a name of held-back rows.
        split: &'static str,
        /// Files that are there.
        there: usize,
        /// Files that their names speak of.
        wanted: usize,
        /// The name of the first that is missing.
        missing: String,
    },
    /// A pattern hits no file, or is none.
    #[error("{pattern}: {reason}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A data set of the hub is named, and nobody has fetched it.
    #[error("{entry} is a data set of the hub, and was not fetched")]
    NotFetched {
        /// The entry of `data.train` or `data.eval`.
        entry: String,
    },
    /// A file ends too early, or its bytes are not those that were written.
    #[error("{}: the {what} is torn or damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the file is.
        what: &'static str,
        /// What its reader says.
        reason: String,
    },
    /// A row that has not ended after more bytes than any has.
    #[error("{}: {reason}", path.display())]
    EndlessRow {
        /// The file.
        path: PathBuf,
        /// Which row.
        reason: String,
    },
    /// A Parquet file ran out of its bounds, or its reader panicked.
    #[error("{path} cannot be read as Parquet: {reason}")]
    ParquetBounds {
        /// The file.
        path: String,
        /// What it ran out of.
        reason: String,
    },
    /// The first row of a table names no columns.
    #[error("{}:{line}: the header cannot be used: {reason}", path.display())]
    BadHeader {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: u32,
        /// What is wrong with it.
        reason: String,
    },
    /// `data.eval_share` leaves no row to train on, or holds none back.
    #[error("data.eval_share = {share} {} {rows} {}", if *held_back { "holds back none of" } else { "holds back all" }, if *rows == 1 { "row" } else { "rows" })]
    EmptyShare {
        /// What the recipe says.
        share: f64,
        /// Rows of the files.
        rows: usize,
        /// Whether the part that is held back is the empty one.
        held_back: bool,
    },
    /// A file holds no rows.
    #[error("{} is {what}; rows are read from JSONL, JSON, CSV, TSV and Parquet", path.display())]
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
    /// A line of a file of the model is damaged.
    #[error("{}:{line}: {reason}", path.display())]
    BadLine {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// The files beside a file of ranks do not say all of its tokenizer.
    #[error("{}{}: {reason}", path.display(), line.map(|line| format!(":{line}")).unwrap_or_default())]
    Tiktoken {
        /// The file.
        path: PathBuf,
        /// The line, from 1, if it is known.
        line: Option<usize>,
        /// What cannot be read, or is missing.
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
    /// A GGUF file has no tokenizer that can be used here.
    #[error("{}: {what}", path.display())]
    GgufTokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with its tokenizer.
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
    /// A conversation cannot be answered.
    #[error("{}{}", .0, expectation(.0))]
    Conversation(Box<RowProblem>),
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
    /// The line of the problem, from 1. 0 in Parquet, which has no lines.
    pub line: u32,
    /// The number of the row in the file, from 1. 0 if the line alone tells it.
    pub row: u32,
    /// The column of the problem, from 1, in bytes, if it is known.
    pub column: Option<usize>,
    /// Why it cannot be used.
    pub problem: RowProblem,
    /// Its first characters, at most 81.
    pub beginning: String,
}

/// What is expected in the place of a problem, behind it.
fn expectation(problem: &RowProblem) -> String {
    problem.expected().map(|expected| format!("; expected {expected}")).unwrap_or_default()
}

impl fmt::Display for BadRow {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", place(&self.file, self.line, self.column, self.row), self.problem)?;
        formatter.write_str(&expectation(&self.problem))?;
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

fn instead(found: &[String]) -> String {
    if found.is_empty() { String::new() } else { format!("; it has {} instead", found.join(" and ")) }
}

impl Advice for DatasetError {
    fn hints(&self) -> Vec<String> {
        let hints: &[&str] = match self {
            Self::Unreadable { path, source } => return files::unreadable_hints(path, source),
            Self::NoTrainFile { .. } => &[
                "name a file of rows, or a directory that holds train.jsonl (and valid.jsonl); or .json, .csv, .parquet",
            ],
            Self::SeveralFiles { .. } => &["name those that are meant in data.train, as a list"],
            Self::MissingShard { .. } => {
                &["fetch the missing file, or name those that are meant: a list, or a pattern"]
            }
            Self::Pattern { .. } => &[
                "a pattern is relative to the recipe file: `*` and `?` stand for parts of a name, `**` for directories",
            ],
            Self::NotFetched { entry } => {
                let name = entry.trim_start_matches(HUB_ROWS).split('/').take(2).collect::<Vec<_>>().join("/");
                return vec![format!("fetch it with `hf download --repo-type dataset {name}`, and name its directory")];
            }
            Self::Damaged { .. } => &["fetch or write the file again: a part of it may be missing"],
            Self::EndlessRow { .. } => &["is this a file of rows? In a table a quote may be open that nothing closes"],
            Self::ParquetBounds { .. } => &["write it again with smaller row groups and pages, or as JSONL"],
            Self::BadHeader { .. } => &["the first line of a table names its columns, such as prompt,completion"],
            Self::EmptyShare { held_back: true, .. } => {
                &["raise data.eval_share, or name a file of held-back rows in data.eval"]
            }
            Self::EmptyShare { .. } => &["lower data.eval_share, or name more rows"],
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
            Self::BadModelFile { .. } | Self::BadLine { .. } => {
                &["download the model directory again: the file may be incomplete"]
            }
            Self::Tiktoken { .. } => &[
                "put a tokenizer.json of the same model beside these files: it is read in their place",
                "`convert_tiktoken_to_fast` of transformers.integrations.tiktoken writes one, from the `tiktoken.Encoding` that the model's own tokenization_*.py makes",
            ],
            Self::TemplateSyntax { .. } | Self::Template(_) => {
                &["name a template of your own with data.chat_template = \"template.jinja\""]
            }
            Self::NoTemplate { .. } => &[
                "base models often have no chat template: name one with data.chat_template = \"template.jinja\"",
                "or use rows that need none: text, or prompt_completion with plain strings",
            ],
            Self::NoRows { files } => &[no_rows_hint(files)],
            Self::AllDropped { .. } => &["raise data.max_seq_len, or cut rows with data.overlong = \"truncate\""],
            Self::BadRows(rows) => return rows.hints(),
            Self::Conversation(problem) => return problem.hints(),
            Self::OtherKind { remedy, .. } => return vec![remedy.clone()],
            Self::NotForLlamaCpp { .. } => {
                &["--format merged writes a model directory, which newer converters of llama.cpp may read"]
            }
            Self::GgufTokenizer { .. } => &[
                "put tokenizer.json and tokenizer_config.json of the model's Hugging Face repository beside the GGUF file, in a directory with no other one, and name the directory",
            ],
            Self::NoTokenizer => &["put the tokenizer.json of the model into its directory"],
            Self::Tokenizer { .. } => &[],
        };
        hints.iter().map(|hint| (*hint).to_owned()).collect()
    }
}

fn no_rows_hint(files: &[PathBuf]) -> &'static str {
    if files.iter().any(|file| kinds::is_pipe(file)) {
        return "a pipe is read once, and data.eval_share reads the rows twice: write them into a file";
    }
    let kind = files.first().and_then(|file| FileKind::of(file).ok()).map(|found| found.kind);
    match kind {
        Some(Kind::Table(_)) => "the first line of a table is its header, and its rows stand on the lines below",
        Some(Kind::Parquet) => "the file has columns and no rows: was another one meant?",
        _ => "each line of a dataset is one JSON object, as {\"messages\": [...]}",
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
        let is_one_file = self.first.iter().all(|row| row.file == first.file);
        if !is_one_file || !FileKind::of(&first.file).is_ok_and(FileKind::has_lines) {
            return Some("to go on without these rows, leave them out of the files".to_owned());
        }
        let lines: Vec<String> = self.first.iter().map(|row| format!("{}d", row.line)).collect();
        let file = first.file.display().to_string().replace('\'', "'\\''");
        Some(format!("to go on without: sed '{}' '{file}' > rest.jsonl, and name that in the recipe", lines.join(";")))
    }
}
