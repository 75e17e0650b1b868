//! Tokens of a text chunk by chunk, if that gives the tokens of the whole. Words come again and
//! again, and without this most of the time of reading rows goes into making the same tokens anew.
//!
//! A text may be cut before a space between two ASCII letters under two conditions: the tokenizer
//! itself always cuts there before it looks for tokens, and nothing on one side of the cut depends
//! on the other. Both hold for byte-level BPE behind one of the regular expressions below. Each of
//! these takes all letters it can get, then stops at the space, and its next match begins with that
//! space and the letter behind it. Any other tokenizer gets its text as a whole.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;
use tokenizers::{ModelWrapper, Tokenizer};

/// Splitting patterns that satisfy both conditions: those of Qwen 2 to 3, Llama 3 and GPT-4o (with
/// and without digits in groups).
const PATTERNS: [&str; 4] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// The most bytes of a chunk that is remembered: words, not code or other scripts.
const LONGEST_KEPT: usize = 48;
/// The most chunks that a thread remembers. Then it forgets all of them.
const MOST_KEPT: usize = 1 << 15;

/// A token and the byte range of the text that it stands for.
pub(crate) type Piece = (u32, Range<usize>);

/// The chunks that a thread remembers.
struct ChunkCache {
    /// The number of the tokenizer that they belong to.
    tokenizer: u64,
    chunks: HashMap<Box<str>, Box<[Piece]>>,
}

thread_local! {
    static KNOWN: RefCell<ChunkCache> = RefCell::new(ChunkCache { tokenizer: 0, chunks: HashMap::new() });
}

/// How a tokenizer gets its text.
pub(crate) struct Chunks {
    /// Different for each tokenizer of the process.
    number: u64,
    /// Whether texts are cut.
    cuts: bool,
}

impl Chunks {
    pub(crate) fn of(tokenizer: &Tokenizer) -> Chunks {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Chunks { number: NEXT.fetch_add(1, Ordering::Relaxed), cuts: may_be_cut(tokenizer) }
    }

