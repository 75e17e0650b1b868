//! An adapter merged into its base: `W + scale · B A`, with DoRA scaled row by row to the trained
//! magnitudes, formed in f32 from the original weights and rounded once. Modules that were trained
//! in full take the place of the base's.
//!
//! If embedding and output layer are one matrix in the base, and the adapter changes one of them or
//! both, the merged model has two. PEFT's merge would add a branch of one to both of them.
//!
//! A packed base is decoded as it was trained on: few bits would lose most of what was learned.

use std::collections::BTreeMap;

use finetune_kernels::matmul::{Matrix, matmul};
use finetune_store::Dtype;
use serde_json::{Value, json};

use crate::adaptation::{is_expert, is_of_vocabulary, module_of, saved_tensors};
use crate::adapter::Adapter;
use crate::branch::{EMBEDDING, OUTPUT};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::base_files::{BaseFiles, BaseTensor};
pub use crate::files::companions::{companion_files, left_out, replace_files};
use crate::files::finite::first_not_finite;
use crate::files::floats::from_f32;
use crate::vocabulary::{FrozenMatrix, resized};

mod compare;
mod loader;
mod pieces;
mod stacks;
mod write;

pub use self::compare::{Comparison, compare};
pub use self::write::{Merged, MergedForm, SHARD_BYTES, quantize_model, write_merged};

/// A tensor of the merged model: what of the base it is made from, and its name.
pub(crate) struct MergedTensor<'a> {
    pub(crate) name: String,
    pub(crate) base: BaseTensor<'a>,
}

/// What an adapter does to each tensor of its base.
pub(crate) struct Merging<'a> {
    branches: Vec<BranchValues<'a>>,
    /// Tensors that were trained in full, by name.
    saved: BTreeMap<String, &'a [f32]>,
    /// Matrices that the adapter brings along.
    vocabulary: &'a [FrozenMatrix],
    /// Whether embedding and output layer are one matrix in the base.
    tied: bool,
    /// Whether they differ once merged, although they are one in the base.
    unties: bool,
    /// Rows of both once merged, if they are not those of the base.
    rows: Option<usize>,
    /// Whether stacks of experts that are otherwise written as they are read change (gpt-oss). Then all of
    /// them are written in plain numbers.
    opens_stacks: bool,
}

