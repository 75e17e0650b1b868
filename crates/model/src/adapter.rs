//! Adapters: PEFT's format (`adapter_config.json`, `adapter_model.safetensors`) and mlx-lm's.
//!
//! Settings and tensors are held against each other, and every tensor is accounted for. What PEFT
//! refuses or would leave out silently is an error. What PEFT warns of is a notice.

mod base;
mod combine;
mod files;
pub(crate) mod mlx;
mod peft;
mod settings;
mod targets;
mod tensors;
mod write;

use std::collections::BTreeSet;
use std::path::Path;

use finetune_store::TensorFile;

pub use self::base::{BaseCheck, BaseName, RecordedBase, base_digest};
use self::files::AdapterFiles;
use self::settings::Settings;
use self::tensors::Branches;
use crate::config::ModelConfig;
use crate::error::{ModelError, list};
use crate::lora::{LoraTarget, LoraTargets, is_named, last_parts, layer_of};
use crate::model::Model;
use crate::parameters::file_name;
use crate::tree::linear_layers;

/// The file of an adapter's settings.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The file of an adapter's tensors in PEFT's format.
pub const TENSOR_FILE: &str = "adapter_model.safetensors";

/// An adapter as read from a directory. Branches are in model order. Values are in the order of the
/// layout that [`Model::add_lora`] makes of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// The branches, in model order.
    pub targets: LoraTargets,
    /// (outputs, inputs) of each target's layer.
    pub shapes: Vec<(usize, usize)>,
    /// All values in f32, one target after the other: A [rank, inputs], then B [outputs, rank].
    pub values: Vec<f32>,
    /// What the adapter says about its base.
    pub base: RecordedBase,
    /// What a user should know about how the adapter was read.
    pub notices: Vec<String>,
    /// All linear layers of the model that it was read for.
    modules: Vec<String>,
}

impl Adapter {
    /// Reads an adapter for a model of this config. `directory` may be a run's: then it is the
    /// adapter that the run has published.
    ///
    /// # Errors
    /// If a file is missing or malformed, if settings and tensors do not fit each other or the
    /// model. Also if a setting means other arithmetic than plain LoRA.
    pub fn read(directory: &Path, config: &ModelConfig) -> Result<Adapter, ModelError> {
        let files = AdapterFiles::find(directory)?;
        let layers = linear_layers(config);
        let modules: Vec<String> = layers.iter().map(|layer| layer.module.clone()).collect();
        let settings = Settings::read(&files, &modules)?;
        let path = files.tensors();
        let keys = |what, names| Err(ModelError::AdapterKeys { path: path.clone(), what, names });
        let file = TensorFile::open(&path)?;
        let mut branches = Branches::sort(&file, files.format, &path)?;
        let mut adapter = Adapter {
            targets: Vec::new(),
            shapes: Vec::new(),
            values: Vec::new(),
            base: RecordedBase::read(&files.directory, &settings.config),
            notices: settings.notices.clone(),
            modules,
        };
        let (mut halves, mut unnamed, mut absent) = (Vec::new(), Vec::new(), Vec::new());
        for (module, layer) in adapter.modules.iter().zip(&layers) {
            let expected = settings.expects(module);
            let (a, b) = match branches.by_module.remove(module) {
                None => {
                    absent.extend((expected == Some(true)).then(|| module.clone()));
                    continue;
                }
                Some([Some(a), Some(b)]) => (a, b),
                Some([a, _]) => {
                    halves.push(file_name(module, if a.is_some() { "lora_B" } else { "lora_A" }));
                    continue;
                }
            };
            unnamed.extend((expected == Some(false)).then(|| module.clone()));
            let shape = (layer.outputs, layer.inputs);
            let (a, b, rank) = tensors::values(&a, &b, shape, files.format)?;
            adapter.targets.push(settings.target(module, rank)?);
            adapter.shapes.push(shape);
            adapter.values.extend(a);
            adapter.values.extend(b);
        }
        if !halves.is_empty() {
            return keys("the other half of a branch is missing", halves);
        }
        let foreign = branches.by_module.into_values().flatten().flatten().map(|view| view.name.to_owned());
        let foreign: Vec<String> = branches.others.into_iter().chain(foreign).collect();
        if !foreign.is_empty() {
            return keys("tensors that belong to no LoRA branch of this model", foreign);
        }
        if !unnamed.is_empty() {
            return keys("branches that the settings do not name, so that others leave them out", unnamed);
        }
        if adapter.targets.is_empty() {
            return keys("it has no LoRA branch at all", vec![]);
        }
        if !absent.is_empty() {
            adapter.notices.push(format!(
                "{}: the settings name branches that it has not, so these layers stay as they are: {}",
                path.display(),
                list(&absent)
            ));
        }
        Ok(adapter)
    }

    /// Checks that the adapter has exactly the branches that a recipe chose.
    ///
    /// # Errors
    /// [`ModelError::AdapterDiffers`] with the first difference, and the lines of `[lora]` that
    /// would fit.
    pub fn expect_targets(&self, wanted: &LoraTargets, directory: &Path) -> Result<(), ModelError> {
        let differs = |what: String| {
            let path = directory.join(CONFIG_FILE);
            Err(ModelError::AdapterDiffers { path, what, settings: self.recipe_lines() })
        };
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
        let mut pattern = |key: &str, of: fn(&LoraTarget) -> String, usual: &str| {
            let special = self.targets.iter().filter(|target| of(target) != usual);
            let entries: Vec<String> = special.map(|target| format!("{:?} = {}", target.module, of(target))).collect();
            if !entries.is_empty() {
                lines.push(format!("{key} = {{ {} }}", entries.join(", ")));
            }
        };
        pattern("rank_pattern", rank_text, &usual_rank);
        pattern("alpha_pattern", alpha_text, &usual_alpha);
        lines
    }

    /// The lines of the recipe that choose the branches' modules.
    fn target_lines(&self) -> Vec<String> {
        let chosen: BTreeSet<&str> = self.targets.iter().map(|target| target.module.as_str()).collect();
        if chosen.len() == self.modules.len() {
            return vec!["target_modules = \"all-linear\"".to_owned()];
        }
        let layers: BTreeSet<usize> = chosen.iter().filter_map(|module| layer_of(module)).collect();
        let all_layers: BTreeSet<usize> = self.modules.iter().filter_map(|module| layer_of(module)).collect();
        let own: Vec<String> = self.targets.iter().map(|target| target.module.clone()).collect();
        let names = last_parts(&own);
        // What the short names choose in these layers.
        let ends = |module: &str| names.iter().any(|name| is_named(module, name));
        let in_layers = |module: &str| layer_of(module).is_some_and(|layer| layers.contains(&layer));
        let short = self.modules.iter().filter(|module| ends(module) && in_layers(module)).count();
        if short != chosen.len() {
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
    /// # Panics
    /// If the adapter was read for another model.
    pub fn attach(&mut self, adapter: &Adapter) {
        self.add_lora(adapter.targets.clone(), 0.0, 0);
        self.set_parameters(&adapter.values);
    }
}
