//! A model directory's tokenizer, its special tokens and its chat template.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::{PostProcessor, PostProcessorWrapper, Tokenizer};

use crate::chunks::Chunks;
use crate::error::DatasetError;
use crate::template::{self, ChatTemplate, LONGEST_SOURCE, Rendered};

/// Bytes of a tokenizer.json. The largest published ones have 35 million.
const LONGEST_TOKENIZER: u64 = 256 << 20;
const LONGEST_CONFIG: u64 = 16 << 20;

pub struct ChatTokenizer {
    /// Without its post-processor, see `encode_with_spans`.
    tokenizer: Tokenizer,
    post_processor: Option<PostProcessorWrapper>,
    template: Option<ChatTemplate>,
    model_dir: PathBuf,
    eos_ids: Vec<u32>,
    /// What is appended to a text that ends: the tokenizer's own end of sequence, else the model's first.
    end: Option<u32>,
    bos_id: Option<u32>,
    vocab_size: usize,
    chunks: Chunks,
}

/// Token ids with the byte range of the text that each stands for.
pub(crate) struct Encoded {
    pub(crate) ids: Vec<u32>,
    pub(crate) spans: Vec<Range<usize>>,
}

impl ChatTokenizer {
    /// [`Self::load`], or `None` where the directory has no tokenizer.json: rows of tokens can be trained on without.
    pub fn load_if_present(model_dir: &Path, chat_template: Option<&Path>) -> Result<Option<Self>, DatasetError> {
        if model_dir.join("tokenizer.json").is_file() {
            Self::load(model_dir, chat_template).map(Some)
        } else {
            Ok(None)
        }
    }

    /// Reads `tokenizer.json` of a model directory and, where there, `tokenizer_config.json`, `special_tokens_map.json`,
    /// `chat_template.jinja`, `generation_config.json` and `config.json`. `chat_template` names a template to use instead.
    pub fn load(model_dir: &Path, chat_template: Option<&Path>) -> Result<Self, DatasetError> {
        let path = model_dir.join("tokenizer.json");
        let bytes = read(&path, LONGEST_TOKENIZER)?;
        let mut tokenizer = Tokenizer::from_bytes(&bytes)
            .map_err(|error| DatasetError::BadModelFile { path: path.clone(), reason: error.to_string() })?;
        let refused =
            |error: tokenizers::Error| DatasetError::BadModelFile { path: path.clone(), reason: error.to_string() };
        // Rows are cut and padded by the trainer, which counts what it cuts.
        tokenizer.with_truncation(None).map_err(refused)?;
        tokenizer.with_padding(None);
        let post_processor = tokenizer.get_post_processor().cloned();
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);

        let config = read_json(&model_dir.join("tokenizer_config.json"))?;
        let special_tokens = special_tokens(&config, &read_json(&model_dir.join("special_tokens_map.json"))?);
        let id_of = |name: &str| {
            let (_, text) = special_tokens.iter().find(|(known, _)| known == name)?;
            tokenizer.token_to_id(text)
        };
        let (bos_id, tokenizer_eos) = (id_of("bos_token"), id_of("eos_token"));
        let mut eos_ids = model_eos_ids(model_dir)?;
        let end = tokenizer_eos.or(eos_ids.first().copied());
        eos_ids.extend(tokenizer_eos.filter(|id| !eos_ids.contains(id)));

