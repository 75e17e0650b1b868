//! The files of a trained model or adapter.

use std::collections::{BTreeSet, HashSet};

use finetune_store::Dtype;
use serde_json::{Value, json};

use crate::adaptation::{Adaptation, is_expert, is_taken_for_expert, saved_modules, stack_of, target_layers};
use crate::adapter::stacked_file::stacked;
use crate::adapter::{BaseName, CONFIG_FILE, TENSOR_FILE};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::companions::{amend_config, companion_files};
use crate::files::wrapper::name_inside;
use crate::flat_file::{FlatFile, FlatTensor};
use crate::lora::{LoraTarget, LoraTargets};
use crate::model::{Model, Trained};

/// The file of all weights.
const WEIGHTS_FILE: &str = "model.safetensors";

impl Model {
    /// The files of a checkpoint but for that of the parameter values. With that one they are a PEFT
    /// adapter, or with full training the weights in f32 with their config and the base's companions.
    /// `base` is what adapter_config.json calls the base model.
    ///
    /// # Errors
    /// If the companions of the base cannot be read.
    pub fn files_beside(&self, base: &BaseName) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
        match &self.trained {
            Trained::Nothing => Ok(vec![]),
            Trained::Adapter(adaptation) => {
                let config = adapter_config(adaptation, base, &self.config);
                let config = serde_json::to_vec_pretty(&config).expect("a JSON value can be written");
                Ok(vec![(CONFIG_FILE.to_owned(), config)])
            }
            Trained::All => {
                let mut files = companion_files(&self.directory, Dtype::F32, &[])?;
                if self.has_own_vocabulary {
                    amend_config(&mut files, |config| config["vocab_size"] = json!(self.config.vocabulary));
                }
                Ok(files)
            }
        }
    }

    /// The file of the values of all trained parameters. `None` if none are trained.
    ///
    /// # Errors
    /// [`ModelError::NotExpressible`] if PEFT's format has no place for them.
    pub fn values_file(&self) -> Result<Option<FlatFile>, ModelError> {
        let layout = self.spread.whole();
        let adaptation = match &self.trained {
            Trained::Nothing => return Ok(None),
            Trained::Adapter(adaptation) => adaptation,
            Trained::All => return Ok(Some(FlatFile::of(WEIGHTS_FILE, layout))),
        };
        let mut file = match stacked(TENSOR_FILE, layout, &self.config)? {
            Some(file) => file,
            None => FlatFile::of(TENSOR_FILE, layout),
        };
        let frozen = self.own_vocabulary(adaptation).into_iter().map(|(module, name, shape)| FlatTensor {
            name,
            shape,
            parts: Vec::new(),
            take_turns: false,
            frozen: Some(module),
        });
        file.tensors.extend(frozen);
        Ok(Some(file))
    }
}

/// adapter_config.json as PEFT writes it. Some branches are those of parameters for PEFT: it names these apart.
pub(super) fn adapter_config(adaptation: &Adaptation, base: &BaseName, config: &ModelConfig) -> Value {
    // The last parts of names would choose modules of the other parts of a multimodal model too.
    let named = |module: &String| if config.is_named_inside() { name_inside(module) } else { module.clone() };
    let parameter = |target: &LoraTarget| match target {
        _ if config.family.has_expert_parameters() && is_expert(&target.module) => Some(stack_of(&target.module)),
        // PEFT has no DoRA of parameters.
        _ if !target.use_dora && is_taken_for_expert(target, config) => {
            Some(format!("{}.weight", named(&target.module)))
        }
        _ => None,
    };
    let (of_parameters, targets): (LoraTargets, LoraTargets) =
        adaptation.targets.iter().cloned().partition(|target| parameter(target).is_some());
    // Of an adapter that has branches of stacked experts alone there is none.
    let none = LoraTarget { module: String::new(), rank: 8, alpha: 8.0, use_rslora: false, use_dora: false };
    let first = targets.first().or(of_parameters.first()).unwrap_or(&none);
    let chosen: Vec<String> = match config.is_named_inside() {
        true => targets.iter().map(|target| named(&target.module)).collect(),
        false => {
            let apart: HashSet<&str> = of_parameters.iter().map(|target| target.module.as_str()).collect();
            let modules = target_layers(config).into_iter().map(|layer| layer.module);
            short_names(&targets, &modules.filter(|module| !apart.contains(module.as_str())).collect::<Vec<_>>())
        }
    };
    let saved = saved_names(&adaptation.saved, config).map(|names| match config.is_named_inside() {
        true => adaptation.saved.iter().map(named).collect(),
        false => names,
    });
    let (mut ranks, mut alphas) = (serde_json::Map::new(), serde_json::Map::new());
    let (mut parameters, mut seen) = (Vec::new(), HashSet::new());
    for target in targets.iter().chain(&of_parameters) {
        let parameter = parameter(target);
        parameters.extend(parameter.clone().filter(|parameter| seen.insert(parameter.clone())));
        let name = parameter.unwrap_or_else(|| named(&target.module));
        if target.rank != first.rank {
            ranks.insert(name.clone(), json!(target.rank));
        }
        if target.alpha != first.alpha {
            alphas.insert(name, whole(target.alpha));
        }
    }
    let mut written = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "inference_mode": true,
        "r": first.rank,
        "lora_alpha": whole(first.alpha),
        // PEFT refuses dropout beside branches of parameters.
        "lora_dropout": if parameters.is_empty() { adaptation.dropout } else { 0.0 },
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
    });
    if !parameters.is_empty() {
        written["target_parameters"] = json!(parameters);
    }
    written
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
