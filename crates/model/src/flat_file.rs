//! A file of flat values, such as those of an adapter or of moments: its tensors, and which elements of the flat
//! vector each is made of. It is written and read tensor by tensor, so that one of them is in memory at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use finetune_store::{Dtype, TensorFile, TensorSpec};

use crate::error::ModelError;
use crate::files::floats::{from_f32, to_f32};
use crate::layout::Layout;

/// A tensor of the file.
#[derive(Clone, Debug)]
pub(crate) struct FlatTensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// Where its elements are in the flat vector: those of one parameter, or of one after the other.
    pub(crate) parts: Vec<Range<usize>>,
    /// Whether the elements of the parts take turns, and do not lie one part behind the other.
    pub(crate) take_turns: bool,
    /// The module whose frozen matrix it is. Then it has no parts.
    pub(crate) frozen: Option<&'static str>,
}

/// A file of flat values.
#[derive(Clone, Debug)]
pub struct FlatFile {
    /// The file's name.
    pub name: String,
    pub(crate) tensors: Vec<FlatTensor>,
}

impl FlatFile {
    /// A file with each parameter as it is.
    pub fn of(name: &str, layout: &Layout) -> FlatFile {
        let tensor = |parameter: &crate::layout::Parameter| FlatTensor {
            name: parameter.name.clone(),
            shape: parameter.shape.clone(),
            parts: vec![parameter.range.clone()],
            take_turns: false,
            frozen: None,
        };
        FlatFile { name: name.to_owned(), tensors: layout.iter().map(tensor).collect() }
    }

    /// The elements of the flat vector in the order of the file, parameter by parameter.
    pub fn parts(&self) -> impl Iterator<Item = &Range<usize>> {
        self.tensors.iter().flat_map(|tensor| &tensor.parts)
    }

    /// Names and shapes of the tensors, all in f32.
    pub fn specs(&self) -> Vec<TensorSpec> {
        let spec = |tensor: &FlatTensor| TensorSpec {
            name: tensor.name.clone(),
            dtype: Dtype::F32,
            shape: tensor.shape.clone(),
        };
        self.tensors.iter().map(spec).collect()
    }

    /// What the header says beside the tensors.
    pub fn metadata() -> BTreeMap<String, String> {
        BTreeMap::from([("format".to_owned(), "pt".to_owned())])
    }

    /// The lengths of the parts of the `n`th tensor.
    pub fn lengths(&self, n: usize) -> Vec<usize> {
        self.tensors[n].parts.iter().map(Range::len).collect()
    }

    /// The module whose frozen matrix the `n`th tensor is, if it is one.
    pub fn frozen(&self, n: usize) -> Option<&'static str> {
        self.tensors[n].frozen
    }

    /// The bytes of the `n`th tensor, from the values of its parts, or those of a frozen matrix.
    ///
    /// # Panics
    /// If these are not as long as the parts.
    pub fn bytes(&self, n: usize, parts: &[Vec<f32>]) -> Vec<u8> {
        match parts {
            [one] => from_f32(one, Dtype::F32),
            _ if self.tensors[n].take_turns => {
                let length = parts.first().map_or(0, Vec::len);
                let turns: Vec<f32> =
                    (0..length).flat_map(|element| parts.iter().map(move |part| part[element])).collect();
                from_f32(&turns, Dtype::F32)
            }
            _ => parts.iter().flat_map(|part| from_f32(part, Dtype::F32)).collect(),
        }
    }

    /// Opens such a file in a directory.
    ///
    /// # Errors
    /// If it cannot be read, or has other tensors than these.
    pub fn open(&self, directory: &Path) -> Result<FlatReader<'_>, ModelError> {
        let path = directory.join(&self.name);
        let file = TensorFile::open(&path)?;
        let keys = |what, names| Err(ModelError::AdapterKeys { path: path.clone(), what, names });
        for FlatTensor { name, shape, .. } in &self.tensors {
            let Some(view) = file.get(name) else { return keys("a parameter is missing", vec![name.clone()]) };
            if view.shape != shape.as_slice() {
                let (found, expected) = (view.shape.to_vec(), shape.clone());
                return Err(ModelError::Shape { path: path.clone(), name: name.clone(), found, expected });
            }
        }
        let known: BTreeSet<&str> = self.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        let extra: Vec<String> = file.names().filter(|name| !known.contains(name)).map(str::to_owned).collect();
        match extra.is_empty() {
            true => Ok(FlatReader { of: self, file, path }),
            false => keys("tensors that are no parameter of this run", extra),
        }
    }
}

/// A file of flat values that is open, with the tensors that it should have.
#[derive(Debug)]
pub struct FlatReader<'a> {
    of: &'a FlatFile,
    file: TensorFile,
    path: PathBuf,
}

impl FlatReader<'_> {
    /// The values of the `n`th tensor, part behind part.
    ///
    /// # Errors
    /// If they cannot be read.
    ///
    /// # Panics
    /// If there is no such tensor.
    pub fn values(&self, n: usize) -> Result<Vec<f32>, ModelError> {
        let FlatTensor { name, parts, take_turns, .. } = &self.of.tensors[n];
        let Some(view) = self.file.get(name) else {
            let (path, names) = (self.path.clone(), vec![name.clone()]);
            return Err(ModelError::AdapterKeys { path, what: "a parameter is missing", names });
        };
        let values = to_f32(&view)?;
        if !take_turns {
            return Ok(values);
        }
        let count = parts.len();
        Ok((0..count).flat_map(|part| values.iter().skip(part).step_by(count).copied()).collect())
    }
}