        let vocab_size = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let template = match template_source(model_dir, &config, chat_template)? {
            Some((source, origin)) => Some(ChatTemplate::compile(&source, origin, special_tokens)?),
            None => None,
        };
        let model_dir = model_dir.to_owned();
        let chunks = Chunks::of(&tokenizer);
        Ok(Self { tokenizer, chunks, post_processor, template, model_dir, eos_ids, end, bos_id, vocab_size })
    }

    /// Token ids of a text. `add_special_tokens`: with what the tokenizer puts around it, a BOS for many models.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, DatasetError> {
        match &self.post_processor {
            Some(processor) if add_special_tokens => {
                let encoding = self.tokenizer.encode_fast(text, false).map_err(failed)?;
                Ok(processor.process(encoding, None, true).map_err(failed)?.get_ids().to_vec())
            }
            _ => Ok(self.encode_with_spans(text)?.ids),
        }
    }

    /// The ids of a rendered conversation. Nothing is added: a template writes its own BOS.
    pub fn encode_chat(&self, rendered: &str) -> Result<Vec<u32>, DatasetError> {
        self.encode(rendered, false)
    }

    /// As [`Self::encode_chat`], with the bytes that each token stands for. The post-processor must not have its say here:
    /// `ByteLevel { trim_offsets: true }`, which Llama 3 has, moves the start of a token behind its white space, and with it
    /// the line break before an answer into the answer.
    pub(crate) fn encode_with_spans(&self, rendered: &str) -> Result<Encoded, DatasetError> {
        let pieces = self.chunks.encode(&self.tokenizer, rendered).map_err(failed)?;
        let (ids, spans) = pieces.into_iter().unzip();
        Ok(Encoded { ids, spans })
    }

    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, DatasetError> {
        self.tokenizer.decode(ids, skip_special_tokens).map_err(failed)
    }

    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// The highest id + 1, added tokens included. The model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Every token that ends generation: the model's own, then the tokenizer's.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    pub(crate) fn end(&self) -> Option<u32> {
        self.end
    }

    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    pub(crate) fn template(&self) -> Result<&ChatTemplate, DatasetError> {
        self.template.as_ref().ok_or_else(|| DatasetError::NoTemplate { model_dir: self.model_dir.clone() })
    }

    /// Messages through the chat template, as `apply_chat_template(messages, tools, tokenize=False)`.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<Rendered, DatasetError> {
        let (messages, tools) = (template::to_values(messages)?, template::tools_value(tools)?);
        self.template()?.render(&messages, &tools, add_generation_prompt)
    }
}

fn failed(error: tokenizers::Error) -> DatasetError {
    DatasetError::Tokenizer { reason: error.to_string() }
}

fn read(path: &Path, limit: u64) -> Result<Vec<u8>, DatasetError> {
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

/// Null where there is no such file.
fn read_json(path: &Path) -> Result<Value, DatasetError> {
    match read(path, LONGEST_CONFIG) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| DatasetError::BadModelFile { path: path.to_owned(), reason: error.to_string() }),
        Err(DatasetError::Unreadable { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok(Value::Null)
        }
        Err(error) => Err(error),
    }
}

fn read_text(path: &Path) -> Result<String, DatasetError> {
    String::from_utf8(read(path, LONGEST_SOURCE)?)
        .map_err(|_| DatasetError::BadModelFile { path: path.to_owned(), reason: "not UTF-8 text".to_owned() })
}

/// The template's text and the file that it came from, in order of precedence.
fn template_source(
    model_dir: &Path,
    config: &Value,
    chosen: Option<&Path>,
) -> Result<Option<(String, String)>, DatasetError> {
    if let Some(path) = chosen {
        return Ok(Some((read_text(path)?, path.display().to_string())));
    }
    let path = model_dir.join("chat_template.jinja");
    match read_text(&path) {
        Ok(source) => return Ok(Some((source, path.display().to_string()))),
        Err(DatasetError::Unreadable { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let source = match config.get("chat_template") {
        Some(Value::String(source)) => Some(source.as_str()),
        Some(Value::Array(named)) => named
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|entry| entry.get("template"))
            .and_then(Value::as_str),
        _ => None,
    };
    let origin = || model_dir.join("tokenizer_config.json").display().to_string();
    Ok(source.map(|source| (source.to_owned(), origin())))
}

/// Names and texts of the special tokens, as a template sees them: those that are set.
fn special_tokens(config: &Value, map: &Value) -> Vec<(String, String)> {
    let text_of = |value: &Value| {
        // A plain string, or an added token written out: {"content": "<s>", "lstrip": false, ...}.
        value.as_str().or_else(|| value.get("content").and_then(Value::as_str)).map(str::to_owned)
    };
    let names = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
    let mut tokens: Vec<(String, String)> = names
        .iter()
        .filter_map(|name| {
            let value = config.get(name).or_else(|| map.get(name))?;
            Some(((*name).to_owned(), text_of(value)?))
        })
        .collect();
    // A model's own, {"image_token": "<image>"}.
    if let Some(extra) = config.get("extra_special_tokens").and_then(Value::as_object) {
        tokens.extend(extra.iter().filter_map(|(name, value)| Some((name.clone(), text_of(value)?))));
    }
    tokens
}

/// `eos_token_id` of generation_config.json, else of config.json: a number or a list.
fn model_eos_ids(model_dir: &Path) -> Result<Vec<u32>, DatasetError> {
    for name in ["generation_config.json", "config.json"] {
        let config = read_json(&model_dir.join(name))?;
        let nested = config.get("text_config").and_then(|text| text.get("eos_token_id"));
        let Some(value) = config.get("eos_token_id").or(nested) else { continue };
        let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let mut ids = Vec::new();
        for id in values.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()) {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        if !ids.is_empty() {
            return Ok(ids);
        }
    }
    Ok(Vec::new())
}
