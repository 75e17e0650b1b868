//! The trained parameters in one fixed order: the layout of gradients, moments and checkpoints.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use finetune_store::{Dtype, TensorFile, encode_tensors};

use crate::error::ModelError;
use crate::files::floats::{from_f32, to_f32};

/// One trained tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Its name in the files.
    pub name: String,
    /// Its dimensions, row-major.
    pub shape: Vec<usize>,
    /// Its elements in the flat vector.
    pub range: Range<usize>,
}

/// All trained parameters in model order. Gradients, moments and sums over ranks are flat `[f32]`
/// of [`Layout::len`] elements in this order.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Layout {
    parameters: Vec<Parameter>,
}

impl Layout {
    /// Adds a tensor behind the others.
    pub fn push(&mut self, name: String, shape: Vec<usize>) {
        let start = self.len();
        let range = start..start + shape.iter().product::<usize>();
        self.parameters.push(Parameter { name, shape, range });
    }

    /// The same tensors once for each prefix, as `prefix.name`. Optimizer moments are stored so.
    pub fn repeated(&self, prefixes: &[&str]) -> Layout {
        let mut layout = Layout::default();
        for prefix in prefixes {
            for parameter in &self.parameters {
                layout.push(format!("{prefix}.{}", parameter.name), parameter.shape.clone());
            }
        }
        layout
    }

    /// Elements of all parameters together.
    pub fn len(&self) -> usize {
        self.parameters.last().map_or(0, |last| last.range.end)
    }

    /// Whether nothing is trained.
    pub fn is_empty(&self) -> bool {
        self.parameters.is_empty()
    }

    /// The parameters in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Parameter> {
        self.parameters.iter()
    }

    /// BLAKE3 of names and shapes in order, in hexadecimal. Ranks and checkpoints must agree on it.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for Parameter { name, shape, .. } in &self.parameters {
            hasher.update(format!("{name} {shape:?}\n").as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// Flat values as safetensors under the names of the layout, in f32.
///
/// # Errors
/// If safetensors cannot hold them.
///
/// # Panics
/// If there are fewer values than the layout has elements.
pub fn encode_flat(layout: &Layout, values: &[f32]) -> Result<Vec<u8>, ModelError> {
    let tensors: Vec<_> = layout
        .iter()
        .map(|parameter| {
            let bytes = from_f32(&values[parameter.range.clone()], Dtype::F32);
            (parameter.name.clone(), Dtype::F32, parameter.shape.clone(), Cow::Owned(bytes))
        })
        .collect();
    Ok(encode_tensors(&tensors, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?)
}

/// Reads what [`encode_flat`] wrote: every parameter of the layout in its shape, and nothing else.
///
/// # Errors
/// If the file cannot be read, or has other tensors than the layout.
pub fn read_flat(path: &Path, layout: &Layout) -> Result<Vec<f32>, ModelError> {
    let file = TensorFile::open(path)?;
    let mut values = Vec::with_capacity(layout.len());
    let keys = |what, names| Err(ModelError::AdapterKeys { path: path.to_owned(), what, names });
    for parameter in layout.iter() {
        let Some(view) = file.get(&parameter.name) else {
            return keys("a parameter is missing", vec![parameter.name.clone()]);
        };
        if view.shape != parameter.shape.as_slice() {
            let (found, expected) = (view.shape.to_vec(), parameter.shape.clone());
            return Err(ModelError::Shape { path: path.to_owned(), name: parameter.name.clone(), found, expected });
        }
        values.extend(to_f32(&view)?);
    }
    let known: BTreeSet<&str> = layout.iter().map(|parameter| parameter.name.as_str()).collect();
    let extra: Vec<String> = file.names().filter(|name| !known.contains(name)).map(str::to_owned).collect();
    if extra.is_empty() { Ok(values) } else { keys("tensors that are no parameter of this run", extra) }
}
