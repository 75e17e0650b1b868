//! A model's tokenizer, its special tokens and its chat template.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use finetune_store::json_fault;
use serde_json::Value;
use tokenizers::models::ModelWrapper;
use tokenizers::{PostProcessor, PostProcessorWrapper, Tokenizer};

use crate::added_tokens::{TokenConfigs, add_new};
use crate::chunks::Chunks;
use crate::error::DatasetError;
use crate::gguf_texts;
use crate::guard::{self, Bounds, Foreign};
use crate::template::{self, ChatTemplate, Rendered};
use crate::text_source::{self, GENERATION_CONFIG, TOKENIZER, TextSource, read_json, read_tokenizer};

/// Bounds of loading a tokenizer.json. One of 35 MB takes 2 s. Both bounds grow with the file.
const LOADING: Bounds = Bounds { time: Duration::from_secs(20), bytes: 1 << 30 };
/// Bytes of memory that loading may take for each byte of the file.
const LOADING_BYTES: usize = 64;

/// Bounds of encoding a text. A megabyte takes a second, and 200 bytes of memory for each byte.
const ENCODING: Bounds = Bounds { time: Duration::from_secs(5), bytes: 512 << 20 };
/// Bytes of memory that encoding may take for each byte of the text.
const ENCODING_BYTES: usize = 512;

/// For so many bytes of text the bound of time grows by a second.
const PER_SECOND: usize = 128 << 10;

/// A model's tokenizer with its special tokens and chat template. A clone is another handle on the
/// same tokenizer.
#[derive(Clone)]
pub struct ChatTokenizer {
    loaded: Arc<Loaded>,
    template: Option<Arc<ChatTemplate>>,
    foreign: Foreign,
    /// The directories that its files were looked for in.
    pub(crate) model_dir: PathBuf,
    pub(crate) tokenizer_dir: PathBuf,
    pub(crate) adapter_dir: Option<PathBuf>,
    eos_ids: Vec<u32>,
    /// The token that is appended to a text that ends: the tokenizer's own end of sequence, or the
    /// model's first if the tokenizer has none.
    end: Option<u32>,
    bos_id: Option<u32>,
    notices: Vec<String>,
    fingerprint: [u8; 32],
}

/// What a tokenizer.json becomes.
struct Loaded {
    /// Without its post-processor (see `encode_with_spans`).
    tokenizer: Tokenizer,
    post_processor: Option<PostProcessorWrapper>,
    vocab_size: usize,
    /// How it encodes a text, in pieces or as a whole.
    chunks: Chunks,
    /// The file splits words at random, which was switched off.
    without_chance: bool,
    /// Tokens that a recipe adds and no file has, with their ids.
    new_tokens: Vec<(String, u32)>,
    notices: Vec<String>,
    /// A hash of the files that it was read from.
    files: [u8; 32],
}

/// Token ids with the byte range of the text that each stands for.
pub(crate) struct Encoded {
    pub(crate) ids: Vec<u32>,
    pub(crate) spans: Vec<Range<usize>>,
}

