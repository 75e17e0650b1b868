//! A tokenizer of a GGUF file as the files of a Hugging Face directory: the reverse of
//! `llama_cpp.rs`. The ids of a text are those that llama.cpp gives it (src/llama-vocab.cpp).

use std::collections::HashMap;

use finetune_gguf::{FileSet, Value as Field};
use serde_json::{Map, Value, json};

use super::{BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, splits};

/// Control tokens of these texts end generation in llama.cpp, whatever the file says.
const ENDS: [&str; 6] = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"];
/// The longest token of pieces, in bytes, that merges are made for. Those of published vocabularies
/// have at most 100.
const LONGEST_PIECE: usize = 512;

/// The texts of a tokenizer's files.
pub(crate) struct Texts {
    /// tokenizer.json, or why it cannot be made.
    pub(crate) tokenizer: Result<Vec<u8>, String>,
    /// tokenizer_config.json, with the chat template.
    pub(crate) config: Vec<u8>,
    /// generation_config.json, with the tokens that end generation.
    pub(crate) generation: Vec<u8>,
    /// Texts by id, without those that stand for nothing.
    pub(crate) tokens: Vec<Option<String>>,
}

/// The vocabulary and the settings of a file.
struct Vocabulary<'a> {
    files: &'a FileSet,
    tokens: Vec<&'a str>,
    types: Vec<i32>,
    /// Whether tokens are pieces of text (SentencePiece), rather than bytes in GPT-2's spelling.
    is_pieces: bool,
}

impl Texts {
    /// Of a file. `None`: it has no tokenizer.
    pub(crate) fn read(files: &FileSet) -> Result<Option<Texts>, String> {
        let Some(vocabulary) = Vocabulary::read(files)? else { return Ok(None) };
        let tokenizer = vocabulary.tokenizer().map(|json| json.to_string().into_bytes());
        let tokens = vocabulary.named().map(|token| token.map(str::to_owned)).collect();
        let config = vocabulary.config().to_string().into_bytes();
        Ok(Some(Texts { tokenizer, config, generation: vocabulary.generation().to_string().into_bytes(), tokens }))
    }
}

impl<'a> Vocabulary<'a> {
    fn read(files: &'a FileSet) -> Result<Option<Vocabulary<'a>>, String> {
        let Some(model) = files.get("tokenizer.ggml.model").and_then(Field::as_str) else { return Ok(None) };
        let Some(tokens) = files.get("tokenizer.ggml.tokens").and_then(Field::as_array) else { return Ok(None) };
        let is_pieces = match model {
            "gpt2" => false,
            "llama" => true,
            other => return Err(format!("tokenizer.ggml.model is `{other}`; `gpt2` and `llama` are read")),
        };
        let tokens: Option<Vec<&str>> = tokens.iter().map(Field::as_str).collect();
        let tokens = tokens.ok_or("tokenizer.ggml.tokens is no list of texts")?;
        let types = match files.get("tokenizer.ggml.token_type").and_then(Field::as_array) {
            None => vec![NORMAL; tokens.len()],
            Some(types) if types.len() == tokens.len() => {
                types.iter().map(|kind| integer(kind).unwrap_or(NORMAL)).collect()
            }
            Some(types) => {
                return Err(format!(
                    "tokenizer.ggml.token_type has {} entries for {} tokens",
                    types.len(),
                    tokens.len()
                ));
            }
        };
        Ok(Some(Vocabulary { files, tokens, types, is_pieces }))
    }

    fn flag(&self, key: &str, default: bool) -> bool {
        match self.files.get(&format!("tokenizer.ggml.{key}")) {
            Some(Field::Bool(flag)) => *flag,
            _ => default,
        }
    }

    /// Texts by id. `None`: the token stands for nothing, as those that fill up the embedding.
    fn named(&self) -> impl Iterator<Item = Option<&'a str>> + '_ {
        self.tokens.iter().zip(&self.types).map(|(text, kind)| (*kind != UNUSED && !text.is_empty()).then_some(*text))
    }

    /// The text of a special token, such as `bos`. Files of pieces may leave out what Llama has.
    fn special(&self, name: &str) -> Option<&'a str> {
        self.id(name).and_then(|id| self.tokens.get(id)).copied().filter(|text| !text.is_empty())
    }

    fn id(&self, name: &str) -> Option<usize> {
        let default = match name {
            "unknown" if self.is_pieces => Some(0),
            "bos" if self.is_pieces => Some(1),
            "eos" if self.is_pieces => Some(2),
            _ => None,
        };
        let stated = self.files.get(&format!("tokenizer.ggml.{name}_token_id"));
        let id = stated.and_then(Field::as_u64).map(|id| id as usize).or(default);
        id.filter(|id| *id < self.tokens.len())
    }

