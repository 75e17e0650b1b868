//! Weights from the files of a base, or fresh ones.

use std::sync::Arc;

use burn::tensor::{Element, Tensor, TensorData};
use finetune_kernels::{FloatType, FrozenValues, PackedWeight};
use finetune_random::Stream;
use rayon::prelude::*;

use crate::config::{ModelConfig, Wrapper};
use crate::error::{ModelError, list};
use crate::files::base_files::{BaseFiles, BaseTensor};
use crate::files::by_row::ByRow;
use crate::files::extra;
use crate::files::floats::float_type;
use crate::placement::Placement;
use crate::random_stream::RandomStream;
use crate::tree::{Decoder, Matrix, Slot, Vector};

/// Checks that the files hold every tensor of the config in its shape, dense or packed, and no other
/// that takes part in arithmetic. Returns what a user should know about the others.
pub(crate) fn check(files: &BaseFiles, config: &ModelConfig) -> Result<Vec<String>, ModelError> {
    let (family, path) = (config.family.architecture, files.path());
    let parts = files.parts(config)?;
    let Some(files) = files.safetensors() else { return Ok(Vec::new()) };
    let mut notices = Vec::new();
    if let Some(Wrapper { class, .. }) = &config.wrapper {
        let parts: Vec<String> = part_names(files.left_out().map(|view| view.name));
        let count = files.left_out().count();
        notices.push(format!(
            "{}: {class}: the text model in it, {family}; {count} tensors of {} take no part",
            path.display(),
            list(&parts)
        ));
    }
    let unused = extra::passed_over(files, config, &parts, path)?;
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

/// The parts of a multimodal model that these tensors are of, such as `model.vision_tower`, each once.
fn part_names<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let part = |name: &str| {
        let words = if name.starts_with("model.") { 2 } else { 1 };
        name.split('.').take(words).collect::<Vec<_>>().join(".")
    };
    let mut parts: Vec<String> = names.map(part).collect();
    parts.sort();
    parts.dedup();
    parts
}

