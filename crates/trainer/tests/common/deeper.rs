//! Models with more layers than the golden ones have.

use std::borrow::Cow;
use std::path::Path;

use finetune_store::{Dtype, TensorSet, encode_tensors};
use serde_json::Value;
use tempfile::TempDir;

use super::goldens;

type Tensor = (String, Dtype, Vec<usize>, Cow<'static, [u8]>);

/// The golden model of a family with so many layers. Those that it lacks are of the kind of its last one, whose
/// numbers they have in other places: no two layers are the same.
pub(crate) fn deeper(family: &str, layers: usize) -> TempDir {
    let (golden, folder) = (goldens(family), tempfile::tempdir().expect("a directory"));
    let text = std::fs::read_to_string(golden.join("config.json")).expect("config.json");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    let had = config["num_hidden_layers"].as_u64().expect("a number of layers") as usize;
    assert!(had < layers, "{family} has {had} layers");
    config["num_hidden_layers"] = layers.into();
    if let Some(kinds) = config.get_mut("layer_types").and_then(Value::as_array_mut) {
        let last = kinds.last().expect("a layer").clone();
        kinds.resize(layers, last);
    }
    let set = TensorSet::open_model(&golden).expect("the golden model");
    let of_last = format!("model.layers.{}.", had - 1);
    let mut tensors: Vec<Tensor> = Vec::new();
    for name in set.names() {
        let view = set.get(name).expect("a tensor");
        assert_eq!(view.dtype, Dtype::F32, "{name}");
        let bytes = view.bytes().expect("its bytes");
        for layer in had..layers {
            let Some(rest) = name.strip_prefix(&of_last) else { break };
            let mut moved = bytes.clone();
            let places = size_of::<f32>() * (5 * (layer - had + 1)) % moved.len().max(1);
            moved.rotate_left(places);
            tensors.push((format!("model.layers.{layer}.{rest}"), view.dtype, view.shape.to_vec(), moved.into()));
        }
        tensors.push((name.to_owned(), view.dtype, view.shape.to_vec(), bytes.into()));
    }
    let file = encode_tensors(&tensors, &Default::default()).expect("a file");
    write(&folder.path().join("model.safetensors"), &file);
    write(&folder.path().join("config.json"), config.to_string().as_bytes());
    folder
}

#[expect(clippy::disallowed_methods, reason = "a file of the test")]
fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("written");
}
