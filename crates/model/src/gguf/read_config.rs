//! The keys that describe a model, as the config.json of the same model: the reverse of
//! `metadata.rs`. A key that changes what is computed and is not known is refused by name.

use std::path::Path;

use finetune_gguf::{FileSet, Metadata, TensorInfo, Value};
use serde_json::{Map, Value as Json, json};

use crate::error::ModelError;
use crate::gguf::architecture::{Architecture, Kind, architecture, architectures};

mod families;
mod mixtures;
mod rope;

pub(super) use self::mixtures::SIGMOID;

/// Keys that all architectures have: they are read, or change nothing.
const READ: [&str; 17] = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
    "vocab_size",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
];

/// Keys that change nothing if they have this value.
const HARMLESS: [(&str, f64); 9] = [
    ("rope.scale_linear", 1.0),
    ("expert_count", 0.0),
    ("expert_used_count", 0.0),
    ("attention.causal", 1.0),
    ("attention.scale", 0.0),
    ("logit_scale", 0.0),
    ("embedding_scale", 0.0),
    ("residual_scale", 0.0),
    ("nextn_predict_layers", 0.0),
];

/// What the hint of most refusals says.
pub(super) const OTHER_COPY: &str = "name the model's Hugging Face repository or directory instead, if there is one";

/// The description of a model.
pub(super) struct Described {
    pub(super) architecture: &'static Architecture,
    /// config.json of the same model.
    pub(super) config: Json,
}

/// What a config is read from: a file, or what one is going to be written with.
pub(super) trait Header {
    /// Keys and values.
    fn metadata(&self) -> &Metadata;

    /// The tensor of this name.
    fn tensor(&self, name: &str) -> Option<&TensorInfo>;

    /// The bytes of a tensor's numbers.
    ///
    /// # Errors
    /// If they cannot be read.
    fn bytes(&self, name: &str) -> Result<Vec<u8>, ModelError>;
}

impl Header for FileSet {
    fn metadata(&self) -> &Metadata {
        FileSet::metadata(self)
    }

    fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        FileSet::tensor(self, name)
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        Ok(FileSet::bytes(self, name)?)
    }
}

/// The keys of a file.
pub(super) struct Keys<'a> {
    header: &'a dyn Header,
    path: &'a Path,
    architecture: String,
}

impl<'a> Keys<'a> {
    /// # Errors
    /// If the file holds something else than a model, or one of an architecture that is not known.
    pub(super) fn of(header: &'a dyn Header, path: &'a Path) -> Result<Keys<'a>, ModelError> {
        let mut keys = Keys { header, path, architecture: String::new() };
        let text = |key: &str| keys.value(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let holds = text("general.type");
        keys.architecture = text("general.architecture");
        if !["", "model"].contains(&holds.as_str()) {
            return Err(keys.refused(format!("it holds no model, but its general.type is `{holds}`"), OTHER_COPY));
        }
        Ok(keys)
    }

