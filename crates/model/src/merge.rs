//! An adapter merged into its base: `W + scale · B A`, with DoRA scaled row by row to the trained
//! magnitudes, formed in f32 from the original weights and rounded once. Modules that were trained
//! in full take the place of the base's.
//!
//! If embedding and output layer are one matrix in the base, and the adapter changes one of them or
//! both, the merged model has two. PEFT's merge would add a branch of one to both of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use finetune_kernels::FloatType;
use finetune_kernels::matmul::{Matrix, matmul};
use finetune_random::Stream;
use finetune_store::{Disk, Dtype, Staging, TensorSet, TensorSpec, TensorView, write_shards};
use serde_json::{Value, json};

use crate::adaptation::{is_of_vocabulary, module_of, saved_tensors};
use crate::adapter::Adapter;
use crate::branch::{EMBEDDING, OUTPUT};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::companions::amend_config;
pub use crate::files::companions::{companion_files, left_out, replace_files};
use crate::files::finite::{expect_finite, first_not_finite};
use crate::files::floats::{from_f32, to_finite_f32};
use crate::files::load::check;
use crate::model::Model;
use crate::placement::Placement;
use crate::tree::expected_tensors;
use crate::vocabulary::{FrozenMatrix, resized};

/// Bytes of the largest weight file of an export, as in transformers.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// How the weights of a merged model are written.
#[derive(Clone, Copy, Debug)]
pub struct MergedForm {
    /// Bytes of a weight file at most.
    pub shard_bytes: u64,
    /// The number type of the model's tensors. `None`: each keeps the base's.
    pub dtype: Option<FloatType>,
}

impl MergedForm {
    /// The base's number types, in files of so many bytes at most.
    pub fn of_shards(shard_bytes: u64) -> MergedForm {
        MergedForm { shard_bytes, dtype: None }
    }
}

