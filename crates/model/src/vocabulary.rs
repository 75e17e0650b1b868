//! The rows of embedding and output layer, one for each token: more of them, and those that come
//! with an adapter.

use burn::tensor::{Tensor, TensorData};
use finetune_kernels::Weight;

use crate::adaptation::Adaptation;
use crate::branch::{EMBEDDING, OUTPUT};
use crate::error::ModelError;
use crate::model::Model;
use crate::parameters::tensor_name;
use crate::placement::Placement;
use crate::readback::data;
use crate::tree::{Decoder, Matrix};

/// A matrix of the base that comes with an adapter.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct FrozenMatrix {
    /// The module: the embedding or the output layer.
    pub(crate) module: String,
    /// [v, hidden]
    pub(crate) shape: [usize; 2],
    /// The elements, row-major.
    pub(crate) values: Vec<f32>,
}

impl Decoder {
    /// Gives a tied output layer a matrix of its own, with the embedding's values.
    pub(crate) fn untie(&mut self) {
        if self.head.output.is_none() {
            let mut output = Matrix::new(format!("{OUTPUT}.weight"), self.embedding.shape);
            output.set_as(&self.embedding);
            self.head.output = Some(output);
        }
    }

    /// The embedding, and the output layer if it has a matrix of its own, with their modules.
    fn of_vocabulary(&self) -> Vec<(&'static str, &Matrix)> {
        let output = self.head.output.as_ref().map(|output| (OUTPUT, output));
        std::iter::once((EMBEDDING, &self.embedding)).chain(output).collect()
    }

    /// Puts other values into the embedding or the output layer, in the number type that it is held
    /// in. In the place of a packed one they are held in the type that is computed in: few bits
    /// would change them. A tied output layer is the embedding.
    fn replace(&mut self, module: &str, shape: [usize; 2], values: Vec<f32>, placement: &Placement) {
        let matrix = match &mut self.head.output {
            Some(output) if module == OUTPUT => output,
            _ => &mut self.embedding,
        };
        let held = match matrix.by_row() {
            Some(by_row) => by_row.held.dtype(),
            None => match matrix.weight() {
                Weight::Dense(tensor) => tensor.dtype(),
                Weight::Packed(_) => placement.compute().dtype(),
            },
        };
        matrix.shape = shape;
        matrix.set(Tensor::<2>::from_data(TensorData::new(values, shape), placement.device()).cast(held));
    }
}

impl Model {
    /// Gives embedding and output layer this many rows. A new row is the mean of those that are
    /// there. (transformers draws new rows from a normal distribution around that mean.) Afterwards all rows are in
    /// memory.
    ///
    /// # Errors
    /// If the device fails, or rows that stay in their file cannot be read.
    pub fn resize_vocabulary(&mut self, rows: usize) -> Result<(), ModelError> {
        if rows == self.config.vocabulary {
            return Ok(());
        }
        let mut resized_matrices = Vec::new();
        for (module, matrix) in self.weights.of_vocabulary() {
            let values = data(matrix.in_f32(self.placement.device())?)?;
            resized_matrices.push((module, resized(values, matrix.shape[1], rows)));
        }
        for (module, values) in resized_matrices {
            self.weights.replace(module, [rows, self.config.hidden_size], values, &self.placement);
        }
        self.config.vocabulary = rows;
        self.has_own_vocabulary = true;
        Ok(())
    }

    /// Takes over the embedding and the output layer that come with an adapter, and its number of
    /// rows.
    pub(crate) fn take_vocabulary(&mut self, rows: usize, matrices: &[FrozenMatrix]) -> Result<(), ModelError> {
        self.resize_vocabulary(rows)?;
        for FrozenMatrix { module, shape, values } in matrices {
            let own = self.weights.of_vocabulary();
            let own = own.iter().find(|(known, _)| known == module).or(own.first());
            let own = own.map(|(_, matrix)| data(matrix.in_f32(self.placement.device())?)).transpose()?;
            if own.as_ref() != Some(values) {
                self.weights.replace(module, *shape, values.clone(), &self.placement);
                self.has_own_vocabulary = true;
            }
        }
        Ok(())
    }

