//! The rotary embeddings of a GGUF file, as config.json has them.

use finetune_gguf::{TensorType, Value};
use serde_json::{Value as Json, json};

use super::{Keys, OTHER_COPY, short};
use crate::config::{Rope, RopeScaling};
use crate::error::ModelError;
use crate::gguf::architecture::architecture;
use crate::gguf::metadata::rope_factors;
use crate::gguf::read::ROPE_FACTORS;

/// The tensors with factors of frequencies: of all rows, of LongRoPE's long and short ones.
pub(super) const FREQUENCIES: &str = ROPE_FACTORS[0];
const LONG: &str = ROPE_FACTORS[1];
const SHORT: &str = ROPE_FACTORS[2];

/// What Llama 3's models say about where wavelengths are long and short. A GGUF file has only the
/// factors that came of it.
const LOW_FREQ_FACTOR: f64 = 1.0;
const HIGH_FREQ_FACTOR: f64 = 4.0;
/// Contexts, in tokens, that a model may have had before it was stretched: powers of two.
const CONTEXTS: std::ops::RangeInclusive<u32> = 4..=20;
/// How far factors may differ from those of the config, relative to them. They are rounded to f32
/// in another order by the program that wrote them.
const TOLERANCE: f32 = 1e-4;

impl Keys<'_> {
    /// The scaling of the rotary embedding, as config.json has it.
    /// `width`: elements that are turned.
    pub(super) fn scaling(&self, theta: f64, width: usize, config: &Json) -> Result<Option<Json>, ModelError> {
        let plain = &Rope { theta, scaling: RopeScaling::None, width, growth: None };
        let context = config["max_position_embeddings"].as_u64().unwrap_or(0);
        let kind = self.get("rope.scaling.type").and_then(Value::as_str).unwrap_or("none");
        let factor = self.number("rope.scaling.factor")?.unwrap_or(1.0);
        let factors = self.factors(FREQUENCIES, plain.width / 2)?;
        if kind == "yarn" && factors.is_none() && self.has_yarn() {
            return self.yarn(config).map(Some);
        }
        match (kind, factors) {
            ("none" | "linear", Some(factors)) if factor == 1.0 => self.llama3(plain, &factors, context),
            ("none", None) => Ok(None),
            ("linear", None) if factor == 1.0 => Ok(None),
            ("linear", None) => Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
            (_, Some(_)) => {
                let what = format!(
                    "`{}` = {kind} together with `{FREQUENCIES}` is not computed here",
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

    /// The factors of rotary frequencies in a tensor. `None`: the file has no such tensor, or it changes
    /// nothing.
    pub(super) fn factors(&self, name: &str, pairs: usize) -> Result<Option<Vec<f32>>, ModelError> {
        let Some(tensor) = self.header.tensor(name) else { return Ok(None) };
        if tensor.kind != TensorType::F32 || tensor.shape != [pairs] {
            let (kind, shape) = (tensor.kind.name(), &tensor.shape);
            let what = format!("the tensor `{name}` is {kind} of shape {shape:?}, expected f32 of [{pairs}]");
            return Err(self.refused(what, OTHER_COPY));
        }
        let factors = TensorType::F32.decode(&self.header.bytes(name)?)?;
        Ok(Some(factors).filter(|factors| factors.iter().any(|factor| *factor != 1.0)))
    }

    /// Whether the architecture has its keys of YaRN read.
    fn has_yarn(&self) -> bool {
        architecture(&self.architecture).is_some_and(|known| known.keys.has_yarn())
    }

    /// YaRN's keys, as config.json has them.
    pub(super) fn yarn(&self, config: &Json) -> Result<Json, ModelError> {
        let factor = self.number("rope.scaling.factor")?.unwrap_or(1.0);
        let context = config["max_position_embeddings"].as_u64().unwrap_or(0);
        let original = self.size("rope.scaling.original_context_length")?.unwrap_or(context);
        let mut yarn = json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        });
        for (key, theirs) in [("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")] {
            if let Some(number) = self.number(&format!("rope.scaling.{theirs}"))? {
                yarn[key] = json!(number);
            }
        }
        if let Some(other) = self.number("rope.scaling.yarn_attn_factor")? {
            yarn["attention_factor"] = json!(other);
        }
        Ok(yarn)
    }

    /// LongRoPE's factors, as config.json has them. `width`: elements that are turned.
    pub(super) fn long(&self, width: usize) -> Result<Option<Json>, ModelError> {
        let of = |name: &str| -> Result<Option<Vec<f64>>, ModelError> {
            if self.header.tensor(name).is_none() {
                return Ok(None);
            }
            let factors = self.factors(name, width / 2)?.unwrap_or_else(|| vec![1.0; width / 2]);
            Ok(Some(factors.into_iter().map(short).collect()))
        };
        match (of(LONG)?, of(SHORT)?) {
            (None, None) => Ok(None),
            (Some(long), Some(short)) => {
                let mut scaling = json!({ "rope_type": "longrope", "long_factor": long, "short_factor": short });
                if let Some(factor) = self.number("rope.scaling.attn_factor")? {
                    scaling["attention_factor"] = json!(factor);
                }
                Ok(Some(scaling))
            }
            _ => Err(self.refused(format!("it has only one of `{LONG}` and `{SHORT}`"), OTHER_COPY)),
        }
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
                    format!("the factors of rotary frequencies in `{FREQUENCIES}` are not those of Llama 3's scaling");
                Err(self.refused(what, OTHER_COPY))
            }
        }
    }
}
