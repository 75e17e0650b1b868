//! `finetune export` of an adapter alone, in PEFT's or mlx-lm's format, and the adapters that a
//! merge is made of.

use std::io::Read;
use std::path::{Path, PathBuf};

use finetune_model::adapter::{Adapter, CONFIG_FILE, TENSOR_FILE};
use finetune_model::{Adaptation, ModelConfig, expect_finite_file};
use finetune_store::{RealDisk, Staging, refuse_links_out};
use serde_json::{Value, json};

use crate::cli::{ExportArguments, ExportFormat, WeightedAdapter};
use crate::commands::export_source::{recorded_digest, recorded_quantization};
use crate::commands::opening;
use crate::failure::Failure;
use crate::interrupt::Unfinished;
use crate::progress::Progress;

/// Files that other programs need to write text and to end it as the training did. An adapter's
/// files take the place of the base's.
const TEXT_FILES: [&str; 13] = [
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
    "tiktoken.model",
];

/// Longest adapter_config.json that is read for its dropout, in bytes.
const LONGEST_CONFIG: u64 = 1 << 20;

/// Reads adapters for a base and adds them up, as the arguments say.
pub(super) fn sum(
    adapters: &[WeightedAdapter],
    base: &Path,
    arguments: &ExportArguments,
    show: &Progress,
) -> Result<Adapter, Failure> {
    let mut read = Vec::new();
    for WeightedAdapter { path, weight } in adapters {
        refuse_links_out(path)?;
        read.push((opening::read_adapter(path, base, arguments.force, &|line| show.say(line))?, *weight));
    }
    Ok(Adapter::sum(read)?.scaled(arguments.scale.unwrap_or(1.0))?)
}

/// The lines that say which adapters are used.
pub(super) fn describe(adapters: &[WeightedAdapter]) -> String {
    let line = |adapter: &WeightedAdapter| match adapter.weight {
        1.0 => format!("adapter     {}", adapter.path.display()),
        weight => format!("adapter     {}, times {weight}", adapter.path.display()),
    };
    adapters.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Writes one adapter, or the sum of several.
pub(super) fn alone(
    adapters: &[WeightedAdapter],
    base: Result<PathBuf, Failure>,
    arguments: &ExportArguments,
    show: &Progress,
    unfinished: &Unfinished,
) -> Result<(), Failure> {
    let first = &adapters[0].path;
    let unchanged =
        adapters.len() == 1 && adapters[0].weight == 1.0 && arguments.scale.is_none_or(|scale| scale == 1.0);
    // Branches of single experts are put together, as PEFT has them.
    let has_experts =
        base.as_ref().is_ok_and(|base| ModelConfig::load(base).is_ok_and(|config| config.experts.is_some()));
    let is_copied = arguments.format == ExportFormat::Peft && unchanged && !has_experts;
    let mut files = if is_copied && first.join(TENSOR_FILE).is_file() {
        refuse_links_out(first)?;
        copied(first)?
    } else {
        let base = base?;
        let (adapter, config) = (sum(adapters, &base, arguments, show)?, ModelConfig::load(&base)?);
        if arguments.format == ExportFormat::Mlx {
            let (files, notices) = adapter.mlx_files(dropout_of(first), &config)?;
            notices.iter().for_each(|notice| show.say(notice));
            files
        } else {
            let adaptation = Adaptation { dropout: dropout_of(first), ..adapter.adaptation() };
            adaptation.peft_notices(&config).iter().for_each(|notice| show.say(notice));
            adapter.peft_files(adaptation.dropout, &config)?
        }
    };
    files.extend(text_files_of(adapters, show)?);
    let mut about = json!({"kind": "adapter"});
    let digests: Vec<_> = adapters.iter().map(|adapter| recorded_digest(&adapter.path)).collect();
    if let Some(digest) = digests[0].clone().filter(|digest| digests.iter().all(|other| other.as_ref() == Some(digest)))
    {
        about["base_digest"] = Value::from(digest);
    }
    if let Some(word) = recorded_quantization(first) {
        show.say(&format!(
            "trained     over its base packed as {word}: load the base so, for the answers it was trained to"
        ));
        about["quantization"] = Value::from(word);
    }
    let mut staging = unfinished.begin(|| Staging::begin_replacing(&RealDisk, &arguments.output, "adapter"))?;
    for (name, bytes) in &files {
        staging.write(name, bytes)?;
    }
    let _publishing = unfinished.publishing();
    staging.publish_replacing(&about)?;
    Ok(())
}

/// The files of an adapter in PEFT's format, byte by byte. A damaged one is not passed on, nor one
/// of a training that diverged.
fn copied(adapter: &Path) -> Result<Vec<(String, Vec<u8>)>, Failure> {
    expect_finite_file(&adapter.join(TENSOR_FILE))?;
    let mut files = Vec::new();
    for name in [CONFIG_FILE, TENSOR_FILE] {
        let bytes = std::fs::read(adapter.join(name)).map_err(|error| unreadable(&adapter.join(name), &error))?;
        files.push((name.to_owned(), bytes));
    }
    files.extend(optional_file(adapter, "README.md")?);
    Ok(files)
}

/// The dropout that an adapter was trained with, in PEFT's or mlx-lm's settings.
fn dropout_of(adapter: &Path) -> f64 {
    let mut text = String::new();
    let file = std::fs::File::open(adapter.join(CONFIG_FILE));
    let _ = file.and_then(|file| file.take(LONGEST_CONFIG).read_to_string(&mut text));
    let config: Value = serde_json::from_str(&text).unwrap_or_default();
    let dropout = config["lora_dropout"].as_f64().or(config["lora_parameters"]["dropout"].as_f64());
    dropout.filter(|dropout| (0.0..1.0).contains(dropout)).unwrap_or(0.0)
}

/// What the adapters' directories have of text: the tokenizer and template that the first of them
/// was trained with.
pub(super) fn text_files_of(adapters: &[WeightedAdapter], show: &Progress) -> Result<Vec<(String, Vec<u8>)>, Failure> {
    let first = text_files(&adapters[0].path)?;
    for other in &adapters[1..] {
        let theirs = text_files(&other.path)?;
        let differs = |name: &str| {
            let of = |files: &[(String, Vec<u8>)]| files.iter().find(|(known, _)| known == name).cloned();
            of(&theirs).is_some_and(|file| of(&first) != Some(file))
        };
        if differs("chat_template.jinja") || differs("tokenizer.json") {
            let (one, other) = (adapters[0].path.display(), other.path.display());
            show.say(&format!("{other} was trained with another tokenizer or template; those of {one} are used"));
        }
    }
    Ok(first)
}

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

pub(super) fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::arguments(format!("{}: {error}", path.display()), "name a run, a checkpoint or an adapter")
}
