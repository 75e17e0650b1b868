//! What lies at a path, by its names and first bytes. Commands use what they can. Of anything else
//! they say what it is, instead of showing the symptoms of reading it as something else.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Operation, StoreError};
use crate::holding::Holding;
use crate::hub::has_gguf;
use crate::manifest::MANIFEST_NAME;
use crate::names::stays_inside;

mod file;

/// How much of a file is looked at, in bytes.
const HEAD: u64 = 4096;

/// What lies at a path. Links are followed, and no more than a few KiB of a file are read.
pub fn recognize(path: &Path) -> Holding {
    match path.metadata() {
        Err(_) => Holding::Missing,
        Ok(found) if found.is_dir() => directory(path),
        Ok(found) if !found.is_file() => Holding::Binary,
        Ok(found) if found.len() == 0 => Holding::EmptyFile,
        Ok(_) => file::recognize(path, &head(path)),
    }
}

/// What a file called `name` holds if these are its first bytes, a few KiB of them. It is for
/// content that comes out of a packed file.
pub fn recognize_content(name: &Path, head: &[u8]) -> Holding {
    if head.is_empty() { Holding::EmptyFile } else { file::recognize(name, head) }
}

fn head(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A file that cannot be read has no first bytes. Its name may still say something.
    let _ = File::open(path).and_then(|file| file.take(HEAD).read_to_end(&mut bytes));
    bytes
}

fn directory(path: &Path) -> Holding {
    let has = |name: &str| path.join(name).is_file();
    let any = |names: &[&str]| names.iter().any(|name| has(name));
    if has("trainer_state.json") && (has("optimizer.safetensors") || kind(path).as_deref() == Some("checkpoint")) {
        return Holding::Checkpoint;
    }
    let weights =
        ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];
    if any(&weights) {
        return Holding::ModelDirectory;
    }
    if any(&["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors"]) {
        return Holding::Adapter;
    }
    if has("config.json") {
        // Some have the config of the model that they were made from beside the GGUF file.
        return if has_gguf(path) { Holding::Gguf } else { Holding::ModelDirectory };
    }
    if is_run(path) {
        return Holding::Run;
    }
    let names = names(path);
    if names.is_empty() {
        return Holding::EmptyDirectory;
    }
    // A download in llama.cpp's format has nothing but one file, or a few.
    if names.iter().any(|name| name.to_ascii_lowercase().ends_with(".gguf") && has(name)) {
        Holding::Gguf
    } else {
        Holding::Directory
    }
}

/// The kind that a manifest of this program names. The manifest is not verified.
fn kind(path: &Path) -> Option<String> {
    let head = head(&path.join(MANIFEST_NAME));
    let text = String::from_utf8_lossy(&head);
    let (_, rest) = text.split_once("\"kind\": \"")?;
    rest.split_once('"').map(|(kind, _)| kind.to_owned())
}

/// Whether `finetune run` has written to a directory.
fn is_run(path: &Path) -> bool {
    let has = |name: &str| path.join(name).is_file();
    let checkpoints = path.join("checkpoints");
    let ours = |name: &String| ["step-", "aside-step-", "."].iter().any(|begin| name.starts_with(begin));
    let has_checkpoints = checkpoints.is_dir() && names(&checkpoints).iter().all(ours);
    let has_result = has("adapter/adapter_config.json") || has("model/manifest.json");
    has_checkpoints || (has("recipe.toml") && (has("metrics.jsonl") || has_result))
}

/// The names in a directory, without those that a file manager leaves.
fn names(path: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(path).into_iter().flatten().filter_map(Result::ok);
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name != ".DS_Store").collect()
}

/// Refuses a model or adapter directory with a file that is there in name only: a git-lfs pointer,
/// a web page, an empty file.
///
/// # Errors
/// [`StoreError::StandIn`] for the first such file.
pub fn refuse_stand_ins(directory: &Path) -> Result<(), StoreError> {
    let mut names = names(directory);
    names.sort();
    let matters = |name: &&String| {
        name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") || FILES.contains(&name.as_str())
    };
    for name in names.iter().filter(matters) {
        let path = directory.join(name);
        if let holding @ (Holding::LfsPointer | Holding::Html | Holding::EmptyFile) = recognize(&path) {
            return Err(StoreError::StandIn { path, holding });
        }
    }
    Ok(())
}

/// The files of a model directory that are read besides its weights.
const FILES: [&str; 5] =
    ["config.json", "adapter_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];

/// Refuses a directory with a link to a file outside. A directory that came from elsewhere could
/// otherwise put any file of this host into what is made of it. The links of the Hugging Face
/// cache, which lead to its `blobs/`, are allowed.
///
/// # Errors
/// [`StoreError::LinkOut`] for the first such link, [`StoreError::Io`].
pub fn refuse_links_out(directory: &Path) -> Result<(), StoreError> {
    let entries =
        std::fs::read_dir(directory).map_err(|source| StoreError::io(directory, Operation::List, 0, source))?;
    let mut paths: Vec<_> = entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
    paths.sort();
    for path in paths {
        // A link that leads nowhere gives nothing away.
        if path.is_symlink() && path.is_file() {
            stays_inside(directory, &path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
