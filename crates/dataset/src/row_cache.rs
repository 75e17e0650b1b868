//! The tokens of rows that were read before, kept in the user's cache. So `run` does not read again
//! what `validate` has read, and of the ranks of a host only one reads.
//!
//! The key of an entry is a hash of the content of the files, the settings that rows depend on, the
//! files of the tokenizer and the template, and this very program. An entry holds the rows as they
//! lie in memory: two bytes for each token if all of them fit, otherwise four, and one bit of mask.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use finetune_recipe::Data;
use finetune_store::{Cache, content_hash_of};
use serde_json::{Value, json};

use crate::counts::Counts;
use crate::ends::Ends;
use crate::error::DatasetError;
use crate::files;
use crate::kinds::{self, FileKind, Kind, Packing};
use crate::load::Dataset;
use crate::shares::Part;
use crate::token_row::{Origin, Row};
use crate::tokenizer::ChatTokenizer;

/// Files with fewer bytes are read faster than they are looked up.
const SMALL: u64 = 4 << 20;
/// How many times larger rows are taken to be than a packed file of them.
const PACKED_LARGER: u64 = 4;
/// The longest wait for another process that reads the same rows.
const PATIENCE: Duration = Duration::from_secs(3600);
/// The most bytes of a part of an entry: of the tokens of a row, a text or the head.
const LONGEST: u64 = 1 << 30;

impl Dataset {
    /// As [`Dataset::load_part`], from `cache` if the same rows were read before. If not, they are put
    /// there.
    ///
    /// # Errors
    /// As [`Dataset::load_part`].
    #[expect(clippy::too_many_arguments, reason = "those of load_part, and the cache")]
    pub fn load_part_kept(
        cache: Option<&Cache>,
        files: &[PathBuf],
        data: &Data,
        part: Part,
        tokenizer: Option<&ChatTokenizer>,
        vocab_size: usize,
        keep_text: usize,
        progress: &dyn Fn(u64),
    ) -> Result<Self, DatasetError> {
        let load = || Self::load_part(files, data, part, tokenizer, vocab_size, keep_text, progress);
        let key = || key(files, data, part, tokenizer, vocab_size, keep_text);
        let Some((cache, key)) = cache.and_then(|cache| Some((cache, key()?))) else { return load() };
        let get = || cache.get(&key, |content| read(content, files, progress));
        if let Some(found) = get() {
            return Ok(found);
        }
        let began = Instant::now();
        let making = cache.make(&key, &|| began.elapsed() < PATIENCE);
        // Another process may have read them meanwhile.
        if let Some(found) = get() {
            return Ok(found);
        }
        let dataset = load()?;
        if making.is_some() {
            cache.put(&key, |content| write(content, &dataset));
        }
        Ok(dataset)
    }
}

/// The key of an entry. `None`: the files are small, or cannot be read, or not twice.
fn key(
    files: &[PathBuf],
    data: &Data,
    row_part: Part,
    tokenizer: Option<&ChatTokenizer>,
    vocab_size: usize,
    keep_text: usize,
) -> Option<String> {
    if files.iter().any(|file| kinds::is_pipe(file)) {
        return None;
    }
    let kinds = files.iter().map(|file| FileKind::of(file)).collect::<Result<Vec<_>, _>>().ok()?;
    let mut bytes = 0;
    for (file, kind) in files.iter().zip(&kinds) {
        let packed = kind.packing != Packing::Plain || kind.kind == Kind::Parquet;
        bytes += file.metadata().ok()?.len() * if packed { PACKED_LARGER } else { 1 };
    }
    if bytes < SMALL {
        return None;
    }
    let mut hasher = blake3::Hasher::new();
    let mut part = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    part(program()?.as_bytes());
    // The places of the files do not matter. The template and the day are in the tokenizer's
    // fingerprint.
    let settings = Data { train: Vec::new(), eval: Vec::new(), chat_template: None, date: None, ..data.clone() };
    // The weights of the files, since those of the entries depend on what the entries are.
    let weights = files::weights(data, files);
    // The name of a file has a say in its kind.
    part(format!("{settings:?} {row_part:?} {kinds:?} {weights:?} {vocab_size} {keep_text}").as_bytes());
    part(tokenizer.map_or(&[], |tokenizer| tokenizer.fingerprint().as_slice()));
    for file in files {
        part(&content_hash_of(file, &mut |_| {}).ok()?);
    }
    Some(hasher.finalize().to_hex().to_string())
}

