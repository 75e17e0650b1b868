//! `finetune export`: a trained adapter in another form.

use std::path::Path;
use std::process::ExitCode;

use finetune_model::adapter::Adapter;
use finetune_model::merge::{Comparison, Merged, MergedForm, SHARD_BYTES, compare, left_out, write_merged};
use finetune_model::{FloatType, ModelConfig, ModelError, Placement, Scheme};
use finetune_store::{RealDisk, Staging, manifest_of, refuse_links_out};
use finetune_trainer::stored_type;
use serde_json::json;

use crate::cli::{ExportArguments, ExportDtype, ExportFormat, WeightedAdapter};
use crate::commands::export_adapter::{alone, describe, sum, text_files_of, unreadable};
use crate::commands::export_gguf;
use crate::commands::export_source::{Exported, find, is_packed};
use crate::failure::Failure;
use crate::interrupt::Unfinished;
use crate::output;
use crate::progress::{Progress, Verbosity};

/// What the manifest calls a merged model.
const MERGED: &str = "merged";

/// Files of a checkpoint that only a resume needs.
const OF_A_RUN: [&str; 2] = ["optimizer.safetensors", "trainer_state.json"];

pub(crate) fn export(arguments: ExportArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    check_options(&arguments)?;
    let unfinished = Unfinished::watch()?;
    let mut show = Progress::new(verbosity, 1);
    let result = write(&arguments, &mut show, &unfinished);
    // A signal removes the directory and ends the program. An error that comes of it is not
    // reported: this waits for the end.
    let _held = unfinished.publishing();
    result?;
    show.say(&format!("written to  {}", arguments.output.display()));
    Ok(ExitCode::SUCCESS)
}

/// Refuses options that do not go together.
fn check_options(arguments: &ExportArguments) -> Result<(), Failure> {
    let ExportArguments { format, dtype, adapter_only, quantize, .. } = arguments;
    let is_adapter = matches!(format, ExportFormat::Peft | ExportFormat::Mlx);
    if *adapter_only && *format != ExportFormat::Gguf {
        return Err(Failure::arguments(
            "--adapter-only is for --format gguf",
            "peft and mlx write the adapter alone; merged always has the base in it",
        ));
    }
    if quantize.is_some() && *format != ExportFormat::Merged {
        return Err(Failure::arguments(
            "--quantize is for --format merged",
            match format {
                ExportFormat::Gguf => {
                    "packed types of GGUF files are --dtype q8_0, and those of llama.cpp's `llama-quantize`"
                }
                _ => "an adapter stays in f32, as it was trained",
            },
        ));
    }
    match dtype {
        Some(_) if is_adapter => Err(Failure::arguments(
            "--dtype is for merged and gguf: an adapter stays in f32, as it was trained",
            "leave --dtype out",
        )),
        Some(ExportDtype::Q8_0) if *format == ExportFormat::Merged || *adapter_only => Err(Failure::arguments(
            "q8_0 is a type of whole models in GGUF files",
            "--format gguf without --adapter-only writes it; otherwise f32, bf16 or f16",
        )),
        _ if arguments.scale.is_some_and(|scale| !scale.is_finite()) => {
            Err(Failure::arguments("--scale is no finite number", "1 is what was trained"))
        }
        _ => Ok(()),
    }
}

fn write(arguments: &ExportArguments, show: &mut Progress, unfinished: &Unfinished) -> Result<(), Failure> {
    let (found, notices) = find(arguments)?;
    for notice in &notices {
        show.say(notice);
    }
    let output = &arguments.output;
    match found {
        Exported::Weights(model) => {
            refuse_place(output, &[&model])?;
            show.say(&format!("model       {}", model.display()));
            weights(&model, arguments, show, unfinished)
        }
        Exported::Adapters { adapters, base } => {
            let sources: Vec<&Path> = adapters.iter().map(|adapter| adapter.path.as_path()).collect();
            refuse_place(output, &sources)?;
            show.say(&describe(&adapters));
            if let ExportFormat::Peft | ExportFormat::Mlx = arguments.format {
                return alone(&adapters, base, arguments, show, unfinished);
            }
            let base = base?;
            refuse_place(output, &[&base])?;
            show.say(&format!("base        {}", base.display()));
            match arguments.format {
                ExportFormat::Gguf if arguments.adapter_only => {
                    export_gguf::adapter(&base, &adapters, arguments, show, unfinished)
                }
                ExportFormat::Gguf => export_gguf::model(&base, &adapters, arguments, show, unfinished),
                _ => merged(&adapters, &base, arguments, show, unfinished),
            }
        }
    }
}