    /// Tokens that are found in a text before it is split: id, text, and whether they are special.
    fn added(&self) -> impl Iterator<Item = (usize, &'a str, bool)> + '_ {
        let texts = self.named().enumerate().zip(&self.types);
        texts.filter_map(|((id, text), kind)| match *kind {
            CONTROL | UNKNOWN => Some((id, text?, true)),
            USER_DEFINED => Some((id, text?, false)),
            _ => None,
        })
    }

    fn tokenizer(&self) -> Result<Value, String> {
        // Of two tokens with one text llama.cpp takes the later one.
        let vocab: Map<String, Value> =
            self.named().enumerate().filter_map(|(id, text)| Some((text?.to_owned(), json!(id)))).collect();
        let pre = self.files.get("tokenizer.ggml.pre").and_then(Field::as_str).unwrap_or("default");
        let (split, model) = if self.is_pieces {
            let has_bytes = self.types.contains(&BYTE);
            let model = json!({
                "type": "BPE", "dropout": null, "unk_token": self.special("unknown"), "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": has_bytes, "ignore_merges": false,
                "vocab": vocab, "merges": self.merges_of_pieces()?,
            });
            (splits::of_pieces(self.flag("add_space_prefix", true)), model)
        } else {
            let known = splits::of_bytes(pre);
            let split = known
                .ok_or_else(|| format!("tokenizer.ggml.pre is `{pre}`, a way to split text that is not known here"))?;
            let model = json!({
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": split.looks_words_up, "vocab": vocab, "merges": self.merges_of_bytes(&vocab)?,
            });
            (split, model)
        };
        let added: Vec<Value> = self
            .added()
            .map(|(id, text, special)| {
                let mut token = settings(text, special);
                token["id"] = json!(id);
                token
            })
            .collect();
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": split.normalizer, "pre_tokenizer": split.pre_tokenizer,
            "post_processor": self.post_processor(split.begins_with_bos), "decoder": split.decoder, "model": model,
        }))
    }

    /// What is put around a text. `bos`: whether llama.cpp begins texts with it if the file does not
    /// say.
    fn post_processor(&self, bos: bool) -> Value {
        let bos = self.special("bos").zip(self.id("bos")).filter(|_| self.flag("add_bos_token", bos));
        let eos = self.special("eos").zip(self.id("eos")).filter(|_| self.flag("add_eos_token", false));
        if bos.is_none() && eos.is_none() {
            return Value::Null;
        }
        let special = |(text, _): (&str, usize), kind: u32| json!({"SpecialToken": {"id": text, "type_id": kind}});
        let mut single = Vec::new();
        let mut pair = Vec::new();
        for (kind, name) in [(0, "A"), (1, "B")] {
            let mut part: Vec<Value> = bos.map(|token| special(token, kind)).into_iter().collect();
            part.push(json!({"Sequence": {"id": name, "type_id": kind}}));
            part.extend(eos.map(|token| special(token, kind)));
            if kind == 0 {
                single.clone_from(&part);
            }
            pair.extend(part);
        }
        let tokens: Map<String, Value> = [bos, eos]
            .into_iter()
            .flatten()
            .map(|(text, id)| (text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]})))
            .collect();
        json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens})
    }

    /// Merges as pairs, in their order.
    fn merges_of_bytes(&self, vocab: &Map<String, Value>) -> Result<Vec<Value>, String> {
        let list = self.files.get("tokenizer.ggml.merges").and_then(Field::as_array);
        let list = list.ok_or("it has no tokenizer.ggml.merges")?;
        let mut merges = Vec::with_capacity(list.len());
        for merge in list {
            // The first space behind the first letter: the left part may itself begin with one.
            let text = merge.as_str().unwrap_or_default();
            let second = text.char_indices().nth(1).map_or(text.len(), |(place, _)| place);
            let parts = text[second..].find(' ').map(|space| (&text[..second + space], &text[second + space + 1..]));
            let Some((left, right)) = parts else {
                return Err(format!("tokenizer.ggml.merges has {text:?}, which is no pair of texts"));
            };
            let made = format!("{left}{right}");
            if let Some(missing) = [left, right, &made].into_iter().find(|text| !vocab.contains_key(*text)) {
                return Err(format!("tokenizer.ggml.merges has {text:?}, and {missing:?} is no token"));
            }
            merges.push(json!([left, right]));
        }
        Ok(merges)
    }

    /// llama.cpp merges the pair whose token has the highest score. So the merges are all ways to make
    /// a token of two, by the token's score.
    fn merges_of_pieces(&self) -> Result<Vec<Value>, String> {
        let scores = self.files.get("tokenizer.ggml.scores").and_then(Field::as_array).unwrap_or_default();
        if scores.len() != self.tokens.len() {
            return Err(format!("tokenizer.ggml.scores has {} entries for {} tokens", scores.len(), self.tokens.len()));
        }
        let is_piece = |kind: i32| kind == NORMAL || kind == USER_DEFINED;
        let pieces: HashMap<&str, usize> = (self.named().enumerate().zip(&self.types))
            .filter(|(_, kind)| is_piece(**kind))
            .filter_map(|((id, text), _)| Some((text?, id)))
            .collect();
        let mut merges: Vec<(f32, usize, usize)> = Vec::new();
        for (text, id) in &pieces {
            if text.len() > LONGEST_PIECE {
                return Err(format!("token {id} has {} bytes; at most {LONGEST_PIECE} are read", text.len()));
            }
            let score = match scores[*id] {
                Field::F32(score) if !score.is_nan() => score,
                _ => return Err(format!("the score of token {id} is no number")),
            };
            let parts = text.char_indices().skip(1).map(|(place, _)| text.split_at(place));
            let known = parts.filter_map(|(left, right)| Some((score, *pieces.get(left)?, *pieces.get(right)?)));
            merges.extend(known);
        }
        merges.sort_by(|one, other| other.0.total_cmp(&one.0).then((one.1, one.2).cmp(&(other.1, other.2))));
        Ok(merges.into_iter().map(|(_, left, right)| json!([self.tokens[left], self.tokens[right]])).collect())
    }

    fn config(&self) -> Value {
        let listed: Map<String, Value> =
            self.added().map(|(id, text, special)| (id.to_string(), settings(text, special))).collect();
        let mut config = json!({
            "added_tokens_decoder": listed, "clean_up_tokenization_spaces": false,
            "tokenizer_class": "PreTrainedTokenizerFast",
        });
        for (key, name) in
            [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
        {
            if let Some(text) = self.special(name) {
                config[key] = json!(text);
            }
        }
        if let Some(templates) = self.templates() {
            config["chat_template"] = templates;
        }
        config
    }

    /// The chat templates: one text, or a list with names.
    fn templates(&self) -> Option<Value> {
        let text = |key: &str| self.files.get(key).and_then(Field::as_str);
        let default = text("tokenizer.chat_template");
        let begin = "tokenizer.chat_template.";
        let others: Vec<(&str, &str)> = self
            .files
            .metadata()
            .iter()
            .filter_map(|(key, value)| Some((key.strip_prefix(begin)?, value.as_str()?)))
            .collect();
        if others.is_empty() {
            return default.map(|text| json!(text));
        }
        let all = default.map(|text| ("default", text)).into_iter().chain(others);
        Some(all.map(|(name, template)| json!({"name": name, "template": template})).collect())
    }

    fn generation(&self) -> Value {
        let mut ends: Vec<usize> = Vec::new();
        let stated = ["eos", "eot", "eom"].into_iter().filter_map(|name| self.id(name));
        let known = self.added().filter(|(_, text, special)| *special && ENDS.contains(text)).map(|(id, ..)| id);
        for id in stated.chain(known) {
            if !ends.contains(&id) {
                ends.push(id);
            }
        }
        let mut config = json!({});
        for (key, name) in [("bos_token_id", "bos"), ("pad_token_id", "padding")] {
            if let Some(id) = self.id(name) {
                config[key] = json!(id);
            }
        }
        match ends[..] {
            [] => {}
            [only] => config["eos_token_id"] = json!(only),
            _ => config["eos_token_id"] = json!(ends),
        }
        config
    }
}

/// An added token as tokenizer.json and tokenizer_config.json write it, without its id.
fn settings(text: &str, special: bool) -> Value {
    json!({
        "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": special,
    })
}

fn integer(value: &Field) -> Option<i32> {
    match value {
        Field::I32(number) => Some(*number),
        other => other.as_u64().and_then(|number| i32::try_from(number).ok()),
    }
}

/// The decoder of pieces: the mark of a space becomes a space, and that at the beginning of a text
/// goes away if it was put there.
pub(super) fn decoder_of_pieces(begins_with_space: bool) -> Value {
    let mut steps = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE.to_string()}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if begins_with_space {
        steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": steps})
}
