//! Which of llama.cpp's built-in ways to split text a tokenizer.json means, and the reverse.

use serde_json::{Value, json};

use super::read::decoder_of_pieces;

/// The patterns of tokenizer.json that llama.cpp knows (src/llama-vocab.cpp, `regex_exprs`), what
/// it calls them, and whether it looks a whole word up before it merges (`ignore_merges`).
const PATTERNS: [(&str, bool, &str); 6] = [
    (LLAMA_3, true, "llama-bpe"),
    (LLAMA_3, false, "smaug-bpe"),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        false,
        "qwen2",
    ),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        true,
        "tekken",
    ),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        false,
        "gpt-4o",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        false,
        "qwen35",
    ),
];

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Other names of a way to split text.
const SAME: [(&str, &str); 9] = [
    ("llama3", "llama-bpe"),
    ("llama-v3", "llama-bpe"),
    ("dbrx", "smaug-bpe"),
    ("deepseek-r1-qwen", "qwen2"),
    ("starcoder", "smollm"),
    ("refact", "smollm"),
    ("command-r", "smollm"),
    ("codeshell", "smollm"),
    ("phi-2", "gpt-2"),
];

/// What llama.cpp does for `default`: each pattern cuts what those before it have left.
const DEFAULT: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

/// What it does for `deepseek-v3`, in the same way.
const DEEPSEEK_3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

/// The parts of a tokenizer.json for one of llama.cpp's ways to split text.
pub(super) struct Parts {
    pub(super) normalizer: Value,
    pub(super) pre_tokenizer: Value,
    pub(super) decoder: Value,
    /// Whether a whole word is looked up before it is merged (`ignore_merges`).
    pub(super) looks_words_up: bool,
    /// Whether a text begins with the `bos` token if the file does not say.
    pub(super) begins_with_bos: bool,
}

/// The parts for `tokenizer.ggml.pre`. `None`: the way is not known here.
pub(super) fn of_bytes(pre: &str) -> Option<Parts> {
    let name = SAME.iter().find(|(other, _)| *other == pre).map_or(pre, |(_, name)| *name);
    let byte_level = |by_words: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": by_words});
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let sequence = |steps: Vec<Value>| json!({"type": "Sequence", "pretokenizers": steps});
    let known = PATTERNS.iter().find(|(.., known)| *known == name);
    let pre_tokenizer = match (name, known) {
        (_, Some((pattern, ..))) => sequence(vec![split(pattern), byte_level(false)]),
        ("gpt-2", None) => byte_level(true),
        ("smollm", None) => sequence(vec![json!({"type": "Digits", "individual_digits": true}), byte_level(true)]),
        ("default", None) => {
            sequence(DEFAULT.iter().map(|pattern| split(pattern)).chain([byte_level(false)]).collect())
        }
        ("deepseek-v3", None) => {
            sequence(DEEPSEEK_3.iter().map(|pattern| split(pattern)).chain([byte_level(false)]).collect())
        }
        _ => return None,
    };
    let looks_words_up = known.is_some_and(|(_, whole, _)| *whole);
    Some(Parts {
        // llama.cpp composes no characters, and the tokenizers that Qwen's models were made with do.
        normalizer: if ["qwen2", "qwen35"].contains(&name) { json!({"type": "NFC"}) } else { Value::Null },
        pre_tokenizer,
        decoder: byte_level(true),
        looks_words_up,
        begins_with_bos: looks_words_up,
    })
}

/// The parts for SentencePiece's pieces.
pub(super) fn of_pieces(begins_with_space: bool) -> Parts {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let prepend = begins_with_space.then(|| json!({"type": "Prepend", "prepend": "\u{2581}"}));
    let steps: Vec<Value> = prepend.into_iter().chain([replace]).collect();
    Parts {
        normalizer: json!({"type": "Sequence", "normalizers": steps}),
        pre_tokenizer: Value::Null,
        decoder: decoder_of_pieces(begins_with_space),
        looks_words_up: false,
        begins_with_bos: true,
    }
}

/// How llama.cpp has to split text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Split {
    /// `tokenizer.ggml.pre`.
    pub(super) pre: &'static str,
    /// SentencePiece's pieces of text, rather than bytes in GPT-2's spelling.
    pub(super) is_pieces: bool,
    /// Whether a text begins with a space that is not in it, for pieces.
    pub(super) begins_with_space: bool,
}

