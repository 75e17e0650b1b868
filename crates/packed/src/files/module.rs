//! The tensors of one weight, found and checked by their headers.

use std::path::PathBuf;

use finetune_store::{Dtype, TensorSet, TensorView};

use super::family;
use crate::PackedError;

/// The number types of weights that are not packed.
pub(super) const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

/// A weight of `[o, i]` and the tensors whose names begin like its own.
#[derive(Debug)]
pub(super) struct Module<'a> {
    files: &'a TensorSet,
    /// The name of the weight.
    pub(super) weight: String,
    /// The name of the weight without `.weight` at its end: that of the layer.
    pub(super) stem: String,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl<'a> Module<'a> {
    pub(super) fn new(files: &'a TensorSet, weight: &str, [rows, columns]: [usize; 2]) -> Self {
        let stem = weight.strip_suffix(".weight").unwrap_or(weight);
        Self { files, weight: weight.to_owned(), stem: stem.to_owned(), rows, columns }
    }

    /// Refuses shapes of the model whose elements cannot be counted in bits, so that no later
    /// product overflows.
    pub(super) fn check_shape(&self) -> Result<(), PackedError> {
        let bits = self.rows.checked_mul(self.columns).and_then(|elements| elements.checked_mul(64));
        match bits {
            Some(1..) => Ok(()),
            _ => Err(self.wrong(format!("the model has a matrix of {} x {} there", self.rows, self.columns))),
        }
    }

    /// `[o, i]`
    pub(super) fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// The tensor of the weight's own name.
    pub(super) fn weight(&self) -> Option<TensorView<'a>> {
        self.files.get(&self.weight)
    }

    /// How many elements the weight has.
    pub(super) fn elements(&self) -> usize {
        self.rows * self.columns
    }

    /// The tensor whose name is the layer's and `end`, such as `.scales`.
    pub(super) fn get(&self, end: &str) -> Option<TensorView<'a>> {
        self.files.get(&format!("{}{end}", self.stem))
    }

    /// The same, of a format that cannot be without it.
    pub(super) fn need(&self, end: &str) -> Result<TensorView<'a>, PackedError> {
        self.get(end).ok_or_else(|| self.wrong(format!("its part `{}{end}` is missing", self.stem)))
    }

    /// The names of all tensors that are of this weight.
    pub(super) fn parts(&self) -> Vec<&'a str> {
        let mut names: Vec<&str> =
            family::all_ends().filter_map(|end| self.get(end)).map(|tensor| tensor.name).collect();
        names.sort_unstable();
        names
    }

    /// The names of the tensors with these ends, as far as they are there.
    pub(super) fn names(&self, ends: &[&str]) -> Vec<&'a str> {
        ends.iter().filter_map(|end| self.get(end)).map(|tensor| tensor.name).collect()
    }

    /// Whether a tensor's name begins with the layer's and a dot, and is not that of its bias.
    pub(super) fn has_other_tensors(&self) -> bool {
        let other =
            |name: &str| name.strip_prefix(&self.stem).is_some_and(|end| end.starts_with('.') && end != ".bias");
        self.files.names().any(other)
    }

    /// The file of the weight, as far as it is known.
    pub(super) fn path(&self) -> Option<PathBuf> {
        let first = family::all_ends().find_map(|end| self.get(end)).map(|tensor| tensor.path().to_owned());
        first.or_else(|| self.files.files().first().cloned())
    }

    /// An error of the weight as a whole.
    pub(super) fn wrong(&self, what: impl Into<String>) -> PackedError {
        PackedError::Malformed { path: self.path(), name: self.weight.clone(), what: what.into() }
    }

    /// The number of rows, columns or whatever `what` says that groups of one size make of
    /// `length`: `length / count`, if it comes out even.
    pub(super) fn group_size(
        &self,
        tensor: &TensorView<'_>,
        length: usize,
        count: usize,
    ) -> Result<usize, PackedError> {
        if count == 0 || !length.is_multiple_of(count) {
            return Err(wrong(
                tensor,
                format!("it has {count} groups a row, which do not divide the {length} columns"),
            ));
        }
        Ok(length / count)
    }
}

/// An error of one tensor.
pub(super) fn wrong(tensor: &TensorView<'_>, what: impl Into<String>) -> PackedError {
    PackedError::Malformed { path: Some(tensor.path().to_owned()), name: tensor.name.to_owned(), what: what.into() }
}

/// Refuses a tensor of other dtypes than these.
pub(super) fn check_dtype(tensor: &TensorView<'_>, dtypes: &[Dtype]) -> Result<(), PackedError> {
    if dtypes.contains(&tensor.dtype) {
        return Ok(());
    }
    let names: Vec<&str> = dtypes.iter().map(|dtype| dtype.name()).collect();
    Err(wrong(tensor, format!("it is {}, and {} is needed", tensor.dtype, names.join(" or "))))
}

/// Refuses a tensor of another shape.
pub(super) fn check_shape(tensor: &TensorView<'_>, shape: &[usize]) -> Result<(), PackedError> {
    if tensor.shape == shape {
        return Ok(());
    }
    Err(wrong(tensor, format!("it has shape {:?}, and {shape:?} is needed", tensor.shape)))
}

/// Refuses a tensor with another number of elements. Its shape may have more dimensions.
pub(super) fn check_count(tensor: &TensorView<'_>, count: usize) -> Result<(), PackedError> {
    let elements = tensor.size() / tensor.dtype.size();
    if elements == count {
        return Ok(());
    }
    Err(wrong(tensor, format!("it has {elements} elements, and {count} are needed")))
}

/// Refuses a tensor that has not two dimensions. Its lengths otherwise.
pub(super) fn matrix(tensor: &TensorView<'_>) -> Result<[usize; 2], PackedError> {
    match tensor.shape {
        [rows, columns] => Ok([*rows, *columns]),
        shape => Err(wrong(tensor, format!("it has shape {shape:?}, and two dimensions are needed"))),
    }
}