impl<'a> Merging<'a> {
    /// The values of each branch and tensor, in the order of the adapter's layout.
    pub(crate) fn new(config: &ModelConfig, adapter: &'a Adapter) -> Merging<'a> {
        let (branches, mut rest) = branches_and_rest(adapter);
        let mut take = |count: usize| {
            let (now, later) = rest.split_at(count);
            rest = later;
            now
        };
        let adaptation = adapter.adaptation();
        let resized = ModelConfig { vocabulary: adapter.rows, ..config.clone() };
        let saved = saved_tensors(&resized, &adaptation);
        let saved = saved.into_iter().map(|(name, shape)| (name, take(shape.iter().product()))).collect();
        let unties = config.tied_embeddings && adaptation.trains_vocabulary();
        let rows = (adapter.rows != config.vocabulary).then_some(adapter.rows);
        let opens_stacks =
            config.family.has_expert_parameters() && branches.iter().any(|branch| is_expert(branch.module));
        let (vocabulary, tied) = (adapter.vocabulary.as_slice(), config.tied_embeddings);
        Merging { branches, saved, vocabulary, tied, unties, rows, opens_stacks }
    }

    /// Changes config.json as the merged model needs it.
    fn amend(&self, config: &mut Value) {
        self.amend_tie(config);
        if let Some(rows) = self.rows {
            config["vocab_size"] = json!(rows);
        }
        if let Some(config) = config.as_object_mut().filter(|_| self.opens_stacks) {
            config.retain(|key, _| !["quantization", "quantization_config"].contains(&key.as_str()));
        }
    }

    /// As [`Merging::amend`], for whether embedding and output layer are one matrix.
    fn amend_tie(&self, config: &mut Value) {
        if self.unties {
            config["tie_word_embeddings"] = Value::Bool(false);
        }
    }

    /// The config of the merged model.
    pub(crate) fn config(&self, base: &ModelConfig) -> ModelConfig {
        let vocabulary = self.rows.unwrap_or(base.vocabulary);
        ModelConfig { vocabulary, tied_embeddings: base.tied_embeddings && !self.unties, ..base.clone() }
    }

    /// The tensors of the merged model: those of the base, and an output layer that was the
    /// embedding. `config`: that of the base.
    pub(crate) fn tensors<'f>(
        &self,
        files: &'f BaseFiles,
        config: &ModelConfig,
    ) -> Result<Vec<MergedTensor<'f>>, ModelError> {
        let output = format!("{OUTPUT}.weight");
        let mut tensors = Vec::new();
        for base in files.tensors_of_files(config, self.opens_stacks)? {
            // A tied output layer that is stored a second time takes its values from the embedding.
            if self.unties && base.name == output {
                continue;
            }
            if self.unties && module_of(&base.name) == EMBEDDING {
                let base = files.tensor(config, &base.name, &base.shape)?;
                tensors.push(MergedTensor { name: output.clone(), base });
            }
            tensors.push(MergedTensor { name: base.name.clone(), base });
        }
        Ok(tensors)
    }

    /// A tensor of the merged model by the name that the model has for it. `config`: that of the base, `shape`: that
    /// of the merged tensor.
    pub(crate) fn tensor<'f>(
        &self,
        files: &'f BaseFiles,
        config: &ModelConfig,
        name: &str,
        shape: &[usize],
    ) -> Result<MergedTensor<'f>, ModelError> {
        let output = format!("{OUTPUT}.weight");
        let of_base = if self.unties && name == output { format!("{EMBEDDING}.weight") } else { name.to_owned() };
        let mut shape = shape.to_vec();
        if self.resized(name).is_some() {
            shape[0] = config.vocabulary;
        }
        Ok(MergedTensor { name: name.to_owned(), base: files.tensor(config, &of_base, &shape)? })
    }

    /// Whether the adapter changes stacks of experts that single experts are read out of.
    pub(crate) fn opens_stacks(&self) -> bool {
        self.opens_stacks
    }

    /// The shape of a tensor of the merged model.
    fn shape(&self, tensor: &MergedTensor<'_>) -> Vec<usize> {
        let mut shape = tensor.base.shape.clone();
        if let Some(rows) = self.resized(&tensor.name) {
            shape[0] = rows;
        }
        shape
    }

    /// The bytes of a tensor of the merged model in a number type. `used`: whether the base computes
    /// with it.
    fn bytes(&self, tensor: &MergedTensor<'_>, dtype: Dtype, used: bool) -> Result<Vec<u8>, ModelError> {
        let (weight, is_merged) = match self.values(tensor)? {
            Some(weight) => (weight, true),
            None => match tensor.base.bytes_in(dtype, used)? {
                Some(bytes) => return Ok(bytes),
                None => (tensor.base.values()?, false),
            },
        };
        rounded_bytes(tensor, &weight, is_merged, dtype)
    }

    /// As [`Merging::bytes`] of a norm that is computed with, with 1 added to each number.
    fn bytes_with_one(&self, tensor: &MergedTensor<'_>, dtype: Dtype) -> Result<Vec<u8>, ModelError> {
        let merged = self.values(tensor)?;
        let is_merged = merged.is_some();
        let mut weight = merged.map_or_else(|| tensor.base.values(), Ok)?;
        weight.iter_mut().for_each(|value| *value += 1.0);
        rounded_bytes(tensor, &weight, is_merged, dtype)
    }

    /// The values of a tensor of the merged model in f32. `None`: they are those of the base.
    pub(crate) fn values(&self, tensor: &MergedTensor<'_>) -> Result<Option<Vec<f32>>, ModelError> {
        let MergedTensor { name, base } = tensor;
        let module = module_of(name);
        let is_weight = name.ends_with(".weight");
        let branch = self.branches.iter().find(|branch| is_weight && branch.module == module);
        let brought = self.brought(module).filter(|_| is_weight);
        let saved = self.saved.get(name.as_str()).copied();
        let rows = self.resized(name);
        if branch.is_none() && brought.is_none() && saved.is_none() && rows.is_none() {
            return Ok(None);
        }
        let mut weight = match saved.or(brought) {
            Some(values) => values.to_vec(),
            None => base.values()?,
        };
        if let Some(rows) = rows {
            weight = resized(weight, base.shape[1], rows);
        }
        if let Some(branch) = branch {
            // The branch of the embedding maps tokens to the hidden size, and a stack has [i, o] of each expert.
            let is_transposed = branch.module == EMBEDDING || base.stack().is_some();
            branch.add_to(&mut weight, rows.unwrap_or(base.shape[0]), base.shape[1], is_transposed);
        }
        Ok(Some(weight))
    }

    /// Rows of a tensor once merged, if it is one of the vocabulary and they are not the base's.
    fn resized(&self, name: &str) -> Option<usize> {
        self.rows.filter(|_| name.ends_with(".weight") && is_of_vocabulary(module_of(name)))
    }

    /// The values that the adapter brings along for the embedding or the output layer. One stands
    /// for both if they are one matrix in the base.
    fn brought(&self, module: &str) -> Option<&'a [f32]> {
        let both = self.tied && is_of_vocabulary(module);
        let matrix = self.vocabulary.iter().find(|matrix| both || matrix.module == module)?;
        Some(&matrix.values)
    }
}