impl ChatTokenizer {
    /// As [`Self::load`]. `None`: the directory has no tokenizer.json, which rows of tokens do not
    /// need.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn load_if_present(model_dir: &Path, chat_template: Option<&Path>) -> Result<Option<Self>, DatasetError> {
        Self::open(&TextSource::of(model_dir, chat_template))
    }

    /// Reads `tokenizer.json` of a model directory. If they are there, it also reads
    /// `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`,
    /// `generation_config.json` and `config.json`. `chat_template` names a template to use instead.
    ///
    /// # Errors
    /// As [`Self::open`], and [`DatasetError::NoTokenizerFile`].
    pub fn load(model_dir: &Path, chat_template: Option<&Path>) -> Result<Self, DatasetError> {
        let opened = Self::load_if_present(model_dir, chat_template)?;
        opened.map_or_else(|| Err(Self::missing(model_dir)), Ok)
    }

    /// Reads the files that a source names. `None`: it has no tokenizer.json.
    ///
    /// # Errors
    /// A [`DatasetError`] that names the file. It cannot be read, is damaged, disagrees with
    /// another, or its reader fails on it.
    pub fn open(source: &TextSource<'_>) -> Result<Option<Self>, DatasetError> {
        Self::open_with(source, &[])
    }

    /// As [`Self::open`], with more special tokens. Those that the files have already stay as they
    /// are. The others get the next free ids, in order, as transformers' `add_tokens` gives them.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(source: &TextSource<'_>, new_tokens: &[String]) -> Result<Option<Self>, DatasetError> {
        Self::open_sharing(source, new_tokens, None)
    }

    /// As [`Self::open`]. If the tokenizer's files are those of `known`, both are handles on the same
    /// tokenizer, with templates and end tokens of their own.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_beside(source: &TextSource<'_>, known: &ChatTokenizer) -> Result<Option<Self>, DatasetError> {
        Self::open_sharing(source, &[], Some(known))
    }

    fn open_sharing(
        source: &TextSource<'_>,
        new_tokens: &[String],
        known: Option<&ChatTokenizer>,
    ) -> Result<Option<Self>, DatasetError> {
        let now = source.moment()?;
        let Some(directory) = source.tokenizer_dir() else { return Ok(None) };
        let path = directory.join(TOKENIZER);
        let foreign = Foreign::Tokenizer(path.display().to_string());
        let configs = TokenConfigs::read(directory, source.model_dir)?;
        let (special_tokens, settings) = (configs.special.clone(), configs.text);
        let special = special_tokens.clone();
        let bytes = read_tokenizer(&path)?;
        let mut fingerprint = blake3::Hasher::new();
        fingerprint.update(blake3::hash(&bytes).as_bytes());
        let bounds = grown(LOADING, bytes.len(), LOADING_BYTES);
        let new_tokens = new_tokens.to_vec();
        let files = configs.digest(&bytes, &new_tokens);
        let read = move || Loaded::read(&bytes, &path, &configs, &new_tokens, files);
        let loaded = match known.filter(|known| known.loaded.files == files) {
            Some(known) => Arc::clone(&known.loaded),
            None => Arc::new(guard::watched(&foreign, bounds, read)??),
        };
        gguf_texts::check(directory, |id| loaded.tokenizer.id_to_token(id))?;
        let id_of = |name: &str| {
            let (_, text) = special_tokens.iter().find(|(known, _)| known == name)?;
            loaded.tokenizer.token_to_id(text)
        };
        let (bos_id, tokenizer_eos) = (id_of("bos_token"), id_of("eos_token"));
        let mut notices = loaded.notices.clone();
        let mut eos_ids = model_eos_ids(source, loaded.vocab_size, &mut notices)?;
        let end = tokenizer_eos.or(eos_ids.first().copied());
        eos_ids.extend(tokenizer_eos.filter(|id| !eos_ids.contains(id)));

        let templates = text_source::templates(source)?;
        let template = match templates.is_empty() {
            true => None,
            false => Some(Arc::new(ChatTemplate::compile(templates, special_tokens, source.variables, now)?)),
        };
        let added: BTreeMap<_, _> = loaded.tokenizer.get_added_tokens_decoder().into_iter().collect();
        let templates = template.iter().flat_map(|template| template.sources());
        let texts: Vec<_> = templates.map(|source| (&source.name, &source.source)).collect();
        let day = template.as_ref().filter(|template| template.uses_date()).map(|_| now);
        let given = source.variables;
        let ends = (bos_id, &eos_ids, end);
        let rest = format!("{added:?} {special:?} {settings:?} {texts:?} {given:?} {day:?} {ends:?}");
        fingerprint.update(rest.as_bytes());
        Ok(Some(Self {
            loaded,
            template,
            fingerprint: *fingerprint.finalize().as_bytes(),
            foreign,
            model_dir: source.model_dir.to_owned(),
            tokenizer_dir: directory.to_owned(),
            adapter_dir: source.adapter.map(Path::to_owned),
            eos_ids,
            end,
            bos_id,
            notices,
        }))
    }

    /// The error for a directory without tokenizer.json, which names what the directory has
    /// instead.
    pub fn missing(model_dir: &Path) -> DatasetError {
        if model_dir.exists() {
            let found = text_source::other_tokenizers(model_dir);
            return DatasetError::NoTokenizerFile { model_dir: model_dir.to_owned(), found };
        }
        let source = std::io::Error::from(std::io::ErrorKind::NotFound);
        DatasetError::Unreadable { path: model_dir.join(TOKENIZER), source }
    }

    /// What a person should know about these files, although they can be used.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Whether the template asks for the time (`strftime_now`), so that its text depends on
    /// [`TextSource::date`].
    pub fn uses_date(&self) -> bool {
        self.template.as_ref().is_some_and(|template| template.uses_date())
    }

    /// Token ids of a text. `add_special_tokens`: with what the tokenizer puts before and behind
    /// it, for many models a BOS.
    ///
    /// # Errors
    /// [`DatasetError::Tokenizer`]. [`DatasetError::TokenizerBounds`] if the tokenizer panics or
    /// does not come to an end.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, DatasetError> {
        self.watched(text, move |loaded, text| match &loaded.post_processor {
            Some(processor) if add_special_tokens => {
                let encoding = loaded.tokenizer.encode_fast(text, false).map_err(failed)?;
                Ok(processor.process(encoding, None, true).map_err(failed)?.get_ids().to_vec())
            }
            _ => {
                let pieces = loaded.chunks.encode(&loaded.tokenizer, text).map_err(failed)?;
                Ok(pieces.into_iter().map(|(id, _)| id).collect())
            }
        })
    }

    /// The ids of a rendered conversation. Nothing is added: a template writes its own BOS.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_chat(&self, rendered: &str) -> Result<Vec<u32>, DatasetError> {
        self.encode(rendered, false)
    }

    /// As [`Self::encode_chat`], with the byte range that each token stands for.
    ///
    /// The post-processor is left out. Llama 3's (`ByteLevel { trim_offsets: true }`) moves the
    /// start of a token behind its white space. The line break before an answer would become part
    /// of the answer.
    pub(crate) fn encode_with_spans(&self, rendered: &str) -> Result<Encoded, DatasetError> {
        self.watched(rendered, |loaded, text| {
            let (ids, spans) = loaded.chunks.encode(&loaded.tokenizer, text).map_err(failed)?.into_iter().unzip();
            Ok(Encoded { ids, spans })
        })
    }

    /// The text of ids. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, DatasetError> {
        let (loaded, ids) = (self.loaded.clone(), ids.to_vec());
        let bounds = grown(ENCODING, ids.len(), 16 * ENCODING_BYTES);
        guard::watched(&self.foreign, bounds, move || {
            loaded.tokenizer.decode(&ids, skip_special_tokens).map_err(failed)
        })?
    }

    /// Does work of the tokenizer on a text, within bounds.
    fn watched<R: Send + 'static>(
        &self,
        text: &str,
        work: impl FnOnce(&Loaded, &str) -> Result<R, DatasetError> + Send + 'static,
    ) -> Result<R, DatasetError> {
        let (loaded, text) = (self.loaded.clone(), text.to_owned());
        guard::watched(&self.foreign, grown(ENCODING, text.len(), ENCODING_BYTES), move || work(&loaded, &text))?
    }

    /// A token's text in the vocabulary, in the tokenizer's own spelling.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.loaded.tokenizer.id_to_token(id)
    }

    /// The id of a token, by its text in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.loaded.tokenizer.token_to_id(token)
    }

    /// Whether a token is special: it stands for no text.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.loaded.tokenizer.get_added_vocabulary();
        added.get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
    }

    /// The highest id plus one, added tokens included. The model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.loaded.vocab_size
    }

    /// Tokens that were added and no file has, with their ids.
    pub fn new_tokens(&self) -> &[(String, u32)] {
        &self.loaded.new_tokens
    }

    /// Every token that ends generation: the model's own, then the tokenizer's.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// A hash of everything that tokens and rendered conversations depend on. If it is the same, so
    /// are they.
    pub(crate) fn fingerprint(&self) -> &[u8; 32] {
        &self.fingerprint
    }

    /// The tokenizer itself, without its post-processor.
    pub(crate) fn backend(&self) -> &Tokenizer {
        &self.loaded.tokenizer
    }

    pub(crate) fn end(&self) -> Option<u32> {
        self.end
    }

    /// The token that begins a sequence, if the tokenizer has one.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// Whether there is a chat template.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Whether the source of a chat template has a text in it.
    pub fn template_has(&self, text: &str) -> bool {
        self.template.as_ref().is_some_and(|template| template.mentions(text))
    }

    /// The file of the chat template that conversations without tools go through.
    pub fn template_file(&self) -> Option<&Path> {
        let sources = self.template.as_ref()?.sources();
        sources.iter().find(|source| source.name == "default").map(|source| source.origin.as_path())
    }

    /// Whether the file tokenizer.json splits words at random, which was switched off here.
    pub(crate) fn without_chance(&self) -> bool {
        self.loaded.without_chance
    }

    pub(crate) fn template(&self) -> Result<&ChatTemplate, DatasetError> {
        self.template.as_deref().ok_or_else(|| DatasetError::NoTemplate { model_dir: self.model_dir.clone() })
    }

    /// Renders messages with the chat template, as transformers'
    /// `apply_chat_template(messages, tools, tokenize=False)`.
    ///
    /// # Errors
    /// [`DatasetError::NoTemplate`], [`DatasetError::Template`], [`DatasetError::TemplateBounds`].
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<Rendered, DatasetError> {
        self.render_with(messages, tools, &[], add_generation_prompt)
    }

    /// As [`Self::render`], with further variables of the template, as `apply_chat_template` takes
    /// them by name (`enable_thinking`, `reasoning_effort`).
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn render_with(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        variables: &[(String, Value)],
        add_generation_prompt: bool,
    ) -> Result<Rendered, DatasetError> {
        let (messages, tools) = (template::to_values(messages)?, template::tools_value(tools)?);
        let variables = variables.iter().map(|(name, value)| Ok((name.clone(), template::to_value(value)?)));
        let variables = variables.collect::<Result<Vec<_>, DatasetError>>()?;
        self.template()?.render(&messages, &tools, &variables, add_generation_prompt)
    }
}

