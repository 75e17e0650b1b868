//! Adapters: PEFT's format (`adapter_config.json`, `adapter_model.safetensors`) and mlx-lm's.
//!
//! Settings and tensors are held against each other, and every tensor is accounted for. What PEFT
//! refuses or would leave out silently is an error. What PEFT warns of is a notice.

mod base;
mod combine;
mod files;
pub(crate) mod mlx;
pub(crate) mod mlx_names;
mod peft;
mod read;
mod settings;
mod stacked;
mod stacked_file;
mod targets;
mod tensors;
mod write;

use std::collections::BTreeSet;
use std::path::Path;

pub use self::base::{BaseCheck, BaseFile, BaseName, RecordedBase, base_digest, base_digest_of, base_files};
pub(crate) use self::files::MLX_FILE;
use crate::adaptation::{Adaptation, is_expert, is_of_vocabulary, stack_of};
use crate::error::ModelError;
use crate::lora::{LoraTarget, LoraTargets, is_named, last_parts, layer_of};
use crate::model::Model;
use crate::slice::adapter_not_in_slices;
use crate::stage::not_in_stages;
use crate::vocabulary::FrozenMatrix;

/// The file of an adapter's settings.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The file of an adapter's tensors in PEFT's format.
pub const TENSOR_FILE: &str = "adapter_model.safetensors";
/// The hint for adapters that a format of adapters has no place for.
pub(crate) const IS_IN_MERGED: &str = "--format merged, and gguf without --adapter-only, write the model with it";

/// Numbers that are hashed at a time.
const HASHED: usize = 1 << 16;

/// An adapter as read from a directory. Branches are in model order. Values are in the order of the
/// layout that [`Model::add_adapter`] makes of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// The branches, in model order.
    pub targets: LoraTargets,
    /// (outputs, inputs) of each target's layer. The embedding has the hidden size as outputs and
    /// the vocabulary as inputs.
    pub shapes: Vec<(usize, usize)>,
    /// Modules that were trained in full beside the branches, in model order.
    pub saved: Vec<String>,
    /// All values in f32, one target after the other: A [rank, inputs], B [outputs, rank], and with
    /// DoRA the magnitudes [outputs]. Then those of the modules that were trained in full.
    pub values: Vec<f32>,
    /// The embedding and the output layer that the adapter was trained on, if it brings them along.
    /// They take the place of the base's.
    pub(crate) vocabulary: Vec<FrozenMatrix>,
    /// Rows of embedding and output layer. They are more than the base's if tokens were added.
    pub rows: usize,
    /// What the adapter says about its base.
    pub base: RecordedBase,
    /// What a user should know about how the adapter was read.
    pub notices: Vec<String>,
    /// All layers of the model that it was read for that may have a branch.
    modules: Vec<String>,
}

impl Adapter {
    /// What the adapter trains, without dropout.
    pub fn adaptation(&self) -> Adaptation {
        Adaptation { targets: self.targets.clone(), saved: self.saved.clone(), dropout: 0.0 }
    }

