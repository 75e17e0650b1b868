//! Granite 4's dense part in mlx-lm's files, which have gate and up apart, under the names of other families:
//!
//! ```text
//! mlp.gate_proj, mlp.up_proj   [f, hidden]   shared_mlp.input_linear, the rows of the gate first
//! mlp.down_proj                [hidden, f]   shared_mlp.output_linear
//! ```
//!
//! Each may be packed. What is packed alike stays so.

use finetune_packed::PackedMatrix;

use super::{BaseFiles, BaseTensor};
use crate::error::ModelError;

/// Matrices here, and what mlx-lm has of each.
const NAMES: [(&str, &[&str]); 2] = [
    (".shared_mlp.input_linear.weight", &[".mlp.gate_proj.weight", ".mlp.up_proj.weight"]),
    (".shared_mlp.output_linear.weight", &[".mlp.down_proj.weight"]),
];

/// A matrix that is made of the rows of others, one behind the other.
pub(super) struct OfRows<'a> {
    parts: Vec<BaseTensor<'a>>,
}

impl<'a> OfRows<'a> {
    /// The matrix of this name and shape. `None`: it is another one, or the files have no parts of it.
    ///
    /// # Errors
    /// If they have other shapes or number types.
    pub(super) fn find(files: &'a BaseFiles, name: &str, shape: &[usize]) -> Result<Option<Self>, ModelError> {
        let named = |(whole, ends): &(&str, &'static [&str])| Some((name.strip_suffix(whole)?.to_owned(), *ends));
        let (Some((layer, ends)), &[rows, columns]) = (NAMES.iter().find_map(named), shape) else { return Ok(None) };
        let mut parts = Vec::with_capacity(ends.len());
        for end in ends {
            let shape = [rows / ends.len(), columns];
            let Some(part) = files.get(&format!("{layer}{end}"), &shape)? else { return Ok(None) };
            parts.push(BaseTensor { quantization: None, ..part });
        }
        Ok(Some(OfRows { parts }))
    }

    /// All of them. There is at least one.
    pub(super) fn all(&self) -> impl Iterator<Item = &BaseTensor<'a>> {
        self.parts.iter()
    }

    /// The first of them.
    pub(super) fn first(&self) -> Option<&BaseTensor<'a>> {
        self.parts.first()
    }

    /// How all of them are packed, if they are packed alike.
    pub(super) fn format(&self) -> Option<String> {
        let mut formats = self.parts.iter().map(BaseTensor::format);
        let first = formats.next().flatten()?;
        formats.all(|format| format.as_ref() == Some(&first)).then_some(first)
    }

    /// Bytes in memory, if they are packed alike.
    pub(super) fn packed_bytes(&self) -> Option<u64> {
        self.format()?;
        self.parts.iter().map(BaseTensor::packed_bytes).sum()
    }

    /// The whole matrix. `None`: they are not packed alike.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(super) fn packed(&self) -> Result<Option<PackedMatrix>, ModelError> {
        if self.format().is_none() {
            return Ok(None);
        }
        let parts = self.parts.iter().map(BaseTensor::packed).collect::<Result<Option<Vec<_>>, _>>()?;
        Ok(parts.and_then(PackedMatrix::joined))
    }

    /// Names of the tensors that make it.
    pub(super) fn names(&self) -> Vec<String> {
        names_of(self.parts.iter())
    }

    /// All elements.
    pub(super) fn values(&self) -> Result<Vec<f32>, ModelError> {
        let parts = self.parts.iter().map(BaseTensor::values).collect::<Result<Vec<_>, _>>()?;
        Ok(parts.concat())
    }
}

/// Names of the tensors of the files that make these.
pub(super) fn names_of<'t, 'a: 't>(tensors: impl Iterator<Item = &'t BaseTensor<'a>>) -> Vec<String> {
    let names = |tensor: &BaseTensor<'_>| match tensor.parts() {
        names if names.is_empty() => vec![tensor.name.clone()],
        names => names,
    };
    tensors.flat_map(names).collect()
}
