//! `config.json` of a Hugging Face model directory, in both spellings in use: the hub's (`rope_theta`,
//! `rope_scaling`, `torch_dtype`) and that of transformers 5 (`rope_parameters`, `dtype`).

use std::path::Path;

use serde_json::{Map, Value};

use crate::ModelError;
use crate::load::read_text;

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
}

impl ModelConfig {
    /// Reads `config.json` in this directory.
    pub fn load(directory: &Path) -> Result<ModelConfig, ModelError> {
        let path = directory.join("config.json");
        ModelConfig::parse(&read_text(&path, LIMIT)?, &path)
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
        let family = self.family()?;
        if self.object.get("quantization_config").is_some_and(|value| !value.is_null()) {
            return Err(self.unsupported("quantization_config", "a quantized model"));
        }
        if let Some(activation) = self.text("hidden_act")?
            && activation != "silu"
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
        if let Some(dropout) = self.number("attention_dropout")?.filter(|&dropout| dropout != 0.0) {
            return Err(self.unsupported("attention_dropout", &dropout.to_string()));
        }
        let (rope_theta, rope_scaling) = self.rope()?;
        Ok(ModelConfig {
            family,
            hidden_size,
            intermediate_size: self.size("intermediate_size")?,
            layers,
            heads,
            key_value_heads,
            head_dim,
            vocabulary: self.size("vocab_size")?,
            rms_norm_eps: self.number("rms_norm_eps")?.unwrap_or(1e-6),
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
            max_position_embeddings: self.optional_size("max_position_embeddings")?.unwrap_or(2048),
            initializer_range: self.number("initializer_range")?.unwrap_or(0.02),
        })
    }

    fn family(&self) -> Result<Family, ModelError> {
        let architecture = self.object.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        let model_type = self.text("model_type")?;
        let known = Family::ALL.into_iter().find(|(_, class, kind)| match architecture {
            Some(architecture) => architecture == *class,
            None => model_type == Some(kind),
        });
        let name = architecture.or(model_type).unwrap_or("(none given)");
        known
            .map(|(family, ..)| family)
            .ok_or_else(|| ModelError::Architecture { path: self.path.to_owned(), name: name.to_owned() })
    }

    /// Theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (hub).
    fn rope(&self) -> Result<(f64, RopeScaling), ModelError> {
        let empty = Map::new();
        // Where a file has both, transformers takes the older one.
        let scaling = self.nested("rope_scaling")?.or(self.nested("rope_parameters")?).unwrap_or(&empty);
        let inner = Reader { object: scaling, path: self.path };
        let theta = inner.number("rope_theta")?.or(self.number("rope_theta")?).unwrap_or(10_000.0);
        let partial = inner.number("partial_rotary_factor")?.or(self.number("partial_rotary_factor")?);
        if let Some(partial) = partial.filter(|&factor| factor != 1.0) {
            return Err(self.unsupported("partial_rotary_factor", &partial.to_string()));
        }
        let kind = inner.text("rope_type")?.or(inner.text("type")?).unwrap_or("default");
        let needed = |key: &'static str| -> Result<f64, ModelError> {
            let value = inner.number(key)?;
            value.ok_or_else(|| self.malformed(&format!("rope scaling of type `{kind}` needs `{key}`")))
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: needed("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor: needed("low_freq_factor")?,
                high_freq_factor: needed("high_freq_factor")?,
                original_max_position_embeddings: {
                    let key = "original_max_position_embeddings";
                    let stated = self.number(key)?.or(inner.number(key)?);
                    stated.or(self.number("max_position_embeddings")?).map_or_else(|| needed(key), Ok)?
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