/// The bytes of a tensor's numbers in a number type.
fn rounded_bytes(
    tensor: &MergedTensor<'_>,
    weight: &[f32],
    is_merged: bool,
    dtype: Dtype,
) -> Result<Vec<u8>, ModelError> {
    let rounded = from_f32(weight, dtype);
    match first_not_finite(&rounded, dtype) {
        None => Ok(rounded),
        Some(element) => Err(beyond(tensor, element, weight[element].is_finite(), is_merged, &dtype.to_string())),
    }
}

/// The error for an element that is not finite once merged, or once rounded to `dtype`. `is_finite`:
/// whether it is before it is rounded.
pub(crate) fn beyond(
    tensor: &MergedTensor<'_>,
    element: usize,
    is_finite: bool,
    is_merged: bool,
    dtype: &str,
) -> ModelError {
    let after = match (is_finite, is_merged) {
        (true, true) => format!(" once merged and rounded to {dtype}"),
        (true, false) => format!(" once rounded to {dtype}"),
        (false, _) => " once merged".to_owned(),
    };
    ModelError::NotFinite { path: tensor.base.path().to_owned(), name: tensor.name.clone(), element, after }
}

/// A branch of an adapter with its values.
pub(crate) struct BranchValues<'a> {
    pub(crate) module: &'a str,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    /// [r, i]
    pub(crate) a: &'a [f32],
    /// [o, r]
    pub(crate) b: &'a [f32],
    /// [o] with DoRA.
    pub(crate) magnitudes: Option<&'a [f32]>,
}

/// The values of each branch of an adapter, in the order of its layout.
pub(crate) fn branches(adapter: &Adapter) -> Vec<BranchValues<'_>> {
    branches_and_rest(adapter).0
}

/// The values of each branch, and those of the modules that were trained in full.
fn branches_and_rest(adapter: &Adapter) -> (Vec<BranchValues<'_>>, &[f32]) {
    let mut rest = adapter.values.as_slice();
    let mut take = |count: usize| {
        let (now, later) = rest.split_at(count);
        rest = later;
        now
    };
    let branches = adapter.targets.iter().zip(&adapter.shapes);
    let branches = branches
        .map(|(target, &(outputs, inputs))| BranchValues {
            module: &target.module,
            rank: target.rank,
            scale: target.scale(),
            a: take(target.rank * inputs),
            b: take(outputs * target.rank),
            magnitudes: target.use_dora.then(|| take(outputs)),
        })
        .collect();
    (branches, rest)
}

impl BranchValues<'_> {
    /// Adds the branch to a weight [rows, columns], in f32. `is_transposed`: whether its rows are inputs.
    fn add_to(&self, weight: &mut [f32], rows: usize, columns: usize, is_transposed: bool) {
        if is_transposed {
            let (a, b) = (Matrix::new(self.a, self.rank, rows), Matrix::new(self.b, columns, self.rank));
            return matmul(weight, true, self.scale, a.transposed(), b.transposed());
        }
        let (a, b) = (Matrix::new(self.a, self.rank, columns), Matrix::new(self.b, rows, self.rank));
        matmul(weight, true, self.scale, b, a);
        let Some(magnitudes) = self.magnitudes else { return };
        for (row, magnitude) in weight.chunks_mut(columns).zip(magnitudes) {
            let squares: f64 = row.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
            let factor = magnitude / squares.sqrt() as f32;
            row.iter_mut().for_each(|value| *value *= factor);
        }
    }
}
