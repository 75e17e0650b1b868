//! Files of rows to token rows with a mask: the whole way, in order.

use std::path::{Path, PathBuf};

use finetune_recipe::{Data, Format, Overlong, TrainOn};
use rayon::prelude::*;

use crate::error::{BadRow, BadRows, DatasetError};
use crate::jsonl::{self, Line, Lines, RowProblem};
use crate::mask::{self, Conversation};
use crate::row::{self, Example};
use crate::template;
use crate::tokenizer::ChatTokenizer;

/// One row, ready to train on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub tokens: Vec<u32>,
    /// `trained[i]`: token `i` is a target, predicted from `tokens[..i]`. The first never is.
    pub trained: Vec<bool>,
    pub origin: Origin,
    /// Tokens before the first trained one: what the generation of a sample starts from.
    pub prompt_tokens: usize,
    /// For a person to read: the user message, or the prompt, that the first trained turn answers.
    pub prompt_text: String,
    /// The answer that the row trains on first: what a generated sample is held against.
    pub answer_text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Index into [`Dataset::files`].
    pub file: u32,
    /// From 1.
    pub line: u32,
}

/// What was read. All but `dropped` and `zero_label` rows are in the dataset.
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
}

/// Bad rows that are shown in full.
const SHOWN_ROWS: usize = 10;

impl Dataset {
    /// Reads, renders, tokenizes and masks all rows of `files`, in order. `vocab_size` is the number of rows of the model's
    /// embedding. `progress` is called now and then with the number of rows read so far.
    ///
    /// All bad rows are collected into one [`DatasetError::BadRows`].
    pub fn load(
        files: &[PathBuf],
        data: &Data,
        tokenizer: &ChatTokenizer,
        vocab_size: usize,
        progress: &dyn Fn(u64),
    ) -> Result<Self, DatasetError> {
        let reading = Reading { data, tokenizer, vocab_size };
        let mut collected = Collected { files, format: data.format, first: None, rows: Vec::new(), bad: Vec::new(), total_bad: 0, counts: Counts::default() };
        for (index, path) in files.iter().enumerate() {
            let unreadable = |source| DatasetError::Unreadable { path: path.clone(), source };
            let mut lines = Lines::open(path).map_err(unreadable)?;
            loop {
                let block = lines.block().map_err(unreadable)?;
                if block.is_empty() {
                    break;
                }
                let results: Vec<Result<Outcome, DatasetError>> =
                    block.par_iter().map(|line| reading.line(line)).collect();
                for (line, outcome) in block.iter().zip(results) {
                    collected.add(index, line, outcome?);
                }
                progress(collected.counts.rows as u64);
            }
        }
        collected.finish(data)
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

/// Directories in `train` and `eval` become the files in them: `train.jsonl` to train on; `valid.jsonl` to evaluate, from a
/// training directory too if `eval` is empty and it has one.
pub fn resolve_files(train: &[PathBuf], eval: &[PathBuf]) -> Result<(Vec<PathBuf>, Vec<PathBuf>), DatasetError> {
    let (mut train_files, mut eval_files) = (Vec::new(), Vec::new());
    for path in train {
        if !path.is_dir() {
            train_files.push(path.clone());
            continue;
        }
        let (file, valid) = (path.join("train.jsonl"), path.join("valid.jsonl"));
        if !file.is_file() {
            return Err(DatasetError::NoTrainFile { path: path.clone() });
        }
        train_files.push(file);
        if eval.is_empty() && valid.is_file() {
            eval_files.push(valid);
        }
    }
    eval_files.extend(eval.iter().map(|path| if path.is_dir() { path.join("valid.jsonl") } else { path.clone() }));
    for path in train_files.iter().chain(&eval_files) {
        readable(path)?;
    }
    Ok((train_files, eval_files))
}

fn readable(path: &Path) -> Result<(), DatasetError> {
    match std::fs::File::open(path) {
        Ok(_) => Ok(()),
        Err(source) => Err(DatasetError::Unreadable { path: path.to_owned(), source }),
    }
}

/// What became of a line.
struct Outcome {
    /// Known unless the line is no JSON object or no format fits.
    format: Option<Format>,
    end: End,
}

enum End {
    Kept { row: Row, truncated: bool },
    Dropped,
    ZeroLabel(RowProblem),
    Bad(RowProblem),
}

/// Why a row cannot be used, or why none can.
enum Failure {
    Row(RowProblem),
    ZeroLabel(RowProblem),
    All(DatasetError),
}

impl From<RowProblem> for Failure {
    fn from(problem: RowProblem) -> Self {
        Self::Row(problem)
    }
}

impl From<DatasetError> for Failure {
    fn from(error: DatasetError) -> Self {
        match error {
            DatasetError::Template { reason } | DatasetError::Tokenizer { reason } => Self::Row(RowProblem::new(reason)),
            other => Self::All(other),
        }
    }
}

struct Reading<'a> {
    data: &'a Data,
    tokenizer: &'a ChatTokenizer,
    vocab_size: usize,
}

/// A row before its length is looked at.
struct Masked {
    tokens: Vec<u32>,
    trained: Vec<bool>,
    prompt_text: String,
    answer_text: String,
}

impl Reading<'_> {
    fn line(&self, line: &Line) -> Result<Outcome, DatasetError> {
        let mut format = None;
        let end = match self.read(line, &mut format) {
            Ok(end) => end,
            Err(Failure::Row(problem)) => End::Bad(problem),
            Err(Failure::ZeroLabel(problem)) => End::ZeroLabel(problem),
            Err(Failure::All(error)) => return Err(error),
        };
        Ok(Outcome { format, end })
    }

