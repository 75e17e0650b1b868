//! PEFT's adapter format: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Every key of a file is accounted for in both directions: one that belongs to no module, and one that
//! is missing, are errors.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use finetune_store::{Dtype, TensorFile, encode_tensors};
use serde_json::{Value, json};

pub use crate::base::BaseCheck;
use crate::base::{BaseName, RecordedBase};
use crate::config::ModelConfig;
use crate::layout::Layout;
use crate::load::to_f32;
use crate::lora::{LoraTarget, LoraTargets};
use crate::model::{Model, Trained};
use crate::weights::expected_tensors;
use crate::{ModelError, load};

pub const CONFIG_FILE: &str = "adapter_config.json";
pub const TENSOR_FILE: &str = "adapter_model.safetensors";
/// Largest adapter_config.json that is read, in bytes.
const LIMIT: u64 = 1 << 20;

/// Names of all linear layers inside the decoder, in model order.
pub fn linear_modules(config: &ModelConfig) -> Vec<String> {
    expected_tensors(config)
        .iter()
        .filter(|(name, shape)| shape.len() == 2 && name.starts_with("model.layers."))
        .filter_map(|(name, _)| name.strip_suffix(".weight").map(str::to_owned))
        .collect()
}

/// The name in PEFT's file of a module's `lora_A` or `lora_B`.
pub(crate) fn file_name(module: &str, part: &str) -> String {
    format!("base_model.model.{module}.{part}.weight")
}

/// An adapter as read from a directory: its branches in model order, and their values in the order of the
/// layout that [`Model::add_lora`] makes of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    pub targets: LoraTargets,
    /// (outputs, inputs) of each target's layer.
    pub shapes: Vec<(usize, usize)>,
    pub values: Vec<f32>,
    pub base: RecordedBase,
    pub notices: Vec<String>,
}

impl Adapter {
    /// Reads a PEFT adapter for a model of this config.
    pub fn read(directory: &Path, config: &ModelConfig) -> Result<Adapter, ModelError> {
        let settings = Settings::read(directory)?;
        let path = directory.join(TENSOR_FILE);
        let file = TensorFile::open(&path)?;
        let shapes: BTreeMap<String, Vec<usize>> = expected_tensors(config).into_iter().collect();
        let mut left: BTreeSet<&str> = file.names().collect();
        let (mut targets, mut shapes_found, mut values, mut missing) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for module in linear_modules(config) {
            let names = [file_name(&module, "lora_A"), file_name(&module, "lora_B")];
            let [a, b] = names.each_ref().map(|name| file.get(name));
            let (a, b) = match (a, b) {
                (None, None) => continue,
                (Some(a), Some(b)) => (a, b),
                (None, _) => {
                    missing.push(names[0].clone());
                    continue;
                }
                (_, None) => {
                    missing.push(names[1].clone());
                    continue;
                }
            };
            let base = &shapes[&format!("{module}.weight")];
            let rank = a.shape.first().copied().unwrap_or(0);
            for (view, expected) in [(&a, vec![rank, base[1]]), (&b, vec![base[0], rank])] {
                if view.shape != expected.as_slice() || rank == 0 {
                    let (name, found) = (view.name.to_owned(), view.shape.to_vec());
                    return Err(ModelError::Shape { path, name, found, expected });
                }
                values.extend(to_f32(view, &path)?);
                left.remove(view.name);
            }
            let target = settings.target(&module, rank, directory)?;
            targets.push(target);
            shapes_found.push((base[0], base[1]));
        }
        let keys = |what, names| Err(ModelError::AdapterKeys { path: path.clone(), what, names });
        if !missing.is_empty() {
            return keys("the other half of a branch is missing", missing);
        }
        if !left.is_empty() {
            let names = left.into_iter().map(str::to_owned).collect();
            return keys("tensors that belong to no LoRA branch of this model", names);
        }
        if targets.is_empty() {
            return keys("no LoRA branch at all", vec![]);
        }
        Ok(Adapter { targets, shapes: shapes_found, values, base: RecordedBase::default(), notices: Vec::new() })
    }

    pub fn check_base(&self, _base: &Path) -> Result<BaseCheck, ModelError> {
        Ok(BaseCheck::Unknown)
    }

