//! An adapter as PEFT's files, whatever it was read from.

use std::borrow::Cow;
use std::collections::BTreeMap;

use finetune_store::{Dtype, encode_tensors};

use crate::adaptation::{Adaptation, is_expert};
use crate::adapter::stacked::put_together;
use crate::adapter::write::adapter_config;
use crate::adapter::{Adapter, BaseName, CONFIG_FILE, IS_IN_MERGED, TENSOR_FILE};
use crate::branch::EMBEDDING;
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::floats::from_f32;
use crate::merge::branches;
use crate::parameters::{file_name, tensor_name};

impl Adapter {
    /// adapter_config.json and adapter_model.safetensors, in f32, for a base of this config.
    /// `dropout` is the training's, which only a further training uses.
    ///
    /// # Errors
    /// [`ModelError::NotExpressible`] for modules that were trained in full: PEFT's own files of such
    /// an adapter are copied instead. [`ModelError::Store`] for more tensors than a file may have.
    pub fn peft_files(&self, dropout: f64, config: &ModelConfig) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
        if !self.saved.is_empty() || !self.vocabulary.is_empty() {
            self.expect_branches_only("an adapter cannot be written anew in PEFT's format", IS_IN_MERGED)?;
        }
        let base = BaseName { name: self.base.name.clone().unwrap_or_default(), revision: self.base.revision.clone() };
        let is_wrapped = config.is_named_inside();
        let all = branches(self);
        let stacked = put_together(&all, &self.targets, config)?;
        let is_stacked = |module: &str| !stacked.tensors.is_empty() && is_expert(module);
        let mut adaptation = Adaptation { dropout, ..self.adaptation() };
        let config = if config.family.has_expert_parameters() {
            adapter_config(&adaptation, &base, config)
        } else {
            adaptation.targets.retain(|target| !is_stacked(&target.module));
            let mut config = adapter_config(&adaptation, &base, config);
            stacked.describe(&mut config);
            config
        };
        let config = serde_json::to_vec_pretty(&config).expect("a JSON value can be written");
        let mut tensors = Vec::new();
        let tensor = |module: &str, part: &str, shape: Vec<usize>, values: &[f32]| {
            let name = tensor_name(&file_name(module, part), true, is_wrapped);
            (name, Dtype::F32, shape, Cow::from(from_f32(values, Dtype::F32)))
        };
        for (branch, &(outputs, inputs)) in
            all.iter().zip(&self.shapes).filter(|(branch, _)| !is_stacked(branch.module))
        {
            let names = match branch.module {
                EMBEDDING => ["lora_embedding_A", "lora_embedding_B"],
                _ => ["lora_A", "lora_B"],
            };
            let mut parts =
                vec![(names[0], vec![branch.rank, inputs], branch.a), (names[1], vec![outputs, branch.rank], branch.b)];
            parts.extend(branch.magnitudes.map(|values| ("lora_magnitude_vector", vec![outputs], values)));
            tensors.extend(parts.into_iter().map(|(part, shape, values)| tensor(branch.module, part, shape, values)));
        }
        for (module, shapes, values) in &stacked.tensors {
            for ((half, shape), values) in ["lora_A", "lora_B"].iter().zip(shapes).zip(values) {
                tensors.push(tensor(module, half, shape.clone(), values));
            }
        }
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let tensors = encode_tensors(&tensors, &metadata)?;
        Ok(vec![(CONFIG_FILE.to_owned(), config), (TENSOR_FILE.to_owned(), tensors)])
    }
}
