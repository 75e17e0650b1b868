//! The keys that describe a model, as the config.json of the same model: the reverse of
//! `metadata.rs`. A key that changes what is computed and is not known is refused by name.

use std::path::Path;

use finetune_gguf::{FileSet, TensorType, Value};
use serde_json::{Map, Value as Json, json};

use crate::config::{Rope, RopeScaling};
use crate::error::ModelError;
use crate::gguf::metadata::rope_factors;
use crate::gguf::place::{Destination, architectures, family_of};
use crate::gguf::read::ROPE_FACTORS;

/// Keys of an architecture that are read, or change nothing.
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
const HARMLESS: [(&str, f64); 8] = [
    ("rope.scale_linear", 1.0),
    ("expert_count", 0.0),
    ("expert_used_count", 0.0),
    ("attention.causal", 1.0),
    ("attention.scale", 0.0),
    ("logit_scale", 0.0),
    ("embedding_scale", 0.0),
    ("residual_scale", 0.0),
];

/// What Llama 3's models say about where wavelengths are long and short. A GGUF file has only the
/// factors that came of it.
const LOW_FREQ_FACTOR: f64 = 1.0;
const HIGH_FREQ_FACTOR: f64 = 4.0;
/// Contexts, in tokens, that a model may have had before it was stretched: powers of two.
const CONTEXTS: std::ops::RangeInclusive<u32> = 10..=20;
/// How far factors may differ from those of the config, relative to them. They are rounded to f32
/// in another order by the program that wrote them.
const TOLERANCE: f32 = 1e-4;

/// What the hint of most refusals says.
pub(super) const OTHER_COPY: &str = "name the model's Hugging Face repository or directory instead, if there is one";

/// The description of a model.
pub(super) struct Described {
    pub(super) destination: Destination,
    /// config.json of the same model.
    pub(super) config: Json,
}

/// The keys of a file.
pub(super) struct Keys<'a> {
    files: &'a FileSet,
    path: &'a Path,
    architecture: String,
}

impl<'a> Keys<'a> {
    /// # Errors
    /// If the file holds something else than a model, or one of an architecture that is not known.
    pub(super) fn of(files: &'a FileSet, path: &'a Path) -> Result<Keys<'a>, ModelError> {
        let text = |key: &str| files.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let architecture = text("general.architecture");
        let keys = Keys { files, path, architecture };
        let holds = text("general.type");
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

    /// The value of a key of the architecture. `None`: it is left out.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.files.get(&self.full(key))
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

    /// Refuses keys that are not known.
    fn check(&self) -> Result<(), ModelError> {
        let begin = self.full("");
        for (key, value) in self.files.metadata() {
            let Some(rest) = key.strip_prefix(&begin) else { continue };
            let harmless = HARMLESS.iter().find(|(known, _)| *known == rest);
            let is_harmless = harmless.is_some_and(|(_, harmless)| float(value) == Some(*harmless));
            if !READ.contains(&rest) && !is_harmless {
                let what =
                    format!("the key `{key}` = {} is not known here, and may change what is computed", shown(value));
                return Err(self.refused(what, OTHER_COPY));
            }
        }
        Ok(())
    }