    fn read(&self, line: &Line, format: &mut Option<Format>) -> Result<End, Failure> {
        let object = jsonl::object(&line.bytes)?;
        let read_as = match self.data.format {
            Format::Auto => row::detect(&object)?,
            chosen => chosen,
        };
        *format = Some(read_as);
        let masked = match row::read(object, read_as)? {
            Example::Chat { messages, tools, trained_from } => self.chat(&messages, tools.as_ref(), trained_from)?,
            Example::PromptCompletion { prompt, completion } => self.prompt_completion(prompt, completion)?,
            Example::Text(text) => self.text(text)?,
            Example::Tokens { ids, trained } => self.tokens(ids, trained)?,
        };
        self.fit(masked)
    }

    fn chat(
        &self,
        messages: &[serde_json::Value],
        tools: Option<&serde_json::Value>,
        trained_from: usize,
    ) -> Result<Masked, Failure> {
        let conversation = Conversation {
            template: self.tokenizer.template()?,
            messages: &template::to_values(messages)?,
            tools: &template::tools_value(tools)?,
        };
        let is = |index: &usize, role: &str| messages[*index]["role"].as_str() == Some(role);
        let assistant_turns: Vec<usize> = (0..messages.len()).filter(|index| is(index, "assistant")).collect();
        let mut turns: Vec<usize> = assistant_turns.iter().copied().filter(|turn| *turn >= trained_from).collect();
        if self.data.train_on != TrainOn::Assistant {
            turns.drain(..turns.len().saturating_sub(1));
        }
        let full = conversation.render()?;
        check_parts_rendered(messages, &full.text)?;
        let encoded = self.tokenizer.encode_with_spans(&full.text)?;
        let trained = match self.data.train_on {
            TrainOn::All => all_but_first(encoded.ids.len()),
            TrainOn::Assistant | TrainOn::Last if turns.is_empty() => {
                let roles: Vec<&str> = messages.iter().filter_map(|message| message["role"].as_str()).take(8).collect();
                let what = format!("no assistant message to train on; the roles are {}", roles.join(", "));
                return Err(Failure::ZeroLabel(RowProblem::new(what)));
            }
            TrainOn::Assistant | TrainOn::Last => {
                mask::trained_tokens(&encoded.spans, &conversation.trained_spans(&full, &assistant_turns, &turns)?)
            }
        };
        let answered = turns.first().copied().unwrap_or(messages.len());
        let asked = (0..answered).rev().find(|index| is(index, "user"));
        Ok(Masked {
            tokens: encoded.ids,
            trained,
            prompt_text: asked.map(|index| row::content_text(&messages[index])).unwrap_or_default(),
            answer_text: messages.get(answered).map(row::content_text).unwrap_or_default(),
        })
    }

    /// As TRL: the whole is tokenized at once where the prompt's tokens are its beginning, and the two apart where not.
    fn prompt_completion(&self, prompt: String, completion: String) -> Result<Masked, Failure> {
        let prompt_ids = self.tokenizer.encode(&prompt, true)?;
        let mut tokens = self.tokenizer.encode(&format!("{prompt}{completion}"), true)?;
        if !tokens.starts_with(&prompt_ids) {
            tokens = prompt_ids.clone();
            tokens.extend(self.tokenizer.encode(&completion, false)?);
        }
        self.end(&mut tokens);
        let first = if self.data.train_on == TrainOn::All { 1 } else { prompt_ids.len().max(1) };
        let trained = (0..tokens.len()).map(|index| index >= first).collect();
        Ok(Masked { tokens, trained, prompt_text: prompt, answer_text: completion })
    }

    fn text(&self, text: String) -> Result<Masked, Failure> {
        let mut tokens = self.tokenizer.encode(&text, true)?;
        self.end(&mut tokens);
        Ok(Masked { trained: all_but_first(tokens.len()), tokens, prompt_text: String::new(), answer_text: text })
    }

    fn tokens(&self, ids: Vec<u32>, mut trained: Vec<bool>) -> Result<Masked, Failure> {
        self.check_ids(&ids)?;
        if let Some(first) = trained.first_mut() {
            *first = false;
        }
        let start = trained.iter().position(|trained| *trained).unwrap_or(ids.len());
        let answer: Vec<u32> = ids.iter().zip(&trained).filter(|(_, trained)| **trained).map(|(id, _)| *id).collect();
        let prompt_text = self.tokenizer.decode(&ids[..start], false)?;
        Ok(Masked { answer_text: self.tokenizer.decode(&answer, false)?, prompt_text, tokens: ids, trained })
    }

