//! `config.json` of a Hugging Face model directory, in both spellings in use: the hub's (`rope_theta`,
//! `rope_scaling`, `torch_dtype`) and that of transformers 5 (`rope_parameters`, `dtype`).

use std::path::Path;

use serde_json::{Map, Value};

use crate::ModelError;
use crate::load::{has_other_head, read_text};
use crate::weights::expected_tensors;

/// Largest config.json that is read, in bytes.
pub(crate) const LIMIT: u64 = 4 << 20;

/// The families are one decoder with these differences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

impl Family {
    const ALL: [(Family, &'static str, &'static str); 4] = [
        (Family::Llama, "LlamaForCausalLM", "llama"),
        (Family::Mistral, "MistralForCausalLM", "mistral"),
        (Family::Qwen2, "Qwen2ForCausalLM", "qwen2"),
        (Family::Qwen3, "Qwen3ForCausalLM", "qwen3"),
    ];

    /// The name of the model class in transformers.
    pub fn architecture(self) -> &'static str {
        Family::ALL[self as usize].1
    }
}

/// How rotary frequencies are stretched for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    /// Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: f64,
    },
}

/// The architecture, as far as the forward pass depends on it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub key_value_heads: usize,
    pub head_dim: usize,
    pub vocabulary: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub tied_embeddings: bool,
    /// Biases of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub output_bias: bool,
    /// RMS norm of each head's queries and keys (Qwen3).
    pub query_key_norm: bool,
    /// For each layer: how many keys a query sees, all where `None`.
    pub windows: Vec<Option<usize>>,
    pub max_position_embeddings: usize,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// What a user should know about how config.json and the weights were read.
    pub notices: Vec<String>,
}

/// Elements of all weights together, far above any model: with it, no number of bytes overflows 64 bits.
const MOST_ELEMENTS: u128 = 1 << 44;

impl ModelConfig {
    /// Reads `config.json` in this directory, and whether its weights have an output layer of their own.
    pub fn load(directory: &Path) -> Result<ModelConfig, ModelError> {
        let path = directory.join("config.json");
        let mut config = ModelConfig::parse(&read_text(&path, LIMIT)?, &path)?;
        if config.tied_embeddings && has_other_head(directory)? {
            config.tied_embeddings = false;
            config.notices.push(format!(
                "{}: tie_word_embeddings is true, but the weights hold an lm_head.weight with other values: that one is the output layer",
                path.display()
            ));
        }
        Ok(config)
    }

    /// What to say of a text of this many tokens, where the model was made for shorter ones.
    pub fn length_notice(&self, tokens: usize) -> Option<String> {
        let limit = self.max_position_embeddings;
        (tokens > limit)
            .then(|| format!("{tokens} tokens are more than the {limit} positions that the model was made for"))
    }

    /// Reads the text of a config.json; `path` is for messages.
    pub fn parse(text: &str, path: &Path) -> Result<ModelConfig, ModelError> {
        let malformed = |what: String| ModelError::Malformed { path: path.to_owned(), what };
        let object: Map<String, Value> = serde_json::from_str(text).map_err(|error| malformed(error.to_string()))?;
        Reader { object: &object, path }.config()
    }

    /// Rotary frequencies [d/2]: `theta^(-2i/d)`, stretched as the config says.
    pub fn rope_frequencies(&self) -> Vec<f32> {
        let half = self.head_dim / 2;
        (0..half)
            .map(|i| {
                // The exponent and the power are rounded to f32 where torch rounds them.
                let exponent = (2 * i) as f32 / self.head_dim as f32;
                let frequency = 1.0 / (self.rope_theta.powf(f64::from(exponent)) as f32);
                self.rope_scaling.stretch(frequency)
            })
            .collect()
    }
}

impl RopeScaling {
    fn stretch(&self, frequency: f32) -> f32 {
        match *self {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor as f32,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let wavelength = std::f32::consts::TAU / frequency;
                let original = original_max_position_embeddings as f32;
                let (low, high) = (low_freq_factor as f32, high_freq_factor as f32);
                if wavelength > original / low {
                    frequency / factor as f32
                } else if wavelength < original / high {
                    frequency
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
                }
            }
        }
    }
}

