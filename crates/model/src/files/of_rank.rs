//! Which files of a base a process reads, where several hold its layers together. A file is the least that is fetched:
//! one with a tensor of any of its layers is read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::base_files::{BaseFiles, BaseTensor};
use crate::model::Model;
use crate::placement::Placement;
use crate::stage::Stage;
use crate::tree::Decoder;

impl Model {
    /// Names of the files of weights that this process needs for [`Model::load`] with this placement, from the
    /// headers alone. Files that no process reads are the first one's: so all together have the whole base, whose
    /// digest they make.
    ///
    /// # Errors
    /// As [`Model::check_shapes`].
    pub fn files_of(directory: &Path, placement: &Placement) -> Result<BTreeSet<String>, ModelError> {
        let (config, files) = BaseFiles::open(directory, None)?;
        let Some(set) = files.safetensors() else { return Ok(BTreeSet::new()) };
        let all: BTreeSet<String> = set.files().iter().filter_map(|path| file_name(path)).collect();
        let Some(stage) = placement.stage() else { return Ok(all) };
        let readers = readers(&config, &files, placement)?;
        Ok(all.into_iter().filter(|file| needs(&readers, file, stage.mine)).collect())
    }

    /// Bytes of all files of weights, also of those of which only the header is here.
    ///
    /// # Errors
    /// If a file cannot be opened.
    pub fn file_bytes(directory: &Path) -> Result<u64, ModelError> {
        Ok(BaseFiles::read(directory)?.length())
    }

    /// Bytes of the files that [`Model::files_of`] names, of each of the processes that hold a model together.
    ///
    /// # Errors
    /// As [`Model::check_shapes`].
    pub fn file_bytes_of_stages(directory: &Path, placement: &Placement) -> Result<Vec<u64>, ModelError> {
        let (config, files) = BaseFiles::open(directory, None)?;
        let stages = placement.stage().map_or(1, Stage::count);
        let Some(set) = files.safetensors().filter(|_| stages > 1) else { return Ok(vec![files.length(); stages]) };
        let readers = readers(&config, &files, placement)?;
        let named: Vec<(String, u64)> =
            set.lengths().filter_map(|(path, bytes)| Some((file_name(path)?, bytes))).collect();
        let of_stage =
            |mine| named.iter().filter(|(file, _)| needs(&readers, file, mine)).map(|(_, bytes)| bytes).sum();
        Ok((0..stages).map(of_stage).collect())
    }
}

/// The processes that read each file.
type Readers = BTreeMap<String, BTreeSet<usize>>;

fn readers(config: &ModelConfig, files: &BaseFiles, placement: &Placement) -> Result<Readers, ModelError> {
    let mut readers = Readers::new();
    for (name, shape, of) in holders(&mut Decoder::new(config), placement) {
        for file in files_with(files, &files.tensor(config, &name, &shape)?) {
            readers.entry(file).or_default().extend(&of);
        }
    }
    Ok(readers)
}

/// Whether a process needs a file.
fn needs(readers: &Readers, file: &str, mine: usize) -> bool {
    match readers.get(file) {
        Some(of) if !of.is_empty() => of.contains(&mine),
        _ => mine == 0,
    }
}

/// Name and shape of each tensor, and the processes that hold it.
fn holders(decoder: &mut Decoder, placement: &Placement) -> Vec<(String, Vec<usize>, Vec<usize>)> {
    let Some(stage) = placement.stage() else { return Vec::new() };
    let layer_of: BTreeMap<String, usize> = names_of_layers(decoder).collect();
    let embedding = decoder.embedding.name.clone();
    let output = decoder.head.output.as_ref().map(|output| output.name.clone());
    let of_each = |holds: &dyn Fn(&Placement) -> bool| -> Vec<usize> {
        let there = |mine: usize| placement.clone().with_stage(Some(Stage { mine, ..stage.clone() }));
        (0..stage.count()).filter(|&mine| holds(&there(mine))).collect()
    };
    let of = |name: &String| match layer_of.get(name) {
        Some(&layer) => vec![stage.of_layer[layer]],
        None if *name == embedding => of_each(&|there| there.holds_embedding(output.is_none())),
        None if Some(name) == output.as_ref() => of_each(&Placement::holds_output),
        None => (0..stage.count()).collect(),
    };
    let slots = decoder.slots().into_iter().map(|slot| (slot.name().to_owned(), slot.shape()));
    slots.map(|(name, shape)| (name.clone(), shape, of(&name))).collect()
}

/// Names of the tensors inside layers, and the layer of each.
fn names_of_layers(decoder: &mut Decoder) -> impl Iterator<Item = (String, usize)> {
    let layers = decoder.layers.iter_mut().enumerate();
    let named = layers.map(|(n, layer)| layer.slots().iter().map(|slot| (slot.name().to_owned(), n)).collect());
    named.collect::<Vec<Vec<_>>>().into_iter().flatten()
}

