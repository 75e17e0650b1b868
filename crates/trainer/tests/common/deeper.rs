//! Models with more layers than the golden ones have. Used by the tests of several crates.
#![allow(dead_code, reason = "each test file uses a part")]

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use finetune_store::{Dtype, TensorSet, encode_tensors};
use serde_json::Value;
use tempfile::TempDir;

type Tensor = (String, Dtype, Vec<usize>, Cow<'static, [u8]>);

/// Lists of `config.json` with an entry for each layer.
const LISTS: [&str; 4] = ["layer_types", "mlp_layer_types", "no_rope_layers", "layer_rope_theta"];

/// Tensors of packed files that say how others are to be read.
const LEGENDS: [&str; 2] = [".quant_map", ".quant_state."];

/// The golden model in a folder, made [`deeper`] if it has fewer layers than that. The folder that is made lasts as long
/// as what comes first.
pub(crate) fn at_least(golden: &Path, layers: usize) -> (Option<TempDir>, PathBuf) {
    let made = (layers_of(&config(golden)) < layers).then(|| deeper(golden, layers));
    let path = made.as_ref().map_or(golden.to_owned(), |made| made.path().to_owned());
    (made, path)
}

fn config(golden: &Path) -> Value {
    let text = std::fs::read_to_string(golden.join("config.json")).expect("config.json");
    serde_json::from_str(&text).expect("JSON")
}

fn layers_of(config: &Value) -> usize {
    config["num_hidden_layers"].as_u64().expect("a number of layers") as usize
}

/// The golden model in a folder, packed or not, with so many layers. Those that it lacks are of the kind of its last
/// one, whose numbers they have in other places: no two layers are the same.
pub(crate) fn deeper(golden: &Path, layers: usize) -> TempDir {
    let mut config = config(golden);
    let had = layers_of(&config);
    assert!(had < layers, "{} has {had} layers", golden.display());
    lengthen(&mut config, had, layers);
    let set = TensorSet::open_model(golden).expect("the golden model");
    let mut tensors: Vec<Tensor> = Vec::new();
    for name in set.names() {
        let view = set.get(name).expect("a tensor");
        let bytes = view.bytes().expect("its bytes");
        for layer in had..layers {
            let Some(rest) = name.strip_prefix(&of_layer(had - 1)) else { break };
            let mut moved = bytes.clone();
            if !LEGENDS.iter().any(|legend| name.contains(legend)) {
                // So many bytes are whole elements of each type of number.
                let places = 20 * (layer - had + 1) % moved.len().max(1);
                moved.rotate_left(places);
            }
            tensors.push((of_layer(layer) + rest, view.dtype, view.shape.to_vec(), moved.into()));
        }
        tensors.push((name.to_owned(), view.dtype, view.shape.to_vec(), bytes.into()));
    }
    let folder = tempfile::tempdir().expect("a directory");
    let file = encode_tensors(&tensors, &Default::default()).expect("a file");
    write(&folder.path().join("model.safetensors"), &file);
    write(&folder.path().join("config.json"), config.to_string().as_bytes());
    folder
}

fn of_layer(layer: usize) -> String {
    format!("model.layers.{layer}.")
}

/// Says of the layers behind the last one what a config says of that.
fn lengthen(config: &mut Value, had: usize, layers: usize) {
    config["num_hidden_layers"] = layers.into();
    for list in LISTS {
        let Some(entries) = config.get_mut(list).and_then(Value::as_array_mut) else { continue };
        let last = entries.last().expect("a layer").clone();
        entries.resize(layers, last);
    }
    // By its number, or by the name of a part of it.
    for (table, names) in [("per_layer_config", false), ("quantization", true), ("quantization_config", true)] {
        let Some(entries) = config.get_mut(table).and_then(Value::as_object_mut) else { continue };
        let last = if names { of_layer(had - 1) } else { (had - 1).to_string() };
        let of_last = |(name, value): (&String, &Value)| Some((name.strip_prefix(&last)?.to_owned(), value.clone()));
        let parts: Vec<(String, Value)> = entries.iter().filter_map(of_last).collect();
        for layer in had..layers {
            let name = if names { of_layer(layer) } else { layer.to_string() };
            entries.extend(parts.iter().map(|(rest, value)| (format!("{name}{rest}"), value.clone())));
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a file of the test")]
fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("written");
}
