//! `finetune export`: a trained adapter in another form.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use finetune_model::adapter::{self, Adapter};
use finetune_model::merge::{SHARD_BYTES, compare, left_out, write_merged};
use finetune_model::{ModelConfig, Placement};
use finetune_store::{MANIFEST_NAME, NewFile, RealDisk, Staging, newest_verified, replace_directory, verify_directory};
use finetune_trainer::CHECKPOINTS;
use serde_json::Value;

use crate::cli::{ExportArguments, ExportFormat};
use crate::failure::Failure;
use crate::output;
use crate::progress::{Progress, Verbosity};

pub(crate) fn export(arguments: ExportArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    if let ExportFormat::Mlx | ExportFormat::Gguf = arguments.format {
        return Err(Failure::arguments(
            "this version exports merged and peft",
            "export merged: llama.cpp's and mlx-lm's own converters read that directory",
        ));
    }
    let mut show = Progress::new(verbosity, 1);
    let Source { adapter, base } = source(&arguments)?;
    show.say(&format!("adapter     {}", adapter.display()));
    match arguments.format {
        ExportFormat::Merged => merged(&adapter, &base?, &arguments.output, &mut show)?,
        ExportFormat::Peft | ExportFormat::Mlx | ExportFormat::Gguf => peft(&adapter, &arguments.output)?,
    }
    show.say(&format!("written to  {}", arguments.output.display()));
    Ok(ExitCode::SUCCESS)
}

/// Where the adapter is, and the base model: needed for merging only, so that it may be an error until then.
struct Source {
    adapter: PathBuf,
    base: Result<PathBuf, Failure>,
}

fn source(arguments: &ExportArguments) -> Result<Source, Failure> {
    if let Some(adapter) = &arguments.adapter {
        return Ok(Source { adapter: adapter.clone(), base: Ok(arguments.source.clone()) });
    }
    let checkpoints = arguments.source.join(CHECKPOINTS);
    let adapter = if checkpoints.is_dir() {
        let (newest, rejected) = newest_verified(&RealDisk, &checkpoints, "step-")?;
        for bad in rejected {
            anstream::eprintln!("{} is passed over: {}", bad.path.display(), bad.why);
        }
        let Some((_, path, _)) = newest else {
            return Err(Failure::arguments(
                format!("{} has no checkpoint that verifies", checkpoints.display()),
                "train first, or name a checkpoint",
            ));
        };
        path
    } else if !arguments.source.join(MANIFEST_NAME).is_file() {
        return Err(Failure::arguments(
            format!("{} is neither a run nor a checkpoint", arguments.source.display()),
            "a run has a folder checkpoints/; to merge an adapter into a model directory, add --adapter DIR",
        ));
    } else {
        verify_directory(&RealDisk, &arguments.source)?;
        arguments.source.clone()
    };
    if !adapter.join(adapter::CONFIG_FILE).is_file() {
        return Err(Failure::arguments(
            format!("{} holds no adapter", adapter.display()),
            "a run of method \"full\" has its weights in model/, a Hugging Face directory already",
        ));
    }
    let base = match &arguments.base {
        Some(base) => Ok(base.clone()),
        None => recorded_base(&adapter),
    };
    Ok(Source { adapter, base })
}

/// The base model that adapter_config.json names, if it is still there.
fn recorded_base(adapter: &Path) -> Result<PathBuf, Failure> {
    let text = std::fs::read_to_string(adapter.join(adapter::CONFIG_FILE)).unwrap_or_default();
    let config: Value = serde_json::from_str(&text).unwrap_or_default();
    let named = config["base_model_name_or_path"].as_str().unwrap_or_default();
    let path = PathBuf::from(named);
    if !named.is_empty() && path.is_dir() {
        return Ok(path);
    }
    Err(Failure::arguments(
        format!("the base model `{named}` is not there any more"),
        "say where it is with --base MODEL_DIR",
    ))
}

fn merged(adapter: &Path, base: &Path, output: &Path, show: &mut Progress) -> Result<(), Failure> {
    let config = ModelConfig::load(base)?;
    let adapter = Adapter::read(adapter, &config)?;
    for notice in config.notices.iter().chain(&adapter.notices) {
        anstream::eprintln!("{notice}");
    }
    let left = left_out(base);
    if !left.is_empty() {
        show.say(&format!("left out    {}", left.join(", ")));
    }
    let mut staging = Staging::begin_replacing(&RealDisk, output)?;
    show.say(&format!("base        {}", base.display()));
    show.start("merging", adapter.targets.len() as u64);
    write_merged(&RealDisk, base, &adapter, &mut staging, SHARD_BYTES, &[], &|done, _| show.position(done as u64))?;
    show.start("comparing", 0);
    let comparison = compare(base, &adapter, staging.directory(), &Placement::cpu(None))?;
    show.finish();
    staging.publish_replacing(&serde_json::json!({"kind": "merged"}))?;
    output::line(&format!(
        "largest difference of merged and adapter logits: {:.3e} (largest logit {:.1}; same best token at {} of {} probe tokens)",
        comparison.largest, comparison.scale, comparison.agreeing, comparison.positions
    ))?;
    Ok(())
}

fn peft(adapter: &Path, output: &Path) -> Result<(), Failure> {
    let read = |name: &str| std::fs::read(adapter.join(name));
    let files: Vec<(&str, Vec<u8>)> = [adapter::CONFIG_FILE, adapter::TENSOR_FILE]
        .into_iter()
        .map(|name| read(name).map(|bytes| (name, bytes)))
        .collect::<Result<_, _>>()
        .map_err(|error| {
            Failure::arguments(format!("{}: {error}", adapter.display()), "name a run, a checkpoint or an adapter")
        })?;
    let files: Vec<NewFile<'_>> =
        files.iter().map(|(name, bytes)| NewFile { name, bytes: bytes.as_slice().into() }).collect();
    replace_directory(&RealDisk, output, &files, &serde_json::json!({"kind": "adapter"}))?;
    Ok(())
}
