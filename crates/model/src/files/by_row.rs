//! A matrix whose rows are read from its file when a pass needs them: the embedding of the inputs that each
//! layer has of its own, which is half of a small model, and of which a token needs one row.

use std::sync::Arc;

use finetune_store::{Dtype, FileRows};
use rayon::prelude::*;

use crate::error::ModelError;
use crate::files::finite::first_not_finite;
use crate::files::floats::numbers;

/// The embedding of the inputs that each layer has of its own.
pub(crate) const PER_LAYER_TABLE: &str = "model.embed_tokens_per_layer.weight";

/// A matrix [v, columns] in a safetensors file.
#[derive(Clone, Debug)]
pub(crate) struct ByRow {
    pub(crate) name: String,
    pub(crate) rows: Arc<FileRows>,
}

impl ByRow {
    /// Some of its rows in f32, one behind the other.
    ///
    /// # Errors
    /// If the file cannot be read, or a number is not finite.
    pub(crate) fn read(&self, rows: &[u32]) -> Result<Vec<f32>, ModelError> {
        let dtype: Dtype = self.rows.dtype;
        let read = |&row: &u32| {
            let bytes = self.rows.read(row as usize)?;
            let values = numbers(&bytes, dtype);
            match first_not_finite(&bytes, dtype) {
                None => Ok(values),
                Some(column) => Err(ModelError::NotFinite {
                    path: self.rows.path().to_owned(),
                    name: self.name.clone(),
                    element: row as usize * values.len() + column,
                    after: String::new(),
                }),
            }
        };
        let rows: Vec<Vec<f32>> = rows.par_iter().map(read).collect::<Result<_, ModelError>>()?;
        Ok(rows.concat())
    }
}
