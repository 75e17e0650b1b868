//! A tokenizer in tiktoken's form, such as Kimi's and the first Qwen's: a file of ranks, and a
//! Python module that says how a text is split. As that of a GGUF file, its tokenizer.json exists
//! in memory only, until an export or a checkpoint writes it. The ids of a text are tiktoken's
//! (`scripts/make_tiktoken_goldens.py`). Kimi's module also cuts texts after 400,000 characters,
//! and runs of white space or of other characters after 25,000. That is left out here.
//!
//! tiktoken merges those neighbours whose whole has the lowest rank. So the merges are all ways to
//! make a token of two, by its rank, as transformers' `TikTokenConverter` lists them. Of two
//! overlapping ways to make one token, tiktoken takes the one further left, and tokenizers the one
//! that is listed first. No random text showed that difference (the script's `--compare`).
//!
//! Sources: tokenization_kimi.py of Kimi-K2 and tokenization_qwen.py of Qwen-7B, tiktoken 0.12.

mod pattern;

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokenizers::AddedToken;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use crate::added_tokens::added_token;
use crate::error::DatasetError;
use crate::guard::{self, Bounds, Foreign};
use crate::text_source::{TOKENIZER, TOKENIZER_CONFIG, read_if_there, read_json, read_tokenizer};

/// The name of a file of ranks. Others end in `.tiktoken`.
const RANKS: &str = "tiktoken.model";

/// Bounds of making a tokenizer.json. That of Kimi-K2 has 163,584 ranks and 10 MB.
const MAKING: Bounds = Bounds { time: Duration::from_secs(60), bytes: 4 << 30 };

/// The most bytes of a token: the time of finding its merges grows with the square. Kimi-K2's
/// longest one has 256.
const LONGEST_TOKEN: usize = 1024;

/// `pat_str` of tokenization_kimi.py (Kimi-K2) and tokenization_moonshot.py (Moonlight).
const KIMI: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// `PAT_STR` of tokenization_qwen.py.
const QWEN: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Kimi's ids behind the ranks. Those without a name are `<|reserved_token_{id}|>`. The module of
/// Kimi-K2 has two more, for which the model has no row of the embedding.
const KIMI_RESERVED: u32 = 256;
/// Qwen's special tokens behind the ranks, and how many `<|extra_{number}|>` follow them.
const QWEN_SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const QWEN_EXTRAS: u32 = 205;

/// The class of a tokenizer, by `tokenizer_class` of tokenizer_config.json.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    /// `TikTokenTokenizer` of Moonshot.
    Kimi,
    /// `QWenTokenizer`, which composes a text (NFC) first.
    Qwen,
    Other,
}

/// The file of ranks that stands in for a directory's tokenizer.json: tiktoken.model, or the only
/// one that ends in `.tiktoken`.
pub(crate) fn file_in(directory: &Path) -> Option<PathBuf> {
    let usual = directory.join(RANKS);
    if usual.is_file() {
        return Some(usual);
    }
    match files_in(directory).as_slice() {
        [only] => Some(directory.join(only)),
        _ => None,
    }
}

/// The names of files that end in `.tiktoken`, sorted.
pub(crate) fn files_in(directory: &Path) -> Vec<String> {
    names(directory, |name| name.ends_with(".tiktoken"))
}

fn names(directory: &Path, is_meant: impl Fn(&str) -> bool) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let files = entries.filter(|entry| entry.path().is_file());
    let mut names: Vec<String> = files.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| is_meant(name));
    names.sort();
    names
}

/// The bytes of a tokenizer.json that a file of ranks stands in for. `None`: there is none, or
/// there is such a file.
///
/// # Errors
/// [`DatasetError::BadLine`], [`DatasetError::Tiktoken`], and those of reading a file.
pub(crate) fn in_place_of(path: &Path) -> Result<Option<Vec<u8>>, DatasetError> {
    let Some(directory) = path.parent().filter(|_| path.file_name() == Some(OsStr::new(TOKENIZER))) else {
        return Ok(None);
    };
    let Some(file) = file_in(directory).filter(|_| !path.exists()) else { return Ok(None) };
    let foreign = Foreign::Tokenizer(file.display().to_string());
    let directory = directory.to_owned();
    guard::watched(&foreign, MAKING, move || made(&directory, &file))?.map(Some)
}

