//! The files of a checkpoint's model, written and read as a run of one process does it.
#![allow(dead_code, reason = "each test file takes what it needs")]

use std::borrow::Cow;
use std::path::Path;

use finetune_model::{BaseName, FlatFile, Model};
use finetune_store::{Dtype, encode_tensors};

/// Names and bytes of the files of these parameter values.
pub(crate) fn files(model: &Model, values: &[f32], base: &BaseName) -> Vec<(String, Vec<u8>)> {
    let mut files = model.files_beside(base).expect("files");
    let Some(file) = model.values_file().expect("a file") else { return files };
    let (mut tensors, mut places) = (Vec::new(), file.parts());
    for (n, spec) in file.specs().into_iter().enumerate() {
        let parts: Vec<Vec<f32>> = match file.frozen(n) {
            Some(module) => vec![model.vocabulary_values(module).expect("values")],
            None => places.by_ref().take(file.lengths(n).len()).map(|part| values[part.clone()].to_vec()).collect(),
        };
        tensors.push((spec.name, Dtype::F32, spec.shape, Cow::Owned(file.bytes(n, &parts))));
    }
    files.push((file.name.clone(), encode_tensors(&tensors, &FlatFile::metadata()).expect("tensors")));
    files
}

/// The values of all trained parameters, as [`files`] wrote them.
pub(crate) fn values(model: &Model, directory: &Path) -> Vec<f32> {
    let file = model.values_file().expect("a file").expect("trained parameters");
    let (reader, mut places) = (file.open(directory).expect("the file"), file.parts());
    let mut values = vec![0.0; model.layout().len()];
    for n in 0..file.specs().len() {
        if file.frozen(n).is_some() {
            continue;
        }
        let mut rest = reader.values(n).expect("values").into_iter();
        for part in places.by_ref().take(file.lengths(n).len()) {
            values[part.clone()].iter_mut().zip(&mut rest).for_each(|(value, from)| *value = from);
        }
    }
    values
}