/// The split of a tokenizer.json. The error says what llama.cpp does not have.
pub(super) fn of(json: &Value) -> Result<Split, String> {
    let model = &json["model"];
    // Files of before 2022 leave out the type of the model.
    let kind = model["type"].as_str().unwrap_or("BPE");
    if kind != "BPE" {
        return Err(format!("tokens are of the kind {kind}; llama.cpp is given BPE only"));
    }
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model[key].as_str().is_some_and(|text| !text.is_empty()) {
            return Err(format!("llama.cpp has no `{key}`"));
        }
    }
    if model["byte_fallback"] == true { pieces(json) } else { bytes(json, model["ignore_merges"] == true) }
}

/// The parts of a `Sequence`, or the one part that there is.
fn parts<'a>(value: &'a Value, list: &str) -> Vec<&'a Value> {
    match value {
        Value::Null => Vec::new(),
        _ if value["type"] == "Sequence" => value[list].as_array().into_iter().flatten().collect(),
        one => vec![one],
    }
}

/// Text as bytes: GPT-2's way and its successors.
fn bytes(json: &Value, ignore_merges: bool) -> Result<Split, String> {
    // llama.cpp composes no characters (NFC), and neither does the text that models are used on.
    if let Some(other) = parts(&json["normalizer"], "normalizers").iter().find(|part| part["type"] != "NFC") {
        return Err(format!("llama.cpp has no normalizer {}", other["type"]));
    }
    let parts = parts(&json["pre_tokenizer"], "pretokenizers");
    let unknown = || Err("llama.cpp is not known to split text in this way (pre_tokenizer)".to_owned());
    let Some((last, before)) = parts.split_last() else { return unknown() };
    if last["type"] != "ByteLevel" || last["add_prefix_space"] == true {
        return unknown();
    }
    let by_words = last["use_regex"] != false;
    let pre = match before {
        [] if by_words && !ignore_merges => Some("gpt-2"),
        [digits] if digits["type"] == "Digits" && digits["individual_digits"] == true => {
            (by_words && !ignore_merges).then_some("smollm")
        }
        splits if !by_words => {
            let patterns: Option<Vec<String>> = splits.iter().map(|part| pattern(part)).collect();
            patterns.and_then(|patterns| of_patterns(&patterns, ignore_merges))
        }
        _ => None,
    };
    match pre {
        Some(pre) => Ok(Split { pre, is_pieces: false, begins_with_space: false }),
        None => unknown(),
    }
}

/// The pattern that a part cuts text by. Some files have ends of lines as they are in it.
fn pattern(part: &Value) -> Option<String> {
    let cuts = part["type"] == "Split" && part["behavior"] == "Isolated" && part["invert"] != true;
    let pattern = part["pattern"]["Regex"].as_str().filter(|_| cuts)?;
    Some(pattern.replace('\r', r"\r").replace('\n', r"\n"))
}

/// llama.cpp's name of patterns that cut text one after the other.
fn of_patterns(patterns: &[String], ignore_merges: bool) -> Option<&'static str> {
    if let [pattern] = patterns {
        let found = PATTERNS.iter().find(|(known, whole, _)| known == pattern && *whole == ignore_merges);
        return found.map(|(.., pre)| *pre);
    }
    (patterns == DEEPSEEK_3 && !ignore_merges).then_some("deepseek-v3")
}

