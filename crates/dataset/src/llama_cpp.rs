//! A tokenizer as llama.cpp's GGUF files describe it.
//!
//! The reference is llama.cpp's converter (`conversion/base.py`) and gguf-py's `SpecialVocab`. The
//! converter tells by a hash of a text's tokens which of llama.cpp's built-in ways to split text a
//! tokenizer needs. Here the split itself decides, as tokenizer.json has it (`splits.rs`). So a
//! tokenizer with other tokens and the same split is known too.

pub(crate) mod read;
mod splits;

use std::collections::BTreeMap;

use serde_json::Value;
use tokenizers::AddedToken;

use crate::added_tokens::TokenConfigs;
use crate::error::DatasetError;
use crate::text_source::TOKENIZER;
use crate::tokenizer::ChatTokenizer;

/// Kinds of tokens (`enum llama_token_type`).
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The mark of a space in SentencePiece's vocabularies.
const SPACE: char = '\u{2581}';
/// What a score of a token is that no merge makes.
const NO_MERGE: f32 = -1e6;

/// A tokenizer in the words of a GGUF file's `tokenizer.ggml.*`.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaCppTokenizer {
    /// `gpt2` (bytes) or `llama` (SentencePiece).
    pub model: &'static str,
    /// How text is split before merging.
    pub pre: &'static str,
    /// Texts by id, as many as the model has rows of the embedding.
    pub tokens: Vec<String>,
    /// Kinds by id.
    pub types: Vec<i32>,
    /// Scores by id, for `llama`.
    pub scores: Option<Vec<f32>>,
    /// Merges in their order, `left right`, for `gpt2`.
    pub merges: Vec<String>,
    /// Special tokens by llama.cpp's name, such as `bos`.
    pub special: Vec<(&'static str, u32)>,
    /// Whether a text begins with the `bos` token.
    pub add_bos: bool,
    /// Whether a text ends with the `eos` token.
    pub add_eos: bool,
    /// Whether a text begins with a space, for `llama`.
    pub add_space_prefix: Option<bool>,
    /// Chat templates: name and source. `default` is the one in use.
    pub templates: Vec<(String, String)>,
    /// The texts of the tokens that end generation.
    pub ends: Vec<String>,
}

impl ChatTokenizer {
    /// The tokenizer for a model with so many rows of the embedding.
    ///
    /// # Errors
    /// [`DatasetError::NotForLlamaCpp`] if llama.cpp would split text otherwise, or has fewer rows
    /// than there are tokens. Otherwise as [`ChatTokenizer::open`].
    pub fn for_llama_cpp(&self, vocabulary: usize) -> Result<LlamaCppTokenizer, DatasetError> {
        let path = self.tokenizer_dir.join(TOKENIZER);
        let refused = |what: String| DatasetError::NotForLlamaCpp { path: path.clone(), what };
        let bytes = self.tokenizer_json()?;
        let json: Value = serde_json::from_slice(&bytes)
            .map_err(|error| DatasetError::BadModelFile { path: path.clone(), reason: error.to_string() })?;
        let split = splits::of(&json).map_err(refused)?;
        if self.vocab_size() > vocabulary {
            let tokens = self.vocab_size();
            return Err(refused(format!("it has {tokens} tokens, and the model's embedding {vocabulary} rows")));
        }
        let merges = merges(&json["model"]["merges"]).map_err(refused)?;
        let added: BTreeMap<u32, AddedToken> = self.backend().get_added_tokens_decoder().into_iter().collect();
        let unknown = json["model"]["unk_token"].as_str().and_then(|text| self.backend().token_to_id(text));
        let (mut tokens, mut types) = (Vec::with_capacity(vocabulary), Vec::with_capacity(vocabulary));
        for id in 0..vocabulary as u32 {
            let (text, kind) = match (added.get(&id), self.id_to_token(id)) {
                (Some(token), _) if unknown == Some(id) && split.is_pieces => (token.content.clone(), UNKNOWN),
                (Some(token), _) => of_added(token),
                (None, None) => (format!("[PAD{id}]"), UNUSED),
                (None, Some(text)) if split.is_pieces && is_byte(&text) => (text, BYTE),
                (None, Some(text)) if split.is_pieces && unknown == Some(id) => (text, UNKNOWN),
                (None, Some(text)) => (text, NORMAL),
            };
            tokens.push(text);
            types.push(kind);
        }
        let scores = split.is_pieces.then(|| scores(&tokens, &merges));
        let merges = merges.into_iter().map(|[left, right]| format!("{left} {right}")).collect();
        let (add_bos, add_eos) = self.added_around()?;
        let sources = self.template().map(|template| template.sources()).unwrap_or_default();
        Ok(LlamaCppTokenizer {
            model: if split.is_pieces { "llama" } else { "gpt2" },
            pre: split.pre,
            tokens,
            types,
            scores,
            merges: if split.is_pieces { Vec::new() } else { merges },
            special: self.special_ids()?,
            add_bos,
            add_eos,
            add_space_prefix: split.is_pieces.then_some(split.begins_with_space),
            templates: sources.iter().map(|source| (source.name.clone(), source.source.clone())).collect(),
            ends: self.eos_ids().iter().filter_map(|id| self.id_to_token(*id)).collect(),
        })
    }