/// What tells this program from others. Another build may read rows in another way.
fn program() -> Option<String> {
    let about = std::env::current_exe().ok()?.metadata().ok()?;
    Some(format!("{} {} {:?}", env!("CARGO_PKG_VERSION"), about.len(), about.modified().ok()?))
}

fn write(content: &mut dyn Write, dataset: &Dataset) -> io::Result<()> {
    let Dataset { rows, files: _, counts, digest, notices, ends, weights } = dataset;
    let narrow = rows.iter().flat_map(|row| &row.tokens).all(|&token| token <= u32::from(u16::MAX));
    let head = json!({
        "rows": rows.len(), "narrow": narrow, "digest": digest, "notices": notices,
        "counts": [counts.rows, counts.dropped, counts.truncated, counts.zero_label, counts.longest, counts.unmasked],
        // As text: every bit of a number has to come back.
        "weights": weights.iter().map(|weight| weight.to_bits().to_string()).collect::<Vec<_>>(),
        "tokens": counts.tokens, "trained_tokens": counts.trained_tokens,
        "ends": {"tokens": ends.tokens, "without": ends.without, "parts": ends.parts},
    });
    text(content, &head.to_string())?;
    let mut bytes = Vec::new();
    for row in rows {
        bytes.clear();
        let Row { tokens, trained, origin, prompt_tokens, prompt_text, answer_text } = row;
        let numbers = [tokens.len(), *prompt_tokens, prompt_text.len(), answer_text.len()].map(|number| number as u32);
        bytes.extend(
            [origin.file, origin.line, origin.row].iter().chain(&numbers).flat_map(|number| number.to_le_bytes()),
        );
        if narrow {
            bytes.extend(tokens.iter().flat_map(|&token| (token as u16).to_le_bytes()));
        } else {
            bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        }
        let mask = trained.chunks(8).map(|bits| bits.iter().rev().fold(0, |byte, &bit| byte << 1 | u8::from(bit)));
        bytes.extend(mask);
        bytes.extend(prompt_text.bytes().chain(answer_text.bytes()));
        content.write_all(&bytes)?;
    }
    Ok(())
}

fn text(content: &mut dyn Write, text: &str) -> io::Result<()> {
    content.write_all(&(text.len() as u64).to_le_bytes())?;
    content.write_all(text.as_bytes())
}

fn read(content: &mut dyn Read, files: &[PathBuf], progress: &dyn Fn(u64)) -> io::Result<Dataset> {
    let mut bytes = Vec::new();
    take(content, 8, &mut bytes)?;
    let length = u64::from_le_bytes(bytes[..].try_into().map_err(|_| wrong())?);
    take(content, length, &mut bytes)?;
    let head: Value = serde_json::from_slice(&bytes)?;
    let number = |value: &Value| value.as_u64().ok_or_else(wrong);
    let size = |value: &Value| number(value).map(|number| number as usize);
    let counts = Counts {
        rows: size(&head["counts"][0])?,
        dropped: size(&head["counts"][1])?,
        truncated: size(&head["counts"][2])?,
        zero_label: size(&head["counts"][3])?,
        longest: size(&head["counts"][4])?,
        unmasked: size(&head["counts"][5])?,
        tokens: number(&head["tokens"])?,
        trained_tokens: number(&head["trained_tokens"])?,
    };
    let list = |value: &Value| value.as_array().cloned().ok_or_else(wrong);
    let string = |value: &Value| value.as_str().map(str::to_owned).ok_or_else(wrong);
    let notices = list(&head["notices"])?.iter().map(string).collect::<io::Result<_>>()?;
    let end_tokens = list(&head["ends"]["tokens"])?;
    let ends = Ends {
        tokens: end_tokens.iter().map(|token| number(token).map(|id| id as u32)).collect::<io::Result<_>>()?,
        without: size(&head["ends"]["without"])?,
        parts: size(&head["ends"]["parts"])?,
    };
    let weight = |text: &Value| string(text)?.parse().map(f64::from_bits).map_err(|_| wrong());
    let weights = list(&head["weights"])?.iter().map(weight).collect::<io::Result<_>>()?;
    let narrow = head["narrow"] == true;
    let mut rows = Vec::new();
    for index in 0..number(&head["rows"])? {
        rows.push(row(content, narrow, &mut bytes)?);
        if index % 4096 == 0 {
            progress(index);
        }
    }
    let digest = string(&head["digest"])?;
    Ok(Dataset { rows, files: files.to_vec(), counts, digest, notices, ends, weights })
}