/// Writes the merged model into a directory that is being made: weights in the base's number types
/// or that of the form, config and tokenizer files. `text` takes the place of the base's files of
/// the same names.
/// `progress` is called with the number of tensors done, and of all.
///
/// # Errors
/// If reading or writing fails, or if base and adapter do not fit. A number that is not finite, in
/// the base or once merged or rounded, is an error that names its tensor.
pub fn write_merged(
    disk: &dyn Disk,
    base: &Path,
    adapter: &Adapter,
    output: &mut Staging<'_>,
    form: MergedForm,
    text: &[(String, Vec<u8>)],
    progress: &dyn Fn(usize, usize),
) -> Result<(), ModelError> {
    let config = ModelConfig::load(base)?;
    let files = TensorSet::open_model(base)?;
    check(&files, &config, base)?;
    let merging = Merging::new(&config, adapter);
    let tensors = merging.tensors(&files);
    let expected = expected_tensors(&config);
    let used: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
    let written_as = |tensor: &MergedTensor<'_>| match form.dtype {
        Some(dtype) if used.contains(tensor.view.name) => dtype_of(dtype),
        _ => tensor.view.dtype,
    };
    let specs: Vec<TensorSpec> = tensors.iter().map(|tensor| merging.spec(tensor, written_as(tensor))).collect();
    // Read before the long work, so that an error such as a link out of the directory comes early.
    let dtype = tensors
        .iter()
        .find(|tensor| tensor.view.shape.len() == 2 && used.contains(tensor.view.name))
        .map_or(Dtype::F32, written_as);
    let mut companions = companion_files(base, dtype, text)?;
    if merging.unties || merging.rows.is_some() {
        amend_config(&mut companions, |config| merging.amend(config));
    }
    let directory = output.directory().to_owned();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let written =
        write_shards(disk, &directory, &specs, &metadata, form.shard_bytes, |n| -> Result<Vec<u8>, ModelError> {
            progress(n, tensors.len());
            merging.bytes(&tensors[n], specs[n].dtype, used.contains(tensors[n].view.name))
        })?;
    progress(tensors.len(), tensors.len());
    for name in written {
        output.record(&name)?;
    }
    for (name, bytes) in companions {
        output.write(&name, &bytes)?;
    }
    Ok(())
}

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
        Merging { branches, saved, vocabulary: &adapter.vocabulary, tied: config.tied_embeddings, unties, rows }
    }

    /// Changes config.json as the merged model needs it.
    fn amend(&self, config: &mut Value) {
        if self.unties {
            config["tie_word_embeddings"] = Value::Bool(false);
        }
        if let Some(rows) = self.rows {
            config["vocab_size"] = json!(rows);
        }
    }

    /// The config of the merged model.
    pub(crate) fn config(&self, base: &ModelConfig) -> ModelConfig {
        let vocabulary = self.rows.unwrap_or(base.vocabulary);
        ModelConfig { vocabulary, tied_embeddings: base.tied_embeddings && !self.unties, ..base.clone() }
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

    fn spec(&self, tensor: &MergedTensor<'_>, dtype: Dtype) -> TensorSpec {
        let mut shape = tensor.view.shape.to_vec();
        if let Some(rows) = self.resized(&tensor.name) {
            shape[0] = rows;
        }
        TensorSpec { name: tensor.name.clone(), dtype, shape }
    }

    /// The bytes of a tensor of the merged model in a number type. `used`: whether the base computes
    /// with it.
    fn bytes(&self, tensor: &MergedTensor<'_>, dtype: Dtype, used: bool) -> Result<Vec<u8>, ModelError> {
        let view = &tensor.view;
        let (weight, is_merged) = match self.values(tensor)? {
            Some(weight) => (weight, true),
            None if dtype != view.dtype => (to_finite_f32(view)?, false),
            None => {
                let bytes = view.bytes()?;
                if used {
                    expect_finite(view, &bytes, 0)?;
                }
                return Ok(bytes);
            }
        };
        let rounded = from_f32(&weight, dtype);
        match first_not_finite(&rounded, dtype) {
            None => Ok(rounded),
            Some(element) => {
                let is_finite = weight[element].is_finite();
                Err(beyond(tensor, element, is_finite, is_merged, &dtype.to_string()))
            }
        }
    }

    /// The values of a tensor of the merged model in f32. `None`: they are those of the base.
    pub(crate) fn values(&self, tensor: &MergedTensor<'_>) -> Result<Option<Vec<f32>>, ModelError> {
        let MergedTensor { name, view } = tensor;
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
    ModelError::NotFinite { path: tensor.view.path().to_owned(), name: tensor.name.clone(), element, after }
}

/// The number type of files.
fn dtype_of(kind: FloatType) -> Dtype {
    match kind {
        FloatType::F32 => Dtype::F32,
        FloatType::F16 => Dtype::F16,
        FloatType::BF16 => Dtype::BF16,
    }
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

/// The difference of logits between a merged model and its base with the adapter, over probe
/// tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// Largest absolute difference of two logits.
    pub largest: f32,
    /// Largest absolute logit, to judge the difference by.
    pub scale: f32,
    /// Probe positions at which both models find the same token most likely.
    pub agreeing: usize,
    /// Probe positions.
    pub positions: usize,
}

/// Runs both models on 32 random tokens, which are the same each time, and judges the difference.
///
/// # Errors
/// If a model cannot be loaded, or the device fails. [`ModelError::Merge`] if logits are not
/// finite, or are too far apart.
pub fn compare(base: &Path, adapter: &Adapter, merged: &Path, placement: &Placement) -> Result<Comparison, ModelError> {
    let mut with_adapter = Model::load(base, placement)?;
    with_adapter.attach(adapter)?;
    let vocabulary = with_adapter.config.vocabulary;
    let probe: Vec<u32> =
        Stream::new(0, 0, 0, 0).uniform(32, 0.5).iter().map(|u| ((u + 0.5) * vocabulary as f32) as u32).collect();
    let expected = with_adapter.logits(&probe)?;
    drop(with_adapter);
    let found = Model::load(merged, placement)?.logits(&probe)?;
    judge(&expected, &found, vocabulary)
}

/// Rounding the sum to 16 bits moves logits by a few hundredths of the largest at most. Beyond this
/// part of the largest logit, half of the most likely tokens have to agree.
const FAR: f32 = 0.1;
/// Beyond this part of the largest logit the models do not compute the same.
const TOO_FAR: f32 = 0.5;

/// The difference of logits [positions, v], or why they cannot be those of one model.
fn judge(expected: &[f32], found: &[f32], vocabulary: usize) -> Result<Comparison, ModelError> {
    let failed = |what: String| Err(ModelError::Merge { what });
    for (logits, whose) in [(expected, "the base with the adapter"), (found, "the merged model")] {
        if let Some(place) = logits.iter().position(|logit| !logit.is_finite()) {
            let position = place / vocabulary;
            return failed(format!("logits of {whose} are not finite (at probe token {position})"));
        }
    }
    let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(token, _)| token);
    let rows = || expected.chunks(vocabulary).zip(found.chunks(vocabulary));
    // All are finite, so `max` drops none.
    let comparison = Comparison {
        largest: expected.iter().zip(found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max),
        scale: expected.iter().fold(0.0, |max, logit| logit.abs().max(max)),
        agreeing: rows().filter(|(a, b)| best(a) == best(b)).count(),
        positions: rows().count(),
    };
    let Comparison { largest, scale, agreeing, positions } = comparison;
    if largest > TOO_FAR * scale || (largest > FAR * scale && 2 * agreeing < positions) {
        return failed(format!(
            "logits differ by up to {largest:.3e} where the largest is {scale:.1}, with the same best token at {agreeing} of {positions} probe tokens"
        ));
    }
    Ok(comparison)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (logits of the merged model, part of the error). The expected logits of the three positions
    /// are (4, 1), (1, 4) and (4, 1).
    #[test]
    fn a_comparison_is_judged() {
        let expected = [4.0, 1.0, 1.0, 4.0, 4.0, 1.0];
        let table: [(&[f32], Option<&str>); 7] = [
            (&expected, None),
            (&[4.1, 1.0, 1.0, 4.0, 4.0, 0.9], None),
            // The difference is below a tenth, so the most likely tokens need not agree.
            (&[4.3, 1.0, 1.0, 4.0, 3.8, 1.3], None),
            (&[4.0, 1.0, 1.0, f32::NAN, 4.0, 1.0], Some("the merged model are not finite (at probe token 1)")),
            (&[f32::NEG_INFINITY, 1.0, 1.0, 4.0, 4.0, 1.0], Some("are not finite (at probe token 0)")),
            (&[2.4, 2.6, 2.6, 2.4, 4.0, 1.0], Some("at 1 of 3 probe tokens")),
            (&[4.0, 1.0, 1.0, 4.0, 7.0, 1.0], Some("differ by up to 3.000e0")),
        ];
        for (found, want) in table {
            let judged = judge(&expected, found, 2);
            match (judged, want) {
                (Ok(comparison), None) => assert_eq!(comparison.positions, 3),
                (Err(error), Some(part)) => {
                    assert!(error.is_about_numbers() && error.to_string().contains(part), "{error}");
                }
                (judged, want) => panic!("{found:?}: {judged:?}, expected {want:?}"),
            }
        }
        let bad = judge(&[f32::NAN; 2], &[f32::NAN; 2], 2).expect_err("nothing to compare");
        assert!(bad.to_string().contains("the base with the adapter"), "{bad}");
    }
}
