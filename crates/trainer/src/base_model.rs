//! The base model of a recipe: its directory, its name, the number type of its files, and the model
//! itself.

use std::path::{Path, PathBuf};

use finetune_model::gguf::gguf_file;
use finetune_model::merge::companion_files;
pub use finetune_model::stored_type;
use finetune_model::{BaseName, Model, Placement};
use finetune_recipe::Recipe;
use finetune_store::{Dtype, Holding, recognize};

use crate::base_digest::{digest_together, expect_no_files};
use crate::error::TrainError;
use crate::initial_adapter::InitialAdapter;
use crate::ranks::Ranks;

/// The directory or GGUF file of the recipe's model. It is a path, the result of a run that trained
/// all weights, or a snapshot in the Hugging Face cache.
///
/// # Errors
/// If there is no such directory or file, or if it holds something else than a model.
pub fn model_directory(recipe: &Recipe) -> Result<PathBuf, TrainError> {
    let path = Path::new(&recipe.model.path);
    let not_a_model = |what: String, hints: &[&str]| {
        let hints = hints.iter().map(|hint| (*hint).to_owned()).collect();
        Err(TrainError::NotAModel { path: recipe.model.path.clone(), what, hints })
    };
    if path.is_dir() {
        if path.join("config.json").is_file() {
            return Ok(path.to_owned());
        }
        let holding = recognize(path);
        return match holding {
            Holding::Run if path.join("model/config.json").is_file() => Ok(path.join("model")),
            Holding::Run | Holding::Checkpoint | Holding::Adapter => not_a_model(
                format!("is {}, and no model", holding.describe()),
                &[
                    "to train it further, name its base model here and the adapter in lora.init_from",
                    "or make a model of both first: finetune export --format merged",
                ],
            ),
            // The code that reads the directory says what is missing.
            _ => Ok(path.to_owned()),
        };
    }
    let cached = recipe.model.hub_id().and_then(finetune_store::cached_snapshot);
    if let Some(snapshot) = cached {
        return Ok(snapshot);
    }
    match recognize(path) {
        Holding::Missing => Err(TrainError::NoModel { path: recipe.model.path.clone() }),
        Holding::Gguf => Ok(path.to_owned()),
        holding => not_a_model(
            format!("is {}, and a model is a directory or a GGUF file", holding.describe()),
            &["a model directory has config.json, tokenizer.json and model.safetensors, as on the Hugging Face hub"],
        ),
    }
}

/// The directory of a config.json that a recipe names in the place of a model. Sizes need no more.
pub(crate) fn directory_of_config(recipe: &Recipe) -> Option<PathBuf> {
    let path = Path::new(&recipe.model.path);
    let is_config = path.file_name().is_some_and(|name| name == "config.json") && path.is_file();
    let directory = path.parent().filter(|_| is_config)?;
    Some(if directory.as_os_str().is_empty() { PathBuf::from(".") } else { directory.to_owned() })
}

/// What adapter_config.json calls the base model: what the recipe calls it. A hub id comes with the
/// revision that was read.
pub(crate) fn base_name(recipe: &Recipe, directory: &Path) -> BaseName {
    match recipe.model.hub_id() {
        Some(id) if !Path::new(&recipe.model.path).is_dir() => {
            let revision = directory.file_name().map(|name| name.to_string_lossy().into_owned());
            BaseName { name: id.split('@').next().unwrap_or(id).to_owned(), revision }
        }
        _ => {
            let absolute = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
            BaseName { name: absolute.to_string_lossy().into_owned(), revision: None }
        }
    }
}

/// Whether a model directory has weights, and not only a config.json to make fresh ones from. A GGUF
/// file is all weights.
pub(crate) fn has_weights(directory: &Path) -> bool {
    let has = |name: &&str| directory.join(name).is_file();
    // One of several GGUF files has to be named: the code that opens them says so.
    ["model.safetensors", "model.safetensors.index.json"].iter().any(has) || !matches!(gguf_file(directory), Ok(None))
}

/// The base model of a recipe with what is trained set up, and the digest of what its weights were
/// made from. `vocabulary`: the rows of its embedding; `machine`: a text that ranks share if they are on one machine. All
/// ranks call it together.
pub(crate) fn open_model(
    recipe: &Recipe,
    directory: &Path,
    start: Option<InitialAdapter>,
    vocabulary: usize,
    placement: &Placement,
    machine: Option<&str>,
    ranks: &Ranks,
) -> Result<(Model, String), TrainError> {
    if start.is_none() {
        // They go into every checkpoint, so a file that cannot be read is refused now.
        companion_files(directory, Dtype::F32, &[])?;
    }
    if start.is_none() && !has_weights(directory) {
        let config_hash = finetune_store::hex(&finetune_store::content_hash(&directory.join("config.json"))?);
        let mut model = Model::initialize(directory, recipe.seed, placement)?;
        expect_no_files(ranks)?;
        model.resize_vocabulary(vocabulary)?;
        model.train_all();
        return Ok((model, format!("fresh:{config_hash}")));
    }
    let mut model = Model::load(directory, placement).map_err(TrainError::from_base)?;
    let digest = digest_together(directory, placement, machine, ranks)?;
    // The digest was made of the files that have these names now.
    model.expect_files_in_place()?;
    model.resize_vocabulary(vocabulary)?;
    let Some(InitialAdapter { adaptation, adapter, .. }) = start else {
        model.train_all();
        return Ok((model, digest));
    };
    match adapter {
        Some(adapter) => model.start_from(&adapter, adaptation, recipe.seed)?,
        None => model.add_adapter(adaptation, recipe.seed)?,
    }
    Ok((model, digest))
}
