//! Tokens that a model's configs add to its tokenizer.json, in the order and with the ids that
//! transformers 5.23 and 5.24 give them (`TokenizersBackend.__init__` of
//! transformers/tokenization_utils_tokenizers.py and `_from_pretrained` of
//! tokenization_utils_base.py).

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Value, json};
use tokenizers::{AddedToken, Tokenizer};

use crate::error::DatasetError;
use crate::text_source::{ADDED_TOKENS, TOKEN_MAP, TOKENIZER_CONFIG, read_json};
use crate::tokenizer_class::TextSettings;

/// The key of special tokens without a name, and what it was called before.
const EXTRA: &str = "extra_special_tokens";
const ADDITIONAL: &str = "additional_special_tokens";

/// The special tokens that every tokenizer may have.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What the configs of a tokenizer say about tokens.
pub(crate) struct TokenConfigs {
    config: Value,
    map: Value,
    added: Value,
    /// How a text is split.
    pub(crate) text: TextSettings,
    /// Names and texts of the special tokens that are set, as a template sees them.
    pub(crate) special: Vec<(String, String)>,
}

impl TokenConfigs {
    /// A hash of all that a tokenizer is made of: its file, what the configs say but for the chat
    /// template, and tokens that are added to it.
    pub(crate) fn digest(&self, tokenizer: &[u8], new_tokens: &[String]) -> [u8; 32] {
        let mut config = self.config.clone();
        if let Some(config) = config.as_object_mut() {
            config.shift_remove("chat_template");
        }
        let rest = format!("{config} {} {} {:?} {new_tokens:?}", self.map, self.added, self.text);
        let mut hasher = blake3::Hasher::new();
        hasher.update(blake3::hash(tokenizer).as_bytes());
        hasher.update(rest.as_bytes());
        *hasher.finalize().as_bytes()
    }

    /// `directory`: that of the tokenizer. `model_dir` has config.json.
    pub(crate) fn read(directory: &Path, model_dir: &Path) -> Result<Self, DatasetError> {
        let config = read_json(&directory.join(TOKENIZER_CONFIG))?;
        let map = read_json(&directory.join(TOKEN_MAP))?;
        let added = read_json(&directory.join(ADDED_TOKENS))?;
        let text = TextSettings::of(&config, &read_json(&model_dir.join("config.json"))?);
        let mut configs = Self { config, map, added, text, special: Vec::new() };
        configs.special = configs.special_tokens();
        Ok(configs)
    }

    /// Whether the two older files count. transformers reads them if the newer one does not list
    /// all added tokens.
    fn is_old(&self) -> bool {
        self.config.get("added_tokens_decoder").is_none()
    }

    /// What is written of a special token. If the older file counts, it comes first, and its null means that there is
    /// no such token.
    fn written(&self, name: &str) -> Option<&Value> {
        let older = if self.is_old() { self.map.get(name) } else { None };
        older.or_else(|| self.config.get(name))
    }

    fn special_tokens(&self) -> Vec<(String, String)> {
        let mut tokens: Vec<(String, String)> =
            NAMED.iter().filter_map(|name| Some(((*name).to_owned(), text_of(self.written(name)?)?))).collect();
        // Those of the model alone: "image_token": "<image>", beside the others or within
        // "extra_special_tokens".
        let own = |value: &Value| -> Vec<(String, String)> {
            let entries = value.as_object().into_iter().flatten();
            let named = entries.filter(|(name, _)| name.ends_with("_token") && !NAMED.contains(&name.as_str()));
            named.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
        };
        tokens.extend(own(&self.config));
        if self.is_old() {
            tokens.extend(own(&self.map));
        }
        let older = if self.is_old() { Some(&self.map) } else { None };
        for extra in [Some(&self.config), older].into_iter().flatten().filter_map(|file| file.get(EXTRA)?.as_object()) {
            tokens.extend(extra.iter().filter_map(|(name, value)| Some((name.clone(), text_of(value)?))));
        }
        tokens
    }

    /// The listed tokens with their ids, by id.
    fn listed(&self) -> Vec<(u32, AddedToken)> {
        let mut tokens = Vec::new();
        if let Some(listed) = self.config.get("added_tokens_decoder").and_then(Value::as_object) {
            tokens.extend(listed.iter().filter_map(|(id, token)| Some((id.parse().ok()?, added_token(token)?))));
        } else if let Some(listed) = self.added.as_object() {
            let special: HashSet<&str> = self.special.iter().map(|(_, text)| text.as_str()).collect();
            for (content, id) in listed {
                if let Some(id) = id.as_u64().and_then(|id| u32::try_from(id).ok()) {
                    tokens.push((id, AddedToken::from(content.clone(), special.contains(content.as_str()))));
                }
            }
        }
        tokens.sort_by_key(|(id, _)| *id);
        tokens
    }

    /// Special tokens that have no name, in order.
    fn unnamed(&self) -> Vec<AddedToken> {
        let newer = self.config.get(EXTRA).filter(|value| !is_empty(value));
        let list = newer.or_else(|| self.config.get(ADDITIONAL));
        let mut tokens: Vec<AddedToken> =
            list.and_then(Value::as_array).into_iter().flatten().filter_map(special_token).collect();
        if self.is_old() {
            // The former name counts if nothing has the present one.
            let is_new =
                [self.config.get(EXTRA), self.config.get(ADDITIONAL), self.map.get(EXTRA)].iter().any(Option::is_some);
            let older = self.map.get(if is_new { EXTRA } else { ADDITIONAL }).and_then(Value::as_array);
            tokens.extend(older.into_iter().flatten().filter_map(special_token));
        }
        tokens
    }

