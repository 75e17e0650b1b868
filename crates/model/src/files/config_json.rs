//! `config.json` of a Hugging Face model directory, in both spellings in use: the hub's
//! (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of transformers 5 (`rope_parameters`,
//! `dtype`).

use std::path::Path;

use finetune_kernels::{ExpertWeights, Scores};
use finetune_packed::files::PackedConfig;
use serde_json::{Map, Value};

use crate::config::family::{Bias, FAMILIES, Family, Windows};
use crate::config::{ExpertsConfig, LayerConfig, ModelConfig, Rope, RopeScaling};
use crate::error::ModelError;
use crate::files::base_files::BaseFiles;
use crate::files::floats::have_same_values;
use crate::files::packing::have_same_elements;
use crate::files::text::read_text;
use crate::files::wrapper::text_config;
use crate::gguf::read::GgufBase;
use crate::tree::Decoder;

/// Largest config.json that is read, in bytes.
pub(crate) const LIMIT: u64 = 4 << 20;

/// Elements of all weights together, far above any model. Within this limit no number of bytes
/// overflows 64 bits.
const MOST_ELEMENTS: u128 = 1 << 44;
/// More experts than any layer has.
const MOST_EXPERTS: usize = 4096;

impl ModelConfig {
    /// Reads `config.json` in this directory, and whether its weights have an output layer of their
    /// own; or the keys of a GGUF file.
    ///
    /// # Errors
    /// If config.json is missing or malformed, or describes a model that is not supported, or if
    /// the weights cannot be compared.
    pub fn load(directory: &Path) -> Result<ModelConfig, ModelError> {
        if let Some(base) = GgufBase::open(directory)? {
            return Ok(base.config().clone());
        }
        let path = directory.join("config.json");
        let mut config = ModelConfig::parse(&read_text(&path, LIMIT)?, &path)?;
        if config.tied_embeddings && has_other_head(directory, &config)? {
            config.tied_embeddings = false;
            config.notices.push(format!(
                "{}: tie_word_embeddings is true, but the weights hold an lm_head.weight with other values: that one is the output layer",
                path.display()
            ));
        }
        Ok(config)
    }

    /// Reads the text of a config.json. `path` is for messages.
    ///
    /// # Errors
    /// If the text is malformed, or describes a model that is not supported.
    pub fn parse(text: &str, path: &Path) -> Result<ModelConfig, ModelError> {
        let malformed = |what: String| ModelError::Malformed { path: path.to_owned(), what };
        let object: Map<String, Value> = serde_json::from_str(text).map_err(|error| malformed(error.to_string()))?;
        let Some((class, text)) = text_config(&object) else { return Reader { object: &object, path }.config() };
        Ok(ModelConfig { wrapper: Some(class), ..Reader { object: &text, path }.config()? })
    }
}

/// Whether the files have an output layer of their own whose values differ from the embedding's. If
/// so, transformers does not tie the two, whatever config.json says (since 5.8).
fn has_other_head(directory: &Path, config: &ModelConfig) -> Result<bool, ModelError> {
    // What is wrong with the files is said when they are loaded. There may be none yet.
    let Ok(files) = BaseFiles::read(directory) else { return Ok(false) };
    let shape = [config.vocabulary, config.hidden_size];
    let (head, embedding) = (files.get("lm_head.weight", &shape), files.get("model.embed_tokens.weight", &shape));
    let (Some(head), Some(embedding)) = (head.transpose(), embedding.ok().flatten()) else { return Ok(false) };
    // One that cannot be used is no copy of the embedding.
    let Ok(head) = head else { return Ok(true) };
    Ok(match (head.view(), embedding.view()) {
        (Some(head), Some(embedding)) => !have_same_values(head, embedding)?,
        // If only one of them is packed, the other has what was lost by that.
        _ => match (head.packed()?, embedding.packed()?) {
            (Some(head), Some(embedding)) => !have_same_elements(&head, &embedding),
            _ => true,
        },
    })
}

/// Numbers of query heads and key/value heads, and elements of a head.
struct Heads {
    heads: usize,
    key_value_heads: usize,
    head_dim: usize,
}

/// Reads the keys of a config.json.
struct Reader<'a> {
    object: &'a Map<String, Value>,
    path: &'a Path,
}

