//! The files of a model directory that go along with its weights: configs, tokenizer, templates,
//! licenses.

use std::path::Path;

use finetune_store::{Dtype, Operation, SafeName, StoreError, stays_inside};
use serde_json::Value;

use crate::config::ModelConfig;
use crate::config::family::{ExpertLayout, Family};
use crate::error::ModelError;
use crate::files::text::{read_bounded, read_text};
use crate::gguf::read::GgufBase;

/// Files of these names go along unchanged.
const COMPANIONS: [&str; 18] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "tiktoken.model",
    "params.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
];

/// Files whose names begin like this, in any case, go along too. Terms have to be passed on with
/// what they are for.
const BEGINNINGS: [&str; 10] = [
    "tokenizer.model",
    "license",
    "licence",
    "notice",
    "use_policy",
    "acceptable_use",
    "copying",
    "copyright",
    "terms",
    "third_party",
];

/// Python modules whose names begin like this go along: `auto_map` of the configs names them.
const MODULES: [&str; 3] = ["configuration_", "modeling_", "tokenization_"];

/// Endings of files that hold weights, in one form or another. They are not listed as left out,
/// because new weights take their place.
const WEIGHTS: [&str; 11] = [
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
];

/// Largest companion that is copied, in bytes: tokenizers have up to about 40 MB.
const LIMIT: u64 = 256 << 20;

/// Whether a file of this name goes along with the weights.
fn is_companion(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    let begins = BEGINNINGS.iter().any(|beginning| lower.starts_with(beginning)) || lower.ends_with(".tiktoken");
    let is_module = name.ends_with(".py") && MODULES.iter().any(|beginning| name.starts_with(beginning));
    (COMPANIONS.contains(&name) || begins || is_module) && SafeName::parse(name).is_ok()
}

/// config.json with the number type of the weights, and every file of the base that goes along with
/// them. `text` takes the place of the base's files of the same names: what a training changed
/// about tokenizer, template and end tokens.
///
/// # Errors
/// If a file cannot be read, is larger than any companion should be, or is a link that leads out of
/// the directory.
pub fn companion_files(
    base: &Path,
    dtype: Dtype,
    text: &[(String, Vec<u8>)],
) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
    let mut files = vec![("config.json".to_owned(), config_json(base, dtype)?)];
    // A base that is one file has nothing beside it: what lies in its directory is not of it.
    let beside = if base.is_dir() { entries(base)? } else { Vec::new() };
    for name in beside.into_iter().filter(|name| is_companion(name)) {
        let path = base.join(&name);
        let is_replaced = text.iter().any(|(other, _)| *other == name);
        if is_replaced || !path.is_file() {
            continue;
        }
        stays_inside(base, &path)?;
        files.push((name, read_bounded(&path, LIMIT)?));
    }
    replace_files(&mut files, text);
    Ok(files)
}

/// Changes config.json among the files of [`companion_files`].
pub(crate) fn amend_config(files: &mut [(String, Vec<u8>)], change: impl Fn(&mut Value)) {
    for (_, bytes) in files.iter_mut().filter(|(name, _)| name == "config.json") {
        let mut config: Value = serde_json::from_slice(bytes).expect("`companion_files` has written it");
        change(&mut config);
        *bytes = serde_json::to_vec_pretty(&config).expect("a JSON value can be written");
    }
}

/// Puts files in the place of those of the same names, and adds the others. A template in a file of
/// its own makes the older `chat_template.json` wrong, so that is removed.
pub fn replace_files(files: &mut Vec<(String, Vec<u8>)>, text: &[(String, Vec<u8>)]) {
    let has = |name: &str| text.iter().any(|(other, _)| other == name);
    let has_template = has("chat_template.jinja");
    files.retain(|(name, _)| !(has(name) || has_template && name == "chat_template.json"));
    files.extend(text.iter().cloned());
}

/// Names of files and folders of the base that do not go along and are no form of its weights.
/// Folders end in a slash.
pub fn left_out(base: &Path) -> Vec<String> {
    let names = entries(base).unwrap_or_default().into_iter().filter(|name| {
        let ours = ["config.json", finetune_store::MANIFEST_NAME].contains(&name.as_str());
        let weights = WEIGHTS.iter().any(|ending| name.ends_with(ending));
        !ours && !weights && !name.starts_with('.')
    });
    let mut left = Vec::new();
    for name in names {
        let path = base.join(&name);
        if path.is_dir() {
            left.push(format!("{name}/"));
        } else if !is_companion(&name) {
            left.push(name);
        }
    }
    left
}

/// config.json of the base for weights that are not packed, with the number type that they are written
/// in.
fn config_json(base: &Path, dtype: Dtype) -> Result<Vec<u8>, ModelError> {
    let mut config = match GgufBase::open(base)? {
        Some(base) => base.config_json(),
        None => {
            let path = base.join("config.json");
            let text = read_text(&path, crate::files::config_json::LIMIT)?;
            stays_inside(base, &path)?;
            serde_json::from_str(&text).map_err(|error| ModelError::Malformed { path, what: error.to_string() })?
        }
    };
    // The spelling that the directory already uses. transformers reads both.
    let key = if config.get("torch_dtype").is_some() { "torch_dtype" } else { "dtype" };
    config[key] = Value::from(match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    });
    // The weights are plain numbers. A packed base has these in both of mlx-lm's and transformers'
    // spellings. Stacks of experts that are written as they are read stay packed, which is in MXFP4.
    let family = Family::of_model(config.get("model_type").and_then(Value::as_str));
    let is_plain = family.is_none_or(|family| family.expert_layout() == ExpertLayout::Plain);
    let stays = |value: &Value| !is_plain && value["quant_method"] == "mxfp4";
    if let Some(config) = config.as_object_mut() {
        let is_of_packing = |key: &str| ["quantization", "quantization_config"].contains(&key);
        config.retain(|key, value| !is_of_packing(key) || stays(value));
        // Of a multimodal model the text model may say it.
        if let Some(text) = config.get_mut("text_config").and_then(Value::as_object_mut) {
            text.retain(|key, _| !is_of_packing(key));
        }
    }
    // The config says tied, but the weights have an output layer of their own. Not every reader
    // compares the two.
    let says_tied = config.get("tie_word_embeddings") == Some(&Value::Bool(true));
    if says_tied && !ModelConfig::load(base)?.tied_embeddings {
        config["tie_word_embeddings"] = Value::Bool(false);
    }
    Ok(serde_json::to_vec_pretty(&config).expect("a JSON value can be written"))
}

/// Names in a directory, sorted. Names that are not UTF-8 are left out.
fn entries(directory: &Path) -> Result<Vec<String>, ModelError> {
    let failed = |source| StoreError::io(directory, Operation::List, 0, source);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        names.extend(entry.map_err(failed)?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}
