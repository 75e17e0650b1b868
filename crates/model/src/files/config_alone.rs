//! What is known of a base whose weights are not here: what its config.json says.

use std::path::Path;

use finetune_kernels::FloatType;
use finetune_packed::Scheme;
use finetune_packed::files::{PackedConfig, Place, Told, Weight};

use crate::adaptation::{is_expert, is_of_vocabulary, module_of};
use crate::adapter::mlx_names::of_branch;
use crate::branch::{EMBEDDING, OUTPUT};
use crate::config::ModelConfig;
use crate::config::family::InMlx;
use crate::files::base_files::{chooses_experts, config_object, packing_of, packs_while_read};
use crate::files::by_row::PER_LAYER_TABLE;
use crate::files::floats::dtype_of;
use crate::files::packing::{self, BaseForm, LayerSizes, described_of};
use crate::files::taking_turns;
use crate::files::wrapper;
use crate::lora::layer_of;
use crate::tree::expected_tensors;

/// A matrix that is packed: in what, and its bytes in memory.
type Packed = (String, u64);

impl BaseForm {
    /// Of a base that has this config and dense numbers in this type. Its matrices are packed as `packing` tells, else
    /// while they are loaded if `quantization` says so.
    pub fn of_config(
        config: &ModelConfig,
        packing: &PackedConfig,
        quantization: Option<Scheme>,
        stored: FloatType,
    ) -> BaseForm {
        if let Some(told) = packing.told(packing::stored(dtype_of(stored))) {
            let form = BaseForm::of_matrices(config, |name, shape| told_of(config, &told, name, shape));
            if form.words.is_some() {
                return BaseForm { is_packed_in_files: true, ..form };
            }
        }
        let while_read = |name: &str, shape: [usize; 2]| {
            let scheme = quantization.filter(|scheme| packs_while_read(*scheme, name, &shape))?;
            let words = format!("{} while it is loaded", packing::scheme_word(scheme));
            Some((words, packing::quantized_bytes(scheme, &shape, dtype_of(stored))))
        };
        let form = BaseForm::of_matrices(config, while_read);
        BaseForm { loading: 4 * form.packed.largest, ..form }
    }

