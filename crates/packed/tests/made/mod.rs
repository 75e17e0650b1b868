//! Goldens with one thing changed.
#![expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use finetune_packed::PackedError;
use finetune_packed::files::{self, PackedConfig};
use finetune_store::{Dtype, TensorSet, encode_tensors};
use serde_json::{Map, Value};

/// A change of a model's files. Names are those of tensors.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    Remove(&'static str),
    /// Dtype and shape become these. Bytes are cut off, or zeros added.
    Cast(&'static str, Dtype, &'static [usize]),
    /// The bytes from the `n`th on become these.
    Bytes(&'static str, usize, &'static [u8]),
    /// In a tensor that is text, the first becomes the second.
    Text(&'static str, &'static str, &'static str),
    /// config.json becomes this.
    Config(&'static str),
}

/// The tensors and the configuration of a model.
pub(crate) struct Files {
    tensors: Vec<(String, Dtype, Vec<usize>, Cow<'static, [u8]>)>,
    config: Map<String, Value>,
}

/// The object in a file of JSON.
pub(crate) fn config_of(path: &Path) -> Map<String, Value> {
    object(&fs::read_to_string(path).expect("a configuration"))
}

pub(crate) fn object(text: &str) -> Map<String, Value> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => object,
        other => panic!("no object: {other:?}"),
    }
}

impl Files {
    pub(crate) fn of(directory: &Path) -> Files {
        let set = TensorSet::open_model(directory).expect("a golden");
        let tensor = |name: &str| {
            let tensor = set.get(name).expect("a tensor by its own name");
            let bytes = tensor.bytes().expect("the bytes of a golden");
            (name.to_owned(), tensor.dtype, tensor.shape.to_vec(), Cow::Owned(bytes))
        };
        Files { tensors: set.names().map(tensor).collect(), config: config_of(&directory.join("config.json")) }
    }

    /// Changes them. A tensor that is not there is made for `Cast`.
    pub(crate) fn change(&mut self, change: Change) {
        match change {
            Change::Config(text) => self.config = object(text),
            Change::Remove(name) => {
                self.tensor(name);
                self.tensors.retain(|(own, ..)| own != name);
            }
            Change::Cast(name, dtype, shape) => {
                if !self.tensors.iter().any(|(own, ..)| own == name) {
                    self.tensors.push((name.to_owned(), dtype, Vec::new(), Cow::default()));
                }
                let tensor = self.tensor(name);
                (tensor.1, tensor.2) = (dtype, shape.to_vec());
                tensor.3.to_mut().resize(shape.iter().product::<usize>() * dtype.size(), 0);
            }
            Change::Bytes(name, start, bytes) => {
                self.tensor(name).3.to_mut()[start..start + bytes.len()].copy_from_slice(bytes);
            }
            Change::Text(name, from, to) => {
                let tensor = self.tensor(name);
                let text = String::from_utf8(tensor.3.to_vec()).expect("a text");
                assert!(text.contains(from), "{text} has no {from}");
                let text = text.replacen(from, to, 1).into_bytes();
                (tensor.2, tensor.3) = (vec![text.len()], Cow::Owned(text));
            }
        }
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Dtype, Vec<usize>, Cow<'static, [u8]>) {
        self.tensors.iter_mut().find(|(own, ..)| own == name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// The error of finding a weight in them, or of reading it.
    pub(crate) fn error(&self, weight: &str, shape: [usize; 2]) -> PackedError {
        match self.read(weight, shape) {
            Err(error) => error,
            Ok(found) => panic!("{weight} was {}", if found { "read" } else { "not found" }),
        }
    }

    /// Whether a weight is found. It is read then.
    pub(crate) fn read(&self, weight: &str, shape: [usize; 2]) -> Result<bool, PackedError> {
        let directory = tempfile::tempdir().expect("a directory");
        let bytes = encode_tensors(&self.tensors, &BTreeMap::new()).expect("a safetensors file");
        fs::write(directory.path().join("model.safetensors"), bytes).expect("a file");
        let set = TensorSet::open_model(directory.path()).expect("a model");
        let config = PackedConfig::parse(&self.config, &directory.path().join("config.json"))?;
        let Some(found) = files::find(&set, &config, weight, shape)? else { return Ok(false) };
        found.read()?;
        Ok(true)
    }
}