fn made(directory: &Path, file: &Path) -> Result<Vec<u8>, DatasetError> {
    let ranks = Ranks::read(file)?;
    let config = read_json(&directory.join(TOKENIZER_CONFIG))?;
    let class = match config.get("tokenizer_class").and_then(Value::as_str) {
        Some("TikTokenTokenizer") => Class::Kimi,
        Some("QWenTokenizer") => Class::Qwen,
        _ => Class::Other,
    };
    let pattern = pattern_of(directory, file, class)?;
    let added = added_tokens(directory, &config, class, &ranks)?;
    Ok(ranks.tokenizer_json(&pattern, class == Class::Qwen, &added).into_bytes())
}

/// The pattern that a text is split by: that of the Python modules beside the ranks, or that of a
/// known class.
fn pattern_of(directory: &Path, file: &Path, class: Class) -> Result<String, DatasetError> {
    let mut found: Option<(String, String)> = None;
    for name in names(directory, |name| name.starts_with("tokenization_") && name.ends_with(".py")) {
        let path = directory.join(&name);
        let refused = |line, reason| DatasetError::Tiktoken { path: path.clone(), line, reason };
        let source = read_if_there(&path)?.unwrap_or_default();
        let read = pattern::in_module(&String::from_utf8_lossy(&source));
        let Some(text) = read.map_err(|(line, reason)| refused(Some(line), reason))? else { continue };
        pattern::check(&text).map_err(|reason| refused(None, reason))?;
        Split::new(SplitPattern::Regex(text.clone()), SplitDelimiterBehavior::Isolated, false)
            .map_err(|error| refused(None, format!("the pattern of `pat_str` is none: {error}")))?;
        match &found {
            Some((other, known)) if *known != text => {
                return Err(refused(None, format!("its pattern is not that of {other}")));
            }
            _ => found = Some((name, text)),
        }
    }
    match (found, class) {
        (Some((_, text)), _) => Ok(text),
        (None, Class::Kimi) => Ok(KIMI.to_owned()),
        (None, Class::Qwen) => Ok(QWEN.to_owned()),
        (None, Class::Other) => {
            let reason = "no tokenization_*.py beside it has a `pat_str`, which says how a text is split".to_owned();
            Err(DatasetError::Tiktoken { path: file.to_owned(), line: None, reason })
        }
    }
}

/// The tokens behind the ranks, by id: those that the class has, with the names and settings of
/// tokenizer_config.json.
fn added_tokens(
    directory: &Path,
    config: &Value,
    class: Class,
    ranks: &Ranks,
) -> Result<Vec<AddedToken>, DatasetError> {
    let path = directory.join(TOKENIZER_CONFIG);
    let refused = |reason| Err(DatasetError::Tiktoken { path: path.clone(), line: None, reason });
    let first = ranks.tokens.len() as u32;
    let special = |text: String| AddedToken::from(text, true);
    let mut tokens: BTreeMap<u32, AddedToken> = match class {
        Class::Kimi => {
            (first..first + KIMI_RESERVED).map(|id| (id, special(format!("<|reserved_token_{id}|>")))).collect()
        }
        Class::Qwen => {
            let extras = (0..QWEN_EXTRAS).map(|number| format!("<|extra_{number}|>"));
            (first..).zip(QWEN_SPECIAL.map(str::to_owned).into_iter().chain(extras).map(special)).collect()
        }
        Class::Other => BTreeMap::new(),
    };
    let listed = config.get("added_tokens_decoder").and_then(Value::as_object).filter(|listed| !listed.is_empty());
    if listed.is_none() && class != Class::Qwen {
        return refused("it has no `added_tokens_decoder`, which names the special tokens".to_owned());
    }
    for (id, token) in listed.into_iter().flatten() {
        match (id.parse::<u32>(), added_token(token)) {
            (Ok(number), Some(token)) if number >= first => tokens.insert(number, token),
            (Ok(number), Some(token)) => {
                return refused(format!("{:?} is token {number}, which is one of the {first} ranks", token.content));
            }
            _ => return refused(format!("token {id} of `added_tokens_decoder` has no number or no text")),
        };
    }
    if let Some((id, _)) = (first..).zip(tokens.keys()).find(|(id, known)| id != *known) {
        return refused(format!("there is no token {id} in `added_tokens_decoder`, and there are some behind it"));
    }
    let (letters, mut texts) = (alphabet(), HashMap::new());
    for (id, token) in &tokens {
        let rank = ranks.with_spelling(&token.content, &letters).map(|rank| rank as u32);
        if let Some(other) = rank.or_else(|| texts.insert(token.content.as_str(), *id)) {
            return refused(format!("{:?} is token {id}, and token {other} has the same text", token.content));
        }
    }
    Ok(tokens.into_values().collect())
}

