//! Weights from the files of a base, or fresh ones.

use burn::tensor::{Tensor, TensorData};
use finetune_random::Stream;

use crate::config::{ModelConfig, Wrapper};
use crate::error::{ModelError, list};
use crate::files::base_files::BaseFiles;
use crate::files::by_row::{ByRow, PER_LAYER_TABLE};
use crate::files::extra;
use crate::files::fetch::fetch;
use crate::files::floats::float_type;
use crate::files::of_rank::of_others;
use crate::placement::Placement;
use crate::random_stream::RandomStream;
use crate::slice::not_in_slices;
use crate::tree::{Decoder, Matrix, Slot, Vector};

/// Checks that the files hold every tensor of the config in its shape, dense or packed, and no other
/// that takes part in arithmetic. Returns what a user should know about the others.
pub(crate) fn check(files: &BaseFiles, config: &ModelConfig) -> Result<Vec<String>, ModelError> {
    let (family, path) = (config.family.architecture, files.path());
    let parts = files.parts(config)?;
    let Some(files) = files.safetensors() else { return Ok(Vec::new()) };
    let mut notices = Vec::new();
    if let Some(Wrapper { class, .. }) = &config.wrapper {
        let parts: Vec<String> = part_names(files.left_out().map(|view| view.name));
        let count = files.left_out().count();
        notices.push(format!(
            "{}: {class}: the text model in it, {family}; {count} tensors of {} take no part",
            path.display(),
            list(&parts)
        ));
    }
    let unused = extra::passed_over(files, config, &parts, path)?;
    if !unused.is_empty() {
        let names = list(&unused);
        notices.push(format!("{}: passed over, as no part of {family} uses them: {names}", path.display()));
    }
    if !files.unlisted().is_empty() {
        let names = list(files.unlisted());
        notices.push(format!("{}: the index of the weights leaves out {names}; the shards have them", path.display()));
    }
    Ok(notices)
}

/// The parts of a multimodal model that these tensors are of, such as `model.vision_tower`, each once.
pub(crate) fn part_names<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let part = |name: &str| {
        let words = if name.starts_with("model.") { 2 } else { 1 };
        name.split('.').take(words).collect::<Vec<_>>().join(".")
    };
    let mut parts: Vec<String> = names.map(part).collect();
    parts.sort();
    parts.dedup();
    parts
}

/// Where the tensors of a model come from.
pub(crate) enum Source<'a> {
    Files {
        files: &'a BaseFiles,
    },
    /// transformers' initialization: normal weights with the config's `initializer_range`, norms 1,
    /// biases 0.
    Fresh {
        seed: u64,
    },
}

/// Elements that may be on their way to a GPU at a time. Each tensor lies in a buffer of its own
/// until it has arrived.
const MOST_ON_THE_WAY: usize = 128 << 20;

/// All weights on the device: vectors in f32, matrices packed or in the type that the placement says.
/// One tensor after the other is read and handed over, so there is never a second copy of more than
/// one.
pub(crate) fn weights(config: &ModelConfig, source: &Source<'_>, placement: &Placement) -> Result<Decoder, ModelError> {
    let mut decoder = Decoder::new(config);
    if let Some(slice) = placement.slice() {
        if let Some(what) = not_in_slices(config, slice.count) {
            return Err(ModelError::NotInSlices { what });
        }
        decoder.cut(slice);
    }
    // A token needs one row of it. As the output layer, all rows are needed.
    decoder.embedding.is_by_row = placement.reads_layers() && decoder.head.output.is_some();
    let mut on_the_way = 0;
    let of_others = of_others(&mut decoder, placement);
    let mut elsewhere = decoder.names_in_layers(|n| !placement.holds(n));
    if !placement.holds_embedding(decoder.head.output.is_none()) {
        elsewhere.insert(decoder.embedding.name.clone());
    }
    if !placement.holds_output() {
        elsewhere.extend(decoder.head.output.iter().map(|output| output.name.clone()));
    }
    for (index, slot) in decoder.slots().into_iter().enumerate() {
        let loader = Loader { config, source, placement, index: index as u32 };
        match slot {
            Slot::Vector(vector) if of_others.contains(&vector.name) && !loader.is_here(vector)? => {
                vector.set(loader.fresh(vector));
            }
            Slot::Vector(vector) => vector.set(loader.vector(vector)?),
            Slot::Matrix(matrix) if elsewhere.contains(&matrix.name) => {}
            Slot::Matrix(matrix) => {
                loader.fill(matrix)?;
                on_the_way += matrix.shape.iter().product::<usize>();
            }
        }
        if on_the_way > MOST_ON_THE_WAY {
            on_the_way = 0;
            let _ = placement.device.sync();
        }
    }
    Ok(decoder)
}

/// Reads one tensor, the `index`th of the model.
struct Loader<'a> {
    config: &'a ModelConfig,
    source: &'a Source<'a>,
    placement: &'a Placement,
    index: u32,
}