    fn refused(&self, what: String, hint: &str) -> ModelError {
        ModelError::GgufBase { path: self.path.to_owned(), what, hint: hint.to_owned() }
    }

    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    /// The value of a key. `None`: it is left out.
    fn value(&self, key: &str) -> Option<&'a Value> {
        self.header.metadata().iter().find(|(known, _)| known == key).map(|(_, value)| value)
    }

    /// The value of a key of the architecture. `None`: it is left out.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.value(&self.full(key))
    }

    /// A whole number. A list with one for each layer counts if all are the same.
    fn size(&self, key: &str) -> Result<Option<u64>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let shown = || self.refused(format!("`{}` is no whole number", self.full(key)), OTHER_COPY);
        let Some(list) = value.as_array() else { return value.as_u64().map(Some).ok_or_else(shown) };
        let first = list.first().and_then(Value::as_u64).ok_or_else(shown)?;
        match list.iter().all(|value| value.as_u64() == Some(first)) {
            true => Ok(Some(first)),
            false => {
                let what = format!("`{}` differs between layers, which is not computed here", self.full(key));
                Err(self.refused(what, OTHER_COPY))
            }
        }
    }

    fn needed(&self, key: &str) -> Result<u64, ModelError> {
        self.size(key)?.ok_or_else(|| self.refused(format!("it has no `{}`", self.full(key)), OTHER_COPY))
    }

    /// A number, as its shortest decimal has it: 1e-5 in f32 is 1e-5.
    fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match float(value) {
                Some(number) => Ok(Some(number)),
                None => Err(self.refused(format!("`{}` is no number", self.full(key)), OTHER_COPY)),
            },
        }
    }

    /// A whole number for each of so many layers: a list, or one number for all. Flags count as 0 and 1.
    fn of_layers(&self, key: &str, layers: usize) -> Result<Option<Vec<u64>>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = |value: &Value| match value {
            Value::Bool(flag) => Some(u64::from(*flag)),
            other => other.as_u64(),
        };
        let numbers: Option<Vec<u64>> = match value.as_array() {
            None => number(value).map(|number| vec![number; layers]),
            Some(list) if list.len() >= layers => list[..layers].iter().map(number).collect(),
            Some(_) => None,
        };
        let what = || format!("`{}` is no list of {layers} whole numbers", self.full(key));
        numbers.map(Some).ok_or_else(|| self.refused(what(), OTHER_COPY))
    }

    /// Whether the file has this tensor of a layer.
    fn has(&self, layer: usize, part: &str) -> bool {
        self.header.tensor(&format!("blk.{layer}.{part}")).is_some()
    }

    /// Refuses keys that are not known.
    fn check(&self, architecture: &Architecture) -> Result<(), ModelError> {
        let begin = self.full("");
        let own = families::keys(architecture.keys);
        for (key, value) in self.header.metadata() {
            let Some(rest) = key.strip_prefix(&begin) else { continue };
            let harmless = HARMLESS.iter().find(|(known, _)| *known == rest);
            let is_harmless = harmless.is_some_and(|(_, harmless)| float(value) == Some(*harmless));
            if !READ.contains(&rest) && !own.iter().any(|keys| keys.contains(&rest)) && !is_harmless {
                let what =
                    format!("the key `{key}` = {} is not known here, and may change what is computed", shown(value));
                return Err(self.refused(what, OTHER_COPY));
            }
        }
        Ok(())
    }

    /// The architecture and the config.json of the model. Its shapes are compared with the tensors
    /// later.
    ///
    /// # Errors
    /// [`ModelError::GgufBase`] for an architecture, a key or a rope scaling that is not known.
    pub(super) fn describe(&self) -> Result<Described, ModelError> {
        let Some(architecture) = architecture(&self.architecture) else {
            let what = format!("models of the architecture `{}` are not known here", self.architecture);
            return Err(self.refused(what, &format!("these are: {}", architectures())));
        };
        self.check(architecture)?;
        let mut config = self.common(architecture)?;
        match architecture.keys {
            Kind::Deepseek2 | Kind::Gemma4 => {}
            kind => self.add_heads(kind, &mut config)?,
        }
        self.add_family(architecture.keys, &mut config)?;
        self.add_special_tokens(&mut config);
        Ok(Described { architecture, config })
    }

    /// What all architectures have.
    fn common(&self, architecture: &Architecture) -> Result<Json, ModelError> {
        let eps = self.number("attention.layer_norm_rms_epsilon")?;
        let eps = eps.ok_or_else(|| {
            self.refused(format!("it has no `{}`", self.full("attention.layer_norm_rms_epsilon")), OTHER_COPY)
        })?;
        let (blocks, idle) = (self.needed("block_count")?, self.size("nextn_predict_layers")?.unwrap_or(0));
        let Some(layers) = blocks.checked_sub(idle).filter(|layers| (1..=4096).contains(layers)) else {
            return Err(self.refused(format!("{blocks} layers, of which {idle} predict further tokens"), OTHER_COPY));
        };
        let mut config = json!({
            "model_type": architecture.model_type,
            "hidden_size": self.needed("embedding_length")?,
            "num_hidden_layers": layers,
            "num_attention_heads": self.needed("attention.head_count")?,
            "vocab_size": self.vocabulary()?,
            "max_position_embeddings": self.needed("context_length")?,
            "rms_norm_eps": eps,
            "rope_theta": self.number("rope.freq_base")?.unwrap_or(10_000.0),
            "hidden_act": "silu",
            "tie_word_embeddings": self.header.tensor("output.weight").is_none(),
        });
        if idle > 0 {
            config["num_nextn_predict_layers"] = json!(idle);
        }
        if self.has(0, "attn_q.bias") {
            config["attention_bias"] = json!(true);
        }
        Ok(config)
    }

    /// Heads that all layers have the same of.
    fn add_heads(&self, kind: Kind, config: &mut Json) -> Result<(), ModelError> {
        let (hidden, heads) = (self.needed("embedding_length")?, self.needed("attention.head_count")?);
        let head_dim = self.size("attention.key_length")?.unwrap_or(hidden / heads.max(1));
        let values = self.size("attention.value_length")?.unwrap_or(head_dim);
        let turned = self.size("rope.dimension_count")?.unwrap_or(head_dim);
        let is_partial = matches!(kind, Kind::Glm4 | Kind::Glm4Moe | Kind::Phi3 | Kind::Delta);
        if values != head_dim || (turned != head_dim && !is_partial) || turned > head_dim {
            let what = format!(
                "heads of {head_dim} elements, of which {turned} are turned, and values of {values}: only equal numbers are computed here"
            );
            return Err(self.refused(what, OTHER_COPY));
        }
        config["head_dim"] = json!(head_dim);
        if is_partial {
            config["partial_rotary_factor"] = json!(turned as f64 / head_dim as f64);
        }
        if !matches!(kind, Kind::Lfm2 | Kind::GraniteHybrid) {
            config["num_key_value_heads"] = json!(self.size("attention.head_count_kv")?.unwrap_or(heads));
        }
        match self.size("feed_forward_length")? {
            Some(width) => config["intermediate_size"] = json!(width),
            // Where every layer has experts, no width is needed.
            None if kind == Kind::Delta && self.get("expert_count").is_some() => {}
            None => config["intermediate_size"] = json!(self.needed("feed_forward_length")?),
        }
        if !matches!(kind, Kind::Gemma3 | Kind::Olmo2 | Kind::Phi3) {
            let (theta, width) = (config["rope_theta"].as_f64().unwrap_or(1e4), turned as usize);
            if let Some(scaling) = self.scaling(theta, width, config)? {
                config["rope_scaling"] = scaling;
            }
        }
        Ok(())
    }

    /// Rows of the embedding.
    fn vocabulary(&self) -> Result<u64, ModelError> {
        let embedding = self.header.tensor("token_embd.weight");
        let rows = embedding.and_then(|tensor| tensor.shape.first()).map(|rows| *rows as u64);
        let rows = rows.ok_or_else(|| self.refused("it has no tensor `token_embd.weight`".to_owned(), OTHER_COPY))?;
        match self.size("vocab_size")? {
            Some(stated) if stated != rows => {
                let what =
                    format!("`{}` is {stated}, and `token_embd.weight` has {rows} rows", self.full("vocab_size"));
                Err(self.refused(what, "the file is damaged: fetch it again"))
            }
            _ => Ok(rows),
        }
    }

    /// Tokens with a meaning, for programs that read config.json.
    fn add_special_tokens(&self, config: &mut Json) {
        for (key, theirs) in [("bos_token_id", "bos"), ("eos_token_id", "eos")] {
            let id = self.value(&format!("tokenizer.ggml.{theirs}_token_id")).and_then(Value::as_u64);
            let rows = config["vocab_size"].as_u64();
            if let Some(id) = id.filter(|&id| rows.is_some_and(|rows| id < rows)) {
                config[key] = json!(id);
            }
        }
    }
}

/// config.json with the name of the class, which the family knows.
pub(super) fn with_class(config: Json, class: &str) -> Json {
    let mut object = Map::new();
    object.insert("architectures".to_owned(), json!([class]));
    object.extend(config.as_object().cloned().unwrap_or_default());
    Json::Object(object)
}

/// The value of a number or a flag.
fn float(value: &Value) -> Option<f64> {
    match value {
        Value::F32(number) => Some(short(*number)),
        Value::F64(number) => Some(*number),
        Value::Bool(flag) => Some(f64::from(u8::from(*flag))),
        other => other.as_u64().map(|number| number as f64),
    }
    .filter(|number| number.is_finite())
}

/// The number whose decimal is the shortest that means this f32.
pub(super) fn short(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

/// A value for a message.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => format!("{:?}", text.chars().take(40).collect::<String>()),
        Value::Array(values) => format!("a list of {}", values.len()),
        other => float(other).map_or_else(|| format!("{other:?}"), |number| number.to_string()),
    }
}
