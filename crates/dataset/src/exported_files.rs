//! The files that go into an adapter, a checkpoint or a merged model beside its weights. With them
//! another program writes and ends text as this one did.

use serde_json::{Value, json};

use crate::added_tokens::written;
use crate::error::DatasetError;
use crate::text_source::{
    ADDED_TOKENS, GENERATION_CONFIG, TEMPLATE, TOKEN_MAP, TOKENIZER, TOKENIZER_CONFIG, read_if_there, read_json,
    read_tokenizer,
};
use crate::tokenizer::ChatTokenizer;

/// Files of a tokenizer that are copied as they are.
const AS_THEY_ARE: [&str; 2] = [TOKEN_MAP, ADDED_TOKENS];

impl ChatTokenizer {
    /// The files by which another program writes and ends text as this one did: (name, bytes), by
    /// name. They are the tokenizer's files, the template in use, and a generation_config.json. The
    /// `eos_token_id` of the latter includes `ends`, the tokens that trained turns end with.
    ///
    /// One template becomes a chat_template.jinja, as transformers saves it. Several stay a list in
    /// tokenizer_config.json. Variables of the recipe are defaults in them.
    ///
    /// # Errors
    /// As [`ChatTokenizer::open`], since the files are read again.
    pub fn files(&self, ends: &[u32]) -> Result<Vec<(String, Vec<u8>)>, DatasetError> {
        let directory = &self.tokenizer_dir;
        let mut files = vec![(TOKENIZER.to_owned(), self.tokenizer_json()?)];
        for name in AS_THEY_ARE {
            if let Some(bytes) = read_if_there(&directory.join(name))? {
                let is_list = name == ADDED_TOKENS && !self.new_tokens().is_empty();
                files.push((name.to_owned(), if is_list { self.with_new_tokens(name)? } else { bytes }));
            }
        }
        let mut config = read_json(&directory.join(TOKENIZER_CONFIG))?;
        if let Some(listed) = config.get_mut("added_tokens_decoder").and_then(Value::as_object_mut) {
            listed.extend(self.new_tokens().iter().map(|(text, id)| (id.to_string(), written(text))));
        }
        let sources = self.template().map(|template| template.sources()).unwrap_or_default();
        let given = self.template().map(|template| template.given()).unwrap_or_default();
        match sources {
            [] => {}
            [only] if only.name == "default" => {
                files.push((TEMPLATE.to_owned(), with_defaults(&only.source, given).into_bytes()));
                // Programs that look here first would take the base model's template.
                if let Some(entries) = config.as_object_mut() {
                    entries.shift_remove("chat_template");
                }
            }
            several => {
                let list: Vec<Value> = several
                    .iter()
                    .map(|source| json!({"name": source.name, "template": with_defaults(&source.source, given)}))
                    .collect();
                if config.is_null() {
                    config = json!({});
                }
                if let Some(entries) = config.as_object_mut() {
                    entries.insert("chat_template".to_owned(), Value::Array(list));
                }
            }
        }
        if !config.is_null() {
            files.push((TOKENIZER_CONFIG.to_owned(), pretty(&config)));
        }
        if let Some(config) = self.generation_config(ends)? {
            files.push((GENERATION_CONFIG.to_owned(), config));
        }
        files.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(files)
    }

    pub(crate) fn tokenizer_json(&self) -> Result<Vec<u8>, DatasetError> {
        let path = self.tokenizer_dir.join(TOKENIZER);
        let bytes = read_tokenizer(&path)?;
        if !self.without_chance() && self.new_tokens().is_empty() {
            return Ok(bytes);
        }
        let mut tokenizer: Value = serde_json::from_slice(&bytes)
            .map_err(|error| DatasetError::BadModelFile { path, reason: error.to_string() })?;
        // Otherwise the next program would split at random again, even when it generates.
        if self.without_chance()
            && let Some(model) = tokenizer.get_mut("model").and_then(Value::as_object_mut)
        {
            for key in ["dropout", "alpha", "nbest_size"] {
                if model.contains_key(key) {
                    model.insert(key.to_owned(), Value::Null);
                }
            }
        }
        if !self.new_tokens().is_empty() {
            let new = self.new_tokens().iter().map(|(text, id)| {
                let mut token = written(text);
                token["id"] = json!(id);
                token
            });
            match tokenizer.get_mut("added_tokens").and_then(Value::as_array_mut) {
                Some(tokens) => tokens.extend(new),
                None => tokenizer["added_tokens"] = new.collect(),
            }
        }
        Ok(pretty(&tokenizer))
    }

    /// The older list of added tokens, {"text": id}, with the new ones.
    fn with_new_tokens(&self, name: &str) -> Result<Vec<u8>, DatasetError> {
        let mut list = read_json(&self.tokenizer_dir.join(name))?;
        if let Some(entries) = list.as_object_mut() {
            entries.extend(self.new_tokens().iter().map(|(text, id)| (text.clone(), json!(id))));
        }
        Ok(pretty(&list))
    }

    /// The bytes of generation_config.json. `None`: there is none, and no end token is known.
    fn generation_config(&self, ends: &[u32]) -> Result<Option<Vec<u8>>, DatasetError> {
        let mut config = Value::Null;
        for directory in self.adapter_dir.iter().chain([&self.model_dir]) {
            config = read_json(&directory.join(GENERATION_CONFIG))?;
            if config.is_object() {
                break;
            }
        }
        let mut ids = self.eos_ids().to_vec();
        ids.extend(ends.iter().copied().filter(|id| !self.eos_ids().contains(id)));
        if ids.is_empty() {
            return Ok(config.is_object().then(|| pretty(&config)));
        }
        if !config.is_object() {
            config = json!({});
        }
        config["eos_token_id"] = match ids[..] {
            [only] => json!(only),
            _ => json!(ids),
        };
        Ok(Some(pretty(&config)))
    }
}

/// Words of templates that are no names of variables.
const WORDS: [&str; 18] = [
    "and", "or", "not", "in", "is", "if", "elif", "else", "for", "true", "false", "none", "True", "False", "None",
    "loop", "self", "super",
];

/// A template with these variables as defaults, for programs that do not know the recipe. What they give themselves
/// comes first.
///
/// They are a line of tags: templates for chats write no line break behind a tag.
fn with_defaults(source: &str, variables: &[(String, Value)]) -> String {
    let is_name = |name: &str| {
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        !name.is_empty()
            && name.bytes().all(letter)
            && !name.starts_with(|first: char| first.is_ascii_digit())
            && !WORDS.contains(&name)
    };
    let mut defaults = String::new();
    for (name, value) in variables.iter().filter(|(name, _)| is_name(name) && source.contains(name.as_str())) {
        defaults += &format!("{{% if {name} is not defined %}}{{% set {name} = {value} %}}{{% endif %}}");
    }
    match defaults.is_empty() || source.starts_with(&defaults) {
        true => source.to_owned(),
        false => format!("{defaults}\n{source}"),
    }
}

fn pretty(value: &Value) -> Vec<u8> {
    // A JSON value always has a text.
    let mut text = serde_json::to_vec_pretty(value).unwrap_or_default();
    text.push(b'\n');
    text
}
