//! The files of a trained model or adapter, and reading them again bit by bit.

use std::collections::BTreeSet;
use std::path::Path;

use finetune_store::Dtype;
use serde_json::{Value, json};

use crate::adaptation::{Adaptation, saved_modules, target_layers};
use crate::adapter::{BaseName, CONFIG_FILE, TENSOR_FILE};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::companions::{amend_config, companion_files};
use crate::files::wrapper::name_inside;
use crate::layout::{encode_flat, read_flat};
use crate::lora::{LoraTarget, LoraTargets};
use crate::model::{Model, Trained};

impl Model {
    /// The files of a checkpoint of these parameter values. They are a PEFT adapter, or with full
    /// training the weights in f32 with their config and the base's companions. `base` is what
    /// adapter_config.json calls the base model.
    ///
    /// # Errors
    /// If the companions of the base cannot be read, or the device fails.
    ///
    /// # Panics
    /// If `values` do not have the layout's length.
    pub fn files(&self, values: &[f32], base: &BaseName) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
        match &self.trained {
            Trained::Nothing => Ok(vec![]),
            Trained::Adapter(adaptation) => {
                let tensors = match self.with_own_vocabulary(adaptation)? {
                    (_, more) if more.is_empty() => encode_flat(self.layout(), values)?,
                    (layout, more) => encode_flat(&layout, &[values, &more].concat())?,
                };
                let config = adapter_config(adaptation, base, &self.config);
                let config = serde_json::to_vec_pretty(&config).expect("a JSON value can be written");
                Ok(vec![(CONFIG_FILE.to_owned(), config), (TENSOR_FILE.to_owned(), tensors)])
            }
            Trained::All => {
                let mut files = companion_files(&self.directory, Dtype::F32, &[])?;
                if self.has_own_vocabulary {
                    amend_config(&mut files, |config| config["vocab_size"] = json!(self.config.vocabulary));
                }
                files.push(("model.safetensors".to_owned(), encode_flat(self.layout(), values)?));
                Ok(files)
            }
        }
    }

    /// The values of the trained parameters, as [`Model::files`] wrote them.
    ///
    /// # Errors
    /// If the file is missing, damaged, or has other tensors than the layout.
    pub fn read_values(&self, directory: &Path) -> Result<Vec<f32>, ModelError> {
        let Trained::Adapter(adaptation) = &self.trained else {
            return read_flat(&directory.join("model.safetensors"), self.layout());
        };
        let (layout, _) = self.with_own_vocabulary(adaptation)?;
        let mut values = read_flat(&directory.join(TENSOR_FILE), &layout)?;
        values.truncate(self.layout().len());
        Ok(values)
    }
}

/// adapter_config.json as PEFT writes it.
pub(super) fn adapter_config(adaptation: &Adaptation, base: &BaseName, config: &ModelConfig) -> Value {
    let Adaptation { targets, dropout, .. } = adaptation;
    let modules: Vec<String> = target_layers(config).into_iter().map(|layer| layer.module).collect();
    // Of an adapter that has branches of stacked experts alone there is none.
    let none = LoraTarget { module: String::new(), rank: 8, alpha: 8.0, use_rslora: false, use_dora: false };
    let first = targets.first().unwrap_or(&none);
    // The last parts of names would choose modules of the other parts of a multimodal model too.
    let named = |module: &String| if config.is_named_inside() { name_inside(module) } else { module.clone() };
    let chosen = match config.is_named_inside() {
        true => targets.iter().map(|target| named(&target.module)).collect(),
        false => short_names(targets, &modules),
    };
    let saved = saved_names(&adaptation.saved, config).map(|names| match config.is_named_inside() {
        true => adaptation.saved.iter().map(named).collect(),
        false => names,
    });
    let (mut ranks, mut alphas) = (serde_json::Map::new(), serde_json::Map::new());
    for target in targets {
        if target.rank != first.rank {
            ranks.insert(named(&target.module), json!(target.rank));
        }
        if target.alpha != first.alpha {
            alphas.insert(named(&target.module), whole(target.alpha));
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
        "target_modules": chosen,
        "bias": "none",
        "use_rslora": first.use_rslora,
        "use_dora": first.use_dora,
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": saved,
        "layers_to_transform": null,
        "layers_pattern": null,
    })
}

/// PEFT writes alpha as an integer if it is one.
pub(super) fn whole(alpha: f64) -> Value {
    if alpha.fract() == 0.0 && alpha.abs() < 1e15 { json!(alpha as i64) } else { json!(alpha) }
}

/// The last parts of the module names if these choose the same modules, otherwise the full names.
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

/// As [`short_names`], for the modules that are trained in full: `None` if there are none.
fn saved_names(saved: &[String], config: &ModelConfig) -> Option<Vec<String>> {
    let last = |name: &String| name.rsplit('.').next().unwrap_or(name).to_owned();
    let short: BTreeSet<String> = saved.iter().map(last).collect();
    let short: Vec<String> = short.into_iter().collect();
    let is_same = saved_modules(&short, config).is_ok_and(|chosen| chosen == saved);
    (!saved.is_empty()).then(|| if is_same { short } else { saved.to_vec() })
}
