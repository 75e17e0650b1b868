//! The files of a model that its tokenizer and templates are made of: which directory each is taken
//! from, and what it holds.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use chrono::{NaiveDate, NaiveDateTime, NaiveTime};
use finetune_recipe::Variable;
use finetune_store::{Holding, json_fault};
use serde_json::Value;

use crate::clock;
use crate::error::DatasetError;
use crate::gguf_texts;
use crate::json::kind;
use crate::tiktoken;

/// The most bytes of a tokenizer.json. The largest published ones have 35 million.
const LONGEST_TOKENIZER: u64 = 256 << 20;
/// The most bytes of a config.
const LONGEST_CONFIG: u64 = 16 << 20;
/// The most bytes of a template's source. The longest published one has 17 thousand.
pub(crate) const LONGEST_TEMPLATE: u64 = 1 << 20;

/// The most templates of additional_chat_templates/ that are read. Published models have at most
/// three.
const MOST_TEMPLATES: usize = 32;

/// Where the tokenizer and the templates of a model come from.
#[derive(Clone, Copy, Debug)]
pub struct TextSource<'a> {
    /// The model's directory, or its GGUF file.
    pub model_dir: &'a Path,
    /// An adapter's or checkpoint's directory: its tokenizer files, template and
    /// generation_config.json come first.
    pub adapter: Option<&'a Path>,
    /// A template to use instead of those of either directory.
    pub chat_template: Option<&'a Path>,
    /// YYYY-MM-DD. A template that asks for the time is told this day at 00:00:00. `None`: it is
    /// told the moment of opening, which is the same for all rows.
    pub date: Option<&'a str>,
    /// Variables of every rendering, as `data.chat_template_kwargs` of a recipe has them. Those of a
    /// row or a request replace them.
    pub variables: Option<&'a BTreeMap<String, Variable>>,
}

impl<'a> TextSource<'a> {
    /// The source of a model without an adapter.
    pub fn of(model_dir: &'a Path, chat_template: Option<&'a Path>) -> Self {
        Self { model_dir, adapter: None, chat_template, date: None, variables: None }
    }

    /// The time that a template is told: 00:00 of the date, or now.
    pub(crate) fn moment(&self) -> Result<NaiveDateTime, DatasetError> {
        let Some(date) = self.date else { return Ok(clock::now()) };
        let day = NaiveDate::parse_from_str(date, "%Y-%m-%d");
        Ok(day.map_err(|_| DatasetError::BadDate { date: date.to_owned() })?.and_time(NaiveTime::MIN))
    }

    /// The adapter's directory, then the model's.
    pub(crate) fn directories(&self) -> impl Iterator<Item = &'a Path> + use<'a> {
        self.adapter.into_iter().chain([self.model_dir])
    }

    /// The directory that all of the tokenizer's files are taken from. Those of two directories
    /// must not be mixed.
    pub(crate) fn tokenizer_dir(&self) -> Option<&'a Path> {
        self.directories().find(|directory| {
            gguf_texts::is_there(&directory.join(TOKENIZER)) || tiktoken::file_in(directory).is_some()
        })
    }
}

pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(crate) const TOKEN_MAP: &str = "special_tokens_map.json";
pub(crate) const ADDED_TOKENS: &str = "added_tokens.json";
pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";
pub(crate) const TEMPLATE: &str = "chat_template.jinja";

/// Files of tokenizers that this program does not read.
const OTHER_TOKENIZERS: [&str; 6] =
    ["tokenizer.model", "tekken.json", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"];

/// The files of other kinds of tokenizer that a directory has.
pub(crate) fn other_tokenizers(directory: &Path) -> Vec<String> {
    let there = OTHER_TOKENIZERS.iter().filter(|name| directory.join(name).is_file());
    let mut found: Vec<String> = there.map(|name| (*name).to_owned()).collect();
    if found.iter().any(|name| name == "vocab.json") && directory.join("merges.txt").is_file() {
        found.push("merges.txt".to_owned());
    }
    // One alone is read.
    found.extend(tiktoken::files_in(directory));
    found
}

/// A template's text, its name among the model's ("default", "tool_use") and the file it came from.
#[derive(Clone, Debug)]
pub(crate) struct TemplateSource {
    pub(crate) name: String,
    pub(crate) source: String,
    pub(crate) origin: PathBuf,
}

/// The templates of a source. The first of these that exists is taken, in transformers' order:
///
/// 1. the template that the user chose;
/// 2. the .jinja files of a directory, all of them;
/// 3. those in its tokenizer_config.json, one or a list;
/// 4. those in a processor's chat_template.json.
pub(crate) fn templates(source: &TextSource<'_>) -> Result<Vec<TemplateSource>, DatasetError> {
    if let Some(path) = source.chat_template {
        return Ok(vec![template("default", read_text(path)?, path.to_owned())]);
    }
    for directory in source.directories() {
        let mut found = jinja_files(directory)?;
        if found.is_empty() {
            let path = directory.join(TOKENIZER_CONFIG);
            found = in_config(&read_json(&path)?, &path)?;
        }
        if found.is_empty() {
            let path = directory.join("chat_template.json");
            found = in_config(&read_json(&path)?, &path)?;
        }
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Ok(Vec::new())
}

fn template(name: &str, source: String, origin: PathBuf) -> TemplateSource {
    TemplateSource { name: name.to_owned(), source, origin }
}

fn jinja_files(directory: &Path) -> Result<Vec<TemplateSource>, DatasetError> {
    let mut found = Vec::new();
    let path = directory.join(TEMPLATE);
    match read_text(&path) {
        Ok(source) => found.push(template("default", source, path)),
        Err(DatasetError::Unreadable { source, .. }) if is_missing(&source) => {}
        Err(error) => return Err(error),
    }
    let Ok(entries) = std::fs::read_dir(directory.join("additional_chat_templates")) else { return Ok(found) };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "jinja"));
    paths.sort();
    for path in paths.into_iter().take(MOST_TEMPLATES) {
        if let Some(name) = path.file_stem().and_then(|name| name.to_str()) {
            found.push(template(name, read_text(&path)?, path.clone()));
        }
    }
    Ok(found)
}

