//! What the program that loads a packed form has of a model: which matrices it packs and how, and what it calls
//! them.
//!
//! mlx-lm 0.32 has a stack for gate, up and down each of a layer's experts, and packs it like any matrix. It has
//! 8 bits for routers and the gates of shared experts, whatever the other matrices have (`quant_predicate` of its
//! models). Of a multimodal model it has the text model alone, and Granite 4's dense part in three matrices under the
//! names of other families. It rounds all other numbers to the type of the matrices first, but for those that
//! `cast_predicate` of its models names, and has 1 + w in the norms of models with delta nets. transformers 5 has
//! stacks of another kind, which bitsandbytes 0.50 does not pack: experts stay as they are. It packs every linear
//! layer of a multimodal model, but for those that config.json names: here all beside the text model.

use finetune_packed::{Scheme, applies, config_entry};
use finetune_store::Dtype;
use serde_json::{Value, json};

use crate::adaptation::{is_expert, module_of};
use crate::adapter::mlx::in_whole;
use crate::adapter::mlx_names::{Halves, MlxModule, of_branch};
use crate::branch::OUTPUT;
use crate::config::ModelConfig;
use crate::config::family::{InMlx, OtherMixer};
use crate::error::ModelError;
use crate::files::base_files::{BaseFiles, is_linear};
use crate::files::by_row::PER_LAYER_TABLE;
use crate::files::load::part_names;

/// Text models, by their `model_type`, that mlx-lm has inside of their multimodal ones alone.
const INSIDE_ALONE: [&str; 4] = ["gemma4_unified_text", "muse_glimmer_text", "qwen3_5_moe_text", "qwen3_5_text"];

/// How the name of a shared expert's gate ends.
const SHARED_GATE: &str = ".shared_expert_gate";

/// The program that loads a form, before a model of this config.
pub(super) struct Loader<'a> {
    config: &'a ModelConfig,
    scheme: Scheme,
    /// Modules of a multimodal model that bitsandbytes leaves as they are.
    skipped: Vec<String>,
}

impl<'a> Loader<'a> {
    /// `opens_stacks`: whether gpt-oss's experts are written in plain numbers, whatever they were.
    ///
    /// # Errors
    /// [`ModelError::NotExpressible`] if it does not load the model in this form.
    pub(super) fn of(
        config: &'a ModelConfig,
        files: &BaseFiles,
        scheme: Scheme,
        opens_stacks: bool,
    ) -> Result<Self, ModelError> {
        let family = config.family;
        let loader = Loader { config, scheme, skipped: skipped(config, files, scheme) };
        if let Some((why, instead)) = loader.unread() {
            return Err(ModelError::NotExpressible {
                what: format!("mlx-lm would not load {} packed in this form: {why}", family.architecture),
                hint: format!("model.quantization packs a 16-bit base while it is loaded; {instead}"),
            });
        }
        if family.has_expert_parameters() && !opens_stacks && files.is_packed(config)? {
            return Err(ModelError::NotExpressible {
                what: format!(
                    "the experts of this {} are in MXFP4, and transformers loads no second form beside it",
                    family.architecture
                ),
                hint: "export without --quantize: the experts stay as they are".to_owned(),
            });
        }
        Ok(loader)
    }

    pub(super) fn is_mlx(&self) -> bool {
        is_mlx(self.scheme)
    }

    /// Why mlx-lm does not read the model in its forms, and what else there is. `None`: it does, or is not meant.
    fn unread(&self) -> Option<(String, &'static str)> {
        let family = self.config.family;
        if !self.is_mlx() {
            return None;
        }
        if let Some(InMlx::Unread(why)) = family.mixture.map(|mixture| mixture.in_mlx) {
            return Some((why.to_owned(), "nf4 and int8, for transformers, leave experts in 16 bits"));
        }
        let model_type = family.model_type;
        let is_alone = self.config.wrapper.is_none() && INSIDE_ALONE.contains(&model_type);
        let why = || format!("it has `{model_type}` inside of a multimodal model alone");
        is_alone.then(|| (why(), "quantize the multimodal model as the hub has it"))
    }

    /// How a matrix of this name in the model is packed. `None`: it stays in plain numbers.
    pub(super) fn scheme_of(&self, name: &str, shape: [usize; 2]) -> Option<Scheme> {
        let module = module_of(name);
        let is_packed = match (self.is_mlx(), self.is_router(module)) {
            (true, _) if module.ends_with(SHARED_GATE) => true,
            (true, true) => self.config.family.mixture.is_some_and(|mixture| mixture.in_mlx == InMlx::LinearRouter),
            // Gemma 4's is a linear layer in transformers, too.
            (false, true) => self.config.family.has_stacks_only(),
            // mlx-lm makes two matrices of it for each head when it loads it, of plain numbers only without a loss.
            (true, false) => !module.ends_with(".kv_b_proj"),
            // A table that is read row by row is no linear layer.
            (false, false) => !is_expert(module) && name != PER_LAYER_TABLE,
        };
        let scheme = if self.has_own_bits(module) { Scheme::Mlx8 } else { self.scheme };
        // mlx-lm asks first whether columns fill the groups of the other matrices.
        let fits = |scheme: Scheme| applies(scheme, shape, is_linear(name));
        (is_packed && fits(self.scheme) && fits(scheme)).then_some(scheme)
    }

