//! What `finetune export` takes: the checkpoint of a run, or an adapter with its base.

use std::io::Read;
use std::path::{Path, PathBuf};

use finetune_model::Model;
use finetune_store::{Holding, RealDisk, manifest_of, newest_verified, recognize, verify_directory};
use finetune_trainer::CHECKPOINTS;
use serde_json::Value;

use crate::cli::{ExportArguments, ExportFormat, WeightedAdapter};
use crate::failure::Failure;
use crate::source::{Named, adapter_directory, base_of, named};

/// Longest trainer_state.json that is read, in bytes.
const LONGEST_STATE: u64 = 1 << 20;

/// What is exported.
pub(super) enum Exported {
    /// One adapter, or several that are added up. A copy needs no base, so it may be an error until
    /// it is needed.
    Adapters { adapters: Vec<WeightedAdapter>, base: Result<PathBuf, Failure> },
    /// All weights, of a run of `method = "full"` or of a model directory.
    Weights(PathBuf),
}

/// Finds what the arguments name. Also returns lines that the user should see.
pub(super) fn find(arguments: &ExportArguments) -> Result<(Exported, Vec<String>), Failure> {
    let mut notices = Vec::new();
    if !arguments.adapter.is_empty() {
        let holding = recognize(&arguments.source);
        if matches!(holding, Holding::Run | Holding::Checkpoint | Holding::Adapter) {
            return Err(Failure::arguments(
                format!(
                    "{} is {}: with --adapter a model directory is meant",
                    arguments.source.display(),
                    holding.describe()
                ),
                "name the base model; every adapter, also this one, is an --adapter of its own",
            ));
        }
        let mut adapters = Vec::new();
        for WeightedAdapter { path, weight } in &arguments.adapter {
            adapters.push(WeightedAdapter { path: adapter_directory(path, &mut notices)?, weight: *weight });
        }
        let base = base_of(&adapters[0].path, Some(&arguments.source))?;
        return Ok((Exported::Adapters { adapters, base: Ok(base) }, notices));
    }
    let path = match recognize(&arguments.source) {
        Holding::Run => checkpoint_of(&arguments.source, arguments.best, &mut notices)?,
        Holding::Checkpoint => {
            verify_directory(&RealDisk, &arguments.source)?;
            arguments.source.clone()
        }
        // In another form a model is worth an export of its own.
        Holding::ModelDirectory
            if arguments.format == ExportFormat::Gguf
                || arguments.dtype.is_some()
                || arguments.quantize.is_some()
                || is_packed(&arguments.source) =>
        {
            arguments.source.clone()
        }
        Holding::ModelDirectory => {
            return Err(Failure::arguments(
                format!("{} is a model directory, with no adapter to export", arguments.source.display()),
                "to merge an adapter into it, add --adapter ADAPTER; a run or a checkpoint is exported by its own name",
            ));
        }
        _ => match named(&arguments.source, &mut notices)? {
            Named::Adapter(path) | Named::Model(path) => path,
        },
    };
    if !path.join("adapter_config.json").is_file() {
        return Ok((Exported::Weights(path), notices));
    }
    let base = base_of(&path, arguments.base.as_deref());
    let adapters = vec![WeightedAdapter { path, weight: 1.0 }];
    Ok((Exported::Adapters { adapters, base }, notices))
}

/// Whether matrices of a model are packed in its files. What is wrong with them is said later.
pub(super) fn is_packed(model: &Path) -> bool {
    Model::form(model, None).is_ok_and(|form| form.is_packed_in_files)
}

