//! What a file is, by its first bytes, and by its name if these do not tell.

use std::path::Path;

use crate::holding::Holding;

/// Bytes that a format begins with.
const MAGIC: [(&[u8], Holding); 19] = [
    (b"version https://git-lfs", Holding::LfsPointer),
    (b"GGUF", Holding::Gguf),
    (b"\x1f\x8b", Holding::Gzip),
    (b"\x28\xb5\x2f\xfd", Holding::Zstd),
    (b"PAR1", Holding::Parquet),
    // The same with an encrypted footer.
    (b"PARE", Holding::Parquet),
    (b"\xfd7zXZ\0", Holding::OtherPacked),
    (b"7z\xbc\xaf\x27\x1c", Holding::OtherPacked),
    // Excel before 2007.
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", Holding::Spreadsheet),
    (b"ARROW1", Holding::Arrow),
    // Arrow's stream format, which the datasets library keeps in its cache.
    (b"\xff\xff\xff\xff", Holding::Arrow),
    // Its mark begins as that of UTF-16 does.
    (b"\xff\xfe\0\0", Holding::Utf32),
    (b"\0\0\xfe\xff", Holding::Utf32),
    (b"\xff\xfe", Holding::Utf16),
    (b"\xfe\xff", Holding::Utf16),
    (b"\x80\x02", Holding::Pickle),
    (b"\x80\x03", Holding::Pickle),
    (b"\x80\x04", Holding::Pickle),
    (b"\x80\x05", Holding::Pickle),
];

/// The kind of a file. `head`: its first bytes; none if it cannot be read.
pub(super) fn recognize(path: &Path, head: &[u8]) -> Holding {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    // Before the others: a header of 640 bytes begins as a pickle does.
    if is_safetensors(head) {
        return Holding::Safetensors;
    }
    if let Some((_, holding)) = MAGIC.iter().find(|(magic, _)| head.starts_with(magic)) {
        return *holding;
    }
    // The level of packing stands between.
    if head.starts_with(b"BZh") && head.get(4..10) == Some(b"1AY&SY") {
        return Holding::OtherPacked;
    }
    let is_torch = matches!(extension.as_str(), "bin" | "pt" | "pth");
    if head.starts_with(b"PK\x03\x04") {
        let holds_pickle = is_torch || head.windows(8).any(|part| part == b"data.pkl");
        let holds_sheets = ["xlsx", "xlsm", "ods"].contains(&extension.as_str());
        return match (holds_pickle, holds_sheets) {
            (true, _) => Holding::Pickle,
            (false, true) => Holding::Spreadsheet,
            (false, false) => Holding::Zip,
        };
    }
    if head.get(257..262) == Some(b"ustar") {
        return Holding::Tar;
    }
    // The first piece of every SentencePiece model, in protocol buffers: field 1, its length, field
    // 1, its length, the text.
    if head.len() > 5 && head[0] == b'\n' && head[2] == b'\n' && head.windows(5).take(64).any(|part| part == b"<unk>") {
        return Holding::SentencePiece;
    }
    if is_utf16_without_mark(head) {
        return Holding::Utf16;
    }
    match text_of(head) {
        Some(text) => of_text(text, &extension),
        None if is_torch => Holding::Pickle,
        None => match extension.as_str() {
            // Rows in an older encoding than UTF-8.
            "csv" => Holding::Csv,
            "tsv" => Holding::Tsv,
            _ => Holding::Binary,
        },
    }
}

/// Whether a file begins with the length of a header and a header that is JSON.
fn is_safetensors(head: &[u8]) -> bool {
    let Some((length, rest)) = head.split_first_chunk::<8>() else { return false };
    let length = u64::from_le_bytes(*length);
    (2..=100_000_000).contains(&length) && rest.starts_with(b"{")
}

/// Whether every second byte is zero, as in Latin text without a byte order mark.
fn is_utf16_without_mark(head: &[u8]) -> bool {
    let zeros = |first: usize| head.iter().skip(first).step_by(2).filter(|&&byte| byte == 0).count();
    let pairs = head.len() / 2;
    pairs >= 4 && [(0, 1), (1, 0)].iter().any(|&(a, b)| zeros(a) * 10 >= pairs * 8 && zeros(b) == 0)
}

/// The text of these bytes, which may end within a character. `None`: they are no text.
fn text_of(head: &[u8]) -> Option<&str> {
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    let text = match std::str::from_utf8(head) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => std::str::from_utf8(&head[..error.valid_up_to()]).ok()?,
        Err(_) => return None,
    };
    (!text.contains('\0')).then_some(text)
}

