//! The base of a run: its config, what of it is packed, its tokenizer.

use std::path::Path;

use finetune_model::{BaseForm, FloatType, Model, ModelConfig, ModelError, PackedSizes, stated_packing, stated_type};
use finetune_recipe::Method;
use finetune_store::{StoreError, human_bytes};

use super::{Examiner, Extent, kept};
use crate::assumed;
use crate::base_model::{has_weights, stored_type};
use crate::device_plan::DevicePlan;
use crate::error::TrainError;
use crate::router_loss;
use crate::rows::{open_tokenizer, vocabulary};

impl Examiner<'_> {
    /// Config, names and shapes of the weights, the device, the tokenizer.
    pub(super) fn look_at_model(&mut self) {
        let Some(directory) = self.found.directory.clone() else { return };
        self.found.config = self.checked_config(&directory);
        if let Some(config) = &self.found.config {
            self.found.notices.extend(config.notices.iter().cloned());
        }
        if let Some(config) = &self.found.config {
            let has_only_lora = config.delta.is_some() || config.per_layer.is_some();
            let only_lora = match (&config.experts, &config.wrapper) {
                (Some(_), _) => Some(format!("the experts of {} are trained", config.family.architecture)),
                (None, Some(wrapper)) => Some(format!("the text model of {} is trained", wrapper.class)),
                (None, None) if has_only_lora => Some(format!("{} is trained", config.family.architecture)),
                (None, None) => None,
            };
            if let Some(what) = only_lora.filter(|_| self.recipe.train.method == Method::Full) {
                self.found.problems.push(TrainError::OnlyLora { what });
            }
            let of_routers = kept(&mut self.found.problems, router_loss::check(self.recipe, config));
            self.found.notices.extend(of_routers.flatten());
            self.stored = match self.has_no_weights {
                true => stated_type(&directory).unwrap_or(FloatType::BF16),
                false => stored_type(&directory),
            };
            let device_plan = DevicePlan::choose(&self.recipe.model, self.host, self.stored, config.family);
            self.found.device_plan = self.found.keep(device_plan);
        }
        if let Some(device_plan) = &self.found.device_plan {
            self.found.notices.extend(device_plan.notices.iter().cloned());
        }
        if self.has_no_weights {
            self.found.assumptions.push(assumed::no_weights(&directory, self.stored));
        }
        self.look_at_form(&directory);
        self.found.tokenizer = self.found.keep(open_tokenizer(self.recipe, &directory));
        if let Some(Some(tokenizer)) = &self.found.tokenizer {
            self.found.notices.extend(tokenizer.notices().iter().cloned());
            if let Some(config) = &mut self.found.config {
                let rows = vocabulary(self.recipe, config, Some(tokenizer));
                self.has_new_rows = rows != config.vocabulary;
                config.vocabulary = rows;
            }
        }
    }

    /// The config, checked against the weights. If there are none, `run` refuses the model; sizes are those of the
    /// config.
    fn checked_config(&mut self, directory: &Path) -> Option<ModelConfig> {
        if self.recipe.train.method == Method::Full && !has_weights(directory) {
            return self.found.keep(ModelConfig::load(directory).map_err(TrainError::from));
        }
        let checked = match self.extent {
            Extent::Validate => Model::check(directory),
            Extent::Run | Extent::Plan => Model::check_shapes(directory),
        };
        let error = match checked {
            Ok(config) => return Some(config),
            Err(error) => error,
        };
        let has_none = matches!(error, ModelError::Store(StoreError::NoModel { only_pickle: false, .. }));
        let may_go_on = has_none && self.extent != Extent::Run;
        let config = if may_go_on { ModelConfig::load(directory).ok() } else { None };
        self.has_no_weights = config.is_some();
        if self.extent != Extent::Plan || config.is_none() {
            self.found.problems.push(TrainError::from_base(error));
        }
        config
    }

    /// How the base's matrices are packed, in its files or while they are loaded.
    fn look_at_form(&mut self, directory: &Path) {
        let Some(device_plan) = &self.found.device_plan else { return };
        let quantization = device_plan.placement.quantization();
        let form = match &self.found.config {
            Some(config) if self.has_no_weights => {
                Ok(BaseForm::of_config(config, &stated_packing(directory), quantization, self.stored))
            }
            _ if has_weights(directory) => Model::form(directory, quantization).map_err(TrainError::from_base),
            _ => return,
        };
        let Some(form) = self.found.keep(form) else { return };
        if let Some(words) = &form.words {
            let path = directory.display();
            match self.recipe.model.quantization.filter(|_| form.is_packed_in_files) {
                None => self.found.notices.push(format!("{path}: {words}")),
                Some(quantization) => self.found.notices.push(format!(
                    "{path}: {words}; model.quantization = {} changes nothing, as the base is packed already",
                    quantization.as_str()
                )),
            }
            if self.recipe.train.method == Method::Full {
                let (path, form) = (directory.to_owned(), words.clone());
                self.found.problems.push(TrainError::PackedBase { path, form });
            }
        }
        self.found.form = Some(form);
    }

    /// Sizes of the packed matrices. Embedding and output layer with new rows are decoded.
    pub(super) fn packed_sizes(&mut self) -> PackedSizes {
        let (Some(form), Some(device_plan)) = (&self.found.form, &self.found.device_plan) else {
            return PackedSizes::default();
        };
        let BaseForm { packed, vocabulary, .. } = form;
        if !self.has_new_rows || vocabulary.elements == 0 {
            return *packed;
        }
        let compute = device_plan.placement.compute();
        let decoded = vocabulary.elements * compute.bytes() as u64;
        self.found.notices.push(format!(
            "data.add_tokens: the embedding is packed; with rows for new tokens it is held in {} and takes {} instead of {}",
            compute.name(),
            human_bytes(decoded),
            human_bytes(vocabulary.bytes)
        ));
        PackedSizes { bytes: packed.bytes - vocabulary.bytes + decoded, ..*packed }
    }
}
