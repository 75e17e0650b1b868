//! What somebody holds in the hand: a path, and what lies there. Commands use what they can, and say of the rest what it
//! is instead of showing the symptoms of reading it as something else.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Operation, StoreError};
use crate::manifest::MANIFEST_NAME;
use crate::names::stays_inside;

mod file;

/// What a path holds, by names and first bytes. Follows links; never reads more than a few KiB of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holding {
    Missing,
    ModelDirectory,
    /// PEFT's or mlx-lm's.
    Adapter,
    Run,
    Checkpoint,
    Directory,
    EmptyDirectory,
    EmptyFile,
    /// A TOML file.
    Recipe,
    Yaml,
    Gguf,
    LfsPointer,
    Html,
    Gzip,
    Zstd,
    Zip,
    Parquet,
    Arrow,
    Csv,
    Tsv,
    JsonArray,
    JsonObject,
    JsonLines,
    Utf16,
    /// torch's own format: `.bin`, `.pt`, `.pth`.
    Pickle,
    Safetensors,
    /// A tokenizer.model.
    SentencePiece,
    Jinja,
    Text,
    Binary,
}

/// How much of a file is looked at, in bytes.
const HEAD: u64 = 4096;

/// What lies at a path.
pub fn recognize(path: &Path) -> Holding {
    match path.metadata() {
        Err(_) => Holding::Missing,
        Ok(found) if found.is_dir() => directory(path),
        Ok(found) if !found.is_file() => Holding::Binary,
        Ok(found) if found.len() == 0 => Holding::EmptyFile,
        Ok(_) => file::recognize(path, &head(path)),
    }
}

fn head(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    // What cannot be read has no first bytes; its name may still say something.
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
        return Holding::ModelDirectory;
    }
    if is_run(path) {
        return Holding::Run;
    }
    let names = names(path);
    if names.is_empty() {
        return Holding::EmptyDirectory;
    }
    // A download of llama.cpp's format has nothing but its file, or a few of them.
    if names.iter().any(|name| name.to_ascii_lowercase().ends_with(".gguf")) {
        Holding::Gguf
    } else {
        Holding::Directory
    }
}

/// The kind that a manifest of ours says, without checking it.
fn kind(path: &Path) -> Option<String> {
    let head = head(&path.join(MANIFEST_NAME));
    let text = String::from_utf8_lossy(&head);
    let (_, rest) = text.split_once("\"kind\": \"")?;
    rest.split_once('"').map(|(kind, _)| kind.to_owned())
}

/// A directory that `finetune run` has written to.
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

impl Holding {
    /// With its article, as in "x is a Parquet file".
    pub fn describe(self) -> &'static str {
        match self {
            Holding::Missing => "not there",
            Holding::ModelDirectory => "a model directory",
            Holding::Adapter => "an adapter",
            Holding::Run => "a run of finetune",
            Holding::Checkpoint => "a checkpoint of a run",
            Holding::Directory => "a directory",
            Holding::EmptyDirectory => "an empty directory",
            Holding::EmptyFile => "an empty file",
            Holding::Recipe => "a TOML file, such as a recipe",
            Holding::Yaml => "a YAML file, such as another program's recipe",
            Holding::Gguf => "a GGUF model, llama.cpp's format",
            Holding::LfsPointer => "a git-lfs pointer in place of the file",
            Holding::Html => "a web page in place of the file",
            Holding::Gzip => "a gzip file",
            Holding::Zstd => "a zstd file",
            Holding::Zip => "a zip file",
            Holding::Parquet => "a Parquet file",
            Holding::Arrow => "an Arrow file",
            Holding::Csv => "a CSV file",
            Holding::Tsv => "a table with tabs (TSV)",
            Holding::JsonArray => "a JSON file with one list",
            Holding::JsonObject => "a JSON file with one object",
            Holding::JsonLines => "a file of rows, one JSON object a line",
            Holding::Utf16 => "a UTF-16 text file",
            Holding::Pickle => "a pickle, torch's own format, which can run code when it is read",
            Holding::Safetensors => "a safetensors file",
            Holding::SentencePiece => "a SentencePiece tokenizer (tokenizer.model)",
            Holding::Jinja => "a chat template",
            Holding::Text => "a text file",
            Holding::Binary => "a file of no kind that is known here",
        }
    }

    /// How to come to the file that should be there instead of a stand-in.
    pub(crate) fn remedy(self, path: &Path) -> Vec<String> {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        match self {
            Holding::LfsPointer => vec![format!(
                "the repository was cloned without git-lfs: `git lfs install`, then `git lfs pull` in {}, or `hf download`",
                directory.display()
            )],
            Holding::Html => vec![
                "a page to log in at or an error was saved in its place: a gated model needs `hf auth login`, then `hf download`".to_owned(),
            ],
            _ => vec!["the download is not complete: fetch it again".to_owned()],
        }
    }
}

/// An error for the first file of a model or adapter directory that is there in name only: a git-lfs pointer, a web page,
/// nothing at all.
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

/// What is read of a model directory besides its weights.
const FILES: [&str; 5] =
    ["config.json", "adapter_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];

/// An error for the first file of a directory that is a link to a file outside. A directory that came from elsewhere could
/// otherwise put any file of this machine into what is made of it. The Hugging Face cache is made of links to `blobs/`.
pub fn refuse_links_out(directory: &Path) -> Result<(), StoreError> {
    let entries =
        std::fs::read_dir(directory).map_err(|source| StoreError::io(directory, Operation::List, 0, source))?;
    let mut paths: Vec<_> = entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
    paths.sort();
    for path in paths {
        // A link that leads nowhere has no text to give away.
        if path.is_symlink() && path.is_file() {
            stays_inside(directory, &path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