/// The tokens of a file.
struct Ranks {
    /// By rank.
    tokens: Vec<Vec<u8>>,
    ranks: HashMap<Vec<u8>, usize>,
}

impl Ranks {
    /// Reads lines of `base64(token) rank`. Every byte is a token, and the ranks are 0 to n - 1.
    fn read(path: &Path) -> Result<Ranks, DatasetError> {
        let bytes = read_tokenizer(path)?;
        let wrong = |line, reason| Err(DatasetError::BadLine { path: path.to_owned(), line, reason });
        let mut entries: Vec<(usize, Vec<u8>, usize)> = Vec::new();
        for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
            match entry(line.trim_ascii()) {
                Ok(Some((token, rank))) => entries.push((index + 1, token, rank)),
                Ok(None) => {}
                Err(reason) => return wrong(index + 1, reason),
            }
        }
        let count = entries.len();
        // Lines are counted from 1: 0 stands for none.
        let (mut lines, mut tokens) = (vec![0; count], vec![Vec::new(); count]);
        let mut ranks = HashMap::with_capacity(count);
        for (line, token, rank) in entries {
            if rank >= count {
                return wrong(line, format!("rank {rank} is too high: {count} tokens have the ranks from 0 on"));
            }
            if lines[rank] != 0 {
                return wrong(line, format!("rank {rank} is that of line {}", lines[rank]));
            }
            if let Some(other) = ranks.insert(token.clone(), rank) {
                return wrong(line, format!("the token is that of line {}", lines[other]));
            }
            (lines[rank], tokens[rank]) = (line, token);
        }
        if let Some(byte) = (0..=u8::MAX).find(|byte| !ranks.contains_key([*byte].as_slice())) {
            let reason = format!("no token is the byte 0x{byte:02X} alone");
            return Err(DatasetError::BadModelFile { path: path.to_owned(), reason });
        }
        Ok(Ranks { tokens, ranks })
    }

    /// The rank whose token is spelt like a text. In a tokenizer.json the two would be one.
    fn with_spelling(&self, text: &str, letters: &[char; 256]) -> Option<usize> {
        let byte = |letter: char| letters.iter().position(|known| *known == letter).map(|byte| byte as u8);
        let token: Option<Vec<u8>> = text.chars().map(byte).collect();
        self.ranks.get(&token?).copied()
    }

    /// All ways to make a token of two others, as a list of JSON without its brackets. `spelt`: the
    /// tokens in JSON.
    fn merges(&self, spelt: &[String]) -> String {
        let mut merges = String::new();
        for token in &self.tokens {
            let splits = (1..token.len()).map(|place| token.split_at(place));
            let ranks = splits.filter_map(|(left, right)| Some((*self.ranks.get(left)?, *self.ranks.get(right)?)));
            let mut pairs: Vec<(usize, usize)> = ranks.collect();
            pairs.sort_unstable();
            for (left, right) in pairs {
                let comma = if merges.is_empty() { "" } else { "," };
                let _ = write!(merges, "{comma}[{},{}]", spelt[left], spelt[right]);
            }
        }
        merges
    }

    fn tokenizer_json(&self, pattern: &str, composes: bool, added: &[AddedToken]) -> String {
        let letters = alphabet();
        let spelt: Vec<String> = self.tokens.iter().map(|token| quoted(token, &letters)).collect();
        let mut vocab = String::new();
        for (rank, text) in spelt.iter().enumerate() {
            let comma = if rank == 0 { "" } else { "," };
            let _ = write!(vocab, "{comma}{text}:{rank}");
        }
        let added: Vec<Value> = (self.tokens.len()..)
            .zip(added)
            .map(|(id, token)| {
                let AddedToken { content, single_word, lstrip, rstrip, normalized, special } = token;
                json!({
                    "id": id, "content": content, "single_word": single_word, "lstrip": lstrip, "rstrip": rstrip,
                    "normalized": normalized, "special": special,
                })
            })
            .collect();
        let normalizer = if composes { json!({"type": "NFC"}) } else { Value::Null };
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let head = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": null, "decoder": byte_level,
        });
        // tiktoken looks a whole piece up before it merges (`ignore_merges`). The long lists are
        // written by hand: as values of JSON they take seconds.
        let head = head.to_string();
        let merges = self.merges(&spelt);
        format!(
            r#"{},"model":{{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":true,"vocab":{{{vocab}}},"merges":[{merges}]}}}}"#,
            head.strip_suffix('}').unwrap_or(&head)
        )
    }
}