    /// `packed` says of a matrix how it is packed. `None`: it is not.
    fn of_matrices(config: &ModelConfig, packed: impl Fn(&str, [usize; 2]) -> Option<Packed>) -> BaseForm {
        let mut form = BaseForm::default();
        let mut formats = Vec::new();
        for (name, shape) in expected_tensors(config) {
            let &[rows, columns] = shape.as_slice() else { continue };
            let elements = rows as u64 * columns as u64;
            let (format, bytes) = packed(&name, [rows, columns]).unzip();
            form.by_row += if name == PER_LAYER_TABLE && bytes.is_none() { elements } else { 0 };
            form.embedding_by_row |= module_of(&name) == EMBEDDING && bytes.is_none() && !config.tied_embeddings;
            form.add(&name, &LayerSizes::of_matrix(&name, elements, bytes));
            formats.push(format);
        }
        form.words = described_of(formats.into_iter());
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

/// How config.json says that a matrix of the files is packed.
fn told_of(config: &ModelConfig, told: &Told<'_>, name: &str, shape: [usize; 2]) -> Option<Packed> {
    let module = module_of(name);
    let mut names = vec![module.to_owned()];
    if config.wrapper.is_some() {
        names.extend([wrapper::name_inside(module), wrapper::name_in_mlx(module)]);
    }
    let place = place_of(config, name);
    let in_mlx = of_branch(module, config).name;
    let (format, bytes) = told.of(&Weight { names: &names, in_mlx: &in_mlx, shape, place })?;
    let is_of_stack = config.family.has_expert_parameters() && place == Place::Expert;
    let words = if is_of_stack { taking_turns::FORMAT.to_owned() } else { format.to_string() };
    Some((words, bytes))
}

fn place_of(config: &ModelConfig, name: &str) -> Place {
    let module = module_of(name);
    let is_plain_in_mlx = config.family.mixture.is_some_and(|mixture| mixture.in_mlx == InMlx::PlainRouter);
    match module {
        OUTPUT => Place::Output,
        EMBEDDING => Place::Embedding,
        _ if name == PER_LAYER_TABLE => Place::Embedding,
        _ if chooses_experts(name) => Place::Router { is_linear: !is_plain_in_mlx },
        _ if is_expert(module) => Place::Expert,
        _ if module.ends_with(".kv_b_proj") => Place::Latent,
        _ => Place::Linear,
    }
}

/// What the config.json of a directory says of packed weights. Nothing if it cannot be read.
pub fn stated_packing(directory: &Path) -> PackedConfig {
    let path = directory.join("config.json");
    let Ok(config) = config_object(directory) else { return PackedConfig::default() };
    let text = wrapper::text_config(&config).map(|(_, text)| text);
    packing_of(&config, text.as_ref(), &path).unwrap_or_default()
}

/// What is assumed of packed weights that config.json alone tells of. `None`: it tells of none, or not enough of them.
pub fn assumed_of_packing(packing: &PackedConfig, stored: FloatType) -> Option<&'static str> {
    packing.told(packing::stored(dtype_of(stored))).map(|told| told.assumed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::base_files::stored_type;
    use crate::model::Model;

    fn of_config(directory: &Path, scheme: Option<Scheme>) -> BaseForm {
        let config = ModelConfig::load(directory).unwrap_or_else(|error| panic!("{error}"));
        BaseForm::of_config(&config, &stated_packing(directory), scheme, stored_type(directory))
    }

    /// With and without the files of weights the same is known of a base, in every family, however its files are
    /// packed.
    #[test]
    fn a_config_says_what_files_say() {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens");
        let entries = ["models", "packed"].into_iter().flat_map(|folder| {
            let entries = std::fs::read_dir(goldens.join(folder)).expect("goldens");
            entries.map(|entry| entry.expect("an entry").path())
        });
        let (mut dense, mut packed) = (0, 0);
        for directory in entries.filter(|path| path.join("model.safetensors").is_file()) {
            // mlx-lm left out a matrix of its own accord, which its config.json does not say.
            if directory.ends_with("mlx_mixed") {
                continue;
            }
            for scheme in [None, Some(Scheme::Nf4), Some(Scheme::Mlx4), Some(Scheme::Mxfp4)] {
                let of_files = Model::form(&directory, scheme).unwrap_or_else(|error| panic!("{error}"));
                assert_eq!(of_config(&directory, scheme), of_files, "{} {scheme:?}", directory.display());
                *(if of_files.is_packed_in_files { &mut packed } else { &mut dense }) += 1;
            }
        }
        assert!(dense > 80 && packed > 70, "{dense} and {packed} forms were compared");
    }

    /// What mlx-lm left out without a word in config.json counts as packed.
    #[test]
    fn a_matrix_that_mlx_left_out_counts_as_packed() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/packed/mlx_mixed");
        let of_files = Model::form(&directory, None).unwrap_or_else(|error| panic!("{error}"));
        let of_config = of_config(&directory, None);
        assert_eq!(of_config.packed.elements - of_files.packed.elements, 64 * 64);
        // 4 bits, a scale and a bias of 16 bits for 32.
        assert_eq!(of_config.packed.bytes - of_files.packed.bytes, 64 * 64 * 5 / 8);
    }

    /// Sizes that tensors alone tell are not told, and nothing is packed then but while it is loaded.
    #[test]
    fn a_form_that_config_does_not_tell_is_not_guessed() {
        let config = |quantization: &str| {
            let text = format!("{{\"quantization_config\": {quantization}}}");
            let object = serde_json::from_str(&text).expect("JSON");
            PackedConfig::parse(&object, Path::new("config.json")).unwrap_or_else(|error| panic!("{error}"))
        };
        for (quantization, is_told) in [
            (r#"{"quant_method": "gptq", "bits": 4, "group_size": 128}"#, true),
            (r#"{"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"+:.*": {"bits": 8}}}"#, false),
            (r#"{"quant_method": "gptq", "group_size": 128}"#, false),
            (r#"{"quant_method": "modelopt"}"#, false),
            (r#"{"quant_method": "hqq"}"#, false),
            (r#"{"quant_method": "compressed-tensors", "format": "pack-quantized"}"#, false),
        ] {
            let packing = config(quantization);
            assert!(packing.is_packed() && packing.describe().is_some(), "{quantization}");
            assert_eq!(assumed_of_packing(&packing, FloatType::BF16).is_some(), is_told, "{quantization}");
        }
    }
}
