//! What each tensor of a merged model is made of: `W + scale · B A`, with DoRA scaled row by row to
//! the trained magnitudes. Modules that were trained in full take the place of the base's.
//!
//! If embedding and output layer are one matrix in the base, and the adapter changes one of them or
//! both, the merged model has two. PEFT's merge would add a branch of one to both of them.

use std::collections::BTreeMap;

use finetune_kernels::matmul::{Matrix, matmul};
use finetune_store::{TensorSet, TensorView};
use serde_json::{Value, json};

use crate::adaptation::{is_of_vocabulary, module_of, saved_tensors};
use crate::adapter::Adapter;
use crate::branch::{EMBEDDING, OUTPUT};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::floats::to_finite_f32;
use crate::vocabulary::{FrozenMatrix, resized};

/// A tensor of the merged model: what of the base it is made from, and its name.
pub(crate) struct MergedTensor<'a> {
    pub(crate) name: String,
    pub(crate) view: TensorView<'a>,
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
}

impl<'a> Merging<'a> {
    /// The values of each branch and tensor, in the order of the adapter's layout.
    pub(crate) fn new(config: &ModelConfig, adapter: &'a Adapter) -> Merging<'a> {
        let (branches, mut rest) = split(adapter);
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
        Merging { branches, saved, vocabulary: &adapter.vocabulary, tied: config.tied_embeddings, unties, rows }
    }

    /// The config of the merged model.
    pub(crate) fn config(&self, base: &ModelConfig) -> ModelConfig {
        ModelConfig {
            tied_embeddings: base.tied_embeddings && !self.unties,
            vocabulary: self.rows.unwrap_or(base.vocabulary),
            ..base.clone()
        }
    }

    /// Whether config.json is another one than the base's.
    pub(crate) fn changes_config(&self) -> bool {
        self.unties || self.rows.is_some()
    }

    /// Changes config.json as the merged model needs it.
    pub(crate) fn amend(&self, config: &mut Value) {
        if self.unties {
            config["tie_word_embeddings"] = Value::Bool(false);
        }
        if let Some(rows) = self.rows {
            config["vocab_size"] = json!(rows);
        }
    }

    /// The tensors of the merged model: those of the base, and an output layer that was the
    /// embedding.
    pub(crate) fn tensors<'f>(&self, files: &'f TensorSet) -> Vec<MergedTensor<'f>> {
        let output = format!("{OUTPUT}.weight");
        let mut tensors = Vec::new();
        for view in files.names().filter_map(|name| files.get(name)) {
            // A tied output layer that is stored a second time takes its values from the embedding.
            if self.unties && view.name == output {
                continue;
            }
            let is_embedding = module_of(view.name) == EMBEDDING;
            if self.unties && is_embedding {
                tensors.push(MergedTensor { name: output.clone(), view });
            }
            tensors.push(MergedTensor { name: view.name.to_owned(), view });
        }
        tensors
    }

    /// The shape of a tensor of the merged model.
    pub(crate) fn shape(&self, tensor: &MergedTensor<'_>) -> Vec<usize> {
        let mut shape = tensor.view.shape.to_vec();
        if let Some(rows) = self.resized(&tensor.name) {
            shape[0] = rows;
        }
        shape
    }

    /// The values of a tensor of the merged model in f32. `None`: those of the base.
    pub(crate) fn values(&self, name: &str, view: &TensorView<'_>) -> Result<Option<Vec<f32>>, ModelError> {
        let module = module_of(name);
        let is_weight = name.ends_with(".weight");
        let branch = self.branches.iter().find(|branch| is_weight && branch.module == module);
        let brought = self.brought(module).filter(|_| is_weight);
        let saved = self.saved.get(name).copied();
        let rows = self.resized(name);
        if branch.is_none() && brought.is_none() && saved.is_none() && rows.is_none() {
            return Ok(None);
        }
        let mut weight = match saved.or(brought) {
            Some(values) => values.to_vec(),
            None => to_finite_f32(view)?,
        };
        if let Some(rows) = rows {
            weight = resized(weight, view.shape[1], rows);
        }
        if let Some(branch) = branch {
            branch.add_to(&mut weight, rows.unwrap_or(view.shape[0]), view.shape[1]);
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

/// A branch of an adapter with its values.
pub(crate) struct BranchValues<'a> {
    pub(crate) module: &'a str,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    /// [rank, inputs]
    pub(crate) a: &'a [f32],
    /// [outputs, rank]
    pub(crate) b: &'a [f32],
    /// [outputs] with DoRA.
    pub(crate) magnitudes: Option<&'a [f32]>,
}

impl BranchValues<'_> {
    /// Adds the branch to a weight [rows, columns], in f32.
    fn add_to(&self, weight: &mut [f32], rows: usize, columns: usize) {
        if self.module == EMBEDDING {
            // Its branch maps tokens to the hidden size: the weight is its transposed matrix.
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

/// The values of each branch, in the order of the adapter's layout.
pub(crate) fn branches(adapter: &Adapter) -> Vec<BranchValues<'_>> {
    split(adapter).0
}

/// The branches, and the values behind them: those of the modules that were trained in full.
fn split(adapter: &Adapter) -> (Vec<BranchValues<'_>>, &[f32]) {
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