    /// Checks that the adapter has just the branches that a recipe chose.
    pub fn expect_targets(&self, wanted: &LoraTargets, directory: &Path) -> Result<(), ModelError> {
        let path = directory.join(CONFIG_FILE);
        let differs = |key, found: String, expected: String| {
            Err(ModelError::AdapterDiffers { path: path.clone(), key, found, expected })
        };
        let modules = |targets: &LoraTargets| targets.iter().map(|t| t.module.clone()).collect::<Vec<_>>();
        let (found, expected) = (modules(&self.targets), modules(wanted));
        if found != expected {
            let only = |a: &[String], b: &[String]| {
                a.iter()
                    .find(|name| !b.contains(name))
                    .map_or("none beyond those".to_owned(), |name| format!("`{name}`"))
            };
            return differs("target_modules", only(&found, &expected), only(&expected, &found));
        }
        for (found, expected) in self.targets.iter().zip(wanted) {
            if found.rank != expected.rank {
                return differs("rank", found.rank.to_string(), expected.rank.to_string());
            }
            if found.scale() != expected.scale() {
                let show = |t: &LoraTarget| format!("{} (use_rslora = {})", t.alpha, t.use_rslora);
                return differs("alpha", show(found), show(expected));
            }
        }
        Ok(())
    }
}

/// The part of adapter_config.json that fixes the arithmetic.
struct Settings {
    alpha: f64,
    use_rslora: bool,
    alpha_pattern: Vec<(fancy_regex::Regex, f64)>,
}

impl Settings {
    fn read(directory: &Path) -> Result<Settings, ModelError> {
        let path = directory.join(CONFIG_FILE);
        let malformed = |what: String| ModelError::Malformed { path: path.clone(), what };
        let text = load::read_text(&path, LIMIT)?;
        let config: Value = serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
        if let Some(kind) = config.get("peft_type").and_then(Value::as_str)
            && kind != "LORA"
        {
            return Err(ModelError::Setting { path, key: "peft_type", value: kind.to_owned() });
        }
        let is_set = |key: &str| match config.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::String(text)) => text != "none",
            Some(_) => true,
        };
        // Settings under which the tensors would mean something else than plain LoRA branches.
        const OTHER_ARITHMETIC: [&str; 15] = [
            "use_dora",
            "fan_in_fan_out",
            "bias",
            "modules_to_save",
            "lora_bias",
            "layer_replication",
            "megatron_config",
            "use_qalora",
            "use_bdlora",
            "kasa_config",
            "velora_config",
            "monteclora_config",
            "alora_invocation_tokens",
            "arrow_config",
            "trainable_token_indices",
        ];
        for key in OTHER_ARITHMETIC {
            if is_set(key) {
                return Err(ModelError::Setting { path, key, value: config[key].to_string() });
            }
        }
        // These start from a base that was changed along with the adapter.
        if let Some(init) = config.get("init_lora_weights").and_then(Value::as_str)
            && !["gaussian", "eva", "orthogonal"].contains(&init)
        {
            return Err(ModelError::Setting { path, key: "init_lora_weights", value: init.to_owned() });
        }
        let alpha = config.get("lora_alpha").and_then(Value::as_f64);
        let mut alpha_pattern = Vec::new();
        if let Some(table) = config.get("alpha_pattern").and_then(Value::as_object) {
            for (pattern, alpha) in table {
                match (crate::lora::ending(pattern), alpha.as_f64()) {
                    (Ok(regex), Some(alpha)) => alpha_pattern.push((regex, alpha)),
                    _ => return Err(malformed(format!("alpha_pattern: `{pattern}` cannot be used"))),
                }
            }
        }
        Ok(Settings {
            alpha: alpha.ok_or_else(|| malformed("`lora_alpha` is missing".to_owned()))?,
            use_rslora: is_set("use_rslora"),
            alpha_pattern,
        })
    }

    fn target(&self, module: &str, rank: usize, directory: &Path) -> Result<LoraTarget, ModelError> {
        let special = self.alpha_pattern.iter().find(|(regex, _)| regex.is_match(module).unwrap_or(false));
        let alpha = special.map_or(self.alpha, |(_, alpha)| *alpha);
        if !alpha.is_finite() {
            let what = format!("the alpha of `{module}` is not a finite number");
            return Err(ModelError::Malformed { path: directory.join(CONFIG_FILE), what });
        }
        Ok(LoraTarget { module: module.to_owned(), rank, alpha, use_rslora: self.use_rslora })
    }
}

impl Model {
    /// Attaches an adapter for use (evaluation, generation, merging).
    pub fn attach(&mut self, adapter: &Adapter) {
        self.add_lora(adapter.targets.clone(), 0.0, 0);
        self.set_parameters(&adapter.values);
    }