/// Exports all weights of a model.
fn weights(
    model: &Path,
    arguments: &ExportArguments,
    show: &mut Progress,
    unfinished: &Unfinished,
) -> Result<(), Failure> {
    let no_adapter = |hint: &str| {
        Err(Failure::arguments(format!("{} has no adapter: all weights were trained", model.display()), hint))
    };
    if arguments.scale.is_some() {
        return no_adapter("leave --scale out");
    }
    let stays = arguments.dtype.is_none() && arguments.quantize.is_none() && !is_packed(model);
    match arguments.format {
        ExportFormat::Gguf if !arguments.adapter_only => export_gguf::model(model, &[], arguments, show, unfinished),
        ExportFormat::Merged if stays => whole_model(model, &arguments.output, unfinished),
        ExportFormat::Merged => {
            refuse_links(model)?;
            let mut staging = unfinished.begin(|| Staging::begin_replacing(&RealDisk, &arguments.output, MERGED))?;
            let nothing = Adapter::none(&ModelConfig::load(model)?);
            let merged = write_merged(&RealDisk, model, &nothing, &mut staging, form(arguments), &[], &|_, _| {})?;
            let publishing = unfinished.publishing();
            staging.publish_replacing(&json!({"kind": MERGED}))?;
            drop(publishing);
            say_left_out(model, show);
            say(&merged, show);
            Ok(())
        }
        _ => no_adapter("--format merged writes them as a model directory, --format gguf as a GGUF file"),
    }
}

/// How merged weights are written.
fn form(arguments: &ExportArguments) -> MergedForm {
    MergedForm {
        shard_bytes: SHARD_BYTES,
        dtype: arguments.dtype.and_then(float_type),
        quantize: arguments.quantize.map(Scheme::from),
    }
}

/// The number type of a model directory.
fn float_type(dtype: ExportDtype) -> Option<FloatType> {
    match dtype {
        ExportDtype::F32 => Some(FloatType::F32),
        ExportDtype::Bf16 => Some(FloatType::BF16),
        ExportDtype::F16 => Some(FloatType::F16),
        ExportDtype::Q8_0 => None,
    }
}

/// Refuses a base with links out of its directory. A base that is one file has none.
pub(super) fn refuse_links(base: &Path) -> Result<(), Failure> {
    if base.is_dir() {
        refuse_links_out(base)?;
    }
    Ok(())
}

/// Refuses a place that the export reads, or that holds a run's result. An export replaces earlier
/// exports only.
pub(super) fn refuse_place(output: &Path, sources: &[&Path]) -> Result<(), Failure> {
    let hint = "choose a new, empty or absent directory";
    if let Ok(place) = output.canonicalize() {
        for source in sources {
            let same = source.canonicalize().is_ok_and(|source| source == place || source.starts_with(&place));
            if same {
                let (output, source) = (output.display(), source.display());
                return Err(Failure::arguments(format!("{output} holds {source}, which the export reads"), hint));
            }
        }
    }
    let is_result = manifest_of(&RealDisk, output).is_some_and(|manifest| manifest.field("step").is_some());
    if is_result {
        return Err(Failure::arguments(
            format!("{} is a checkpoint or the result of a run, and no export takes its place", output.display()),
            hint,
        ));
    }
    Ok(())
}

fn merged(
    adapters: &[WeightedAdapter],
    base: &Path,
    arguments: &ExportArguments,
    show: &mut Progress,
    unfinished: &Unfinished,
) -> Result<(), Failure> {
    refuse_links(base)?;
    let adapter = sum(adapters, base, arguments, show)?;
    let text = text_files_of(adapters, show)?;
    let form = form(arguments);
    let mut staging = unfinished.begin(|| Staging::begin_replacing(&RealDisk, &arguments.output, MERGED))?;
    show.start("merging", 100);
    let written = write_merged(&RealDisk, base, &adapter, &mut staging, form, &text, &|done, all| {
        show.position((100 * done / all.max(1)) as u64);
    });
    show.finish();
    let merged = written?;
    show.start("comparing", 0);
    let compared = compare(base, &adapter, staging.directory(), &Placement::cpu(None));
    let stored = form.dtype.unwrap_or_else(|| stored_type(base));
    let verdict = match (form.quantize, compared) {
        (Some(scheme), Ok(found)) => Ok(survival(merged.kept, scheme) + &agreement(&found)),
        // Few bits may move answers far. That is what was asked for, and it is said.
        (Some(scheme), Err(ModelError::Merge { what })) => {
            Ok(format!("{}\nwarning: {what}", survival(merged.kept, scheme)))
        }
        (None, Ok(found)) => Ok(verdict(&found, stored)),
        (_, Err(error)) => Err(error),
    };
    show.finish();
    let verdict = verdict?;
    let publishing = unfinished.publishing();
    staging.publish_replacing(&json!({"kind": MERGED}))?;
    drop(publishing);
    say_left_out(base, show);
    say(&merged, show);
    output::line(&verdict)?;
    Ok(())
}

