//! `finetune export --format gguf`: a GGUF file and a Modelfile for Ollama beside it.

use std::path::Path;

use finetune_dataset::{ChatTokenizer, LlamaCppTokenizer, TextSource};
use finetune_model::gguf::{AdapterFile, Metadata, ModelFile, TensorType, Value, write_adapter, write_model};
use finetune_model::{FloatType, ModelConfig};
use finetune_store::{RealDisk, Staging, human_bytes};
use finetune_trainer::stored_type;
use serde_json::json;

use crate::cli::{ExportArguments, ExportDtype, WeightedAdapter};
use crate::commands::export::refuse_links;
use crate::commands::export_adapter::sum;
use crate::failure::Failure;
use crate::interrupt::Unfinished;
use crate::output;
use crate::progress::Progress;

/// What the manifest calls such a directory.
const KIND: &str = "GGUF export";
const MODELFILE: &str = "Modelfile";

/// Writes a model, with what the adapters add merged in.
pub(super) fn model(
    base: &Path,
    adapters: &[WeightedAdapter],
    arguments: &ExportArguments,
    show: &mut Progress,
    unfinished: &Unfinished,
) -> Result<(), Failure> {
    refuse_links(base)?;
    let adapter = if adapters.is_empty() { None } else { Some(sum(adapters, base, arguments, show)?) };
    let kind = match (arguments.dtype, stored_type(base)) {
        (Some(dtype), _) => tensor_type(dtype),
        (None, FloatType::BF16) => TensorType::BF16,
        (None, FloatType::F16 | FloatType::F32) => TensorType::F16,
    };
    let config = ModelConfig::load(base)?;
    let opened = ChatTokenizer::open(&TextSource {
        model_dir: base,
        adapter: adapters.first().map(|adapter| adapter.path.as_path()),
        chat_template: None,
        date: None,
        variables: None,
    })?;
    // More than the base's if tokens were added.
    let rows = adapter.as_ref().map_or(config.vocabulary, |adapter| adapter.rows);
    let tokenizer = opened.map(|opened| opened.for_llama_cpp(rows)).transpose()?;
    if tokenizer.is_none() {
        show.say("there is no tokenizer.json: llama.cpp can use the file with token ids only");
    }
    let mut staging = unfinished.begin(|| Staging::begin_replacing(&RealDisk, &arguments.output, KIND))?;
    let name = format!("model-{}.gguf", kind.name());
    let path = staging.directory().join(&name);
    let file = ModelFile {
        base,
        adapter: adapter.as_ref(),
        kind,
        name: &title(&arguments.output),
        tokenizer: metadata(tokenizer.as_ref()),
    };
    show.start("writing", config.layers.len() as u64);
    let written = write_model(&RealDisk, &file, &path, &|done, all| {
        show.position((done * config.layers.len() / all.max(1)) as u64);
    });
    show.finish();
    written?.iter().for_each(|notice| show.say(notice));
    staging.record(&name)?;
    let ends = tokenizer.map(|tokenizer| tokenizer.ends).unwrap_or_default();
    staging.write(MODELFILE, modelfile(&name, None, &ends).as_bytes())?;
    publish(staging, &path, &name, kind, unfinished)
}

/// Writes what the adapters add, alone.
pub(super) fn adapter(
    base: &Path,
    adapters: &[WeightedAdapter],
    arguments: &ExportArguments,
    show: &mut Progress,
    unfinished: &Unfinished,
) -> Result<(), Failure> {
    let adapter = sum(adapters, base, arguments, show)?;
    let config = ModelConfig::load(base)?;
    let kind = arguments.dtype.map_or(TensorType::F32, tensor_type);
    let mut staging = unfinished.begin(|| Staging::begin_replacing(&RealDisk, &arguments.output, KIND))?;
    let name = "adapter.gguf";
    let path = staging.directory().join(name);
    let file = AdapterFile { adapter: &adapter, config: &config, kind, name: &title(&arguments.output) };
    write_adapter(&RealDisk, &file, &path)?.iter().for_each(|notice| show.say(notice));
    staging.record(name)?;
    let ends = ChatTokenizer::open(&TextSource {
        model_dir: base,
        adapter: adapters.first().map(|adapter| adapter.path.as_path()),
        chat_template: None,
        date: None,
        variables: None,
    })?
    .map(|opened| opened.eos_ids().iter().filter_map(|id| opened.id_to_token(*id)).collect::<Vec<_>>());
    let own_name = base.file_name().filter(|_| base.is_file()).map(|name| name.to_string_lossy());
    let base_file = match (own_name, stored_type(base)) {
        (Some(name), _) => name.into_owned(),
        (None, FloatType::BF16) => "model-bf16.gguf".to_owned(),
        (None, FloatType::F16 | FloatType::F32) => "model-f16.gguf".to_owned(),
    };
    let text = modelfile(&base_file, Some((name, base)), &ends.unwrap_or_default());
    staging.write(MODELFILE, text.as_bytes())?;
    publish(staging, &path, name, kind, unfinished)
}

fn publish(
    staging: Staging<'_>,
    path: &Path,
    name: &str,
    kind: TensorType,
    unfinished: &Unfinished,
) -> Result<(), Failure> {
    let bytes = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let _publishing = unfinished.publishing();
    staging.publish_replacing(&json!({"kind": KIND}))?;
    output::line(&format!("{name}: {}, matrices in {}", human_bytes(bytes), kind.name()))?;
    Ok(())
}

