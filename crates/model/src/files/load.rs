//! Weights from a Hugging Face directory, or fresh ones.

use std::path::Path;

use burn::tensor::{Element, Tensor, TensorData};
use finetune_kernels::FloatType;
use finetune_random::Stream;
use finetune_store::{TensorSet, TensorView};
use rayon::prelude::*;

use crate::config::ModelConfig;
use crate::error::{ModelError, list};
use crate::files::extra;
use crate::files::finite::expect_finite;
use crate::files::floats::{float_type, to_finite_f32};
use crate::placement::Placement;
use crate::random_stream::RandomStream;
use crate::tree::{Decoder, Matrix, Slot, Vector, expected_tensors};

/// Checks that the files hold every tensor of the config in its shape, and no other that takes part
/// in arithmetic. Returns what a user should know about the others.
pub(crate) fn check(files: &TensorSet, config: &ModelConfig, directory: &Path) -> Result<Vec<String>, ModelError> {
    let family = config.family.architecture;
    let path = directory.to_owned();
    for (name, shape) in expected_tensors(config) {
        let Some(view) = files.get(&name) else {
            return Err(ModelError::MissingTensor { path, name, family });
        };
        if view.shape != shape.as_slice() {
            return Err(ModelError::Shape { path, name, found: view.shape.to_vec(), expected: shape });
        }
        if float_type(view.dtype).is_none() {
            return Err(ModelError::Dtype { path, name, dtype: view.dtype.to_string() });
        }
    }
    let mut notices = Vec::new();
    let unused = extra::passed_over(files, config, directory)?;
    if !unused.is_empty() {
        let names = list(&unused);
        notices.push(format!("{}: passed over, as no part of {family} uses them: {names}", path.display()));
    }
    if !files.unlisted().is_empty() {
        let names = list(files.unlisted());
        notices.push(format!("{}: the index of the weights leaves out {names}; the shards have them", path.display()));
    }
    Ok(notices)
}

/// Where the tensors of a model come from.
pub(crate) enum Source<'a> {
    Files {
        files: &'a TensorSet,
    },
    /// transformers' initialization: normal weights with the config's `initializer_range`, norms 1,
    /// biases 0.
    Fresh {
        seed: u64,
    },
}

/// Elements that may be on their way to a GPU at a time. Each tensor lies in a buffer of its own
/// until it has arrived.
const MOST_ON_THE_WAY: usize = 128 << 20;

/// All weights on the device: vectors in f32, matrices in the type that the placement says. One
/// tensor after the other is read and handed over, so there is never a second copy of more than
/// one.
pub(crate) fn weights(config: &ModelConfig, source: &Source<'_>, placement: &Placement) -> Result<Decoder, ModelError> {
    let mut decoder = Decoder::new(config);
    let mut on_the_way = 0;
    for (index, slot) in decoder.slots().into_iter().enumerate() {
        let loader = Loader { config, source, placement, index: index as u32 };
        match slot {
            Slot::Vector(vector) => vector.set(loader.vector(vector)?),
            Slot::Matrix(matrix) => {
                matrix.set(loader.matrix(matrix)?);
                on_the_way += matrix.shape.iter().product::<usize>();
            }
        }
        if on_the_way > MOST_ON_THE_WAY {
            on_the_way = 0;
            let _ = placement.device.sync();
        }
    }
    Ok(decoder)
}

/// Reads one tensor, the `index`th of the model.
struct Loader<'a> {
    config: &'a ModelConfig,
    source: &'a Source<'a>,
    placement: &'a Placement,
    index: u32,
}

impl Loader<'_> {
    fn vector(&self, vector: &Vector) -> Result<Tensor<1>, ModelError> {
        let values = match self.source {
            Source::Files { files } => to_finite_f32(&view(files, &vector.name))?,
            Source::Fresh { .. } => vec![vector.fresh; vector.length],
        };
        Ok(Tensor::from_data(TensorData::new(values, [vector.length]), &self.placement.device))
    }

    fn matrix(&self, matrix: &Matrix) -> Result<Tensor<2>, ModelError> {
        let files = match self.source {
            Source::Files { files } => files,
            Source::Fresh { seed } => {
                let stream = Stream::new(*seed, RandomStream::Weights as u32, 0, self.index);
                let values = stream.normal(matrix.shape.iter().product(), self.config.initializer_range as f32);
                // Fresh weights are trained, and trained parameters are f32.
                return Ok(Tensor::from_data(TensorData::new(values, matrix.shape), &self.placement.device));
            }
        };
        let view = view(files, &matrix.name);
        let stored = float_type(view.dtype).expect("checked when the files were opened");
        let held = self.placement.held(stored);
        if held == stored {
            // The bytes go to the device as they lie in the file, without a conversion.
            let bytes = view.bytes()?;
            expect_finite(&view, &bytes, 0)?;
            let data = TensorData::from_bytes_vec(bytes, matrix.shape, stored.dtype());
            return Ok(Tensor::from_data(data, (&self.placement.device, stored.dtype())));
        }
        let values = to_finite_f32(&view)?;
        match held {
            FloatType::F32 => Ok(Tensor::from_data(TensorData::new(values, matrix.shape), &self.placement.device)),
            FloatType::F16 => self.rounded(&view, &values, matrix.shape, half::f16::from_f32, "f16"),
            FloatType::BF16 => self.rounded(&view, &values, matrix.shape, half::bf16::from_f32, "bf16"),
        }
    }

    /// The values in a 16-bit type. A finite number that becomes infinite is an error.
    fn rounded<E: Element>(
        &self,
        view: &TensorView<'_>,
        values: &[f32],
        shape: [usize; 2],
        round: fn(f32) -> E,
        kind: &str,
    ) -> Result<Tensor<2>, ModelError> {
        let rounded: Vec<E> = values.par_iter().map(|&value| round(value)).collect();
        match rounded.par_iter().position_first(|value| !value.elem::<f32>().is_finite()) {
            None => Ok(Tensor::from_data(TensorData::new(rounded, shape), (&self.placement.device, E::dtype()))),
            Some(element) => Err(ModelError::NotFinite {
                path: view.path().to_owned(),
                name: view.name.to_owned(),
                element,
                after: format!(" once rounded to {kind}"),
            }),
        }
    }
}

fn view<'a>(files: &'a TensorSet, name: &str) -> TensorView<'a> {
    files.get(name).expect("checked when the files were opened")
}
