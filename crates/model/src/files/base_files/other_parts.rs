//! What a multimodal model has beside its text model, where that is packed: a vision tower, a projector. They are
//! written as they are, or decoded, if they are packed too.

use std::collections::BTreeSet;
use std::path::Path;

use finetune_packed::files::{find, told_shape};
use finetune_store::{Dtype, StoreError, TensorSet, TensorView};

use super::{BaseFiles, BaseTensor, Origin, Stored};
use crate::error::ModelError;
use crate::files::floats::float_type;

/// The tensors of all parts under the names that they have in the files, if some beside the text model may be packed.
///
/// # Errors
/// If a file cannot be read.
pub(super) fn as_named(path: &Path, files: &TensorSet) -> Result<Option<Box<TensorSet>>, StoreError> {
    let is_other = |view: TensorView<'_>| float_type(view.dtype).is_none();
    if !files.left_out().any(is_other) {
        return Ok(None);
    }
    Ok(Some(Box::new(TensorSet::open_model(path)?)))
}

impl BaseFiles {
    /// The tensors of these parts. Those of a form that does not tell its shape lie here part by part.
    ///
    /// # Errors
    /// If a file cannot be read, or parts of a packed matrix do not add up.
    pub(super) fn other_parts(&self) -> Result<Vec<BaseTensor<'_>>, ModelError> {
        let Origin::Directory { files, as_named, packing, .. } = &self.origin else { return Ok(Vec::new()) };
        let mut tensors = Vec::new();
        let mut of_packed: BTreeSet<String> = BTreeSet::new();
        for view in files.left_out() {
            let (Some(all), Some((name, shape))) = (as_named, told_shape(&view)?) else { continue };
            let Some(packed) = find(all, packing, &name, shape)? else { continue };
            of_packed.extend(packed.parts().into_iter().map(str::to_owned));
            tensors.push(self.other(name, &shape, Stored::Packed(packed)));
        }
        let dense = files.left_out().filter(|view| !of_packed.contains(view.name));
        tensors.extend(dense.map(|view| self.other(view.name.to_owned(), view.shape, Stored::Dense(view))));
        Ok(tensors)
    }

    fn other<'a>(&'a self, name: String, shape: &[usize], stored: Stored<'a>) -> BaseTensor<'a> {
        BaseTensor { name, shape: shape.to_vec(), base: &self.path, stored, quantization: None, cut: None }
    }

    /// A tensor of these parts that has the codes of a packed matrix whose shape nothing tells. `None`: there is none.
    ///
    /// # Errors
    /// As [`BaseFiles::other_parts`].
    pub(crate) fn untold_codes(&self) -> Result<Option<String>, ModelError> {
        let is_codes = |tensor: &BaseTensor<'_>| {
            let ends = [".weight", ".qweight", ".weight_packed"].iter().any(|end| tensor.name.ends_with(end));
            match tensor.dtype() {
                Some(Dtype::F8_E4M3) => true,
                Some(dtype) => ends && float_type(dtype).is_none(),
                None => false,
            }
        };
        Ok(self.other_parts()?.into_iter().find(is_codes).map(|tensor| tensor.name))
    }
}