/// The token and the rank of a line. `None`: the line is empty. The error says what is wrong.
fn entry(line: &[u8]) -> Result<Option<(Vec<u8>, usize)>, String> {
    if line.is_empty() {
        return Ok(None);
    }
    let fields: Vec<&[u8]> = line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty()).collect();
    let [token, rank] = fields[..] else {
        return Err(format!("{} fields, where a token in base64 and its rank are expected", fields.len()));
    };
    let shown = |field: &[u8]| String::from_utf8_lossy(&field[..field.len().min(40)]).into_owned();
    let bytes = base64(token).ok_or_else(|| format!("{:?} is no base64", shown(token)))?;
    if bytes.len() > LONGEST_TOKEN {
        return Err(format!("the token has {} bytes; at most {LONGEST_TOKEN} are read", bytes.len()));
    }
    let number = std::str::from_utf8(rank).ok().and_then(|rank| rank.parse().ok());
    Ok(Some((bytes, number.ok_or_else(|| format!("{:?} is no rank", shown(rank)))?)))
}

/// The bytes of a text in base64. `None`: it is none, or stands for no bytes.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let digits = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"=")).unwrap_or(text);
    if !text.len().is_multiple_of(4) || digits.is_empty() {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut held, mut count) = (0u32, 0);
    for digit in digits {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        held = (held << 6) | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((held >> count) as u8);
            held &= (1 << count) - 1;
        }
    }
    Some(bytes)
}

/// The letter of each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`): itself if it
/// prints, otherwise the next one from U+0100.
fn alphabet() -> [char; 256] {
    let mut others = '\u{100}'..;
    std::array::from_fn(|byte| match byte as u8 {
        itself @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => char::from(itself),
        _ => others.next().unwrap_or_default(),
    })
}

/// A token in a byte-level vocabulary, as a string of JSON.
fn quoted(token: &[u8], letters: &[char; 256]) -> String {
    let mut text = String::with_capacity(token.len() * 2 + 2);
    text.push('"');
    for byte in token {
        if matches!(byte, b'"' | b'\\') {
            text.push('\\');
        }
        text.push(letters[usize::from(*byte)]);
    }
    text.push('"');
    text
}