    fn is_router(&self, module: &str) -> bool {
        let router = self.config.family.names.router;
        module.strip_suffix(router).is_some_and(|layer| layer.ends_with('.'))
    }

    /// Whether config.json says of a module how it is packed.
    pub(super) fn has_own_bits(&self, module: &str) -> bool {
        self.is_mlx() && (self.is_router(module) || module.ends_with(SHARED_GATE))
    }

    /// The number type that a tensor has before it is packed or written, if its file has it in `own` and most
    /// matrices in `most`.
    pub(super) fn dtype(&self, name: &str, own: Dtype, most: Dtype) -> Dtype {
        let family = self.config.family;
        let correction = family.mixture.and_then(|mixture| mixture.correction);
        let is_correction = correction.is_some_and(|correction| name.ends_with(correction));
        let is_of_decay = name.ends_with(".A_log") && family.other_mixer == OtherMixer::Delta { is_grouped: false };
        if !self.is_mlx() || is_correction || is_of_decay { own } else { most }
    }

    /// Whether it has 1 more in a tensor than a file for transformers.
    pub(super) fn adds_one(&self, name: &str) -> bool {
        let family = self.config.family;
        self.is_mlx() && family.has_one_in_mlx_files() && family.adds_one_to(name)
    }

    /// What it calls a tensor of the model, and of which expert of that stack it is.
    pub(super) fn place(&self, name: &str) -> MlxModule {
        let MlxModule { name: module, expert } = of_branch(module_of(name), self.config);
        let part = name.strip_prefix(module_of(name)).unwrap_or_default();
        MlxModule { name: in_whole(&format!("{module}{part}"), self.config), expert }
    }

    /// What it calls the two halves of a tensor's rows, if it holds gate and up of one matrix apart (Granite 4).
    pub(super) fn halves(&self, name: &str) -> Option<[String; 2]> {
        let of = || Halves::of(module_of(name)).filter(|halves| self.is_mlx() && !halves.take_turns);
        let part = name.strip_prefix(module_of(name)).unwrap_or_default();
        Some(of()?.names.map(|module| in_whole(&format!("{module}{part}"), self.config)))
    }

    /// The shape that it has of a tensor of this shape in a file for transformers: convolutions are turned.
    pub(super) fn shape(&self, name: &str, shape: &[usize]) -> Vec<usize> {
        let is_turned = match self.config.family.other_mixer {
            OtherMixer::Convolution => name.ends_with(".conv.conv.weight"),
            OtherMixer::Delta { .. } => name.ends_with(".conv1d.weight"),
            OtherMixer::None => false,
        };
        match *shape {
            [channels, 1, taps] if is_turned => vec![channels, taps, 1],
            ref shape => shape.to_vec(),
        }
    }

    /// Changes a multimodal model's config.json as mlx-lm reads it. `merged`: that of the text model.
    pub(super) fn amend(&self, whole: &mut Value, merged: &ModelConfig) {
        if self.config.wrapper.is_none() || !self.is_mlx() {
            return;
        }
        if let Some(whole) = whole.as_object_mut() {
            // There are no weights of it.
            whole.remove("vision_config");
        }
        if let Some(text) = whole["text_config"].as_object_mut() {
            text.retain(|key, _| !["quantization", "quantization_config"].contains(&key.as_str()));
            text.insert("tie_word_embeddings".to_owned(), json!(merged.tied_embeddings));
        }
        // Of Gemma it takes this key of the whole, whatever the text model has.
        if merged.family.model_type.starts_with("gemma") {
            whole["vocab_size"] = json!(merged.vocabulary);
        }
    }

    /// Keys of config.json, with their values. `modules`: those that have bits of their own.
    pub(super) fn config_entry<'m>(
        &self,
        modules: impl Iterator<Item = &'m str> + Clone,
    ) -> Vec<(&'static str, Value)> {
        let mut entries = config_entry(self.scheme);
        for (_, value) in &mut entries {
            if !self.skipped.is_empty() {
                value["llm_int8_skip_modules"] = json!(self.skipped);
            }
            for module in modules.clone() {
                // As mlx-lm writes it: without the mode, which is then the affine one.
                let [bits, group] = ["bits", "group_size"].map(|key| config_entry(Scheme::Mlx8)[0].1[key].clone());
                value[module] = json!({"bits": bits, "group_size": group});
            }
        }
        entries
    }
}

/// What bitsandbytes packs none of in a multimodal model, by names as transformers has them in memory, and as files of
/// older models and classes of repositories do. A list of its own takes the place of transformers', which is the
/// output layer.
fn skipped(config: &ModelConfig, files: &BaseFiles, scheme: Scheme) -> Vec<String> {
    let Some(files) = files.safetensors().filter(|_| config.wrapper.is_some() && !is_mlx(scheme)) else {
        return Vec::new();
    };
    let in_memory = |part: &String| match part.split_once('.') {
        Some(("model", _)) => None,
        _ => Some(format!("model.{part}")),
    };
    let parts = part_names(files.left_out().map(|view| view.name));
    let parts = parts.into_iter().flat_map(|part| in_memory(&part).into_iter().chain([part]).collect::<Vec<_>>());
    [OUTPUT.to_owned()].into_iter().chain(parts).collect()
}

/// Whether mlx-lm loads a form, and not transformers with bitsandbytes.
pub(super) fn is_mlx(scheme: Scheme) -> bool {
    matches!(scheme, Scheme::Mlx4 | Scheme::Mlx8 | Scheme::Mxfp4)
}