    /// The frozen matrices that an adapter's file has to hold because the base's directory has
    /// others: module, name and shape.
    pub(crate) fn own_vocabulary(&self, adaptation: &Adaptation) -> Vec<(&'static str, String, Vec<usize>)> {
        if !self.has_own_vocabulary {
            return Vec::new();
        }
        let is_frozen = |module: &str| !adaptation.saved.iter().any(|saved| saved == module);
        let name = |module: &str| {
            let has_branch = adaptation.targets.iter().any(|target| target.module == module);
            let end = if has_branch { ".base_layer.weight" } else { ".weight" };
            tensor_name(&format!("{module}{end}"), true, self.config.is_named_inside())
        };
        let matrices = self.weights.of_vocabulary().into_iter().filter(|(module, _)| is_frozen(module));
        matrices.map(|(module, matrix)| (module, name(module), matrix.shape.to_vec())).collect()
    }

    /// The values of the embedding or the output layer, in f32.
    ///
    /// # Errors
    /// If the device fails, or rows that stay in their file cannot be read.
    pub fn vocabulary_values(&self, module: &str) -> Result<Vec<f32>, ModelError> {
        let all = self.weights.of_vocabulary();
        let found = all.iter().find(|(known, _)| *known == module);
        found.map_or(Ok(Vec::new()), |(_, matrix)| data(matrix.in_f32(self.placement.device())?))
    }
}

/// The rows of a matrix with `columns` columns, cut or filled up to `rows` with their mean.
pub(crate) fn resized(mut values: Vec<f32>, columns: usize, rows: usize) -> Vec<f32> {
    let there = values.len() / columns;
    let mut sums = vec![0.0f64; columns];
    for row in values.chunks(columns) {
        sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
    }
    let mean: Vec<f32> = sums.iter().map(|sum| (sum / there as f64) as f32).collect();
    values.truncate(rows * columns);
    (there..rows).for_each(|_| values.extend_from_slice(&mean));
    values
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use finetune_kernels::FloatType;

    use super::*;

    /// An embedding whose rows stay in their file is taken into memory when it changes, with the values of one that was
    /// there.
    #[test]
    fn an_embedding_in_its_file_gets_new_rows() {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models/llama3");
        for held in [None, Some(FloatType::BF16)] {
            let [mut in_memory, mut from_disk] = [false, true].map(|disk| {
                let placement = Placement::cpu(held).with_layers_from_disk(disk);
                Model::load(&base, &placement).unwrap_or_else(|error| panic!("{error}"))
            });
            let values = |model: &Model| model.vocabulary_values(EMBEDDING).expect("values");
            assert!(from_disk.weights.embedding.by_row().is_some());
            assert_eq!(values(&from_disk), values(&in_memory), "{held:?}");
            let rows = in_memory.config.vocabulary + 3;
            for model in [&mut in_memory, &mut from_disk] {
                model.resize_vocabulary(rows).expect("new rows");
            }
            assert!(from_disk.weights.embedding.by_row().is_none());
            assert_eq!(values(&from_disk), values(&in_memory), "{held:?}");
            let tokens = [1, rows as u32 - 1, 2];
            assert_eq!(
                from_disk.logits(&tokens).expect("logits"),
                in_memory.logits(&tokens).expect("logits"),
                "{held:?}"
            );
        }
    }

    #[test]
    fn new_rows_are_the_mean_of_the_others() {
        let rows = vec![1.0, -2.0, 3.0, 4.0];
        assert_eq!(resized(rows.clone(), 2, 4), [1.0, -2.0, 3.0, 4.0, 2.0, 1.0, 2.0, 1.0]);
        assert_eq!(resized(rows, 2, 1), [1.0, -2.0]);
    }
}
