//! An adapter merged into its base: formed in f32 from the original weights and rounded once.
//! [`crate::merging`] says what each tensor is made of.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use finetune_kernels::FloatType;
use finetune_random::Stream;
use finetune_store::{Disk, Dtype, Staging, TensorSet, TensorSpec, TensorView, write_shards};

use crate::adapter::Adapter;
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::companions::amend_config;
pub use crate::files::companions::{companion_files, left_out, replace_files};
use crate::files::finite::{expect_finite, first_not_finite};
use crate::files::floats::{from_f32, to_finite_f32};
use crate::files::load::check;
use crate::merging::{MergedTensor, Merging};
use crate::model::Model;
use crate::placement::Placement;
use crate::tree::expected_tensors;

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
    let is_used = |tensor: &MergedTensor<'_>| used.contains(tensor.view.name);
    let written_as = |tensor: &MergedTensor<'_>| match form.dtype {
        Some(dtype) if is_used(tensor) => dtype_of(dtype),
        _ => tensor.view.dtype,
    };
    let spec = |tensor: &MergedTensor<'_>| TensorSpec {
        name: tensor.name.clone(),
        dtype: written_as(tensor),
        shape: merging.shape(tensor),
    };
    let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
    // Read before the long work, so that an error such as a link out of the directory comes early.
    let dtype =
        tensors.iter().find(|tensor| tensor.view.shape.len() == 2 && is_used(tensor)).map_or(Dtype::F32, written_as);
    let mut companions = companion_files(base, dtype, text)?;
    if merging.changes_config() {
        amend_config(&mut companions, |config| merging.amend(config));
    }
    let directory = output.directory().to_owned();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let written = write_shards(disk, &directory, &specs, &metadata, form.shard_bytes, |n| {
        progress(n, tensors.len());
        merged_bytes(&merging, &tensors[n], specs[n].dtype, is_used(&tensors[n]))
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

/// The bytes of a tensor of the merged model. `used`: whether the base computes with it.
fn merged_bytes(
    merging: &Merging<'_>,
    tensor: &MergedTensor<'_>,
    dtype: Dtype,
    used: bool,
) -> Result<Vec<u8>, ModelError> {
    let MergedTensor { name, view } = tensor;
    let merged = merging.values(name, view)?;
    if merged.is_none() && dtype == view.dtype {
        let bytes = view.bytes()?;
        if used {
            expect_finite(view, &bytes, 0)?;
        }
        return Ok(bytes);
    }
    let is_merged = merged.is_some();
    let weight = match merged {
        Some(weight) => weight,
        None => to_finite_f32(view)?,
    };
    let rounded = from_f32(&weight, dtype);
    match first_not_finite(&rounded, dtype) {
        None => Ok(rounded),
        Some(element) => Err(beyond((view, name), &weight, element, is_merged, &dtype.to_string())),
    }
}

/// The error for an element that is not finite once merged, or once rounded to `dtype`. It is one of
/// the tensor with this name, which is made of the base's tensor.
pub(crate) fn beyond(
    (view, name): (&TensorView<'_>, &str),
    weight: &[f32],
    element: usize,
    is_merged: bool,
    dtype: &str,
) -> ModelError {
    let after = match (weight[element].is_finite(), is_merged) {
        (true, true) => format!(" once merged and rounded to {dtype}"),
        (true, false) => format!(" once rounded to {dtype}"),
        (false, _) => " once merged".to_owned(),
    };
    ModelError::NotFinite { path: view.path().to_owned(), name: name.to_owned(), element, after }
}

/// The number type of files.
fn dtype_of(kind: FloatType) -> Dtype {
    match kind {
        FloatType::F32 => Dtype::F32,
        FloatType::F16 => Dtype::F16,
        FloatType::BF16 => Dtype::BF16,
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