fn of_text(text: &str, extension: &str) -> Holding {
    let start = text.trim_start();
    let lower: String = start.chars().take(64).collect::<String>().to_ascii_lowercase();
    if ["<!doctype html", "<html", "<head", "<?xml"].iter().any(|tag| lower.starts_with(tag)) {
        return Holding::Html;
    }
    if ["{%", "{{", "{#"].iter().any(|tag| start.starts_with(tag)) {
        return Holding::Jinja;
    }
    if start.starts_with('{') {
        return json_object(start, extension);
    }
    // A torn table header in a file called .toml is reported as an error of the recipe.
    if start.starts_with('[')
        && !is_toml(start)
        && (extension != "toml" || start[1..].trim_start().starts_with(['{', '[']))
    {
        return Holding::JsonArray;
    }
    match extension {
        "jinja" | "jinja2" | "j2" => return Holding::Jinja,
        "yaml" | "yml" => return Holding::Yaml,
        "csv" => return Holding::Csv,
        "tsv" => return Holding::Tsv,
        _ => {}
    }
    if is_toml(start) {
        return Holding::Recipe;
    }
    if is_yaml(start, extension) {
        return Holding::Yaml;
    }
    match extension {
        "toml" => Holding::Recipe,
        "jsonl" | "ndjson" => Holding::JsonLines,
        _ if has_columns(start, '\t') => Holding::Tsv,
        _ if has_columns(start, ',') => Holding::Csv,
        _ => Holding::Text,
    }
}

/// Whether a text that begins with `{` is rows, or one object over many lines.
fn json_object(text: &str, extension: &str) -> Holding {
    let is_rows = match text.split_once('\n') {
        // The first line is longer than what was read, so the name has to tell.
        None => extension != "json",
        Some((first, rest)) => {
            let whole = serde_json::from_str::<serde::de::IgnoredAny>(first.trim()).is_ok();
            whole && (extension != "json" || rest.trim_start().starts_with('{'))
        }
    };
    let named_so = matches!(extension, "jsonl" | "ndjson");
    // A file named as rows whose first row is torn is still a file of rows.
    let looks_pretty = text.lines().next().is_some_and(|first| first.trim() == "{");
    if is_rows || (named_so && !looks_pretty) { Holding::JsonLines } else { Holding::JsonObject }
}

/// The first lines that are neither blank nor comments.
fn meaningful(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(str::trim_end)
        .filter(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
        .take(20)
}

/// Whether a text begins with `[table]` or `key = value`.
fn is_toml(text: &str) -> bool {
    let name = |text: &str| {
        let text = text.trim().trim_matches(['"', '\'']);
        text.starts_with(|letter: char| letter.is_ascii_alphabetic() || letter == '_')
            && text.chars().all(|letter| letter.is_ascii_alphanumeric() || "_-.\"'".contains(letter))
    };
    let Some(first) = meaningful(text).next() else { return false };
    let without_comment = first.split(" #").next().unwrap_or(first).trim_end();
    if let Some(table) = without_comment.strip_prefix('[') {
        // `["a", "b"]` and `[true]` are JSON.
        let Some(table) = table.strip_suffix(']') else { return false };
        let table = table.strip_prefix('[').and_then(|table| table.strip_suffix(']')).unwrap_or(table);
        return name(table) && !table.starts_with('"') && !["true", "false", "null"].contains(&table);
    }
    first.split_once('=').is_some_and(|(key, value)| name(key) && !value.starts_with('='))
}

/// Whether a text has keys with a colon behind them. Prose may begin so too. So two keys are
/// needed, or one in a file called .toml.
fn is_yaml(text: &str, extension: &str) -> bool {
    if text.starts_with("---\n") || text.starts_with("%YAML") {
        return true;
    }
    let is_key = |line: &&str| {
        let Some((key, value)) = line.split_once(':') else { return false };
        let begins_so = key.starts_with(|letter: char| letter.is_ascii_alphabetic() || letter == '_');
        let word = key.chars().all(|letter| letter.is_ascii_alphanumeric() || "_-.".contains(letter));
        begins_so && word && (value.is_empty() || value.starts_with(' '))
    };
    let keys = meaningful(text).filter(is_key).count();
    keys >= if extension == "toml" { 1 } else { 2 }
}

/// Whether a text has a header and a row with as many columns, at least two.
fn has_columns(text: &str, separator: char) -> bool {
    let mut counts = text.lines().map(|line| line.matches(separator).count());
    matches!((counts.next(), counts.next()), (Some(header), Some(row)) if header > 0 && row >= header)
        && text.lines().next().is_some_and(|header| !header.contains(". ") && header.len() < 400)
}