fn tensor_type(dtype: ExportDtype) -> TensorType {
    match dtype {
        ExportDtype::F32 => TensorType::F32,
        ExportDtype::F16 => TensorType::F16,
        ExportDtype::Bf16 => TensorType::BF16,
        ExportDtype::Q8_0 => TensorType::Q8_0,
    }
}

/// `general.name`: the name of the directory.
fn title(output: &Path) -> String {
    output.file_name().map_or_else(|| "finetune".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// The keys of a tokenizer.
fn metadata(tokenizer: Option<&LlamaCppTokenizer>) -> Metadata {
    let text = |text: &str| Value::String(text.to_owned());
    let Some(tokenizer) = tokenizer else {
        return vec![("tokenizer.ggml.model".to_owned(), text("none"))];
    };
    let mut keys: Vec<(&str, Value)> = vec![
        ("model", text(tokenizer.model)),
        ("pre", text(tokenizer.pre)),
        ("tokens", Value::strings(tokenizer.tokens.iter().cloned())),
        ("token_type", Value::Array(tokenizer.types.iter().map(|kind| Value::I32(*kind)).collect())),
    ];
    if let Some(scores) = &tokenizer.scores {
        keys.push(("scores", Value::Array(scores.iter().map(|score| Value::F32(*score)).collect())));
    }
    if !tokenizer.merges.is_empty() {
        keys.push(("merges", Value::strings(tokenizer.merges.iter().cloned())));
    }
    keys.push(("add_bos_token", Value::Bool(tokenizer.add_bos)));
    keys.push(("add_eos_token", Value::Bool(tokenizer.add_eos)));
    keys.extend(tokenizer.add_space_prefix.map(|add| ("add_space_prefix", Value::Bool(add))));
    let mut metadata: Metadata =
        keys.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
    let ids = tokenizer.special.iter();
    metadata.extend(ids.map(|(name, id)| (format!("tokenizer.ggml.{name}_token_id"), Value::U32(*id))));
    let (default, others): (Vec<_>, Vec<_>) = tokenizer.templates.iter().partition(|(name, _)| name == "default");
    metadata.extend(default.iter().map(|(_, source)| ("tokenizer.chat_template".to_owned(), text(source))));
    if !others.is_empty() {
        let names = others.iter().map(|(name, _)| name.clone());
        metadata.push(("tokenizer.chat_templates".to_owned(), Value::strings(names)));
        metadata.extend(others.iter().map(|(name, source)| (format!("tokenizer.chat_template.{name}"), text(source))));
    }
    metadata
}

/// The Modelfile of a model, or of an adapter with its base.
fn modelfile(model: &str, adapter: Option<(&str, &Path)>, ends: &[String]) -> String {
    let mut lines = vec!["# For Ollama: ollama create NAME -f Modelfile".to_owned()];
    match adapter {
        Some((_, base)) if base.file_name().is_some_and(|name| name.to_string_lossy() == model) => {
            lines.push(format!("# FROM is the adapter's base, {}.", base.display()));
            lines.push("# Put that file beside this one, or name its place.".to_owned());
        }
        Some((_, base)) => {
            lines.push(format!(
                "# FROM is the adapter's base. `finetune export {} --format gguf --output DIR`",
                base.display()
            ));
            lines.push("# writes it. Put that file beside this one, or name its place.".to_owned());
        }
        None => {}
    }
    lines.push(format!("FROM ./{model}"));
    lines.extend(adapter.map(|(name, _)| format!("ADAPTER ./{name}")));
    lines.push("# The chat template is in the model's file. Ollama translates the templates that it knows;".to_owned());
    lines.push(
        "# `ollama show NAME --template` prints what it made of it. SYSTEM is not set: if the rows had".to_owned(),
    );
    lines.push("# a system message, add it here.".to_owned());
    let quoted = |end: &String| format!("PARAMETER stop \"{}\"", end.replace('"', "\\\""));
    lines.extend(ends.iter().filter(|end| !end.contains('\n')).map(quoted));
    lines.push(String::new());
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn modelfiles() {
        let ends = ["<|im_end|>".to_owned(), "a\"b".to_owned()];
        expect![[r#"
            # For Ollama: ollama create NAME -f Modelfile
            FROM ./model-f16.gguf
            # The chat template is in the model's file. Ollama translates the templates that it knows;
            # `ollama show NAME --template` prints what it made of it. SYSTEM is not set: if the rows had
            # a system message, add it here.
            PARAMETER stop "<|im_end|>"
            PARAMETER stop "a\"b"
        "#]]
        .assert_eq(&modelfile("model-f16.gguf", None, &ends));
        expect![[r#"
            # For Ollama: ollama create NAME -f Modelfile
            # FROM is the adapter's base. `finetune export models/base --format gguf --output DIR`
            # writes it. Put that file beside this one, or name its place.
            FROM ./model-f16.gguf
            ADAPTER ./adapter.gguf
            # The chat template is in the model's file. Ollama translates the templates that it knows;
            # `ollama show NAME --template` prints what it made of it. SYSTEM is not set: if the rows had
            # a system message, add it here.
        "#]]
        .assert_eq(&modelfile("model-f16.gguf", Some(("adapter.gguf", Path::new("models/base"))), &[]));
        let of_file = modelfile("tiny-q4_0.gguf", Some(("adapter.gguf", Path::new("models/tiny-q4_0.gguf"))), &[]);
        assert!(of_file.contains("# FROM is the adapter's base, models/tiny-q4_0.gguf.\n"), "{of_file}");
    }
}