/// Names of the tensors of layers that other processes hold. They are not computed with, and may not be here.
pub(crate) fn of_others(decoder: &mut Decoder, placement: &Placement) -> BTreeSet<String> {
    let Some(stage) = placement.stage() else { return BTreeSet::new() };
    names_of_layers(decoder).filter(|(_, layer)| !stage.holds(*layer)).map(|(name, _)| name).collect()
}

/// Names of the files that a tensor is read from.
fn files_with(files: &BaseFiles, tensor: &BaseTensor<'_>) -> BTreeSet<String> {
    let of_part = |part: &String| file_name(files.safetensors()?.get(part)?.path());
    tensor.parts().iter().filter_map(of_part).chain(file_name(tensor.path())).collect()
}

fn file_name(path: &Path) -> Option<String> {
    path.file_name().map(|name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use finetune_store::{RealDisk, TensorFile, encode_tensors, replace_file};
    use serde_json::{Map, Value, json};

    use super::*;

    /// A golden model with a file for each layer, one for the embedding, and one for the rest.
    fn split(family: &str, directory: &Path) {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models").join(family);
        let whole = TensorFile::open(&golden.join("model.safetensors")).expect("a golden model");
        let file = |name: &str| match name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()) {
            Some(layer) => format!("layer-{layer}.safetensors"),
            None if name.contains("embed") => "embedding.safetensors".to_owned(),
            None => "rest.safetensors".to_owned(),
        };
        let (mut map, mut shards) = (Map::new(), BTreeMap::<String, Vec<_>>::new());
        for name in whole.names() {
            let view = whole.get(name).expect("a tensor");
            let tensor = (name.to_owned(), view.dtype, view.shape.to_vec(), Cow::from(view.bytes().expect("bytes")));
            map.insert(name.to_owned(), Value::from(file(name)));
            shards.entry(file(name)).or_default().push(tensor);
        }
        let write = |name: &str, bytes: &[u8]| {
            replace_file(&RealDisk, &directory.join(name), bytes).expect("a new file");
        };
        for (name, tensors) in &shards {
            write(name, &encode_tensors(tensors, &BTreeMap::new()).expect("a shard"));
        }
        write("model.safetensors.index.json", json!({ "weight_map": map }).to_string().as_bytes());
        write("config.json", &std::fs::read(golden.join("config.json")).expect("a config"));
    }

    /// (whether the ends are only where they are used, the stage of each layer, the files of each stage)
    #[test]
    fn each_stage_reads_the_files_of_its_layers() {
        let directory = tempfile::tempdir().expect("a directory");
        split("qwen3_moe", directory.path());
        #[expect(clippy::type_complexity, reason = "a table of cases")]
        let cases: [(bool, &[usize], &[&[&str]]); 4] = [
            (true, &[0, 1, 0], &[&["embedding", "layer-0", "layer-2", "rest"], &["layer-1", "rest"]]),
            (true, &[0, 1, 1], &[&["embedding", "layer-0", "rest"], &["layer-1", "layer-2", "rest"]]),
            (false, &[0, 1, 1], &[&["embedding", "layer-0", "rest"], &["embedding", "layer-1", "layer-2", "rest"]]),
            // The first layer elsewhere: the first process has no embedding.
            (true, &[1, 0, 0], &[&["layer-1", "layer-2", "rest"], &["embedding", "layer-0", "rest"]]),
        ];
        for (where_used, of_layer, want) in cases {
            for (mine, want) in want.iter().enumerate() {
                let stage = Stage { of_layer: of_layer.into(), mine };
                let placement = Placement::cpu(None).with_stage(Some(stage)).with_ends_where_used(where_used);
                let files = Model::files_of(directory.path(), &placement).expect("files");
                let stems: Vec<&str> = files.iter().map(|name| name.trim_end_matches(".safetensors")).collect();
                assert_eq!(stems, *want, "{where_used} {of_layer:?} {mine}");
                let bytes = files.iter().map(|name| directory.path().join(name).metadata().expect("a file").len());
                let of_stages = Model::file_bytes_of_stages(directory.path(), &placement).expect("bytes");
                assert_eq!(of_stages[mine], bytes.sum::<u64>(), "{where_used} {of_layer:?} {mine}");
            }
        }
        let all = Model::files_of(directory.path(), &Placement::cpu(None)).expect("files");
        assert_eq!(all.len(), 5);
        let bytes = all.iter().map(|name| directory.path().join(name).metadata().expect("a file").len());
        assert_eq!(Model::file_bytes(directory.path()).expect("bytes"), bytes.sum::<u64>());
    }
}
