//! Goldens with one thing changed.
#![expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use finetune_packed::files::{self, PackedConfig};
use finetune_packed::{PackedError, PackedMatrix};
use finetune_store::{Dtype, TensorSet, TensorSpec, encode_tensors};
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

/// Name, dtype, shape and bytes.
type Tensor = (String, Dtype, Vec<usize>, Cow<'static, [u8]>);

/// The tensors and the configuration of a model.
pub(crate) struct Files {
    tensors: Vec<Tensor>,
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
    pub(crate) fn new(specs: Vec<TensorSpec>, bytes: Vec<Vec<u8>>, config: Map<String, Value>) -> Files {
        let tensor = |(spec, bytes): (TensorSpec, Vec<u8>)| (spec.name, spec.dtype, spec.shape, Cow::Owned(bytes));
        Files { tensors: specs.into_iter().zip(bytes).map(tensor).collect(), config }
    }

    /// Names, dtypes and shapes.
    pub(crate) fn tensors(&self) -> Vec<(String, Dtype, Vec<usize>)> {
        self.tensors.iter().map(|(name, dtype, shape, _)| (name.clone(), *dtype, shape.clone())).collect()
    }

    /// The same with another dtype and shape of one tensor. Bytes are cut off, or `fill` added.
    pub(crate) fn cast(&mut self, name: &str, dtype: Dtype, shape: &[usize], fill: u8) {
        let tensor = self.tensor(name);
        (tensor.1, tensor.2) = (dtype, shape.to_vec());
        tensor.3.to_mut().resize(shape.iter().product::<usize>() * dtype.size(), fill);
    }

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
                self.cast(name, dtype, shape, 0);
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

    fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|(own, ..)| own == name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// The error of finding a weight in them, or of reading it.
    pub(crate) fn error(&self, weight: &str, shape: [usize; 2]) -> PackedError {
        match self.read(weight, shape) {
            Err(error) => error,
            Ok(Some(_)) => panic!("{weight} was read"),
            Ok(None) => panic!("{weight} was not found"),
        }
    }

    /// A weight in them, and the words for its format.
    pub(crate) fn read(&self, weight: &str, shape: [usize; 2]) -> Result<Option<(String, PackedMatrix)>, PackedError> {
        let directory = tempfile::tempdir().expect("a directory");
        let bytes = encode_tensors(&self.tensors, &BTreeMap::new()).expect("a safetensors file");
        fs::write(directory.path().join("model.safetensors"), bytes).expect("a file");
        let set = TensorSet::open_model(directory.path()).expect("a model");
        let config = PackedConfig::parse(&self.config, &directory.path().join("config.json"))?;
        let Some(found) = files::find(&set, &config, weight, shape)? else { return Ok(None) };
        let matrix = found.read()?;
        assert_eq!(found.memory(), matrix.bytes() as u64, "the memory of {weight}");
        Ok(Some((found.format().to_string(), matrix)))
    }
}