    /// The files of a checkpoint of these parameter values: a PEFT adapter, or with full training the weights
    /// in f32 with their config. `base` is what adapter_config.json calls the base model.
    pub fn files(&self, values: &[f32], base: &BaseName) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
        let tensors = encode(self.layout(), values)?;
        match &self.trained {
            Trained::Nothing => Ok(vec![]),
            Trained::Lora { targets, dropout } => {
                let config = adapter_config(targets, *dropout, base, &self.linear_modules());
                let config = serde_json::to_vec_pretty(&config).expect("a JSON value can be written");
                Ok(vec![(CONFIG_FILE.to_owned(), config), (TENSOR_FILE.to_owned(), tensors)])
            }
            Trained::All => {
                let mut files = crate::merge::companion_files(&self.directory, Dtype::F32, &[])?;
                files.push(("model.safetensors".to_owned(), tensors));
                Ok(files)
            }
        }
    }

    /// The values of the trained parameters as [`Model::files`] wrote them.
    pub fn read_values(&self, directory: &Path) -> Result<Vec<f32>, ModelError> {
        let name = if self.trained == Trained::All { "model.safetensors" } else { TENSOR_FILE };
        read_flat(&directory.join(name), self.layout())
    }
}

/// Flat values as safetensors under the names of the layout.
pub fn encode(layout: &Layout, values: &[f32]) -> Result<Vec<u8>, ModelError> {
    let tensors: Vec<_> = layout
        .iter()
        .map(|parameter| {
            let bytes = load::from_f32(&values[parameter.range.clone()], Dtype::F32);
            (parameter.name.clone(), Dtype::F32, parameter.shape.clone(), Cow::Owned(bytes))
        })
        .collect();
    Ok(encode_tensors(&tensors, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?)
}

/// Reads what [`encode`] wrote: every parameter of the layout in its shape, nothing else.
pub fn read_flat(path: &Path, layout: &Layout) -> Result<Vec<f32>, ModelError> {
    let file = TensorFile::open(path)?;
    let mut values = Vec::with_capacity(layout.len());
    let keys = |what, names| Err(ModelError::AdapterKeys { path: path.to_owned(), what, names });
    for parameter in layout.iter() {
        let Some(view) = file.get(&parameter.name) else {
            return keys("a parameter is missing", vec![parameter.name.clone()]);
        };
        if view.shape != parameter.shape.as_slice() {
            let (found, expected) = (view.shape.to_vec(), parameter.shape.clone());
            return Err(ModelError::Shape { path: path.to_owned(), name: parameter.name.clone(), found, expected });
        }
        values.extend(to_f32(&view, path)?);
    }
    let known: BTreeSet<&str> = layout.iter().map(|parameter| parameter.name.as_str()).collect();
    let extra: Vec<String> = file.names().filter(|name| !known.contains(name)).map(str::to_owned).collect();
    if extra.is_empty() { Ok(values) } else { keys("tensors that are no parameter of this run", extra) }
}

/// adapter_config.json as PEFT writes it.
fn adapter_config(targets: &LoraTargets, dropout: f64, base: &BaseName, modules: &[String]) -> Value {
    let first = &targets[0];
    let (mut ranks, mut alphas) = (serde_json::Map::new(), serde_json::Map::new());
    for target in targets {
        if target.rank != first.rank {
            ranks.insert(target.module.clone(), json!(target.rank));
        }
        if target.alpha != first.alpha {
            alphas.insert(target.module.clone(), whole(target.alpha));
        }
    }
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "inference_mode": true,
        "r": first.rank,
        "lora_alpha": whole(first.alpha),
        "lora_dropout": dropout,
        "target_modules": short_names(targets, modules),
        "bias": "none",
        "use_rslora": first.use_rslora,
        "use_dora": false,
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": null,
        "layers_to_transform": null,
        "layers_pattern": null,
    })
}

/// PEFT writes alpha as an integer where it is one.
fn whole(alpha: f64) -> Value {
    if alpha.fract() == 0.0 && alpha.abs() < 1e15 { json!(alpha as i64) } else { json!(alpha) }
}

/// The last parts of the module names where these choose the same modules, else the full names.
fn short_names(targets: &LoraTargets, modules: &[String]) -> Vec<String> {
    let last = |name: &str| name.rsplit('.').next().unwrap_or(name).to_owned();
    let short: BTreeSet<String> = targets.iter().map(|target| last(&target.module)).collect();
    let chosen = modules.iter().filter(|module| short.contains(&last(module))).count();
    if chosen == targets.len() {
        short.into_iter().collect()
    } else {
        targets.iter().map(|target| target.module.clone()).collect()
    }
}