impl DatasetError {
    /// Turns [`DatasetError::NoTokenizer`] into an error that names the model's directory and what
    /// it has instead of a tokenizer.json. Any other error stays as it is.
    pub fn in_model(self, model_dir: &Path) -> DatasetError {
        match self {
            Self::NoTokenizer => ChatTokenizer::missing(model_dir),
            other => other,
        }
    }
}

impl Loaded {
    fn read(
        bytes: &[u8],
        path: &Path,
        configs: &TokenConfigs,
        new_tokens: &[String],
        files: [u8; 32],
    ) -> Result<Self, DatasetError> {
        let refused = |error: tokenizers::Error| DatasetError::BadModelFile {
            path: path.to_owned(),
            reason: json_fault(bytes, &error),
        };
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(refused)?;
        let mut notices = Vec::new();
        // Rows are cut in `reading.rs`, which counts what it cuts, and are never padded.
        tokenizer.with_truncation(None).map_err(refused)?;
        tokenizer.with_padding(None);
        let without_chance = take_chance(&mut tokenizer);
        if without_chance {
            notices.push(format!(
                "{} splits words at random (dropout, or sampling), which is switched off: the same text gives the same tokens",
                path.display()
            ));
        }
        let directory = path.parent().unwrap_or(Path::new("."));
        configs.text.apply(&mut tokenizer, &mut notices).map_err(refused)?;
        configs.add_to(&mut tokenizer, directory, &mut notices)?;
        let new_tokens = add_new(&mut tokenizer, new_tokens, &mut notices).map_err(refused)?;
        let post_processor = tokenizer.get_post_processor().cloned();
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        let vocab_size = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let chunks = Chunks::of(&tokenizer);
        let loaded = Self { tokenizer, post_processor, vocab_size, chunks, without_chance, new_tokens, notices, files };
        loaded.try_out();
        Ok(loaded)
    }

