//! The files of a training's result, and reading them again bit by bit.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use finetune_store::{Dtype, TensorFile, encode_tensors};
use serde_json::{Value, json};

use crate::adapter::{BaseName, CONFIG_FILE, TENSOR_FILE};
use crate::layout::Layout;
use crate::load::to_f32;
use crate::lora::LoraTargets;
use crate::model::{Model, Trained};
use crate::{ModelError, companions, load};

impl Model {
    /// The files of a checkpoint of these parameter values: a PEFT adapter, or with full training the weights
    /// in f32 with their config and the base's companions. `base` is what adapter_config.json calls the base model.
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
                let mut files = companions::companion_files(&self.directory, Dtype::F32, &[])?;
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
        values.extend(to_f32(&view)?);
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
pub(super) fn whole(alpha: f64) -> Value {
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