    /// Whether the tokenizer puts its first and last tokens around a text.
    fn added_around(&self) -> Result<(bool, bool), DatasetError> {
        let (plain, whole) = (self.encode("a", false)?, self.encode("a", true)?);
        let has = |token: Option<u32>, at: Option<&u32>| at.is_some() && token == at.copied();
        let more = whole.len() > plain.len();
        Ok((more && has(self.bos_id(), whole.first()), more && has(self.end(), whole.last())))
    }

    /// The ids of special tokens. Those that trained turns end with, and that are not the
    /// tokenizer's own end, are the ends of a turn and of a message.
    fn special_ids(&self) -> Result<Vec<(&'static str, u32)>, DatasetError> {
        let configs = TokenConfigs::read(&self.tokenizer_dir, &self.model_dir)?;
        let named = |name: &str| {
            let (_, text) = configs.special.iter().find(|(known, _)| known == name)?;
            self.backend().token_to_id(text)
        };
        let mut ids = Vec::new();
        let mut put = |name, id: Option<u32>| ids.extend(id.map(|id| (name, id)));
        put("bos", self.bos_id());
        put("eos", self.end());
        let mut others = self.eos_ids().iter().copied().filter(|id| self.end() != Some(*id));
        put("eot", others.next());
        put("eom", others.next());
        put("unknown", named("unk_token"));
        put("padding", named("pad_token"));
        Ok(ids)
    }
}

/// Text and kind of a token that was added to the vocabulary.
fn of_added(token: &AddedToken) -> (String, i32) {
    let text = &token.content;
    // As the converter: tokens in such brackets are for control, whatever their file says.
    if token.special || (text.starts_with("<|") && text.ends_with("|>")) {
        return (text.clone(), CONTROL);
    }
    (text.replace(SPACE, " "), USER_DEFINED)
}

/// Whether a text is SentencePiece's spelling of a byte, `<0x0A>`.
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// The merges of a tokenizer.json, in either spelling. A space inside a part is written as GPT-2's
/// tables do, since llama.cpp splits each merge at the space.
fn merges(json: &Value) -> Result<Vec<[String; 2]>, String> {
    let wrong = || "it has merges that are no pairs of texts".to_owned();
    let list = json.as_array().ok_or_else(wrong)?;
    let pair = |merge: &Value| -> Option<[String; 2]> {
        let encoded = |text: &str| text.replace(' ', "Ġ");
        match merge {
            Value::String(text) => text.split_once(' ').map(|(left, right)| [left.to_owned(), right.to_owned()]),
            Value::Array(parts) => match parts.as_slice() {
                [left, right] => Some([encoded(left.as_str()?), encoded(right.as_str()?)]),
                _ => None,
            },
            _ => None,
        }
    };
    list.iter().map(|merge| pair(merge).ok_or_else(wrong)).collect()
}

/// llama.cpp merges the pair whose token has the highest score, tokenizers the pair that comes first
/// in the list. So a token's score is minus the place of the first merge that makes it.
fn scores(tokens: &[String], merges: &[[String; 2]]) -> Vec<f32> {
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for (place, [left, right]) in merges.iter().enumerate() {
        places.entry(format!("{left}{right}")).or_insert(place);
    }
    tokens.iter().map(|token| places.get(token).map_or(NO_MERGE, |place| -(*place as f32))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_sentence_piece() {
        for (text, want) in [("<0x0A>", true), ("<0xff>", true), ("<0x0>", false), ("<0x0G>", false), ("0x0A", false)] {
            assert_eq!(is_byte(text), want, "{text}");
        }
    }

    #[test]
    fn merges_in_both_spellings() {
        let strings = merges(&serde_json::json!(["a b", "ab c"])).expect("pairs");
        assert_eq!(strings, merges(&serde_json::json!([["a", "b"], ["ab", "c"]])).expect("pairs"));
        assert_eq!(merges(&serde_json::json!([["a b", "c"]])).expect("a pair")[0][0], "aĠb");
        for wrong in [serde_json::json!(["ab"]), serde_json::json!([["a"]]), serde_json::json!([1]), Value::Null] {
            assert!(merges(&wrong).is_err(), "{wrong}");
        }
        let tokens = ["ab", "abc", "a"].map(str::to_owned);
        assert_eq!(scores(&tokens, &strings), [0.0, -1.0, NO_MERGE]);
    }

    #[test]
    fn kinds_of_added_tokens() {
        for (text, special, want) in [
            ("<s>", true, ("<s>", CONTROL)),
            ("<|im_end|>", false, ("<|im_end|>", CONTROL)),
            ("<think>", false, ("<think>", USER_DEFINED)),
            ("\u{2581}\u{2581}", false, ("  ", USER_DEFINED)),
        ] {
            let (found, kind) = of_added(&AddedToken::from(text.to_owned(), special));
            assert_eq!((found.as_str(), kind), want, "{text}");
        }
    }
}