fn row(content: &mut dyn Read, narrow: bool, bytes: &mut Vec<u8>) -> io::Result<Row> {
    take(content, 28, bytes)?;
    let number = |place: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes[4 * place + byte]));
    let origin = Origin { file: number(0), line: number(1), row: number(2) };
    let [length, prompt_tokens, prompt, answer] = [3, 4, 5, 6].map(|place| number(place) as usize);
    let tokens = if narrow {
        take(content, 2 * length as u64, bytes)?;
        bytes.chunks_exact(2).map(|two| u32::from(u16::from_le_bytes([two[0], two[1]]))).collect()
    } else {
        take(content, 4 * length as u64, bytes)?;
        bytes.chunks_exact(4).map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect()
    };
    take(content, length.div_ceil(8) as u64, bytes)?;
    let trained = (0..length).map(|index| bytes[index / 8] >> (index % 8) & 1 == 1).collect();
    let mut string = |length: usize| {
        take(content, length as u64, bytes)?;
        String::from_utf8(bytes.clone()).map_err(|_| wrong())
    };
    let (prompt_text, answer_text) = (string(prompt)?, string(answer)?);
    Ok(Row { tokens, trained, origin, prompt_tokens, prompt_text, answer_text })
}

/// Reads `length` bytes in place of what `bytes` held. The length comes from the disk and is
/// checked, since the hash of the entry is known only at its end.
fn take(content: &mut dyn Read, length: u64, bytes: &mut Vec<u8>) -> io::Result<()> {
    bytes.clear();
    if length > LONGEST || content.take(length).read_to_end(bytes)? as u64 != length {
        return Err(wrong());
    }
    Ok(())
}

fn wrong() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset(tokens: &[u32]) -> Dataset {
        let row = |length: usize, line: u32| Row {
            tokens: tokens.iter().copied().cycle().take(length).collect(),
            trained: (0..length).map(|index| index % 3 == 1).collect(),
            origin: Origin { file: 0, line, row: line % 2 },
            prompt_tokens: length / 2,
            prompt_text: "é".repeat(length % 3),
            answer_text: "b".repeat(length % 2),
        };
        Dataset {
            rows: (1..40).map(|line| row(line as usize, line)).collect(),
            files: vec![PathBuf::from("rows.jsonl")],
            counts: Counts { rows: 40, dropped: 1, tokens: 780, trained_tokens: 260, longest: 39, ..Counts::default() },
            digest: "d".into(),
            notices: vec!["a notice".into()],
            ends: Ends { tokens: vec![2, 7], without: 1, parts: 40 },
            weights: vec![1.0, 0.1],
        }
    }

    #[test]
    fn rows_come_back_as_they_were() {
        for tokens in [[1, 2, 65_535].as_slice(), &[1, 65_536, u32::MAX]] {
            let written = dataset(tokens);
            let mut bytes = Vec::new();
            write(&mut bytes, &written).unwrap();
            let read_back = read(&mut bytes.as_slice(), &written.files, &|_| {}).unwrap();
            assert_eq!(read_back, written);
            for length in 0..bytes.len() {
                assert!(read(&mut &bytes[..length], &written.files, &|_| {}).is_err(), "{length}");
            }
        }
    }
}
