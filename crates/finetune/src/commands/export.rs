//! `finetune export`: a trained adapter in another form.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use finetune_model::adapter::{CONFIG_FILE, TENSOR_FILE};
use finetune_model::merge::{Comparison, SHARD_BYTES, compare, left_out, write_merged};
use finetune_model::{FloatType, Placement};
use finetune_store::{RealDisk, Staging, manifest_of, refuse_links_out};
use finetune_trainer::stored_type;
use serde_json::{Value, json};

use crate::cli::{ExportArguments, ExportFormat};
use crate::commands::export_source::{Exported, find, recorded_digest};
use crate::commands::opening;
use crate::failure::Failure;
use crate::interrupt::Unfinished;
use crate::output;
use crate::progress::{Progress, Verbosity};

/// Files that other programs need to write text and to end it as the training did. An adapter's
/// files take the place of the base's.
const TEXT_FILES: [&str; 12] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "tekken.json",
];

/// Files of a checkpoint that only a resume needs.
const OF_A_RUN: [&str; 2] = ["optimizer.safetensors", "trainer_state.json"];

pub(crate) fn export(arguments: ExportArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    if let ExportFormat::Mlx | ExportFormat::Gguf = arguments.format {
        return Err(Failure::arguments(
            "this version exports merged and peft",
            "export merged: llama.cpp's and mlx-lm's own converters read that directory",
        ));
    }
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

fn write(arguments: &ExportArguments, show: &mut Progress, unfinished: &Unfinished) -> Result<(), Failure> {
    let (found, notices) = find(arguments)?;
    for notice in &notices {
        show.say(notice);
    }
    let output = &arguments.output;
    match (found, arguments.format) {
        (Exported::Weights(model), ExportFormat::Merged) => {
            refuse_place(output, &[&model])?;
            show.say(&format!("model       {}", model.display()));
            whole_model(&model, output, unfinished)
        }
        (Exported::Weights(model), _) => Err(Failure::arguments(
            format!("{} has no adapter: all weights were trained", model.display()),
            "--format merged writes them as a model directory",
        )),
        (Exported::Adapter { adapter, base }, ExportFormat::Merged) => {
            let base = base?;
            refuse_place(output, &[&adapter, &base])?;
            show.say(&format!("adapter     {}\nbase        {}", adapter.display(), base.display()));
            merged(&adapter, &base, arguments, show, unfinished)
        }
        (Exported::Adapter { adapter, .. }, _) => {
            refuse_place(output, &[&adapter])?;
            show.say(&format!("adapter     {}", adapter.display()));
            peft(&adapter, output, unfinished)
        }
    }
}

/// Refuses a place that the export reads, or that holds a run's result. An export replaces earlier
/// exports only.
fn refuse_place(output: &Path, sources: &[&Path]) -> Result<(), Failure> {
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
    adapter_dir: &Path,
    base: &Path,
    arguments: &ExportArguments,
    show: &mut Progress,
    unfinished: &Unfinished,
) -> Result<(), Failure> {
    refuse_links_out(base)?;
    refuse_links_out(adapter_dir)?;
    let adapter = opening::read_adapter(adapter_dir, base, arguments.force, &|line| show.say(line))?;
    let text = text_files(adapter_dir)?;
    let mut staging = unfinished.begin(|| Staging::begin_replacing(&RealDisk, &arguments.output, "merged"))?;
    show.start("merging", adapter.targets.len() as u64);
    let written = write_merged(&RealDisk, base, &adapter, &mut staging, SHARD_BYTES, &text, &|done, _| {
        show.position(done as u64);
    });
    show.finish();
    written?;
    show.start("comparing", 0);
    let comparison = compare(base, &adapter, staging.directory(), &Placement::cpu(None));
    show.finish();
    let comparison = comparison?;
    let publishing = unfinished.publishing();
    staging.publish_replacing(&json!({"kind": "merged"}))?;
    drop(publishing);
    let left_out = left_out(base);
    if !left_out.is_empty() {
        show.say(&format!("left out    {} (of the base, no part of the model)", left_out.join(", ")));
    }
    output::line(&verdict(&comparison, stored_type(base)))?;
    Ok(())
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
    let mut staging = unfinished.begin(|| Staging::begin_replacing(&RealDisk, output, "merged"))?;
    for name in plain_files(model)? {
        let from = model.join(&name);
        std::fs::copy(&from, staging.directory().join(&name))
            .map_err(|source| finetune_store::StoreError::io(&from, finetune_store::Operation::Write, 0, source))?;
        staging.record(&name)?;
    }
    let _publishing = unfinished.publishing();
    staging.publish_replacing(&json!({"kind": "merged"}))?;
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

fn peft(adapter: &Path, output: &Path, unfinished: &Unfinished) -> Result<(), Failure> {
    refuse_links_out(adapter)?;
    if !adapter.join(TENSOR_FILE).is_file() {
        return Err(Failure::arguments(
            format!("{} is an adapter of mlx-lm, and --format peft copies PEFT's", adapter.display()),
            "--format merged reads both; with --base MODEL_DIR where the base is not found",
        ));
    }
    let mut files = Vec::new();
    for name in [CONFIG_FILE, TENSOR_FILE] {
        let bytes = std::fs::read(adapter.join(name)).map_err(|error| unreadable(&adapter.join(name), &error))?;
        files.push((name.to_owned(), bytes));
    }
    files.extend(text_files(adapter)?);
    files.extend(optional_file(adapter, "README.md")?);
    let mut about = json!({"kind": "adapter"});
    if let Some(digest) = recorded_digest(adapter) {
        about["base_digest"] = Value::from(digest);
    }
    let mut staging = unfinished.begin(|| Staging::begin_replacing(&RealDisk, output, "adapter"))?;
    for (name, bytes) in &files {
        staging.write(name, bytes)?;
    }
    let _publishing = unfinished.publishing();
    staging.publish_replacing(&about)?;
    Ok(())
}

/// What an adapter's directory has of text: the tokenizer and template that it was trained with.
fn text_files(adapter: &Path) -> Result<Vec<(String, Vec<u8>)>, Failure> {
    let files = TEXT_FILES.iter().map(|name| optional_file(adapter, name));
    Ok(files.collect::<Result<Vec<_>, Failure>>()?.into_iter().flatten().collect())
}

fn optional_file(directory: &Path, name: &str) -> Result<Option<(String, Vec<u8>)>, Failure> {
    let path: PathBuf = directory.join(name);
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Some((name.to_owned(), bytes))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unreadable(&path, &error)),
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::arguments(format!("{}: {error}", path.display()), "name a run, a checkpoint or an adapter")
}