/// The files of a base that are no part of the model, and so not of what was written.
pub(super) fn say_left_out(base: &Path, show: &Progress) {
    let left_out = left_out(base);
    if !left_out.is_empty() {
        show.say(&format!("left out    {} (of the base, no part of the model)", left_out.join(", ")));
    }
}

/// What a user should know about a merged model, beside how much is left of the training.
fn say(merged: &Merged, show: &Progress) {
    if !merged.left_out.is_empty() {
        show.say(&format!("left out    {}: mlx-lm has the text model alone", merged.left_out.join(", ")));
    }
    merged.notice.iter().chain(&merged.alone).for_each(|notice| show.say(notice));
}

/// Below this share of what was trained a packed model is no result of the training any more.
const MOSTLY_KEPT: f64 = 0.9;

/// How much of what was trained is left once the merged weights are packed, in words.
fn survival(kept: Option<f64>, scheme: Scheme) -> String {
    let bits = match scheme {
        Scheme::Int8 | Scheme::Mlx8 => 8,
        Scheme::Nf4 | Scheme::Mlx4 | Scheme::Mxfp4 => 4,
    };
    let Some(kept) = kept else { return format!("the merged weights are packed in {bits} bits") };
    let survives =
        format!("of the change that training made, {:.0} % survives in {bits} bits", (kept * 100.0).clamp(0.0, 100.0));
    if kept < MOSTLY_KEPT {
        return format!("warning: {survives}; keep the adapter, or export without --quantize");
    }
    survives
}

/// How near the answers of packed weights are to those of base and adapter, in words.
fn agreement(comparison: &Comparison) -> String {
    let Comparison { agreeing, positions, .. } = comparison;
    format!("\nthe most likely token is that of base and adapter at {agreeing} of {positions} probe tokens")
}

/// The result of comparing the merged model with base and adapter, in words.
fn verdict(comparison: &Comparison, stored: FloatType) -> String {
    let Comparison { largest, scale, agreeing, positions, .. } = comparison;
    let why = match stored {
        FloatType::F32 => "what another order of sums does".to_owned(),
        stored => format!("what rounding the merged weights to {} does", stored.name()),
    };
    format!(
        "merged and adapter agree: the same most likely token at {agreeing} of {positions} probe tokens; largest difference of logits {largest:.1e}, of {scale:.1}: {why}"
    )
}

/// Exports the weights of a run of `method = "full"` as a model directory, without the files that
/// only the run needs.
fn whole_model(model: &Path, output: &Path, unfinished: &Unfinished) -> Result<(), Failure> {
    refuse_links_out(model)?;
    let mut staging = unfinished.begin(|| Staging::begin_replacing(&RealDisk, output, MERGED))?;
    for name in plain_files(model)? {
        let from = model.join(&name);
        std::fs::copy(&from, staging.directory().join(&name))
            .map_err(|source| finetune_store::StoreError::io(&from, finetune_store::Operation::Write, 0, source))?;
        staging.record(&name)?;
    }
    let _publishing = unfinished.publishing();
    staging.publish_replacing(&json!({"kind": MERGED}))?;
    Ok(())
}

/// The files of a directory of ours that are the model's.
fn plain_files(directory: &Path) -> Result<Vec<String>, Failure> {
    let entries = std::fs::read_dir(directory).map_err(|error| unreadable(directory, &error))?;
    let mut names: Vec<String> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.path().is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| {
            !name.starts_with('.') && name != finetune_store::MANIFEST_NAME && !OF_A_RUN.contains(&name.as_str())
        })
        .collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use finetune_model::Scheme;

    use super::survival;

    #[test]
    fn what_survives_of_a_training() {
        for (kept, scheme, want) in [
            (
                Some(0.18),
                Scheme::Mlx4,
                "warning: of the change that training made, 18 % survives in 4 bits; keep the adapter, or export without --quantize",
            ),
            (Some(0.993), Scheme::Int8, "of the change that training made, 99 % survives in 8 bits"),
            (
                Some(-0.1),
                Scheme::Nf4,
                "warning: of the change that training made, 0 % survives in 4 bits; keep the adapter, or export without --quantize",
            ),
            (None, Scheme::Mxfp4, "the merged weights are packed in 4 bits"),
        ] {
            assert_eq!(survival(kept, scheme), want);
        }
    }
}