/// Text as pieces, with bytes for what is in none: SentencePiece's way, of Llama 2 and Mistral.
fn pieces(json: &Value) -> Result<Split, String> {
    let mut begins_with_space = false;
    let mut marks_spaces = false;
    for part in parts(&json["normalizer"], "normalizers") {
        match part["type"].as_str().unwrap_or_default() {
            "Prepend" if part["prepend"] == "\u{2581}" => begins_with_space = true,
            "Replace" if part["pattern"]["String"] == " " && part["content"] == "\u{2581}" => marks_spaces = true,
            other => return Err(format!("llama.cpp has no normalizer {other} for tokens of this kind")),
        }
    }
    for part in parts(&json["pre_tokenizer"], "pretokenizers") {
        // Gemma's splits at spaces, of which none is left by then.
        if marks_spaces && part["type"] == "Split" && part["pattern"]["String"] == " " {
            continue;
        }
        // Older files say `add_prefix_space` instead of the scheme.
        if part["type"] != "Metaspace" || part["split"] == true {
            return Err("llama.cpp is not known to split text in this way (pre_tokenizer)".to_owned());
        }
        marks_spaces = true;
        let scheme = part["prepend_scheme"].as_str();
        begins_with_space |= scheme.map_or(part["add_prefix_space"] != false, |scheme| scheme != "never");
    }
    match marks_spaces {
        true => Ok(Split { pre: "default", is_pieces: true, begins_with_space }),
        false => Err("its tokens are pieces of text, and nothing marks the spaces".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A tokenizer.json that splits in this way.
    fn back(split: &Split) -> Value {
        let parts = match split.is_pieces {
            true => of_pieces(split.begins_with_space),
            false => of_bytes(split.pre).expect("a way that is written is read"),
        };
        json!({
            "normalizer": parts.normalizer,
            "pre_tokenizer": parts.pre_tokenizer,
            "model": {"type": "BPE", "byte_fallback": split.is_pieces, "ignore_merges": parts.looks_words_up},
        })
    }

    /// (tokenizer.json, `pre` or part of the refusal)
    #[test]
    fn known_splits() {
        let byte_level =
            |by_words: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": by_words});
        let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let sequence = |parts: Vec<Value>| json!({"type": "Sequence", "pretokenizers": parts});
        let of_bytes = |pre: Value, ignore_merges: bool| json!({"model": {"type": "BPE", "ignore_merges": ignore_merges}, "pre_tokenizer": pre});
        let of_pieces = |normalizer: Value, pre: Value| json!({"model": {"type": "BPE", "byte_fallback": true}, "normalizer": normalizer, "pre_tokenizer": pre});
        let prepend = json!({"type": "Prepend", "prepend": "▁"});
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let metaspace =
            |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
        let digits = json!({"type": "Digits", "individual_digits": true});
        let of_deepseek = |patterns: &[String; 3]| {
            sequence(patterns.iter().map(|pattern| split(pattern)).chain([byte_level(false)]).collect())
        };
        let at_spaces = json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"});
        for (what, tokenizer, want) in [
            ("GPT-2", of_bytes(byte_level(true), false), Ok(("gpt-2", false))),
            ("SmolLM", of_bytes(sequence(vec![digits, byte_level(true)]), false), Ok(("smollm", false))),
            ("Llama 3", of_bytes(sequence(vec![split(LLAMA_3), byte_level(false)]), true), Ok(("llama-bpe", false))),
            ("SmolLM3", of_bytes(sequence(vec![split(LLAMA_3), byte_level(false)]), false), Ok(("smaug-bpe", false))),
            ("Qwen", of_bytes(sequence(vec![split(PATTERNS[2].0), byte_level(false)]), false), Ok(("qwen2", false))),
            ("tekken", of_bytes(sequence(vec![split(PATTERNS[3].0), byte_level(false)]), true), Ok(("tekken", false))),
            (
                "gpt-oss",
                of_bytes(sequence(vec![split(PATTERNS[4].0), byte_level(false)]), false),
                Ok(("gpt-4o", false)),
            ),
            (
                "Qwen3.5",
                of_bytes(sequence(vec![split(PATTERNS[5].0), byte_level(false)]), false),
                Ok(("qwen35", false)),
            ),
            ("DeepSeek", of_bytes(of_deepseek(&DEEPSEEK_3.map(str::to_owned)), false), Ok(("deepseek-v3", false))),
            (
                "DeepSeek, with ends of lines",
                of_bytes(of_deepseek(&DEEPSEEK_3.map(|pattern| pattern.replace(r"\r\n", "\r\n"))), false),
                Ok(("deepseek-v3", false)),
            ),
            (
                "Llama 2",
                of_pieces(json!({"type": "Sequence", "normalizers": [prepend, replace]}), Value::Null),
                Ok(("default", true)),
            ),
            ("Mistral 0.3", of_pieces(Value::Null, metaspace("first")), Ok(("default", true))),
            ("without a space", of_pieces(Value::Null, metaspace("never")), Ok(("default", false))),
            ("Gemma", of_pieces(replace.clone(), at_spaces.clone()), Ok(("default", false))),
            ("spaces that stay", of_pieces(Value::Null, at_spaces), Err("pre_tokenizer")),
            ("no words", of_bytes(byte_level(false), false), Err("pre_tokenizer")),
            (
                "another pattern",
                of_bytes(sequence(vec![split("[a-z]+"), byte_level(false)]), false),
                Err("pre_tokenizer"),
            ),
            ("nothing", of_bytes(Value::Null, false), Err("pre_tokenizer")),
            ("unmarked", of_pieces(Value::Null, Value::Null), Err("nothing marks the spaces")),
            ("Unigram", json!({"model": {"type": "Unigram"}}), Err("of the kind Unigram")),
        ] {
            let found = of(&tokenizer);
            match (found, want) {
                (Ok(split), Ok(want)) => {
                    assert_eq!((split.pre, split.begins_with_space), want, "{what}");
                    assert_eq!(of(&back(&split)), Ok(split), "{what}, there and back");
                }
                (Err(error), Err(part)) => assert!(error.contains(part), "{what}: {error}"),
                (found, want) => panic!("{what}: {found:?}, expected {want:?}"),
            }
        }
    }
}