    /// A hash of all that the adapter does to a base: where it is the same, so are answers.
    pub fn content(&self) -> String {
        let Adapter { targets, saved, values, vocabulary, rows, .. } = self;
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{targets:?} {saved:?} {rows}").as_bytes());
        let of_vocabulary =
            vocabulary.iter().map(|matrix| (format!("{} {:?}", matrix.module, matrix.shape), &matrix.values));
        for (name, values) in of_vocabulary.chain([(String::new(), values)]) {
            hasher.update(name.as_bytes());
            for part in values.chunks(HASHED) {
                hasher.update(&part.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
            }
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Checks that the adapter has exactly the branches, and the modules trained in full, that a
    /// recipe chose.
    ///
    /// # Errors
    /// [`ModelError::AdapterDiffers`] with the first difference, and the lines of `[lora]` that
    /// would fit.
    pub fn expect_adaptation(&self, wanted: &Adaptation, directory: &Path) -> Result<(), ModelError> {
        let differs = |what: String| {
            let path = directory.join(CONFIG_FILE);
            Err(ModelError::AdapterDiffers { path, what, settings: self.recipe_lines() })
        };
        let Adaptation { targets: wanted, saved, .. } = wanted;
        let only = |one: &[String], other: &[String]| one.iter().find(|module| !other.contains(module)).cloned();
        if let Some(module) = only(&self.saved, saved) {
            return differs(format!("the adapter has `{module}` trained in full, the recipe has not"));
        }
        if let Some(module) = only(saved, &self.saved) {
            return differs(format!("the recipe trains `{module}` in full, the adapter has not"));
        }
        let has = |targets: &LoraTargets, module: &str| targets.iter().any(|target| target.module == module);
        if let Some(target) = self.targets.iter().find(|target| !has(wanted, &target.module)) {
            return differs(format!("the adapter has a branch on `{}`, the recipe has none", target.module));
        }
        if let Some(target) = wanted.iter().find(|target| !has(&self.targets, &target.module)) {
            return differs(format!("the recipe has a branch on `{}`, the adapter has none", target.module));
        }
        // Both lists are in model order.
        for (found, expected) in self.targets.iter().zip(wanted) {
            let module = &found.module;
            if found.rank != expected.rank {
                let (found, expected) = (found.rank, expected.rank);
                return differs(format!("rank {found} on `{module}` in the adapter, {expected} in the recipe"));
            }
            if found.use_dora != expected.use_dora {
                let words = |dora: bool| if dora { "DoRA" } else { "plain LoRA" };
                let (found, expected) = (words(found.use_dora), words(expected.use_dora));
                return differs(format!("{found} on `{module}` in the adapter, {expected} in the recipe"));
            }
            if found.scale() != expected.scale() {
                let show = |target: &LoraTarget| {
                    let rslora = if target.use_rslora { " with use_rslora" } else { "" };
                    format!("alpha {}{rslora}", write::whole(target.alpha))
                };
                let (found, expected) = (show(found), show(expected));
                return differs(format!("{found} on `{module}` in the adapter, {expected} in the recipe"));
            }
        }
        Ok(())
    }

    /// The lines of `[lora]` that make a recipe with these branches.
    fn recipe_lines(&self) -> Vec<String> {
        let Some(first) = self.targets.first() else { return Vec::new() };
        let mut lines = self.target_lines();
        let usual = |of: fn(&LoraTarget) -> String| -> String {
            // The value that most modules have. If several are equally frequent, the first of them.
            let all: Vec<String> = self.targets.iter().map(of).collect();
            let count = |value: &String| all.iter().filter(|other| *other == value).count();
            let most = all.iter().map(count).max().unwrap_or(0);
            all.iter().find(|value| count(value) == most).cloned().unwrap_or_default()
        };
        let (usual_rank, usual_alpha) = (usual(rank_text), usual(alpha_text));
        lines.push(format!("rank = {usual_rank}"));
        lines.push(format!("alpha = {usual_alpha}"));
        if first.use_rslora {
            lines.push("use_rslora = true".to_owned());
        }
        if first.use_dora {
            lines.push("use_dora = true".to_owned());
        }
        if !self.saved.is_empty() {
            lines.push(format!("modules_to_save = {:?}", self.saved));
        }
        let mut pattern = |key: &str, of: fn(&LoraTarget) -> String, usual: &str| {
            let special = self.targets.iter().filter(|target| of(target) != usual);
            let mut entries: Vec<String> =
                special.map(|target| format!("{:?} = {}", self.chosen_name(&target.module), of(target))).collect();
            let mut seen = BTreeSet::new();
            entries.retain(|entry| seen.insert(entry.clone()));
            if !entries.is_empty() {
                lines.push(format!("{key} = {{ {} }}", entries.join(", ")));
            }
        };
        pattern("rank_pattern", rank_text, &usual_rank);
        pattern("alpha_pattern", alpha_text, &usual_alpha);
        lines
    }

    /// Whether experts have branches of stacks (gpt-oss): then a recipe chooses stacks.
    fn has_stacks(&self) -> bool {
        self.modules.iter().any(|module| is_expert(module) && module.ends_with(".gate_up_proj"))
    }

    /// What a recipe calls a module.
    fn chosen_name(&self, module: &str) -> String {
        if self.has_stacks() { stack_of(module) } else { module.to_owned() }
    }

    /// The lines of the recipe that choose the branches' modules.
    fn target_lines(&self) -> Vec<String> {
        let chosen: BTreeSet<&str> = self.targets.iter().map(|target| target.module.as_str()).collect();
        if self.modules.iter().all(|module| chosen.contains(module.as_str()) != is_of_vocabulary(module)) {
            return vec!["target_modules = \"all-linear\"".to_owned()];
        }
        let layers: BTreeSet<usize> = chosen.iter().filter_map(|module| layer_of(module)).collect();
        let all_layers: BTreeSet<usize> = self.modules.iter().filter_map(|module| layer_of(module)).collect();
        let has_stacks = self.has_stacks();
        let named = |module: &str| if has_stacks { stack_of(module) } else { module.to_owned() };
        let mut own: Vec<String> = self.targets.iter().map(|target| named(&target.module)).collect();
        let is_stack = |module: &String| has_stacks && is_expert(module);
        let (stacks, others): (Vec<String>, Vec<String>) = own.iter().cloned().partition(is_stack);
        let mut names = last_parts(&others);
        names.extend(last_parts(&stacks).iter().map(|part| format!("experts.{part}")));
        // What the short names choose in these layers.
        let ends = |module: &str| names.iter().any(|name| is_named(&named(module), name));
        // Modules outside of the layers are chosen by short names if all layers are.
        let in_layers = |module: &str| layer_of(module).map_or(layers == all_layers, |layer| layers.contains(&layer));
        let short = self.modules.iter().filter(|module| ends(module) && in_layers(module)).count();
        if short != chosen.len() {
            let mut seen = BTreeSet::new();
            own.retain(|module| seen.insert(module.clone()));
            return vec![format!("target_modules = {own:?}")];
        }
        let mut lines = vec![format!("target_modules = {names:?}")];
        if layers != all_layers {
            lines.push(format!("layers_to_transform = {:?}", layers.iter().collect::<Vec<_>>()));
        }
        lines
    }
}

fn rank_text(target: &LoraTarget) -> String {
    target.rank.to_string()
}

fn alpha_text(target: &LoraTarget) -> String {
    write::whole(target.alpha).to_string()
}

impl Model {
    /// Attaches an adapter for use (evaluation, generation, merging).
    ///
    /// # Errors
    /// If the device fails, or a row of a weight cannot have a magnitude for DoRA; if this process holds slices
    /// of layers, and the adapter has DoRA on a layer whose inputs are split.
    ///
    /// # Panics
    /// If the adapter was read for another model.
    pub fn attach(&mut self, adapter: &Adapter) -> Result<(), ModelError> {
        self.start_from(adapter, adapter.adaptation(), 0)
    }

    /// As [`Model::add_adapter`], with the values of an adapter that has the same branches and
    /// modules.
    ///
    /// # Errors
    /// As [`Model::attach`].
    ///
    /// # Panics
    /// If the adapter was read for another model, or has other branches.
    pub fn start_from(&mut self, adapter: &Adapter, adaptation: Adaptation, seed: u64) -> Result<(), ModelError> {
        self.take_vocabulary(adapter.rows, &adapter.vocabulary)?;
        let is_sliced = self.placement().slice().is_some();
        if let Some(what) = is_sliced.then(|| adapter_not_in_slices(&self.config, adapter)).flatten() {
            return Err(ModelError::NotInSlices { what });
        }
        let is_shared = self.placement().stage().is_some();
        if let Some(what) = is_shared.then(|| not_in_stages(&self.config, &adaptation)).flatten() {
            let hint = "one rank can hold all layers, in memory or on its disk".to_owned();
            return Err(ModelError::NotExpressible { what, hint });
        }
        self.add_adapter(adaptation, seed)?;
        let values = self.own_of(&adapter.values);
        self.set_parameters(&values);
        Ok(())
    }
}