    /// Adds the tokens that tokenizer.json lacks.
    ///
    /// # Errors
    /// [`DatasetError::BadModelFile`] if a token would not get the id that the config has for it.
    /// What a model has learnt under one id must not be read under another.
    pub(crate) fn add_to(
        &self,
        tokenizer: &mut Tokenizer,
        directory: &Path,
        notices: &mut Vec<String>,
    ) -> Result<(), DatasetError> {
        let known: HashSet<AddedKey> = tokenizer.get_added_tokens_decoder().values().map(AddedKey::of).collect();
        let mut texts: HashSet<String> = known.iter().map(|key| key.0.clone()).collect();
        let mut missing: Vec<(Option<u32>, AddedToken)> = Vec::new();
        for (id, token) in self.listed() {
            let there = tokenizer.token_to_id(&token.content);
            if let Some(other) = there
                && other != id
            {
                notices.push(format!(
                    "{TOKENIZER_CONFIG} has {:?} as token {id}, tokenizer.json as token {other}, which is used",
                    token.content
                ));
            }
            let is_new = texts.insert(token.content.clone());
            // The older file only lists what is missing. The settings of the newer one override
            // those of tokenizer.json.
            if !known.contains(&AddedKey::of(&token)) && (is_new || !self.is_old()) {
                missing.push((there.is_none().then_some(id), token));
            }
        }
        let named = self.special.iter().map(|(name, text)| {
            let token = self.written(name).filter(|value| value.is_object()).and_then(added_token);
            token.unwrap_or_else(|| AddedToken::from(text.clone(), true)).special(true)
        });
        for token in named.chain(self.unnamed()) {
            if texts.insert(token.content.clone()) {
                missing.push((None, token));
            }
        }
        missing.retain(|(_, token)| !token.content.is_empty());
        if missing.is_empty() {
            return Ok(());
        }
        let refused = |reason: String| DatasetError::BadModelFile { path: directory.join(TOKENIZER_CONFIG), reason };
        let tokens: Vec<AddedToken> = missing.iter().map(|(_, token)| token.clone()).collect();
        tokenizer.add_tokens(tokens).map_err(|error| refused(error.to_string()))?;
        for (wanted, token) in &missing {
            let given = tokenizer.token_to_id(&token.content);
            if let (Some(wanted), Some(given)) = (wanted, given)
                && *wanted != given
            {
                return Err(refused(format!(
                    "it has {:?} as token {wanted}, which tokenizer.json lacks and whose next free token is {given}",
                    token.content
                )));
            }
        }
        Ok(())
    }
}

/// Adds special tokens that a recipe names. Returns those that were not there, with their ids.
pub(crate) fn add_new(
    tokenizer: &mut Tokenizer,
    texts: &[String],
    notices: &mut Vec<String>,
) -> tokenizers::Result<Vec<(String, u32)>> {
    let mut new: Vec<String> = Vec::new();
    for text in texts {
        match tokenizer.token_to_id(text) {
            Some(id) => notices.push(format!("{text:?} is token {id} of the tokenizer already, and is not added")),
            None if new.contains(text) => {}
            None => new.push(text.clone()),
        }
    }
    tokenizer.add_special_tokens(new.iter().map(|text| AddedToken::from(text.clone(), true)).collect::<Vec<_>>())?;
    Ok(new.into_iter().filter_map(|text| tokenizer.token_to_id(&text).map(|id| (text, id))).collect())
}

/// A special token as tokenizer.json and tokenizer_config.json write it, without its id.
pub(crate) fn written(text: &str) -> Value {
    json!({
        "content": text, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true,
    })
}

/// A token with its settings, for comparison.
#[derive(PartialEq, Eq, Hash)]
struct AddedKey(String, [bool; 5]);

impl AddedKey {
    fn of(token: &AddedToken) -> Self {
        let AddedToken { content, single_word, lstrip, rstrip, normalized, special } = token;
        Self(content.clone(), [*single_word, *lstrip, *rstrip, *normalized, *special])
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        other => other.is_null(),
    }
}

/// The text of a token: a plain string, or a token written out, {"content": "<s>", "lstrip": false,
/// ...}.
fn text_of(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content").and_then(Value::as_str)).map(str::to_owned)
}

fn special_token(value: &Value) -> Option<AddedToken> {
    match value {
        Value::String(text) => Some(AddedToken::from(text.clone(), true)),
        other => added_token(other).map(|token| token.special(true)),
    }
}

/// A token written out, with the defaults of the Python class.
pub(crate) fn added_token(value: &Value) -> Option<AddedToken> {
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = flag("special").unwrap_or(false);
    let token = AddedToken::from(value.get("content")?.as_str()?, special)
        .single_word(flag("single_word").unwrap_or(false))
        .lstrip(flag("lstrip").unwrap_or(false))
        .rstrip(flag("rstrip").unwrap_or(false))
        .normalized(flag("normalized").unwrap_or(!special));
    Some(token)
}
