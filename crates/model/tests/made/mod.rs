//! Model and adapter directories made out of the golden ones, with something changed.
#![expect(clippy::disallowed_methods, reason = "tests write bad files")]
#![allow(dead_code, reason = "each test file takes what it needs")]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use finetune_store::{Dtype, TensorFile, encode_tensors};
use serde_json::Value;

pub(crate) type Tensor = (String, Dtype, Vec<usize>, Cow<'static, [u8]>);

pub(crate) fn golden(family: &str) -> PathBuf {
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_owned());
    Path::new(&here).join("../../tests/goldens/models").join(family)
}

pub(crate) fn read_json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).expect("a file")).expect("JSON")
}

pub(crate) fn read_tensors(path: &Path) -> Vec<Tensor> {
    let file = TensorFile::open(path).expect("a safetensors file");
    let views = file.names().map(|name| file.get(name).expect("a tensor of the file"));
    views
        .map(|view| (view.name.to_owned(), view.dtype, view.shape.to_vec(), view.bytes().expect("its bytes").into()))
        .collect()
}

pub(crate) fn write(path: &Path, bytes: impl AsRef<[u8]>) {
    std::fs::write(path, bytes).expect("written");
}

pub(crate) fn write_tensors(path: &Path, tensors: &[Tensor]) {
    write(path, encode_tensors(tensors, &BTreeMap::new()).expect("tensors"));
}

/// Names of the files of a golden model (`config.json`, `model.safetensors`) or adapter.
pub(crate) const MODEL: [&str; 2] = ["config.json", "model.safetensors"];
pub(crate) const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// A copy of the two files in `source`, changed.
pub(crate) fn changed(
    source: &Path,
    names: [&str; 2],
    change: impl FnOnce(&mut Value, &mut Vec<Tensor>),
) -> tempfile::TempDir {
    let mut config = read_json(&source.join(names[0]));
    let mut tensors = read_tensors(&source.join(names[1]));
    change(&mut config, &mut tensors);
    let made = tempfile::tempdir().expect("a directory");
    write(&made.path().join(names[0]), config.to_string());
    write_tensors(&made.path().join(names[1]), &tensors);
    made
}

pub(crate) fn model(family: &str, change: impl FnOnce(&mut Value, &mut Vec<Tensor>)) -> tempfile::TempDir {
    changed(&golden(family), MODEL, change)
}

pub(crate) fn adapter(family: &str, change: impl FnOnce(&mut Value, &mut Vec<Tensor>)) -> tempfile::TempDir {
    changed(&golden(family).join("adapter"), ADAPTER, change)
}

pub(crate) fn f32s(values: &[f32]) -> Cow<'static, [u8]> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
}

pub(crate) fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Puts one number into a tensor in f32.
pub(crate) fn put(tensors: &mut [Tensor], name: &str, element: usize, value: f32) {
    let tensor = tensors.iter_mut().find(|tensor| tensor.0 == name).expect("a tensor of this name");
    tensor.3.to_mut()[element * 4..element * 4 + 4].copy_from_slice(&value.to_le_bytes());
}