    /// Appends the end of sequence, unless the text brought its own.
    fn end(&self, tokens: &mut Vec<u32>) {
        if let Some(end) = self.tokenizer.end()
            && tokens.last() != Some(&end)
        {
            tokens.push(end);
        }
    }

    fn check_ids(&self, ids: &[u32]) -> Result<(), RowProblem> {
        match ids.iter().position(|id| *id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(place) => {
                let id = ids[place];
                let name = self.tokenizer.id_to_token(id).map(|text| format!(" ({text:?})")).unwrap_or_default();
                let what = format!("token {place} is {id}{name}, not below the vocabulary of {}", self.vocab_size);
                Err(RowProblem::new(what).expected("tokens that the model's embedding has"))
            }
        }
    }

    fn fit(&self, mut masked: Masked) -> Result<End, Failure> {
        self.check_ids(&masked.tokens)?;
        let (length, limit) = (masked.tokens.len(), self.data.max_seq_len);
        let prompt_tokens = masked.trained.iter().position(|trained| *trained);
        let Some(prompt_tokens) = prompt_tokens else {
            let what = format!("nothing to train on: none of its {length} tokens is an answer's");
            return Err(Failure::ZeroLabel(RowProblem::new(what)));
        };
        let truncated = length > limit;
        if truncated {
            match self.data.overlong {
                Overlong::Error => {
                    let what = format!("the row has {length} tokens, more than data.max_seq_len = {limit}");
                    return Err(Failure::Row(RowProblem::new(what)));
                }
                Overlong::Drop => return Ok(End::Dropped),
                Overlong::Truncate if prompt_tokens >= limit => {
                    let what = format!(
                        "nothing to train on once cut to data.max_seq_len = {limit}: of its {length} tokens the first \
                         trained one is number {}",
                        prompt_tokens + 1
                    );
                    return Err(Failure::ZeroLabel(RowProblem::new(what)));
                }
                Overlong::Truncate => {
                    masked.tokens.truncate(limit);
                    masked.trained.truncate(limit);
                }
            }
        }
        let Masked { tokens, trained, prompt_text, answer_text } = masked;
        let origin = Origin { file: 0, line: 0 };
        Ok(End::Kept { row: Row { tokens, trained, origin, prompt_tokens, prompt_text, answer_text }, truncated })
    }
}

fn all_but_first(tokens: usize) -> Vec<bool> {
    (0..tokens).map(|index| index > 0).collect()
}

/// Many templates write nothing for content that is a list (Qwen3's, for one): then the answer would be missing from the
/// text, and the row would train on an empty one.
fn check_parts_rendered(messages: &[serde_json::Value], text: &str) -> Result<(), RowProblem> {
    for (index, message) in messages.iter().enumerate() {
        for part in message["content"].as_array().into_iter().flatten() {
            if !text.contains(part["text"].as_str().unwrap_or_default().trim()) {
                let what = format!("messages[{index}].content is a list, and the chat template leaves its text out");
                return Err(RowProblem::new(what).expected("a string"));
            }
        }
    }
    Ok(())
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
                let what =
                    format!("this is a row of format {}, and the first row ({first}) is {}", format.as_str(), self.format.as_str());
                let expected = format!("format {} in every row", self.format.as_str());
                return self.bad(file, line, RowProblem::new(what).expected(expected));
            }
        }
        match outcome.end {
            End::Kept { mut row, truncated } => {
                row.origin = Origin { file: file as u32, line: line.number };
                let trained = row.trained.iter().filter(|trained| **trained).count();
                self.counts.truncated += usize::from(truncated);
                self.counts.tokens += row.tokens.len() as u64;
                self.counts.trained_tokens += trained as u64;
                self.counts.longest = self.counts.longest.max(row.tokens.len());
                self.counts.unmasked += usize::from(trained + 1 == row.tokens.len());
                self.rows.push(row);
            }
            End::Dropped => self.counts.dropped += 1,
            End::ZeroLabel(problem) => {
                self.counts.zero_label += 1;
                self.bad(file, line, problem);
            }
            End::Bad(problem) => self.bad(file, line, problem),
        }
    }

    fn bad(&mut self, file: usize, line: &Line, problem: RowProblem) {
        self.total_bad += 1;
        if self.bad.len() < SHOWN_ROWS {
            let RowProblem { column, reason, expected } = problem;
            let (file, line, beginning) = (self.files[file].clone(), line.number, jsonl::beginning(&line.bytes));
            self.bad.push(BadRow { file, line, column, reason, expected, beginning });
        }
    }

    fn finish(self, data: &Data) -> Result<Dataset, DatasetError> {
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
        Ok(Dataset { rows: self.rows, files: self.files.to_vec(), counts: self.counts, digest })
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
