//! Where an adapter's files are, and what a path without an adapter holds.

use std::path::{Path, PathBuf};

use crate::adapter::{CONFIG_FILE, TENSOR_FILE};
use crate::error::ModelError;

/// The file in which mlx-lm keeps an adapter's tensors.
pub(crate) const MLX_FILE: &str = "adapters.safetensors";
/// The file in which PEFT kept them before safetensors.
const PICKLE_FILE: &str = "adapter_model.bin";
/// Entries of a directory that are looked at to word a message.
const LOOKED_AT: usize = 256;

/// Whose format the files are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Peft,
    Mlx,
}

/// The files of one adapter.
#[derive(Debug)]
pub(super) struct AdapterFiles {
    pub(super) directory: PathBuf,
    pub(super) format: Format,
}

impl AdapterFiles {
    /// Looks for an adapter in a directory, or in the folder `adapter` of a run.
    pub(super) fn find(given: &Path) -> Result<AdapterFiles, ModelError> {
        let inside = given.join("adapter");
        let is_run = !given.join(CONFIG_FILE).is_file() && inside.join(CONFIG_FILE).is_file();
        let directory = if is_run { inside } else { given.to_owned() };
        if !directory.join(CONFIG_FILE).is_file() {
            return Err(without_config(given));
        }
        let format = if directory.join(TENSOR_FILE).is_file() {
            Format::Peft
        } else if directory.join(MLX_FILE).is_file() {
            Format::Mlx
        } else {
            return Err(without_tensors(&directory));
        };
        Ok(AdapterFiles { directory, format })
    }

    pub(super) fn config(&self) -> PathBuf {
        self.directory.join(CONFIG_FILE)
    }

    pub(super) fn tensors(&self) -> PathBuf {
        self.directory.join(match self.format {
            Format::Peft => TENSOR_FILE,
            Format::Mlx => MLX_FILE,
        })
    }
}

/// The error for a path without adapter_config.json. It says what the path holds instead, and which
/// path may be meant.
fn without_config(given: &Path) -> ModelError {
    let no = |what: String, hint: String| ModelError::NoAdapter { path: given.to_owned(), what, hint };
    let consists = format!("an adapter is a directory with {CONFIG_FILE} and {TENSOR_FILE}");
    if !given.exists() {
        return no("there is nothing of this name".into(), format!("{consists}; adapters are not downloaded"));
    }
    if !given.is_dir() {
        let parent = given.parent().filter(|parent| parent.join(CONFIG_FILE).is_file());
        let hint = parent.map_or(consists, |parent| format!("name the directory: {}", shown(parent)));
        return no("it is a file".into(), hint);
    }
    let named = folders(given, |folder| folder.join(CONFIG_FILE).is_file());
    if let Some(first) = named.first() {
        let what = format!("it holds {} in folders of their own", crate::error::list(&named));
        return no(what, format!("name one of them: {}", given.join(first).display()));
    }
    if given.join("checkpoints").is_dir() {
        let steps = folders(&given.join("checkpoints"), |folder| folder.join(CONFIG_FILE).is_file());
        let hint = steps.last().map_or("train it to its end first".to_owned(), |step| {
            format!("name a checkpoint: {}", given.join("checkpoints").join(step).display())
        });
        return no("it is a run that has not come to its end".into(), hint);
    }
    if given.join("config.json").is_file() {
        return no("it is a model directory".into(), consists);
    }
    let only = [TENSOR_FILE, MLX_FILE, PICKLE_FILE].into_iter().find(|name| given.join(name).is_file());
    match only {
        Some(name) => {
            no(format!("{CONFIG_FILE} is missing beside {name}"), "copy it from where the tensors are from".into())
        }
        None => no(format!("it has no {CONFIG_FILE}"), consists),
    }
}

/// The error for a directory with adapter_config.json but without tensors.
fn without_tensors(directory: &Path) -> ModelError {
    let no = |what: String, hint: String| ModelError::NoAdapter { path: directory.to_owned(), what, hint };
    if !directory.join(PICKLE_FILE).is_file() {
        return no(format!("it has no {TENSOR_FILE}"), "a download or a copy is not complete".into());
    }
    let directory = shown(directory);
    let convert = format!(
        "convert it where torch is: python -c \"import torch, safetensors.torch as s; s.save_file({{k: v.contiguous() for k, v in torch.load('{directory}/{PICKLE_FILE}', map_location='cpu', weights_only=True).items()}}, '{directory}/{TENSOR_FILE}', {{'format': 'pt'}})\""
    );
    no(format!("{PICKLE_FILE} is a pickle, which can run code when it is read, so it is not read"), convert)
}

fn shown(directory: &Path) -> String {
    if directory.as_os_str().is_empty() { ".".to_owned() } else { directory.display().to_string() }
}

/// Names of the folders for which `is` holds, sorted.
fn folders(directory: &Path, is: impl Fn(&Path) -> bool) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let names = entries.take(LOOKED_AT).filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| is(&directory.join(name))).collect();
    names.sort();
    names
}