/// Where the tensors of a model come from.
pub(crate) enum Source<'a> {
    Files {
        files: &'a BaseFiles,
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

/// All weights on the device: vectors in f32, matrices packed or in the type that the placement says.
/// One tensor after the other is read and handed over, so there is never a second copy of more than
/// one.
pub(crate) fn weights(config: &ModelConfig, source: &Source<'_>, placement: &Placement) -> Result<Decoder, ModelError> {
    let mut decoder = Decoder::new(config);
    let mut on_the_way = 0;
    for (index, slot) in decoder.slots().into_iter().enumerate() {
        let loader = Loader { config, source, placement, index: index as u32 };
        match slot {
            Slot::Vector(vector) => vector.set(loader.vector(vector)?),
            Slot::Matrix(matrix) => {
                loader.fill(matrix)?;
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
            Source::Files { files } => files.tensor(self.config, &vector.name, &[vector.length])?.values()?,
            Source::Fresh { .. } => vec![vector.fresh; vector.length],
        };
        Ok(Tensor::from_data(TensorData::new(values, [vector.length]), &self.placement.device))
    }

    fn fill(&self, matrix: &mut Matrix) -> Result<(), ModelError> {
        let files = match self.source {
            Source::Files { files } => files,
            Source::Fresh { seed } => {
                let stream = Stream::new(*seed, RandomStream::Weights as u32, 0, self.index);
                let values = stream.normal(matrix.shape.iter().product(), self.config.initializer_range as f32);
                // Fresh weights are trained, and trained parameters are f32.
                let data = TensorData::new(values, matrix.shape);
                matrix.set(Tensor::from_data(data, &self.placement.device));
                return Ok(());
            }
        };
        let tensor = files.tensor(self.config, &matrix.name, &matrix.shape)?;
        if let Some(view) = tensor.view().filter(|_| matrix.is_by_row) {
            matrix.set_by_row(ByRow { name: tensor.name.clone(), rows: Arc::new(view.rows()?) });
            return Ok(());
        }
        let in_bf16 = self.placement.has_bf16_products();
        match tensor.packed()? {
            Some(packed) => {
                let weight = PackedWeight::new(packed, &self.placement.device);
                matrix.set_packed(if in_bf16 { weight.with_bf16_products() } else { weight });
            }
            None if matrix.is_of_expert => matrix.set_packed(self.of_expert(&tensor, matrix.shape, in_bf16)?),
            None if in_bf16 => {
                let rounded = self.rounded_values(&tensor, &tensor.values()?, half::bf16::from_f32, "bf16")?;
                matrix.set_packed(PackedWeight::bf16(rounded, matrix.shape));
            }
            None => matrix.set(self.dense(&tensor, matrix.shape)?),
        }
        Ok(())
    }

    /// All elements of a matrix that is not packed, in the type that the placement says.
    fn dense(&self, tensor: &BaseTensor<'_>, shape: [usize; 2]) -> Result<Tensor<2>, ModelError> {
        let dtype = tensor.dtype().expect("it is not packed");
        let stored = float_type(dtype).expect("checked when the tensor was looked up");
        let held = self.placement.held(stored);
        if held == stored
            && let Some(bytes) = tensor.bytes_in(dtype, true)?
        {
            // The bytes go to the device as they lie in the file, without a conversion.
            let data = TensorData::from_bytes_vec(bytes, shape, stored.dtype());
            return Ok(Tensor::from_data(data, (&self.placement.device, stored.dtype())));
        }
        let values = tensor.values()?;
        match held {
            FloatType::F32 => Ok(Tensor::from_data(TensorData::new(values, shape), &self.placement.device)),
            FloatType::F16 => self.rounded(tensor, &values, shape, half::f16::from_f32, "f16"),
            FloatType::BF16 => self.rounded(tensor, &values, shape, half::bf16::from_f32, "bf16"),
        }
    }

    /// All elements of an expert's matrix, in the type that the placement says.
    fn of_expert(&self, tensor: &BaseTensor<'_>, shape: [usize; 2], in_bf16: bool) -> Result<PackedWeight, ModelError> {
        let stored = float_type(tensor.dtype().expect("it is not packed")).expect("checked when it was looked up");
        // The values are exact in the type of the file, so rounding to that changes none.
        let values = tensor.values()?;
        let values = match if in_bf16 { FloatType::BF16 } else { self.placement.held(stored) } {
            FloatType::F32 => FrozenValues::F32(values),
            FloatType::F16 => FrozenValues::F16(self.rounded_values(tensor, &values, half::f16::from_f32, "f16")?),
            FloatType::BF16 => {
                FrozenValues::Bf16(self.rounded_values(tensor, &values, half::bf16::from_f32, "bf16")?)
            }
        };
        let weight = PackedWeight::of_values(values, shape, &self.placement.device);
        Ok(if in_bf16 { weight.with_bf16_products() } else { weight })
    }

    /// The values in a 16-bit type. A finite number that becomes infinite is an error.
    fn rounded<E: Element>(
        &self,
        tensor: &BaseTensor<'_>,
        values: &[f32],
        shape: [usize; 2],
        round: fn(f32) -> E,
        kind: &str,
    ) -> Result<Tensor<2>, ModelError> {
        let rounded = self.rounded_values(tensor, values, round, kind)?;
        Ok(Tensor::from_data(TensorData::new(rounded, shape), (&self.placement.device, E::dtype())))
    }

    /// As [`Loader::rounded`], in the memory of the host.
    fn rounded_values<E: Element>(
        &self,
        tensor: &BaseTensor<'_>,
        values: &[f32],
        round: fn(f32) -> E,
        kind: &str,
    ) -> Result<Vec<E>, ModelError> {
        let rounded: Vec<E> = values.par_iter().map(|&value| round(value)).collect();
        match rounded.par_iter().position_first(|value| !value.elem::<f32>().is_finite()) {
            None => Ok(rounded),
            Some(element) => Err(ModelError::NotFinite {
                path: tensor.path().to_owned(),
                name: tensor.name.clone(),
                element,
                after: format!(" once rounded to {kind}"),
            }),
        }
    }
}