impl Loader<'_> {
    fn vector(&self, vector: &Vector) -> Result<Tensor<1>, ModelError> {
        let values = match self.source {
            Source::Files { files } => {
                let values = files.tensor(self.config, &vector.name, &[vector.whole_length()])?.values()?;
                match &vector.cut {
                    Some(cut) => cut.of(&values),
                    None => values,
                }
            }
            Source::Fresh { .. } => return Ok(self.fresh(vector)),
        };
        Ok(Tensor::from_data(TensorData::new(values, [vector.length]), &self.placement.device))
    }

    fn fresh(&self, vector: &Vector) -> Tensor<1> {
        let values = vec![vector.fresh; vector.length];
        Tensor::from_data(TensorData::new(values, [vector.length]), &self.placement.device)
    }

    /// Whether the file with its values is here, and not only the header.
    fn is_here(&self, vector: &Vector) -> Result<bool, ModelError> {
        let Source::Files { files } = self.source else { return Ok(true) };
        Ok(files.tensor(self.config, &vector.name, &[vector.whole_length()])?.is_here())
    }

    fn fill(&self, matrix: &mut Matrix) -> Result<(), ModelError> {
        let files = match self.source {
            Source::Files { files } => files,
            Source::Fresh { seed } => {
                let stream = Stream::new(*seed, RandomStream::Weights as u32, 0, self.index);
                let values = stream.normal(matrix.shape.iter().product(), self.config.initializer_range as f32);
                // Fresh weights are trained, and trained parameters are f32.
                let data = TensorData::new(values, matrix.shape);
                matrix.set(Tensor::from_data(data, &self.placement.device));
                return Ok(());
            }
        };
        if matrix.is_by_row {
            let tensor = files.tensor(self.config, &matrix.name, &matrix.shape)?;
            if let (Some(view), Some(stored)) = (tensor.view(), tensor.dtype().and_then(float_type)) {
                // The table of the layers' own inputs is never all in memory, and as exact as its file.
                let held = if matrix.name == PER_LAYER_TABLE { stored } else { self.placement.held(stored) };
                matrix.set_by_row(ByRow::new(&tensor.name, matrix.shape, view, held)?);
                return Ok(());
            }
        }
        matrix.set_weight(fetch(files, self.config, self.placement, matrix)?.onto(matrix.shape, self.placement));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use finetune_kernels::FloatType;
    use finetune_packed::Scheme;

    use super::*;
    use crate::config::ModelConfig;
    use crate::model::Model;
    use crate::stage::Stage;

    /// An embedding stays in its file with the layers, unless it is the output layer or packed. What is said of a base
    /// before it is loaded is what is loaded then.
    #[test]
    fn an_embedding_stays_in_its_file_where_layers_do() {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens");
        for (base, quantization, stays) in [
            ("models/llama3", None, true),
            ("models/qwen3_moe", None, true),
            ("models/llama3", Some(Scheme::Nf4), true),
            ("packed/awq", None, true),
            ("packed/int4_kimi_k2", None, true),
            // One matrix is embedding and output layer.
            ("models/llama", None, false),
            ("models/gemma4", None, false),
            // Packed, in the file or while it is loaded.
            ("packed/mlx3", None, false),
            ("models/llama3", Some(Scheme::Mxfp4), false),
            ("packed/gguf_k/model.gguf", None, false),
        ] {
            let base = goldens.join(base);
            let what = format!("{} {quantization:?}", base.display());
            let placement = Placement::cpu(None).quantized(quantization);
            let load = |placement: &Placement| Model::load(&base, placement).unwrap_or_else(|error| panic!("{error}"));
            let in_memory = load(&placement);
            assert!(in_memory.weights.embedding.by_row().is_none(), "{what}");
            let from_disk = load(&placement.with_layers_from_disk(true));
            assert_eq!(from_disk.weights.embedding.by_row().is_some(), stays, "{what}");
            let form = Model::form(&base, quantization).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(form.embedding_by_row, stays, "{what}");
            let ends = |reads_layers| form.ends_bytes(FloatType::F32, reads_layers);
            assert_eq!(ends(true) < ends(false), stays, "{what}: it takes no memory then");
        }
    }

    /// Of two processes, only one has the embedding and only one the output layer; a tied one both have.
    #[test]
    fn the_ends_are_where_they_are_used() {
        for family in ["llama", "qwen3"] {
            let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models").join(family);
            let config = ModelConfig::load(&base).expect("a config");
            let layers = config.layers.len();
            for where_used in [false, true] {
                for mine in 0..2 {
                    let stage = Stage::in_turn(layers, 2, mine);
                    let (is_first, is_last) = (mine == 0, stage.last() == mine);
                    let placement = Placement::cpu(None).with_stage(Some(stage)).with_ends_where_used(where_used);
                    let model = Model::load(&base, &placement).unwrap_or_else(|error| panic!("{error}"));
                    let what = format!("{family} {mine} {where_used}");
                    let has = !model.weights.embedding.is_absent();
                    assert_eq!(has, !where_used || is_first || (config.tied_embeddings && is_last), "{what}");
                    assert_eq!(model.weights.head.output.is_none(), config.tied_embeddings, "{what}");
                    assert_eq!(
                        !model.weights.output().is_absent(),
                        !where_used || is_last || (config.tied_embeddings && is_first),
                        "{what}"
                    );
                }
            }
        }
    }
}
