//! Reads an adapter: every tensor gets its place, and settings and tensors are held against each
//! other.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use finetune_store::TensorFile;

use crate::adaptation::{TargetLayer, is_of_vocabulary, saved_modules, saved_tensors, target_layers};
use crate::adapter::files::{AdapterFiles, Format};
use crate::adapter::mlx_names;
use crate::adapter::settings::Settings;
use crate::adapter::stacked::{self, OfExpert};
use crate::adapter::tensors::{self, Branches, Parts};
use crate::adapter::{Adapter, RecordedBase};
use crate::branch::{EMBEDDING, OUTPUT};
use crate::config::ModelConfig;
use crate::error::{ModelError, list};
use crate::files::wrapper::{Spelling, module_in_text};
use crate::lora::LoraTarget;
use crate::parameters::{PREFIX, file_name};
use crate::vocabulary::FrozenMatrix;

impl Adapter {
    /// Reads an adapter for a model of this config. `directory` may be a run's: then it is the
    /// adapter that the run has published.
    ///
    /// # Errors
    /// If a file is missing or malformed, if settings and tensors do not fit each other or the
    /// model. Also if a setting means other arithmetic than LoRA, DoRA and modules trained in full.
    pub fn read(directory: &Path, config: &ModelConfig) -> Result<Adapter, ModelError> {
        let files = AdapterFiles::find(directory)?;
        let mut modules: Vec<String> = target_layers(config).into_iter().map(|layer| layer.module).collect();
        let linears = modules.len();
        modules.extend(stacked::parameters(config));
        let format = files.format;
        let path = files.tensors();
        let file = TensorFile::open(&path)?;
        let spelling = spelling_of(&file, config);
        let named: Vec<String> = modules.iter().map(|module| name_of(module, format, spelling, config)).collect();
        let mut settings = Settings::read(&files, &named, config.tied_embeddings)?;
        modules.truncate(linears);
        let in_text = |module: &str| match config.wrapper {
            Some(_) => module_in_text(module).into_owned(),
            None => module.to_owned(),
        };
        let branches = Branches::sort(&file, files.format, &path, in_text)?;
        settings.targets.take_names(branches.by_module.keys().map(|(module, _)| module.as_str()));
        let rows = rows(&branches).unwrap_or(config.vocabulary);
        let config = &ModelConfig { vocabulary: rows, ..config.clone() };
        let adapter = Adapter {
            targets: Vec::new(),
            shapes: Vec::new(),
            saved: Vec::new(),
            values: Vec::new(),
            vocabulary: Vec::new(),
            rows,
            base: RecordedBase::read(&files.directory, &settings.config),
            notices: settings.notices.clone(),
            modules,
        };
        let mut reader = Reader { config, settings: &settings, path, format, spelling, branches, adapter };
        reader.branches()?;
        reader.saved()?;
        reader.vocabulary()?;
        reader.finish()
    }
}

/// How PEFT's settings call modules: as the tensors do. In a multimodal model both may be named as the text model
/// does it alone.
fn spelling_of(file: &TensorFile, config: &ModelConfig) -> Spelling {
    let names = file.names().map(|name| name.strip_prefix(PREFIX).unwrap_or(name));
    let usual = if config.is_named_inside() { Spelling::Inside } else { Spelling::Text };
    config.wrapper.as_ref().and_then(|_| Spelling::of(names)).unwrap_or(usual)
}

/// What the settings call a module of the text model.
fn name_of(module: &str, format: Format, spelling: Spelling, config: &ModelConfig) -> String {
    match format {
        Format::Peft => spelling.name(module),
        Format::Mlx => mlx_names::of_branch(module, config).name,
    }
}

/// Rows of the embedding or the output layer, if the file has one of them.
fn rows(branches: &Branches<'_>) -> Option<usize> {
    let modules = [EMBEDDING, OUTPUT].into_iter();
    let names = modules.flat_map(|module| [format!("{module}.weight"), format!("{module}.base_layer.weight")]);
    let mut views = names.filter_map(|name| branches.others.get(&name));
    views.find_map(|view| view.shape.first().copied().filter(|_| view.shape.len() == 2))
}

/// An adapter that is being read. What has found its place is taken out of `branches`.
struct Reader<'a> {
    config: &'a ModelConfig,
    settings: &'a Settings,
    path: PathBuf,
    format: Format,
    spelling: Spelling,
    branches: Branches<'a>,
    adapter: Adapter,
}