/// The templates under the key `chat_template` of a file: a text, a list of {"name", "template"},
/// or an object of names and texts.
fn in_config(config: &Value, path: &Path) -> Result<Vec<TemplateSource>, DatasetError> {
    let named = |(name, text): (&str, &str)| template(name, text.to_owned(), path.to_owned());
    let unlike = |found: &Value, wanted: &str| {
        let reason = format!("chat_template has {} where {wanted} is expected", kind(found));
        DatasetError::BadModelFile { path: path.to_owned(), reason }
    };
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![named(("default", text))]),
        Some(Value::Array(entries)) => {
            let text = |entry: &Value| {
                let pair = entry.get("name").and_then(Value::as_str).zip(entry.get("template").and_then(Value::as_str));
                pair.map(named).ok_or_else(|| unlike(entry, "{\"name\", \"template\"}, two texts,"))
            };
            entries.iter().map(text).collect()
        }
        Some(Value::Object(entries)) => {
            let text = |(name, text): (&String, &Value)| match text.as_str() {
                Some(text) => Ok(named((name, text))),
                None => Err(unlike(text, "the text of a template")),
            };
            entries.iter().map(text).collect()
        }
        Some(other) => Err(unlike(other, "a text, or a list of {\"name\", \"template\"},")),
    }
}

pub(crate) fn read_tokenizer(path: &Path) -> Result<Vec<u8>, DatasetError> {
    let bytes = read(path, LONGEST_TOKENIZER)?;
    refuse_stand_in(path, &bytes)?;
    Ok(bytes)
}

/// The JSON object of a small file. Null if there is no such file.
pub(crate) fn read_json(path: &Path) -> Result<Value, DatasetError> {
    let bad = |reason: String| DatasetError::BadModelFile { path: path.to_owned(), reason };
    let Some(bytes) = read_if_there(path)? else { return Ok(Value::Null) };
    match serde_json::from_slice(&bytes) {
        Ok(value @ (Value::Object(_) | Value::Null)) => Ok(value),
        Ok(other) => Err(bad(format!("it holds {}, and an object is expected", kind(&other)))),
        Err(error) => Err(bad(json_fault(&bytes, &error))),
    }
}

/// The bytes of a small file. `None`: there is no such file.
pub(crate) fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, DatasetError> {
    match read(path, LONGEST_CONFIG) {
        Ok(bytes) => refuse_stand_in(path, &bytes).map(|()| Some(bytes)),
        Err(DatasetError::Unreadable { source, .. }) if is_missing(&source) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether there is no such file. A model may be a file itself, in which none can lie.
fn is_missing(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn read_text(path: &Path) -> Result<String, DatasetError> {
    let bytes = read(path, LONGEST_TEMPLATE)?;
    refuse_stand_in(path, &bytes)?;
    String::from_utf8(bytes)
        .map_err(|_| DatasetError::BadModelFile { path: path.to_owned(), reason: "not UTF-8 text".to_owned() })
}

fn read(path: &Path, limit: u64) -> Result<Vec<u8>, DatasetError> {
    let beside = gguf_texts::beside(path);
    let path = beside.as_deref().unwrap_or(path);
    for made in [gguf_texts::in_place_of, tiktoken::in_place_of] {
        if let Some(bytes) = made(path)? {
            return Ok(bytes);
        }
    }
    let unreadable = |source| DatasetError::Unreadable { path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    let bytes = file.metadata().map_err(unreadable)?.len();
    let mut content = Vec::new();
    file.take(limit + 1).read_to_end(&mut content).map_err(unreadable)?;
    if content.len() as u64 > limit {
        return Err(DatasetError::TooLarge { path: path.to_owned(), bytes: bytes.max(limit + 1), limit });
    }
    Ok(content)
}

/// Refuses what git leaves of a file if git-lfs is not installed, and the page that a web server
/// sends if the file may not be read.
fn refuse_stand_in(path: &Path, bytes: &[u8]) -> Result<(), DatasetError> {
    let start: String = String::from_utf8_lossy(&bytes[..bytes.len().min(64)]).trim_start().to_lowercase();
    let holding = if start.starts_with("version https://git-lfs") {
        Holding::LfsPointer
    } else if start.starts_with("<!doctype html") || start.starts_with("<html") {
        Holding::Html
    } else {
        return Ok(());
    };
    Err(DatasetError::StandIn { path: path.to_owned(), holding })
}