/// The newest checkpoint of a run that verifies, or that of its best evaluation. Its result if no
/// checkpoint is left.
fn checkpoint_of(run: &Path, best: bool, notices: &mut Vec<String>) -> Result<PathBuf, Failure> {
    let checkpoints = run.join(CHECKPOINTS);
    let (newest, rejected) = newest_verified(&RealDisk, &checkpoints, "step-")?;
    notices.extend(rejected.iter().map(|bad| format!("{} is passed over: {}", bad.path.display(), bad.why)));
    let Some((step, path, _)) = newest else {
        if best || run.join("adapter").is_dir() || run.join("model").is_dir() {
            return result_alone(run, best, notices);
        }
        return Err(Failure::arguments(
            format!("{} has no checkpoint that verifies", checkpoints.display()),
            "train first, or name a checkpoint",
        ));
    };
    let found = best_of(&path);
    match (found, best) {
        (Some((best_step, loss)), true) => {
            let path = checkpoints.join(format!("step-{best_step:06}"));
            if !path.is_dir() {
                return Err(Failure::arguments(
                    format!("step {best_step} had the best evaluation ({loss:.4}), and its checkpoint is not kept"),
                    "checkpoint.keep_best = true keeps it; without --best the newest checkpoint is exported",
                ));
            }
            verify_directory(&RealDisk, &path)?;
            notices
                .push(format!("step        {best_step}, the best evaluation ({loss:.4}); the newest is step {step}"));
            Ok(path)
        }
        (None, true) => Err(Failure::arguments(
            format!("{} has no evaluation, and so no best one", run.display()),
            "name rows to evaluate on with data.eval, or leave --best out",
        )),
        (Some((best_step, loss)), false) if best_step != step => {
            notices.push(format!(
                "step        {step}, the newest; step {best_step} had the best evaluation ({loss:.4}): --best exports that one"
            ));
            Ok(path)
        }
        (_, false) => {
            notices.push(format!("step        {step}, the newest"));
            Ok(path)
        }
    }
}

/// A run of which only the result is left.
fn result_alone(run: &Path, best: bool, notices: &mut Vec<String>) -> Result<PathBuf, Failure> {
    if best {
        return Err(Failure::arguments(
            format!("{} has no checkpoint that says which evaluation was the best", run.display()),
            "leave --best out, or name a checkpoint",
        ));
    }
    let (Named::Adapter(path) | Named::Model(path)) = named(run, notices)?;
    verify_directory(&RealDisk, &path)?;
    notices.push(format!("no checkpoint is left: {} is exported", path.display()));
    Ok(path)
}

/// Step and loss of the best evaluation so far, as a checkpoint records them.
fn best_of(checkpoint: &Path) -> Option<(u64, f64)> {
    let best = &state_of(checkpoint)["best"];
    Some((best["step"].as_u64()?, best["eval_loss"].as_f64()?))
}

fn state_of(checkpoint: &Path) -> Value {
    let mut text = String::new();
    let file = std::fs::File::open(checkpoint.join("trainer_state.json"));
    let _ = file.and_then(|file| file.take(LONGEST_STATE).read_to_string(&mut text));
    serde_json::from_str(&text).unwrap_or_default()
}

/// The digest of the base that an adapter was trained on, if its directory has it.
pub(super) fn recorded_digest(adapter: &Path) -> Option<String> {
    let manifest = manifest_of(&RealDisk, adapter);
    let of_manifest = manifest.as_ref().and_then(|manifest| manifest.field("base_digest")?.as_str().map(str::to_owned));
    of_manifest.or_else(|| state_of(adapter)["identity"]["model"].as_str().map(str::to_owned))
}

/// How the base of an adapter was packed while it was loaded (`model.quantization`), if its directory
/// says it.
pub(super) fn recorded_quantization(adapter: &Path) -> Option<String> {
    let manifest = manifest_of(&RealDisk, adapter);
    let of_manifest =
        manifest.as_ref().and_then(|manifest| manifest.field("quantization")?.as_str().map(str::to_owned));
    let of_state = || {
        let state = state_of(adapter);
        let values = state["identity"]["recipe"].as_array()?;
        let value = values.iter().find(|pair| pair[0] == "model.quantization")?[1].as_str()?.trim_matches('"');
        (value != "none").then(|| value.to_owned())
    };
    of_manifest.or_else(of_state)
}