impl Reader<'_> {
    fn keys<T>(&self, what: &'static str, names: Vec<String>) -> Result<T, ModelError> {
        Err(ModelError::AdapterKeys { path: self.path.clone(), what, names })
    }

    /// The branches of single experts that the file holds in stacks, by module.
    fn of_experts(&mut self, layers: &[TargetLayer]) -> Result<BTreeMap<String, OfExpert>, ModelError> {
        match self.format {
            Format::Peft => stacked::take(&mut self.branches, self.settings, self.config, self.spelling),
            Format::Mlx => mlx_names::take(&mut self.branches, self.settings, self.config, layers),
        }
    }

    /// The branches of all layers.
    fn branches(&mut self) -> Result<(), ModelError> {
        let (mut halves, mut unnamed, mut absent) = (Vec::new(), Vec::new(), Vec::new());
        let layers = target_layers(self.config);
        let mut of_experts = self.of_experts(&layers)?;
        for layer in layers {
            let module = &layer.module;
            let named = name_of(module, self.format, self.spelling, self.config);
            if let Some(OfExpert { target, a, b }) = of_experts.remove(module) {
                self.adapter.targets.push(target);
                self.adapter.shapes.push((layer.outputs, layer.inputs));
                self.adapter.values.extend(a);
                self.adapter.values.extend(b);
                continue;
            }
            let is_embedding = module == EMBEDDING;
            let expected = self.settings.expects(&named);
            let in_file = if self.format == Format::Mlx { &named } else { module };
            let Some(Parts { found }) = self.branches.by_module.remove(&(in_file.clone(), is_embedding)) else {
                absent.extend((expected == Some(true)).then(|| module.clone()));
                continue;
            };
            let has_a = found[0].is_some();
            let names = if is_embedding { ["lora_embedding_A", "lora_embedding_B"] } else { ["lora_A", "lora_B"] };
            let [Some(a), Some(b), magnitude] = found else {
                halves.push(file_name(module, names[usize::from(has_a)]));
                continue;
            };
            unnamed.extend((expected == Some(false)).then(|| module.clone()));
            let (a, b, rank) = tensors::values(&a, &b, (layer.outputs, layer.inputs), self.format)?;
            let target = self.settings.target(&named, rank)?;
            let target = LoraTarget { module: module.clone(), ..target };
            let use_dora = target.use_dora;
            if use_dora && is_of_vocabulary(module) {
                let (path, value) = (self.path.clone(), format!("true on `{module}`"));
                return Err(ModelError::Setting { path, key: "use_dora", value });
            }
            self.adapter.targets.push(target);
            self.adapter.shapes.push((layer.outputs, layer.inputs));
            self.adapter.values.extend(a);
            self.adapter.values.extend(b);
            match magnitude {
                Some(magnitude) if use_dora => {
                    self.adapter.values.extend(tensors::of_shape(&magnitude, &[layer.outputs])?);
                }
                None if use_dora => {
                    return self
                        .keys("magnitudes of DoRA are missing", vec![file_name(module, "lora_magnitude_vector")]);
                }
                Some(magnitude) => {
                    return self.keys("magnitudes, although use_dora is not set", vec![magnitude.name.to_owned()]);
                }
                None => {}
            }
        }
        if !halves.is_empty() {
            return self.keys("the other half of a branch is missing", halves);
        }
        if !unnamed.is_empty() {
            return self.keys("branches that the settings do not name, so that others leave them out", unnamed);
        }
        if !absent.is_empty() {
            self.adapter.notices.push(format!(
                "{}: the settings name branches that it has not, so these layers stay as they are: {}",
                self.path.display(),
                list(&absent)
            ));
        }
        Ok(())
    }

    /// The modules that were trained in full.
    fn saved(&mut self) -> Result<(), ModelError> {
        let mut names = Vec::new();
        for name in &self.settings.saved {
            match saved_modules(std::slice::from_ref(name), self.config) {
                Ok(_) => names.push(name.clone()),
                Err(error) => self.adapter.notices.push(format!("{}: {error}", self.path.display())),
            }
        }
        if self.settings.ties {
            // PEFT writes both, with the same values.
            let modules = saved_modules(&names, self.config)?;
            names.extend(modules.iter().filter(|module| is_of_vocabulary(module)).map(|_| OUTPUT.to_owned()));
        }
        self.adapter.saved = saved_modules(&names, self.config)?;
        for (name, shape) in saved_tensors(self.config, &self.adapter.adaptation()) {
            let Some(view) = self.branches.others.remove(&name) else {
                return self.keys("a tensor of modules_to_save is missing", vec![name]);
            };
            self.adapter.values.extend(tensors::of_shape(&view, &shape)?);
        }
        Ok(())
    }

    /// The embedding and the output layer, if PEFT saved them as they were: beside their branches,
    /// or because rows were added.
    fn vocabulary(&mut self) -> Result<(), ModelError> {
        for module in [EMBEDDING, OUTPUT] {
            let names = [format!("{module}.base_layer.weight"), format!("{module}.weight")];
            let Some(view) = names.iter().find_map(|name| self.branches.others.remove(name)) else { continue };
            let shape = [self.config.vocabulary, self.config.hidden_size];
            let values = tensors::of_shape(&view, &shape)?;
            self.adapter.vocabulary.push(FrozenMatrix { module: module.to_owned(), shape, values });
        }
        if let [one, other] = self.adapter.vocabulary.as_slice()
            && self.config.tied_embeddings
            && one.values != other.values
        {
            let what = "embedding and output layer differ, and are one matrix in the base".to_owned();
            return Err(ModelError::AdapterParts { path: self.path.clone(), what });
        }
        Ok(())
    }

    fn finish(self) -> Result<Adapter, ModelError> {
        let parts = self.branches.by_module.values().flat_map(|parts| parts.found.iter().flatten());
        let foreign = self.branches.others.values().chain(parts);
        let foreign: Vec<String> = foreign.map(|view| view.name.to_owned()).collect();
        if !foreign.is_empty() {
            return self.keys("tensors that belong to no LoRA branch of this model", foreign);
        }
        if self.adapter.targets.is_empty() {
            return self.keys("it has no LoRA branch at all", vec![]);
        }
        Ok(self.adapter)
    }
}
