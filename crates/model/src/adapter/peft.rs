//! An adapter as PEFT's files, whatever it was read from.

use std::borrow::Cow;
use std::collections::BTreeMap;

use finetune_store::{Dtype, encode_tensors};

use crate::adaptation::Adaptation;
use crate::adapter::write::adapter_config;
use crate::adapter::{Adapter, BaseName, CONFIG_FILE, TENSOR_FILE};
use crate::error::ModelError;
use crate::files::floats::from_f32;
use crate::merging::branches;
use crate::parameters::file_name;

impl Adapter {
    /// adapter_config.json and adapter_model.safetensors, in f32. `dropout` is the training's, which
    /// only a further training uses.
    ///
    /// # Errors
    /// [`ModelError::NoPlace`] for more than LoRA branches on layers. [`ModelError::Store`] for more
    /// tensors than a file may have.
    pub fn peft_files(&self, dropout: f64) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
        self.expect_plain("an adapter that is written anew")?;
        let base = BaseName { name: self.base.name.clone().unwrap_or_default(), revision: self.base.revision.clone() };
        let adaptation = Adaptation { dropout, ..self.adaptation() };
        let config = adapter_config(&adaptation, &base, &self.modules, None);
        let config = serde_json::to_vec_pretty(&config).expect("a JSON value can be written");
        let mut tensors = Vec::new();
        for (branch, &(outputs, inputs)) in branches(self).iter().zip(&self.shapes) {
            let halves =
                [("lora_A", vec![branch.rank, inputs], branch.a), ("lora_B", vec![outputs, branch.rank], branch.b)];
            tensors.extend(halves.map(|(half, shape, values)| {
                (file_name(branch.module, half), Dtype::F32, shape, Cow::from(from_f32(values, Dtype::F32)))
            }));
        }
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let tensors = encode_tensors(&tensors, &metadata)?;
        Ok(vec![(CONFIG_FILE.to_owned(), config), (TENSOR_FILE.to_owned(), tensors)])
    }
}