    /// The destination and the config.json of the model. Its shapes are compared with the tensors
    /// later.
    ///
    /// # Errors
    /// [`ModelError::GgufBase`] for an architecture, a key or a rope scaling that is not known.
    pub(super) fn describe(&self) -> Result<Described, ModelError> {
        let Some((model_type, destination)) = family_of(&self.architecture) else {
            let what = format!("models of the architecture `{}` are not known here", self.architecture);
            return Err(self.refused(what, &format!("these are: {}", architectures())));
        };
        self.check()?;
        let (hidden, heads) = (self.needed("embedding_length")?, self.needed("attention.head_count")?);
        let head_dim = self.size("attention.key_length")?.unwrap_or(hidden / heads.max(1));
        let values = self.size("attention.value_length")?.unwrap_or(head_dim);
        let turned = self.size("rope.dimension_count")?.unwrap_or(head_dim);
        if values != head_dim || turned != head_dim {
            let what = format!(
                "heads of {head_dim} elements, of which {turned} are turned, and values of {values}: only equal numbers are computed here"
            );
            return Err(self.refused(what, OTHER_COPY));
        }
        let eps = self.number("attention.layer_norm_rms_epsilon")?;
        let eps = eps.ok_or_else(|| {
            self.refused(format!("it has no `{}`", self.full("attention.layer_norm_rms_epsilon")), OTHER_COPY)
        })?;
        let context = self.needed("context_length")?;
        let theta = self.number("rope.freq_base")?.unwrap_or(10_000.0);
        let mut config = json!({
            "model_type": model_type,
            "hidden_size": hidden,
            "intermediate_size": self.needed("feed_forward_length")?,
            "num_hidden_layers": self.needed("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.size("attention.head_count_kv")?.unwrap_or(heads),
            "head_dim": head_dim,
            "vocab_size": self.vocabulary()?,
            "max_position_embeddings": context,
            "rms_norm_eps": eps,
            "rope_theta": theta,
            "hidden_act": "silu",
            "tie_word_embeddings": self.files.tensor("output.weight").is_none(),
        });
        if self.files.tensor("blk.0.attn_q.bias").is_some() {
            config["attention_bias"] = json!(true);
        }
        let width = usize::try_from(head_dim).unwrap_or(usize::MAX);
        let plain = Rope { theta, scaling: RopeScaling::None, width, growth: None };
        if let Some(scaling) = self.scaling(&plain, context)? {
            config["rope_scaling"] = scaling;
        }
        self.add_special_tokens(&mut config);
        Ok(Described { destination, config })
    }

    /// Rows of the embedding.
    fn vocabulary(&self) -> Result<u64, ModelError> {
        let embedding = self.files.tensor("token_embd.weight");
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

    /// The scaling of the rotary embedding, as config.json has it.
    fn scaling(&self, plain: &Rope, context: u64) -> Result<Option<Json>, ModelError> {
        let kind = self.get("rope.scaling.type").and_then(Value::as_str).unwrap_or("none");
        let factor = self.number("rope.scaling.factor")?.unwrap_or(1.0);
        let factors = self.rope_factors(plain.width / 2)?;
        match (kind, factors) {
            ("none" | "linear", Some(factors)) if factor == 1.0 => self.llama3(plain, &factors, context),
            ("none", None) => Ok(None),
            ("linear", None) if factor == 1.0 => Ok(None),
            ("linear", None) => Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
            (_, Some(_)) => {
                let what = format!(
                    "`{}` = {kind} together with `{ROPE_FACTORS}` is not computed here",
                    self.full("rope.scaling.type")
                );
                Err(self.refused(what, OTHER_COPY))
            }
            (kind, None) => {
                let what = format!("`{}` = {kind} is not computed here", self.full("rope.scaling.type"));
                Err(self.refused(what, OTHER_COPY))
            }
        }
    }

    /// What the rotary frequencies are divided by. `None`: the file has no such tensor, or it changes
    /// nothing.
    fn rope_factors(&self, pairs: usize) -> Result<Option<Vec<f32>>, ModelError> {
        let Some(tensor) = self.files.tensor(ROPE_FACTORS) else { return Ok(None) };
        if tensor.kind != TensorType::F32 || tensor.shape != [pairs] {
            let (kind, shape) = (tensor.kind.name(), &tensor.shape);
            let what = format!("the tensor `{ROPE_FACTORS}` is {kind} of shape {shape:?}, expected f32 of [{pairs}]");
            return Err(self.refused(what, OTHER_COPY));
        }
        let factors = TensorType::F32.decode(&self.files.bytes(ROPE_FACTORS)?)?;
        Ok(Some(factors).filter(|factors| factors.iter().any(|factor| *factor != 1.0)))
    }

    /// Llama 3's scaling that makes these factors.
    fn llama3(&self, plain: &Rope, factors: &[f32], context: u64) -> Result<Option<Json>, ModelError> {
        let factor = factors.iter().copied().fold(1.0, f32::max);
        let stated = self.size("rope.scaling.original_context_length")?;
        let near = |(ours, theirs): (&f32, &f32)| (ours - theirs).abs() <= TOLERANCE * theirs.abs();
        let fits = |original: &u64| {
            let scaling = RopeScaling::Llama3 {
                factor: f64::from(factor),
                low_freq_factor: LOW_FREQ_FACTOR,
                high_freq_factor: HIGH_FREQ_FACTOR,
                original_max_position_embeddings: *original as f64,
            };
            let made = rope_factors(&Rope { scaling, ..plain.clone() }).unwrap_or_default();
            made.len() == factors.len() && made.iter().zip(factors).all(near)
        };
        let mut contexts = stated.into_iter().chain(CONTEXTS.map(|power| 1 << power)).chain([context]);
        match contexts.find(fits) {
            Some(original) => Ok(Some(json!({
                "rope_type": "llama3",
                "factor": short(factor),
                "low_freq_factor": LOW_FREQ_FACTOR,
                "high_freq_factor": HIGH_FREQ_FACTOR,
                "original_max_position_embeddings": original,
            }))),
            None => {
                let what =
                    format!("the factors of rotary frequencies in `{ROPE_FACTORS}` are not those of Llama 3's scaling");
                Err(self.refused(what, OTHER_COPY))
            }
        }
    }

    /// Tokens with a meaning, for programs that read config.json.
    fn add_special_tokens(&self, config: &mut Json) {
        for (key, theirs) in [("bos_token_id", "bos"), ("eos_token_id", "eos")] {
            let id = self.files.get(&format!("tokenizer.ggml.{theirs}_token_id")).and_then(Value::as_u64);
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
fn short(number: f32) -> f64 {
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