    /// Tokens of a text and the byte range of each, as `tokenizer.encode(text, false)` gives them.
    pub(crate) fn encode(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<Piece>, tokenizers::Error> {
        if !self.cuts {
            return whole(tokenizer, text);
        }
        KNOWN.with_borrow_mut(|known| {
            if known.tokenizer != self.number || known.chunks.len() >= MOST_KEPT {
                *known = ChunkCache { tokenizer: self.number, chunks: HashMap::new() };
            }
            let mut pieces = Vec::with_capacity(text.len() / 4 + 8);
            let mut start = 0;
            while start < text.len() {
                let end = chunk_end(text, start);
                let chunk = &text[start..end];
                match known.chunks.get(chunk) {
                    Some(kept) => add(&mut pieces, kept, start),
                    None => {
                        let found = whole(tokenizer, chunk)?;
                        add(&mut pieces, &found, start);
                        if chunk.len() <= LONGEST_KEPT {
                            known.chunks.insert(chunk.into(), found.into());
                        }
                    }
                }
                start = end;
            }
            Ok(pieces)
        })
    }
}

fn add(pieces: &mut Vec<Piece>, more: &[Piece], start: usize) {
    pieces.extend(more.iter().map(|(id, span)| (*id, start + span.start..start + span.end)));
}

fn whole(tokenizer: &Tokenizer, text: &str) -> Result<Vec<Piece>, tokenizers::Error> {
    let encoding = tokenizer.encode(text, false)?;
    let spans = encoding.get_offsets().iter().map(|(start, end)| *start..*end);
    Ok(encoding.get_ids().iter().copied().zip(spans).collect())
}

/// Where the chunk that begins at `start` ends: before the next space between two ASCII letters.
fn chunk_end(text: &str, start: usize) -> usize {
    let bytes = text.as_bytes();
    let is_letter = |place: usize| bytes.get(place).is_some_and(u8::is_ascii_alphabetic);
    let mut place = start + 1;
    while let Some(found) = bytes.get(place..).and_then(|rest| rest.iter().position(|&byte| byte == b' ')) {
        place += found;
        if is_letter(place - 1) && is_letter(place + 1) {
            return place;
        }
        place += 1;
    }
    bytes.len()
}

/// Whether the tokenizer satisfies both conditions. What it is made of is read from its own JSON
/// form.
fn may_be_cut(tokenizer: &Tokenizer) -> bool {
    let json = |part: serde_json::Result<Value>| part.unwrap_or_default();
    let plain_normalizer = match tokenizer.get_normalizer() {
        None => true,
        // NFC composes no letter with a space.
        Some(normalizer) => json(serde_json::to_value(normalizer))["type"] == "NFC",
    };
    let Some(splitter) = tokenizer.get_pre_tokenizer() else { return false };
    let splitter = json(serde_json::to_value(splitter));
    let parts = match splitter["type"].as_str() {
        Some("Sequence") => splitter["pretokenizers"].as_array().cloned().unwrap_or_default(),
        _ => vec![splitter],
    };
    let plain_model = matches!(tokenizer.get_model(), ModelWrapper::BPE(model) if model.dropout.unwrap_or(0.0) == 0.0);
    let tokens = tokenizer.get_added_tokens_decoder();
    let plain_tokens = tokens.values().all(|token| {
        let text = &token.content;
        !token.lstrip && !token.rstrip && !token.single_word && chunk_end(text, 0) == text.len()
    });
    let splits = parts.iter().any(|part| splits_at_spaces(part) == Some(true));
    plain_normalizer
        && plain_model
        && plain_tokens
        && splits
        && parts.iter().all(|part| splits_at_spaces(part).is_some())
}

/// Whether this part always cuts before a space between letters. `None`: it may undo such a cut.
fn splits_at_spaces(part: &Value) -> Option<bool> {
    match part["type"].as_str()? {
        // GPT-2's own pattern: ` ?\p{L}+`.
        "ByteLevel" if part["add_prefix_space"] == false => Some(part["use_regex"].as_bool().unwrap_or(true)),
        "Digits" => Some(false),
        "Split" => {
            let known = PATTERNS.iter().any(|pattern| part["pattern"]["Regex"] == *pattern);
            (known && part["behavior"] == "Isolated" && part["invert"] == false).then_some(true)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use finetune_random::philox;
    use serde_json::json;

    use super::*;

    /// A byte-level tokenizer behind this splitter, with a few merges.
    fn tokenizer(splitter: &Value, normalizer: &Value) -> Tokenizer {
        let mut vocabulary = serde_json::Map::new();
        let letters = (b'!'..=b'~').map(char::from).chain('\u{a1}'..='\u{ac}').chain('\u{ae}'..='\u{143}');
        for letter in letters {
            let id = vocabulary.len();
            vocabulary.insert(letter.to_string(), json!(id));
        }
        let merges = ["t h", "th e", "Ġ t", "Ġ the", "Ġt h", "Ġ a", "e r", "o n", "Ġ Ġ", "a b"];
        for merge in merges {
            let id = vocabulary.len();
            vocabulary.entry(merge.replace(' ', "")).or_insert(json!(id));
        }
        let text = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": normalizer, "pre_tokenizer": splitter,
            "post_processor": null, "decoder": null,
            "added_tokens": [{"id": 5000, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}],
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": merges},
        });
        Tokenizer::from_bytes(text.to_string()).expect("a tokenizer")
    }

    fn split(pattern: &str) -> Value {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]})
    }

    /// Texts of words, spaces, line breaks, marks, digits, other scripts and special tokens in any
    /// order.
    fn made_up(number: u32) -> String {
        const PARTS: [&str; 24] = [
            "the", "on", "THE", "a", " ", " ", " ", "  ", "\n", "\t", "'s", "'LL", "é", "e\u{301}", "日本", "12", "3",
            ".", ",\n", "<|end|>", "<|", "🙂", "ab", "\u{a0}",
        ];
        let draw = |place: u32| philox([number, place, 0, 0], [7, 7])[0];
        (0..draw(0) % 40).map(|place| PARTS[(draw(place + 1) % 24) as usize]).collect()
    }

    #[test]
    fn chunks_have_the_tokens_of_the_whole() {
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let digits =
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level]});
        let splitters: Vec<Value> = PATTERNS.iter().map(|pattern| split(pattern)).chain([byte_level, digits]).collect();
        for (splitter, normalizer) in splitters.iter().flat_map(|it| [(it, Value::Null), (it, json!({"type": "NFC"}))])
        {
            let tokenizer = tokenizer(splitter, &normalizer);
            let chunks = Chunks::of(&tokenizer);
            assert!(chunks.cuts, "{splitter}");
            for number in 0..2000 {
                let text = made_up(number);
                let found = chunks.encode(&tokenizer, &text).expect("tokens");
                assert_eq!(found, whole(&tokenizer, &text).expect("tokens"), "{number}: {text:?} {splitter}");
            }
        }
    }

    #[test]
    fn other_tokenizers_get_the_whole_text() {
        let prefix = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        let unsplit = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        for (splitter, normalizer) in [
            (prefix, Value::Null),
            (unsplit, Value::Null),
            (split(r"\s+\S+"), Value::Null),
            (Value::Null, Value::Null),
            (split(PATTERNS[0]), json!({"type": "NFKC"})),
            (split(PATTERNS[0]), json!({"type": "Prepend", "prepend": "▁"})),
        ] {
            assert!(!Chunks::of(&tokenizer(&splitter, &normalizer)).cuts, "{splitter} {normalizer}");
        }
        let mut tokenizer = tokenizer(&split(PATTERNS[0]), &Value::Null);
        tokenizer.add_tokens([tokenizers::AddedToken::from("two words", false)]).expect("a token");
        assert!(!Chunks::of(&tokenizer).cuts, "a token across a cut");
    }

    #[test]
    fn a_text_is_cut_between_words_only() {
        let text = "The van  leaves at 7 am, no é way<|end|>";
        let mut chunks = Vec::new();
        let mut start = 0;
        while start < text.len() {
            let end = chunk_end(text, start);
            chunks.push(&text[start..end]);
            start = end;
        }
        assert_eq!(chunks, ["The", " van  leaves", " at 7 am, no é way<|end|>"]);
    }
}
