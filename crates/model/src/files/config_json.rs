//! `config.json` of a Hugging Face model directory, in both spellings in use: the hub's
//! (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of transformers 5 (`rope_parameters`,
//! `dtype`).

mod gemma4;
mod layers;
mod mixture;
mod rope;

use std::path::Path;

use finetune_packed::files::PackedConfig;
use finetune_store::json_fault;
use serde_json::{Map, Value};

use crate::config::family::{Asked, Bias, ExpertLayout, FAMILIES, Family, OtherMixer};
use crate::config::{ExpertsConfig, ModelConfig, Rope};
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
        let object: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| malformed(json_fault(text.as_bytes(), &error)))?;
        let Some((wrapper, text)) = text_config(&object) else { return Reader { object: &object, path }.config() };
        Ok(ModelConfig { wrapper: Some(wrapper), ..Reader { object: &text, path }.config()? })
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

/// The keys of the bounds of scores and logits.
const SOFTCAPS: [&str; 2] = ["attn_logit_softcapping", "final_logit_softcapping"];

/// Sizes that most layers have.
struct LayerSizes {
    key_value_heads: usize,
    head_dim: usize,
    intermediate_size: usize,
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
        let latent = self.latent(family)?;
        let Heads { heads, key_value_heads, head_dim } = match latent {
            Some(latent) => self.latent_heads(latent)?,
            None => self.heads(family, hidden_size)?,
        };
        let layers = self.size("num_hidden_layers")?;
        self.check_limits([("num_hidden_layers", layers), ("num_attention_heads", heads), ("head_dim", head_dim)])?;
        self.note_what_is_left_out(&mut notices)?;
        let experts = self.experts(family)?;
        let turned = latent.map_or_else(|| self.turned(family, head_dim), |latent| Ok(latent.turned))?;
        let ropes = self.ropes(family, turned, self.wide_head(family)?.unwrap_or(turned))?;
        let sizes = LayerSizes {
            key_value_heads,
            head_dim,
            intermediate_size: self.intermediate_size(family, experts.as_ref())?,
        };
        let config = ModelConfig {
            family,
            wrapper: None,
            hidden_size,
            intermediate_size: sizes.intermediate_size,
            experts,
            delta: self.delta_nets(family)?,
            convolution: self.convolutions(family)?,
            latent,
            per_layer: self.per_layer(family)?,
            layers: self.layers(family, layers, &sizes)?,
            heads,
            key_value_heads,
            head_dim,
            vocabulary: self.vocabulary(family)?,
            rms_norm_eps: self.number_within(family.norm_eps.0, 1e-30, 1.0)?.unwrap_or(family.norm_eps.1),
            score_scale: self.score_scale(family, head_dim)?,
            post_norm_eps: match family.post_norm_eps {
                Some(default) => Some(self.number_within("post_norm_eps", 1e-30, 1.0)?.unwrap_or(default)),
                None => None,
            },
            ropes,
            // The first is LFM2's.
            tied_embeddings: self
                .flag("tie_embedding")?
                .or(self.flag("tie_word_embeddings")?)
                .unwrap_or(family.tied_embeddings),
            qkv_bias: self.has_bias(family.qkv_bias)?,
            output_bias: self.has_bias(family.output_bias)?,
            query_key_norm: self.has(family.query_key_norm)?,
            embedding_scale: match family.scaled_embeddings {
                true => Some((hidden_size as f32).sqrt()),
                false => self.multiplier(family, "embedding_multiplier")?.filter(|&factor| factor != 1.0),
            },
            residual_scale: self.multiplier(family, "residual_multiplier")?.filter(|&factor| factor != 1.0),
            logits_divisor: self.logits_divisor(family)?,
            score_cap: self.softcap(family, 0)?,
            logits_cap: self.softcap(family, 1)?,
            idle_layers: self.idle_layers()?,
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

    /// Within these limits and the limit of every size, no product or sum of sizes overflows 64 bits.
    fn check_limits(&self, sizes: [(&str, usize); 3]) -> Result<(), ModelError> {
        match sizes.iter().find(|(_, size)| *size > 4096) {
            Some((key, size)) => Err(self.malformed(&format!("`{key}` = {size} is beyond 4096"))),
            None => Ok(()),
        }
    }

    /// Whether a linear layer of attention has a bias.
    fn has_bias(&self, bias: Bias) -> Result<bool, ModelError> {
        let stated = self.flag("attention_bias")?;
        Ok(match bias {
            Bias::Never => false,
            Bias::Always => true,
            Bias::Asked => stated == Some(true),
            Bias::AskedOrLeftOut => stated != Some(false),
        })
    }

    /// Rows of the embedding.
    fn vocabulary(&self, family: &Family) -> Result<usize, ModelError> {
        match (self.optional_size("vocab_size")?, family.vocabulary) {
            (Some(size), _) | (None, Some(size)) => Ok(size),
            (None, None) => self.size("vocab_size"),
        }
    }

    /// Whether the model has a part.
    fn has(&self, part: Asked) -> Result<bool, ModelError> {
        Ok(match part {
            Asked::Never => false,
            Asked::Always => true,
            Asked::Key(key) => self.flag(key)?.unwrap_or(false),
        })
    }

    /// The factor of attention's scores.
    fn score_scale(&self, family: &Family, head_dim: usize) -> Result<f32, ModelError> {
        let scalar = match family.query_scalar {
            Some(default) => self.number_within("query_pre_attn_scalar", 1e-3, 1e9)?.unwrap_or(default),
            None => head_dim as f64,
        };
        let scale = self.multiplier(family, "attention_multiplier")?.unwrap_or(1.0 / (scalar as f32).sqrt());
        if let Some(default) = family.bare_head_norms {
            // A factor of queries is one of scores.
            let factor = self.number_within("qk_scale_factor", 1e-6, 1e6)?.unwrap_or(default);
            return Ok((factor / scalar.sqrt()) as f32);
        }
        Ok(if family.latent.is_some() { scale * self.latent_scale()? } else { scale })
    }

    /// Elements of a token inside dense feed-forward parts.
    fn intermediate_size(&self, family: &Family, experts: Option<&ExpertsConfig>) -> Result<usize, ModelError> {
        if family.is_hybrid {
            return self.size("shared_intermediate_size");
        }
        let stated = match (self.optional_size("block_ff_dim")?, experts) {
            (Some(size), _) if family.other_mixer == OtherMixer::Convolution => size,
            // Where every layer has experts, nothing else may be said.
            (_, Some(experts)) => self.optional_size("intermediate_size")?.unwrap_or(experts.intermediate_size),
            (_, None) => self.size("intermediate_size")?,
        };
        if !family.adjusts_width || self.flag("block_auto_adjust_ff_dim")? == Some(false) {
            return Ok(stated);
        }
        let factor = self.number_within("block_ffn_dim_multiplier", 1e-3, 1e3)?.unwrap_or(1.0);
        let multiple = self.optional_size("block_multiple_of")?.unwrap_or(256);
        let adjusted = ((2 * stated / 3) as f64 * factor) as usize;
        Ok(adjusted.next_multiple_of(multiple).max(multiple))
    }

    /// A factor of Granite's config; one that is left out is 1, as in the class. `None` in other families.
    fn multiplier(&self, family: &Family, key: &str) -> Result<Option<f32>, ModelError> {
        let stated = || self.number_within(key, 1e-6, 1e6).map(|value| value.unwrap_or(1.0) as f32);
        family.has_multipliers.then(stated).transpose()
    }

    /// What logits are divided by, if by anything.
    fn logits_divisor(&self, family: &Family) -> Result<Option<f32>, ModelError> {
        let divisor = match family.output_multiplier {
            Some(default) => {
                let factor = self.number_within("output_multiplier", 1e-6, 1e6)?.unwrap_or(default);
                Some((1.0 / factor) as f32)
            }
            None => self.multiplier(family, "logits_scaling")?,
        };
        Ok(divisor.filter(|&divisor| divisor != 1.0))
    }

    /// The bound of scores or of logits.
    fn softcap(&self, family: &Family, which: usize) -> Result<Option<f32>, ModelError> {
        let key = SOFTCAPS[which];
        let stated = self.number_within(key, 1e-3, 1e6)?;
        match (family.softcaps[which], stated) {
            (None, Some(cap)) => Err(self.unsupported(key, &cap.to_string())),
            (None, None) => Ok(None),
            // null means none.
            (Some(_), None) if self.object.contains_key(key) => Ok(None),
            (Some(softcap), stated) => Ok(stated.or(softcap.default).map(|cap| cap as f32)),
        }
    }

    /// Layers that predict further tokens (DeepSeek-AI 2024: multi-token prediction). They lie behind the
    /// others in the files.
    fn idle_layers(&self) -> Result<usize, ModelError> {
        let count = match self.get("num_nextn_predict_layers").or(self.get("num_mtp_layers")) {
            Some(value) => value.as_u64().filter(|&count| count <= 64),
            None => Some(0),
        };
        count.map(|count| count as usize).ok_or_else(|| self.wrong_type("num_nextn_predict_layers", "a small number"))
    }

    /// What training leaves out of what the file asks for.
    fn note_what_is_left_out(&self, notices: &mut Vec<String>) -> Result<(), ModelError> {
        if let Some(dropout) = self.number_within("attention_dropout", 0.0, 1.0)?.filter(|&dropout| dropout != 0.0) {
            notices.push(format!(
                "{}: attention_dropout = {dropout} is left out in training; it is nothing at other times",
                self.path.display()
            ));
        }
        Ok(())
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
        if family.mixture.is_some_and(|mixture| mixture.layout == ExpertLayout::TakingTurns) {
            for (key, only) in [("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)] {
                if let Some(other) = self.number(key)?.filter(|&number| number != only) {
                    return Err(self.unsupported(key, &other.to_string()));
                }
            }
        }
        if family.is_hybrid {
            self.expect_attention_only()?;
        }
        for key in ["resid_pdrop", "embd_pdrop"] {
            if let Some(dropout) = self.number(key)?.filter(|&dropout| dropout != 0.0) {
                return Err(self.unsupported(key, &dropout.to_string()));
            }
        }
        if family.rope_pairs && self.flag("rope_interleave")? == Some(false) {
            return Err(self.unsupported("rope_interleave", "false"));
        }
        // Of Gemma 4 images alone are seen in both directions.
        let both_ways = self.get("use_bidirectional_attention");
        if let Some(other) = both_ways.filter(|value| **value != Value::Bool(false) && *value != "vision") {
            return Err(self.unsupported("use_bidirectional_attention", &other.to_string()));
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
        let all_frequencies = |rope: &Rope| [rope.frequencies(), rope.frequencies_of(true)].concat();
        let elements = |shape: Vec<usize>| shape.iter().map(|&length| length as u128).product::<u128>();
        let all: u128 = Decoder::new(config).slots().iter().map(|slot| elements(slot.shape())).sum();
        if all > MOST_ELEMENTS {
            return Err(self.malformed(&format!("its sizes make {all} weights, more than any model has")));
        }
        if config.ropes.iter().flat_map(all_frequencies).any(|frequency| !frequency.is_finite()) {
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