impl Reader<'_> {
    fn config(&self) -> Result<ModelConfig, ModelError> {
        let mut notices = Vec::new();
        let family = self.family(&mut notices)?;
        self.check_supported(family)?;
        let hidden_size = self.size("hidden_size")?;
        let Heads { heads, key_value_heads, head_dim } = self.heads(family, hidden_size)?;
        let layers = self.size("num_hidden_layers")?;
        // Within these and the limit of every size, no product or sum of sizes overflows 64 bits.
        for (key, size, limit) in
            [("num_hidden_layers", layers, 4096), ("num_attention_heads", heads, 4096), ("head_dim", head_dim, 4096)]
        {
            if size > limit {
                return Err(self.malformed(&format!("`{key}` = {size} is beyond {limit}")));
            }
        }
        if let Some(dropout) = self.number_within("attention_dropout", 0.0, 1.0)?.filter(|&dropout| dropout != 0.0) {
            notices.push(format!(
                "{}: attention_dropout = {dropout} is left out in training; it is nothing at other times",
                self.path.display()
            ));
        }
        if family.has_experts && self.flag("output_router_logits")?.unwrap_or(false) {
            notices.push(format!(
                "{}: output_router_logits asks for the router's auxiliary loss in training, which is left out: routers are frozen",
                self.path.display()
            ));
        }
        let ropes = self.ropes(family, head_dim)?;
        let query_scalar = match family.query_scalar {
            Some(default) => self.number_within("query_pre_attn_scalar", 1e-3, 1e9)?.unwrap_or(default),
            None => head_dim as f64,
        };
        let attention_bias = self.flag("attention_bias")?.unwrap_or(false);
        let has_bias = |bias: Bias| bias == Bias::Always || (bias == Bias::Asked && attention_bias);
        let config = ModelConfig {
            family,
            wrapper: None,
            hidden_size,
            intermediate_size: self.size("intermediate_size")?,
            experts: self.experts(family)?,
            layers: self.layers(family, layers)?,
            heads,
            key_value_heads,
            head_dim,
            vocabulary: match (self.optional_size("vocab_size")?, family.vocabulary) {
                (Some(size), _) | (None, Some(size)) => size,
                (None, None) => self.size("vocab_size")?,
            },
            rms_norm_eps: self.number_within("rms_norm_eps", 1e-30, 1.0)?.unwrap_or(1e-6),
            ropes,
            tied_embeddings: self.flag("tie_word_embeddings")?.unwrap_or(family.tied_embeddings),
            qkv_bias: has_bias(family.qkv_bias),
            output_bias: has_bias(family.output_bias),
            query_key_norm: family.query_key_norm,
            score_scale: 1.0 / (query_scalar as f32).sqrt(),
            activation: family.activation.2,
            max_position_embeddings: self
                .optional_size("max_position_embeddings")?
                .unwrap_or(family.max_position_embeddings),
            initializer_range: self.number_within("initializer_range", 0.0, 100.0)?.unwrap_or(0.02),
            notices,
        };
        self.check_whole(&config)?;
        Ok(config)
    }

    /// Refuses settings that no family computes.
    fn check_supported(&self, family: &Family) -> Result<(), ModelError> {
        // What it says is held against the tensors when they are looked up.
        PackedConfig::parse(self.object, self.path)?;
        let (key, names, _) = family.activation;
        if let Some(activation) = self.text(key)?
            && !names.contains(&activation)
        {
            return Err(self.unsupported(key, activation));
        }
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if let Some(cap) = self.number(key)? {
                return Err(self.unsupported(key, &cap.to_string()));
            }
        }
        if self.flag("use_bidirectional_attention")?.unwrap_or(false) {
            return Err(self.unsupported("use_bidirectional_attention", "true"));
        }
        if self.flag("mlp_bias")?.unwrap_or(false) {
            return Err(self.unsupported("mlp_bias", "true"));
        }
        Ok(())
    }

    /// Numbers and size of the heads, which have to fit each other.
    fn heads(&self, family: &Family, hidden_size: usize) -> Result<Heads, ModelError> {
        let heads = self.size("num_attention_heads")?;
        let key_value_heads = match self.optional_size("num_key_value_heads")? {
            Some(count) => count,
            None if self.object.contains_key("num_key_value_heads") => heads,
            None => family.key_value_heads.unwrap_or(heads),
        };
        let head_dim = match self.optional_size("head_dim")?.or(family.head_dim) {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => return Err(self.malformed("hidden_size is no multiple of num_attention_heads")),
        };
        if !heads.is_multiple_of(key_value_heads) {
            return Err(self.malformed("num_attention_heads is no multiple of num_key_value_heads"));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(self.malformed("head_dim is odd"));
        }
        Ok(Heads { heads, key_value_heads, head_dim })
    }

    /// Checks what only the keys together tell.
    fn check_whole(&self, config: &ModelConfig) -> Result<(), ModelError> {
        let elements = |shape: Vec<usize>| shape.iter().map(|&length| length as u128).product::<u128>();
        let all: u128 = Decoder::new(config).slots().iter().map(|slot| elements(slot.shape())).sum();
        if all > MOST_ELEMENTS {
            return Err(self.malformed(&format!("its sizes make {all} weights, more than any model has")));
        }
        if config.ropes.iter().flat_map(Rope::frequencies).any(|frequency| !frequency.is_finite()) {
            return Err(self.malformed("`rope_theta` and the rope scaling make frequencies that are not finite"));
        }
        self.check_end(config.vocabulary)
    }

    /// Checks `eos_token_id`: a token of the vocabulary, or a list of them.
    fn check_end(&self, vocabulary: usize) -> Result<(), ModelError> {
        let Some(value) = self.get("eos_token_id") else { return Ok(()) };
        let list = std::slice::from_ref(value);
        let ids = value.as_array().map_or(list, Vec::as_slice);
        match ids.iter().find(|id| id.as_u64().is_none_or(|id| id >= vocabulary as u64)) {
            None => Ok(()),
            Some(id) => {
                let what = format!("`eos_token_id` = {id} is no token of the vocabulary of {vocabulary}");
                Err(self.malformed(&what))
            }
        }
    }

    /// transformers goes by `model_type`. It goes by `architectures` only if there is no
    /// `model_type`.
    fn family(&self, notices: &mut Vec<String>) -> Result<&'static Family, ModelError> {
        let architecture = self.object.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        let model_type = self.text("model_type")?;
        let unknown = |name: &str| ModelError::Architecture { path: self.path.to_owned(), name: name.to_owned() };
        let known = FAMILIES.iter().find(|family| match model_type {
            Some(model_type) => model_type == family.model_type,
            None => architecture == Some(family.architecture),
        });
        let Some(family) = known else {
            // The class says more than the type, unless the class is a known one and the type is
            // not.
            let ours = |name: &&str| FAMILIES.iter().any(|family| family.architecture == *name);
            let name = architecture.filter(|name| !ours(name)).or(model_type).unwrap_or("(none given)");
            return Err(unknown(name));
        };
        let Family { architecture: class, model_type: kind, .. } = family;
        if let Some(architecture) = architecture.filter(|architecture| architecture != class) {
            // Such a class predicts something else than the next token, or nothing.
            if !architecture.ends_with("ForCausalLM") {
                return Err(unknown(architecture));
            }
            notices.push(format!(
                "{}: model_type says {kind}, architectures {architecture}: it is read as {class}, as transformers does",
                self.path.display()
            ));
        }
        Ok(family)
    }

    /// The rotary embedding of layers that see all keys, then that of layers with a window where they
    /// have their own: from `rope_parameters` (transformers 5), or from `rope_theta`, `rope_scaling` and
    /// `rope_local_base_freq` (hub).
    fn ropes(&self, family: &Family, width: usize) -> Result<Vec<Rope>, ModelError> {
        let empty = Map::new();
        // If a file has both, transformers takes the older one.
        let parameters = self.nested("rope_scaling")?.or(self.nested("rope_parameters")?).unwrap_or(&empty);
        let parameters = Reader { object: parameters, path: self.path };
        let Some(window_theta) = family.window_rope_theta else {
            return Ok(vec![self.rope(parameters.object, family.rope_theta, width)?]);
        };
        // With two of them, each kind of layer has its own parameters.
        let of_all = parameters.nested("full_attention")?.unwrap_or(parameters.object);
        let window = parameters.nested("sliding_attention")?;
        let window_theta = self.number_within("rope_local_base_freq", 1.0, 1e15)?.unwrap_or(window_theta);
        let of_window = match window {
            Some(window) => Reader { object: &empty, path: self.path }.rope(window, window_theta, width)?,
            None => Rope { theta: window_theta, scaling: RopeScaling::None, width },
        };
        Ok(vec![self.rope(of_all, family.rope_theta, width)?, of_window])
    }

    /// Theta and scaling, from an object with the scaling.
    fn rope(&self, scaling: &Map<String, Value>, default_theta: f64, width: usize) -> Result<Rope, ModelError> {
        let inner = Reader { object: scaling, path: self.path };
        let theta = |reader: &Reader<'_>| reader.number_within("rope_theta", 1.0, 1e15);
        let theta = theta(&inner)?.or(theta(self)?).unwrap_or(default_theta);
        let partial = inner.number("partial_rotary_factor")?.or(self.number("partial_rotary_factor")?);
        if let Some(partial) = partial.filter(|&factor| factor != 1.0) {
            return Err(self.unsupported("partial_rotary_factor", &partial.to_string()));
        }
        let kind = inner.text("rope_type")?.or(inner.text("type")?).unwrap_or("default");
        let needed = |key: &'static str| -> Result<f64, ModelError> {
            let value = inner.number_within(key, 1e-3, 1e9)?;
            value.ok_or_else(|| self.malformed(&format!("rope scaling of type `{kind}` needs `{key}`")))
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: needed("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor: needed("low_freq_factor")?,
                high_freq_factor: {
                    let (low, high) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
                    if high <= low {
                        return Err(self.malformed("`high_freq_factor` has to be larger than `low_freq_factor`"));
                    }
                    high
                },
                original_max_position_embeddings: {
                    let key = "original_max_position_embeddings";
                    let stated = |reader: &Reader<'_>, key| reader.number_within(key, 1.0, 1e9);
                    let found = stated(self, key)?.or(stated(&inner, key)?);
                    found.or(stated(self, "max_position_embeddings")?).map_or_else(|| needed(key), Ok)?
                },
            },
            other => return Err(self.unsupported("rope_type", other)),
        };
        Ok(Rope { theta, scaling, width })
    }

    /// Which layers have a window, and which a rotary embedding.
    fn layers(&self, family: &Family, count: usize) -> Result<Vec<LayerConfig>, ModelError> {
        let ropes = self.ropes_of_layers(family, count)?;
        // null means none.
        let window = match self.object.contains_key("sliding_window") {
            true => self.optional_size("sliding_window")?,
            false => family.sliding_window,
        };
        let is_used = self.object.get("use_sliding_window").and_then(Value::as_bool) == Some(true);
        let types = self.object.get("layer_types").and_then(Value::as_array);
        let first = self.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28) as usize;
        let pattern = self.optional_size("sliding_window_pattern")?.unwrap_or(6);
        let is_named = |types: &Vec<Value>, n: usize| types.get(n).and_then(Value::as_str) == Some("sliding_attention");
        let has_window = |n: usize, rope: Option<usize>| match (family.windows, types) {
            (Windows::Never, _) => false,
            (Windows::EveryLayer, _) => true,
            (Windows::Asked, _) => is_used,
            (Windows::Later | Windows::WithoutRope, Some(types)) => is_used && is_named(types, n),
            (Windows::Later, None) => is_used && n >= first,
            (Windows::WithoutRope, None) => is_used && rope.is_none(),
            (Windows::AllButEvery, Some(types)) => is_named(types, n),
            (Windows::AllButEvery, None) => !(n + 1).is_multiple_of(pattern),
        };
        let has_experts = self.layers_with_experts(family)?;
        let layer = |(n, rope): (usize, Option<usize>)| {
            let has_window = has_window(n, rope);
            let rope = if has_window && family.window_rope_theta.is_some() { Some(1) } else { rope };
            LayerConfig { window: window.filter(|_| has_window), rope, has_experts: has_experts(n) }
        };
        Ok(ropes.into_iter().enumerate().map(layer).collect())
    }

    /// The experts of layers with such: Qwen3-MoE's keys.
    fn experts(&self, family: &Family) -> Result<Option<ExpertsConfig>, ModelError> {
        if !family.has_experts {
            return Ok(None);
        }
        // transformers 5 writes the second name.
        let count = match self.optional_size("num_experts")? {
            Some(count) => count,
            None => self.optional_size("num_local_experts")?.unwrap_or(128),
        };
        let choices = self.optional_size("num_experts_per_tok")?.unwrap_or(8);
        if count > MOST_EXPERTS || choices > count {
            return Err(
                self.malformed(&format!("{choices} of {count} experts for each token (at most {MOST_EXPERTS})"))
            );
        }
        let is_normalized = self.flag("norm_topk_prob")?.unwrap_or(false);
        Ok(Some(ExpertsConfig {
            count,
            choices,
            intermediate_size: self.optional_size("moe_intermediate_size")?.unwrap_or(768),
            weights: ExpertWeights { scores: Scores::Softmax, normalized: is_normalized.then_some(0.0), scale: 1.0 },
        }))
    }

    /// Whether the layer of a number has experts: every `decoder_sparse_step`th, but those of
    /// `mlp_only_layers`.
    fn layers_with_experts(&self, family: &Family) -> Result<impl Fn(usize) -> bool, ModelError> {
        let step = self.optional_size("decoder_sparse_step")?.unwrap_or(1);
        let dense: Vec<u64> = match self.get("mlp_only_layers") {
            None => Vec::new(),
            Some(list) => {
                let numbers = list.as_array().and_then(|list| list.iter().map(Value::as_u64).collect::<Option<_>>());
                numbers.ok_or_else(|| self.malformed("`mlp_only_layers` should be a list of layer numbers"))?
            }
        };
        let has_experts = family.has_experts;
        Ok(move |n: usize| has_experts && !dense.contains(&(n as u64)) && (n + 1).is_multiple_of(step))
    }

    /// For each layer the number of its rotary embedding. `no_rope_layers` has 0 for a layer
    /// without one. If it is left out, every fourth layer has none (`no_rope_layer_interval`).
    fn ropes_of_layers(&self, family: &Family, count: usize) -> Result<Vec<Option<usize>>, ModelError> {
        if !family.has_layers_without_rope {
            return Ok(vec![Some(0); count]);
        }
        let Some(list) = self.get("no_rope_layers") else {
            let interval = self.optional_size("no_rope_layer_interval")?.unwrap_or(4);
            return Ok((1..=count).map(|number| (!number.is_multiple_of(interval)).then_some(0)).collect());
        };
        let wrong = || self.malformed(&format!("`no_rope_layers` should be a list of 0 and 1 for {count} layers"));
        let list = list.as_array().filter(|list| list.len() >= count).ok_or_else(wrong)?;
        let rope = |value: &Value| match value.as_u64() {
            Some(0) => Ok(None),
            Some(1) => Ok(Some(0)),
            _ => Err(wrong()),
        };
        list[..count].iter().map(rope).collect()
    }

    fn malformed(&self, what: &str) -> ModelError {
        ModelError::Malformed { path: self.path.to_owned(), what: what.to_owned() }
    }

    fn unsupported(&self, key: &'static str, value: &str) -> ModelError {
        ModelError::Setting { path: self.path.to_owned(), key, value: value.to_owned() }
    }

    /// The value of a key; `None` if it is left out or null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn wrong_type(&self, key: &str, expected: &str) -> ModelError {
        self.malformed(&format!("`{key}` should be {expected}"))
    }

    fn text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong_type(key, "a string"))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong_type(key, "true or false"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().filter(|number| number.is_finite()).map(Some).ok_or_else(|| self.wrong_type(key, "a number"))
    }

    /// A number from `least` to `most`.
    fn number_within(&self, key: &str, least: f64, most: f64) -> Result<Option<f64>, ModelError> {
        match self.number(key)? {
            Some(number) if !(least..=most).contains(&number) => {
                Err(self.malformed(&format!("`{key}` = {number:?} is not between {least:?} and {most:?}")))
            }
            number => Ok(number),
        }
    }

    fn nested(&self, key: &str) -> Result<Option<&Map<String, Value>>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_object().map(Some).ok_or_else(|| self.wrong_type(key, "an object"))
    }

    /// A size between 1 and 2^24, far above those of real models.
    fn optional_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().filter(|&size| (1..=1 << 24).contains(&size));
        size.map(|size| Some(size as usize)).ok_or_else(|| self.wrong_type(key, "a whole number from 1 to 2^24"))
    }

    fn size(&self, key: &str) -> Result<usize, ModelError> {
        self.optional_size(key)?.ok_or_else(|| self.malformed(&format!("`{key}` is missing")))
    }
}
