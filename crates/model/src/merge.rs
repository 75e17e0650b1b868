//! An adapter merged into its base: `W + scale · B A`, formed in f32 from the original weights and rounded once.

use std::collections::BTreeMap;
use std::path::Path;

use finetune_kernels::matmul::{Matrix, matmul};
use finetune_random::Stream;
use finetune_store::{Disk, Dtype, Staging, TensorSet, TensorSpec, write_shards};
use serde_json::Value;

use crate::adapter::Adapter;
use crate::load::{self, from_f32, to_f32};
use crate::model::Model;
use crate::placement::Placement;
use crate::{ModelConfig, ModelError};

/// Files of a model directory that go along with its weights, unchanged.
const COMPANIONS: [&str; 11] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "LICENSE",
];

/// config.json with the dtype of the weights, and every tokenizer and template file that is there.
pub(crate) fn companion_files(
    base: &Path,
    dtype: Dtype,
    text: &[(String, Vec<u8>)],
) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
    let path = base.join("config.json");
    let unreadable = |path: &Path, source| ModelError::Unreadable { path: path.to_owned(), source };
    let config = load::read_text(&path, crate::config::LIMIT)?;
    let mut config: Value = serde_json::from_str(&config)
        .map_err(|error| ModelError::Malformed { path: path.clone(), what: error.to_string() })?;
    // The spelling that the directory uses already; transformers reads both.
    let key = if config.get("torch_dtype").is_some() { "torch_dtype" } else { "dtype" };
    config[key] = Value::from(match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    });
    let config = serde_json::to_vec_pretty(&config).expect("a JSON value can be written");
    let mut files = vec![("config.json".to_owned(), config)];
    files.extend(text.iter().cloned());
    for name in COMPANIONS {
        if text.iter().any(|(known, _)| known == name) {
            continue;
        }
        let path = base.join(name);
        if path.is_file() {
            files.push((name.to_owned(), std::fs::read(&path).map_err(|source| unreadable(&path, source))?));
        }
    }
    Ok(files)
}

/// Largest weight file of an export, in bytes, as transformers shards.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// Writes the merged model into a directory that is being made: weights in the base's number types, config and
/// tokenizer files. `progress` is told the number of tensors done, of how many.
pub fn write_merged(
    disk: &dyn Disk,
    base: &Path,
    adapter: &Adapter,
    output: &mut Staging<'_>,
    shard_bytes: u64,
    text: &[(String, Vec<u8>)],
    progress: &dyn Fn(usize, usize),
) -> Result<(), ModelError> {
    let config = ModelConfig::load(base)?;
    let files = TensorSet::open_model(base)?;
    load::check(&files, &config, base)?;
    let views: Vec<_> = files.names().filter_map(|name| files.get(name)).collect();
    let specs: Vec<TensorSpec> = views
        .iter()
        .map(|view| TensorSpec { name: view.name.to_owned(), dtype: view.dtype, shape: view.shape.to_vec() })
        .collect();
    let branches = branches(adapter);
    let directory = output.directory().to_owned();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let written = write_shards(disk, &directory, &specs, &metadata, shard_bytes, |n| -> Result<Vec<u8>, ModelError> {
        progress(n, views.len());
        let view = &views[n];
        let module = view.name.strip_suffix(".weight").unwrap_or(view.name);
        let Some(branch) = branches.iter().find(|branch| branch.module == module) else {
            return Ok(view.bytes.to_vec());
        };
        let mut weight = to_f32(view, base)?;
        let (outputs, inputs) = (view.shape[0], view.shape[1]);
        let (a, b) = (Matrix::new(branch.a, branch.rank, inputs), Matrix::new(branch.b, outputs, branch.rank));
        matmul(&mut weight, true, branch.scale, b, a);
        Ok(from_f32(&weight, view.dtype))
    })?;
    progress(views.len(), views.len());
    let dtype = views.iter().find(|view| view.shape.len() == 2).map_or(Dtype::F32, |view| view.dtype);
    for name in written {
        output.record(&name)?;
    }
    for (name, bytes) in companion_files(base, dtype, text)? {
        output.write(&name, &bytes)?;
    }
    Ok(())
}

pub fn left_out(_base: &Path) -> Vec<String> {
    Vec::new()
}

struct BranchValues<'a> {
    module: &'a str,
    rank: usize,
    scale: f32,
    a: &'a [f32],
    b: &'a [f32],
}

/// The values of each branch, in the order of the adapter's layout.
fn branches(adapter: &Adapter) -> Vec<BranchValues<'_>> {
    let mut rest = adapter.values.as_slice();
    let mut take = |count: usize| {
        let (now, later) = rest.split_at(count);
        rest = later;
        now
    };
    adapter
        .targets
        .iter()
        .zip(&adapter.shapes)
        .map(|(target, &(outputs, inputs))| BranchValues {
            module: &target.module,
            rank: target.rank,
            scale: target.scale(),
            a: take(target.rank * inputs),
            b: take(outputs * target.rank),
        })
        .collect()
}

/// Largest difference of logits between a merged model and its base with the adapter, over probe tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// Largest absolute difference of two logits.
    pub largest: f32,
    /// Largest absolute logit, to judge the difference by.
    pub scale: f32,
    /// Probe positions at which both models find the same token most likely.
    pub agreeing: usize,
    pub positions: usize,
}

/// Runs both models on 32 random tokens (the same ones each time).
pub fn compare(base: &Path, adapter: &Adapter, merged: &Path, placement: &Placement) -> Result<Comparison, ModelError> {
    let mut with_adapter = Model::load(base, placement)?;
    with_adapter.attach(adapter);
    let vocabulary = with_adapter.config.vocabulary;
    let probe: Vec<u32> =
        Stream::new(0, 0, 0, 0).uniform(32, 0.5).iter().map(|u| ((u + 0.5) * vocabulary as f32) as u32).collect();
    let expected = with_adapter.logits(&probe)?;
    drop(with_adapter);
    let found = Model::load(merged, placement)?.logits(&probe)?;
    let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(token, _)| token);
    let rows = || expected.chunks(vocabulary).zip(found.chunks(vocabulary));
    Ok(Comparison {
        largest: expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max),
        scale: expected.iter().fold(0.0, |max, logit| logit.abs().max(max)),
        agreeing: rows().filter(|(a, b)| best(a) == best(b)).count(),
        positions: rows().count(),
    })
}
