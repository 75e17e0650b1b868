//! What is known of a base whose weights are not here: what its config.json says.

use std::path::Path;

use finetune_kernels::FloatType;
use finetune_packed::Scheme;
use finetune_packed::files::PackedConfig;

use crate::adaptation::{is_of_vocabulary, module_of};
use crate::branch::{EMBEDDING, OUTPUT};
use crate::config::ModelConfig;
use crate::files::base_files::{config_object, packs_while_read};
use crate::files::by_row::PER_LAYER_TABLE;
use crate::files::floats::dtype_of;
use crate::files::packing::{self, BaseForm, LayerSizes};
use crate::lora::layer_of;
use crate::tree::expected_tensors;

impl BaseForm {
    /// Of a base that has this config and dense matrices in this number type, packed while they are loaded if
    /// `quantization` says so.
    pub fn of_config(config: &ModelConfig, quantization: Option<Scheme>, stored: FloatType) -> BaseForm {
        let mut form = BaseForm::default();
        let (mut matrices, mut packed) = (0, 0);
        for (name, shape) in expected_tensors(config) {
            let elements = shape.iter().product::<usize>() as u64;
            form.by_row += if name == PER_LAYER_TABLE { elements } else { 0 };
            if shape.len() != 2 {
                continue;
            }
            let scheme = quantization.filter(|scheme| packs_while_read(*scheme, &name, &shape));
            let size = size(&name, &shape, scheme, stored);
            matrices += 1;
            form.embedding_by_row |= module_of(&name) == EMBEDDING && scheme.is_none() && !config.tied_embeddings;
            if scheme.is_some() {
                packed += 1;
                form.loading = form.loading.max(4 * elements);
            }
            form.add(&name, &size);
        }
        let scheme = quantization.filter(|_| packed > 0);
        form.words = scheme.map(|scheme| {
            format!("{} while it is loaded; {packed} of {matrices} matrices packed", packing::scheme_word(scheme))
        });
        form
    }

    /// Counts a matrix in.
    fn add(&mut self, name: &str, size: &LayerSizes) {
        let module = module_of(name);
        self.packed.add(&size.packed);
        if is_of_vocabulary(module) {
            self.vocabulary.add(&size.packed);
        }
        if let Some(end) = [EMBEDDING, OUTPUT].iter().position(|end| *end == module) {
            self.ends[end].add_size(size);
        }
        if let Some(n) = layer_of(name) {
            self.layers.resize(self.layers.len().max(n + 1), LayerSizes::default());
            self.layers[n].add_size(size);
        }
    }
}

fn size(name: &str, shape: &[usize], scheme: Option<Scheme>, stored: FloatType) -> LayerSizes {
    let packed = scheme.map(|scheme| packing::quantized_bytes(scheme, shape, dtype_of(stored)));
    LayerSizes::of_matrix(name, shape.iter().product::<usize>() as u64, packed)
}

/// What the config.json of a directory says that the weights are packed in, in words. `None`: nothing, or it cannot
/// be read.
pub fn states_packing(directory: &Path) -> Option<String> {
    let config = config_object(directory).ok()?;
    PackedConfig::parse(&config, &directory.join("config.json")).ok()?.describe()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::base_files::stored_type;
    use crate::model::Model;

    /// With and without the files of weights the same is known of a base whose files are not packed, in every family.
    #[test]
    fn a_config_says_what_files_say() {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models");
        let entries = std::fs::read_dir(&goldens).expect("goldens").map(|entry| entry.expect("an entry").path());
        let mut compared = 0;
        for directory in entries.filter(|path| path.join("model.safetensors").is_file()) {
            let config = ModelConfig::load(&directory).unwrap_or_else(|error| panic!("{error}"));
            for scheme in [None, Some(Scheme::Nf4), Some(Scheme::Mlx4), Some(Scheme::Mxfp4)] {
                let of_files = Model::form(&directory, scheme).unwrap_or_else(|error| panic!("{error}"));
                if of_files.is_packed_in_files {
                    assert!(states_packing(&directory).is_some(), "{}", directory.display());
                    continue;
                }
                let of_config = BaseForm::of_config(&config, scheme, stored_type(&directory));
                assert_eq!(of_config, of_files, "{} {scheme:?}", directory.display());
                compared += 1;
            }
        }
        assert!(compared > 80, "{compared} forms were compared");
    }
}