struct Reader<'a> {
    object: &'a Map<String, Value>,
    path: &'a Path,
}

impl Reader<'_> {
    fn config(&self) -> Result<ModelConfig, ModelError> {
        let mut notices = Vec::new();
        let family = self.family(&mut notices)?;
        if self.object.get("quantization_config").is_some_and(|value| !value.is_null()) {
            return Err(self.unsupported("quantization_config", "a quantized model"));
        }
        // Two names of one function.
        if let Some(activation) = self.text("hidden_act")?
            && !["silu", "swish"].contains(&activation)
        {
            return Err(self.unsupported("hidden_act", activation));
        }
        if self.flag("mlp_bias")?.unwrap_or(false) {
            return Err(self.unsupported("mlp_bias", "true"));
        }
        let hidden_size = self.size("hidden_size")?;
        let heads = self.size("num_attention_heads")?;
        // Where config.json leaves it out, the classes of transformers differ.
        let key_value_heads = match (self.optional_size("num_key_value_heads")?, family) {
            (Some(count), _) => count,
            (None, Family::Llama) => heads,
            (None, Family::Mistral) if !self.object.contains_key("num_key_value_heads") => 8,
            (None, Family::Qwen2 | Family::Qwen3) if !self.object.contains_key("num_key_value_heads") => 32,
            (None, _) => heads,
        };
        let head_dim = match self.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            // Qwen3's class has a default of its own instead of hidden_size / heads.
            None if family == Family::Qwen3 => 128,
            None if hidden_size % heads == 0 => hidden_size / heads,
            None => return Err(self.malformed("hidden_size is no multiple of num_attention_heads")),
        };
        if heads % key_value_heads != 0 {
            return Err(self.malformed("num_attention_heads is no multiple of num_key_value_heads"));
        }
        if head_dim % 2 != 0 {
            return Err(self.malformed("head_dim is odd"));
        }
        let layers = self.size("num_hidden_layers")?;
        // With these and the limit of every size, no product or sum of sizes overflows 64 bits.
        for (key, size, limit) in
            [("num_hidden_layers", layers, 4096), ("num_attention_heads", heads, 4096), ("head_dim", head_dim, 4096)]
        {
            if size > limit {
                return Err(self.malformed(&format!("`{key}` = {size} is beyond {limit}")));
            }
        }
        let attention_bias = self.flag("attention_bias")?.unwrap_or(false);
        if let Some(dropout) = self.number_within("attention_dropout", 0.0, 1.0)?.filter(|&dropout| dropout != 0.0) {
            notices.push(format!(
                "{}: attention_dropout = {dropout} is left out in training; it is nothing at other times",
                self.path.display()
            ));
        }
        let (rope_theta, rope_scaling) = self.rope()?;
        let config = ModelConfig {
            family,
            hidden_size,
            intermediate_size: self.size("intermediate_size")?,
            layers,
            heads,
            key_value_heads,
            head_dim,
            vocabulary: self.size("vocab_size")?,
            rms_norm_eps: self.number_within("rms_norm_eps", 1e-30, 1.0)?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            // Each class has its own default for what config.json leaves out; all of these say false.
            tied_embeddings: self.flag("tie_word_embeddings")?.unwrap_or(false),
            // Qwen2 always has them and Mistral never, whatever config.json says; the others ask it.
            qkv_bias: match family {
                Family::Qwen2 => true,
                Family::Mistral => false,
                Family::Llama | Family::Qwen3 => attention_bias,
            },
            output_bias: matches!(family, Family::Llama | Family::Qwen3) && attention_bias,
            query_key_norm: family == Family::Qwen3,
            windows: self.windows(family, layers)?,
            // Again each class has its own default.
            max_position_embeddings: self.optional_size("max_position_embeddings")?.unwrap_or(match family {
                Family::Llama => 2048,
                Family::Mistral => 131_072,
                Family::Qwen2 | Family::Qwen3 => 32_768,
            }),
            initializer_range: self.number_within("initializer_range", 0.0, 100.0)?.unwrap_or(0.02),
            notices,
        };
        self.check_whole(&config)?;
        Ok(config)
    }

    /// What only the keys together tell.
    fn check_whole(&self, config: &ModelConfig) -> Result<(), ModelError> {
        let shapes = expected_tensors(config);
        let elements = |shape: &[usize]| shape.iter().map(|&length| length as u128).product::<u128>();
        let all: u128 = shapes.iter().map(|(_, shape)| elements(shape)).sum();
        if all > MOST_ELEMENTS {
            return Err(self.malformed(&format!("its sizes make {all} weights, more than any model has")));
        }
        if config.rope_frequencies().iter().any(|frequency| !frequency.is_finite()) {
            return Err(self.malformed("`rope_theta` and the rope scaling make frequencies that are not finite"));
        }
        self.check_end(config.vocabulary)
    }

    /// `eos_token_id`: a token of the vocabulary, or a list of them.
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

    /// transformers goes by `model_type`, and so by `architectures` only where there is none.
    fn family(&self, notices: &mut Vec<String>) -> Result<Family, ModelError> {
        let architecture = self.object.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        let model_type = self.text("model_type")?;
        let unknown = |name: &str| ModelError::Architecture { path: self.path.to_owned(), name: name.to_owned() };
        let known = Family::ALL.into_iter().find(|(_, class, kind)| match model_type {
            Some(model_type) => model_type == *kind,
            None => architecture == Some(*class),
        });
        let Some((family, class, kind)) = known else {
            // The class says more than the type, but not where it is one of ours and the type is not.
            let ours = |name: &&str| Family::ALL.iter().any(|(_, class, _)| class == name);
            let name = architecture.filter(|name| !ours(name)).or(model_type).unwrap_or("(none given)");
            return Err(unknown(name));
        };
        if let Some(architecture) = architecture.filter(|architecture| *architecture != class) {
            // A head for something else than the next token, or none.
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

    /// Theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (hub).
    fn rope(&self) -> Result<(f64, RopeScaling), ModelError> {
        let empty = Map::new();
        // Where a file has both, transformers takes the older one.
        let scaling = self.nested("rope_scaling")?.or(self.nested("rope_parameters")?).unwrap_or(&empty);
        let inner = Reader { object: scaling, path: self.path };
        let theta = |reader: &Reader<'_>| reader.number_within("rope_theta", 1.0, 1e15);
        let theta = theta(&inner)?.or(theta(self)?).unwrap_or(10_000.0);
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
        Ok((theta, scaling))
    }

    /// Mistral: one window for all layers. Qwen: only with `use_sliding_window`, on the layers that
    /// `layer_types` names, or from layer `max_window_layers` on.
    fn windows(&self, family: Family, layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
        // Left out, it is 4096 in the classes that know it; null means none.
        let window = match self.object.contains_key("sliding_window") {
            true => self.optional_size("sliding_window")?,
            false => Some(4096),
        };
        Ok(match family {
            Family::Llama => vec![None; layers],
            Family::Mistral => vec![window; layers],
            Family::Qwen2 | Family::Qwen3 => {
                let window =
                    window.filter(|_| self.object.get("use_sliding_window").and_then(Value::as_bool) == Some(true));
                let types = self.object.get("layer_types").and_then(Value::as_array);
                let first = self.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28) as usize;
                (0..layers)
                    .map(|layer| match types {
                        Some(types) => {
                            window.filter(|_| types.get(layer).and_then(Value::as_str) == Some("sliding_attention"))
                        }
                        None => window.filter(|_| layer >= first),
                    })
                    .collect()
            }
        })
    }

    fn malformed(&self, what: &str) -> ModelError {
        ModelError::Malformed { path: self.path.to_owned(), what: what.to_owned() }
    }

    fn unsupported(&self, key: &'static str, value: &str) -> ModelError {
        ModelError::Setting { path: self.path.to_owned(), key, value: value.to_owned() }
    }

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