    /// Encodes a text. Some files load and panic at the first text, and should do so before any row
    /// is blamed. An error is ignored, since it may be due to this text.
    fn try_out(&self) {
        if let (Ok(encoding), Some(processor)) = (self.tokenizer.encode("Hello, 1 é\n", false), &self.post_processor) {
            let _ = processor.process(encoding, None, true);
        }
    }
}

/// Switches off what would give a text other tokens each time. Returns whether there was any.
fn take_chance(tokenizer: &mut Tokenizer) -> bool {
    let model = match tokenizer.get_model() {
        ModelWrapper::BPE(model) if model.dropout.is_some_and(|dropout| dropout != 0.0) => {
            let mut model = model.clone();
            model.dropout = None;
            ModelWrapper::BPE(model)
        }
        ModelWrapper::Unigram(model) if model.alpha.is_some() && model.nbest_size.is_some() => {
            let mut model = model.clone();
            (model.alpha, model.nbest_size) = (None, None);
            ModelWrapper::Unigram(model)
        }
        _ => return false,
    };
    tokenizer.with_model(model);
    true
}

/// Bounds for work on this many bytes.
fn grown(bounds: Bounds, length: usize, bytes: usize) -> Bounds {
    Bounds {
        time: bounds.time + Duration::from_secs((length / PER_SECOND) as u64),
        bytes: bounds.bytes.saturating_add(length.saturating_mul(bytes)),
    }
}

fn failed(error: tokenizers::Error) -> DatasetError {
    DatasetError::Tokenizer { reason: error.to_string() }
}

/// `eos_token_id` of the first file that has one: generation_config.json of the adapter, that of
/// the model, config.json. It is a number or a list.
fn model_eos_ids(
    source: &TextSource<'_>,
    vocab_size: usize,
    notices: &mut Vec<String>,
) -> Result<Vec<u32>, DatasetError> {
    let generation = source.directories().map(|directory| directory.join(GENERATION_CONFIG));
    for path in generation.chain([source.model_dir.join("config.json")]) {
        let config = read_json(&path)?;
        let nested = config.get("text_config").and_then(|text| text.get("eos_token_id"));
        let Some(value) = config.get("eos_token_id").or(nested) else { continue };
        let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let mut ids = Vec::new();
        for value in values.iter().filter(|value| !value.is_null()) {
            match value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|id| (*id as usize) < vocab_size) {
                Some(id) if ids.contains(&id) => {}
                Some(id) => ids.push(id),
                None => notices.push(format!(
                    "{}: eos_token_id {value} is no token of this tokenizer (it has {vocab_size}) and is passed over",
                    path.display()
                )),
            }
        }
        if !ids.is_empty() {
            return Ok(ids);
        }
    }
    Ok(Vec::new())
}
