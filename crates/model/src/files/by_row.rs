//! A matrix whose rows are read from its file when a pass needs them, and of which a token needs one row: the embedding
//! of the inputs that each layer has of its own, which is half of a small model, and the embedding itself where layers
//! are read from the disk.

use std::sync::Arc;

use finetune_kernels::FloatType;
use finetune_store::{FileRows, StoreError, TensorView};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::error::ModelError;
use crate::files::finite::first_not_finite;
use crate::files::floats::{float_type, numbers};

/// The embedding of the inputs that each layer has of its own.
pub(crate) const PER_LAYER_TABLE: &str = "model.embed_tokens_per_layer.weight";

/// A matrix in a safetensors file.
#[derive(Clone, Debug)]
pub(crate) struct ByRow {
    pub(crate) name: String,
    /// [v, columns]
    shape: [usize; 2],
    rows: Arc<FileRows>,
    /// The number type that all of it would be held in: elements are rounded to that.
    pub(crate) held: FloatType,
}

impl ByRow {
    /// # Errors
    /// If the file is not here.
    pub(crate) fn new(
        name: &str,
        shape: [usize; 2],
        view: &TensorView<'_>,
        held: FloatType,
    ) -> Result<ByRow, StoreError> {
        Ok(ByRow { name: name.to_owned(), shape, rows: Arc::new(view.rows()?), held })
    }

    /// Some of its rows in f32, one behind the other.
    ///
    /// # Errors
    /// If the file cannot be read, or a number is not finite.
    pub(crate) fn read(&self, rows: &[u32]) -> Result<Vec<f32>, ModelError> {
        let columns = self.shape[1];
        let mut values = vec![0.0; rows.len() * columns];
        let each = values.par_chunks_mut(columns).zip(rows);
        each.try_for_each(|(out, &row)| self.read_row(row as usize, out))?;
        Ok(values)
    }

    /// All of its rows.
    ///
    /// # Errors
    /// As [`ByRow::read`].
    pub(crate) fn read_all(&self) -> Result<Vec<f32>, ModelError> {
        let rows: Vec<u32> = (0..self.shape[0] as u32).collect();
        self.read(&rows)
    }

    fn read_row(&self, row: usize, out: &mut [f32]) -> Result<(), ModelError> {
        let (bytes, dtype) = (self.rows.read(row)?, self.rows.dtype);
        let not_finite = |column: usize, after: String| ModelError::NotFinite {
            path: self.rows.path().to_owned(),
            name: self.name.clone(),
            element: row * self.shape[1] + column,
            after,
        };
        if let Some(column) = first_not_finite(&bytes, dtype) {
            return Err(not_finite(column, String::new()));
        }
        out.copy_from_slice(&numbers(&bytes, dtype));
        let round: fn(f32) -> f32 = match self.held {
            held if float_type(dtype) == Some(held) => return Ok(()),
            FloatType::F32 => return Ok(()),
            FloatType::F16 => |value| f16::from_f32(value).to_f32(),
            FloatType::BF16 => |value| bf16::from_f32(value).to_f32(),
        };
        out.iter_mut().for_each(|value| *value = round(*value));
        match out.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(column) => Err(not_finite(column, format!(" once rounded to {}", self.held.name()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use finetune_store::{Dtype, RealDisk, TensorFile, encode_tensors, replace_file};

    use super::*;

    const SHAPE: [usize; 2] = [3, 2];

    /// Rows of this matrix, in numbers of this type.
    fn rows(values: [f32; 6], dtype: Dtype, held: FloatType, wanted: &[u32]) -> Result<Vec<f32>, String> {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("model.safetensors");
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| match dtype {
                Dtype::BF16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
                _ => value.to_le_bytes().to_vec(),
            })
            .collect();
        let tensor = ("table".to_owned(), dtype, SHAPE.to_vec(), bytes.into());
        let file = encode_tensors(&[tensor], &BTreeMap::new()).expect("a file");
        replace_file(&RealDisk, &path, &file).expect("written");
        let file = TensorFile::open(&path).expect("a file");
        let by_row = ByRow::new("table", SHAPE, &file.get("table").expect("a tensor"), held).expect("rows");
        let read = if wanted.is_empty() { by_row.read_all() } else { by_row.read(wanted) };
        read.map_err(|error| error.to_string())
    }

    #[test]
    fn rows_are_those_of_the_file() {
        let values = [1.0, -2.0, 3.5, 0.25, 1e30, -0.0];
        for (dtype, held) in
            [(Dtype::F32, FloatType::F32), (Dtype::BF16, FloatType::BF16), (Dtype::BF16, FloatType::F32)]
        {
            let exact = values.map(|value| if dtype == Dtype::BF16 { bf16::from_f32(value).to_f32() } else { value });
            let of = |row: usize| exact[2 * row..2 * row + 2].to_vec();
            assert_eq!(rows(values, dtype, held, &[]), Ok(exact.to_vec()), "{dtype}");
            // Any order, and one twice.
            assert_eq!(rows(values, dtype, held, &[2, 0, 2]), Ok([of(2), of(0), of(2)].concat()), "{dtype}");
        }
    }

    /// As a matrix in memory would be.
    #[test]
    fn elements_are_rounded_to_what_would_be_held() {
        let values = [1.0 + f32::EPSILON, 0.1, 65_504.0, 3.0, 4.0, 5.0];
        let bf16s = values.map(|value| bf16::from_f32(value).to_f32());
        assert_eq!(rows(values, Dtype::F32, FloatType::BF16, &[]), Ok(bf16s.to_vec()));
        let f16s = values.map(|value| f16::from_f32(value).to_f32());
        assert_eq!(rows(values, Dtype::F32, FloatType::F16, &[]), Ok(f16s.to_vec()));
        assert!(f16s != values && bf16s != values);
    }

    /// (element 3, what would be held, what the error says)
    #[test]
    fn numbers_that_are_not_finite_are_named() {
        for (value, held, want) in [
            (f32::NAN, FloatType::F32, "element 3"),
            (f32::INFINITY, FloatType::BF16, "element 3"),
            (65_520.0, FloatType::F16, "once rounded to f16"),
        ] {
            let values = [1.0, 2.0, 3.0, value, 5.0, 6.0];
            let error = rows(values, Dtype::F32, held, &[0, 1]).expect_err("a number");
            assert!(error.contains(want) && error.contains("table") && error.contains("model.safetensors"), "{error}");
            // The other rows are as they are.
            assert_eq!(rows(values, Dtype::F32, held, &[0, 2]), Ok(vec![1.0, 2.0, 5.0, 6.0]));
        }
    }
}
