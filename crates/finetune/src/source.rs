//! What a path on the command line means: a model, an adapter with its base, the result of a run,
//! or a recipe.
//!
//! A path that cannot be used gets an error that says what it holds, and what is meant instead.

use std::io::Read;
use std::path::{Path, PathBuf};

use finetune_dataset::{ChatTokenizer, TextSource};
use finetune_gguf::FileSet;
use finetune_model::ModelError;
use finetune_recipe::{Data, Recipe};
use finetune_store::{Holding, HubId, RealDisk, has_all_weights, newest_verified, recognize, refuse_stand_ins};
use finetune_trainer::{CHECKPOINTS, model_directory};
use serde_json::Value;

use crate::cli::ModelArguments;
use crate::failure::Failure;
use crate::hub_files;

mod mistaken;
#[cfg(test)]
mod tests;

use mistaken::{directory_of_rows, missing, no_rows, not_a_model, not_a_recipe, not_an_adapter, several_ggufs};

const ADAPTER_CONFIG: &str = "adapter_config.json";
/// Longest adapter_config.json that is read, in bytes.
const LONGEST_CONFIG: u64 = 1 << 20;

/// What a command computes with.
#[derive(Debug)]
pub(crate) struct Source {
    /// The directory of the model, or of the adapter's base.
    pub(crate) model: PathBuf,
    pub(crate) adapter: Option<PathBuf>,
    chat_template: Option<PathBuf>,
    /// How the run read its rows, if the model or adapter is a run's. Templates get its date and variables.
    pub(crate) of_run: Option<Data>,
    /// What the user should know about what was chosen.
    pub(crate) notices: Vec<String>,
}

impl Source {
    /// Finds what the arguments of a command name.
    pub(crate) fn open(arguments: &ModelArguments) -> Result<Source, Failure> {
        let mut notices = Vec::new();
        let (model, adapter) = match (named(&arguments.model, &mut notices)?, &arguments.adapter) {
            (Named::Model(model), None) if arguments.base.is_some() => {
                return Err(Failure::arguments(
                    format!("--base names the base of an adapter, and {} is a model itself", model.display()),
                    "leave --base out, or name an adapter or a run instead of the model",
                ));
            }
            (Named::Model(model), None) => (model, None),
            (Named::Model(model), Some(adapter)) => (model, Some(adapter_directory(adapter, &mut notices)?)),
            (Named::Adapter(adapter), None) => (base_of(&adapter, arguments.base.as_deref())?, Some(adapter)),
            (Named::Adapter(first), Some(_)) => {
                return Err(Failure::arguments(
                    format!("{} is an adapter already, and --adapter names another one", first.display()),
                    "name the base model first, or leave --adapter out: the adapter's own base is used",
                ));
            }
        };
        Source::of(model, adapter, arguments.chat_template.clone(), notices)
    }

    /// For a model and an adapter that are known already.
    pub(crate) fn of(
        model: PathBuf,
        adapter: Option<PathBuf>,
        chat_template: Option<PathBuf>,
        notices: Vec<String>,
    ) -> Result<Source, Failure> {
        refuse_stand_ins(&model)?;
        if let Some(adapter) = &adapter {
            refuse_stand_ins(adapter)?;
        }
        if let Some(path) = chat_template.as_ref().filter(|path| !path.is_file()) {
            return Err(Failure::arguments(
                format!("--chat-template {}: there is no such file", path.display()),
                "the path is relative to the current directory",
            ));
        }
        let run = run_of(adapter.as_deref().unwrap_or(&model));
        let of_run = run.and_then(|run| recipe_of(&run)).map(|recipe| recipe.data);
        Ok(Source { model, adapter, chat_template, of_run, notices })
    }

    /// The tokenizer and template that the model was trained with. `None` if neither the model nor
    /// its adapter has a tokenizer.
    pub(crate) fn tokenizer(&self) -> Result<Option<ChatTokenizer>, Failure> {
        Ok(ChatTokenizer::open(&self.texts())?)
    }

    /// As [`Self::tokenizer`]. What is the same as in `known` is in memory once.
    pub(crate) fn tokenizer_beside(&self, known: &ChatTokenizer) -> Result<Option<ChatTokenizer>, Failure> {
        Ok(ChatTokenizer::open_beside(&self.texts(), known)?)
    }

    fn texts(&self) -> TextSource<'_> {
        TextSource {
            model_dir: &self.model,
            adapter: self.adapter.as_deref(),
            chat_template: self.chat_template.as_deref(),
            date: self.of_run.as_ref().and_then(|data| data.date.as_deref()),
            variables: self.of_run.as_ref().map(|data| &data.chat_template_kwargs),
        }
    }
}

/// What one path names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Named {
    Model(PathBuf),
    Adapter(PathBuf),
}

/// The model or adapter at a path, of a run, or of a hub id. One with an owner is fetched if it is
/// not in the cache.
pub(crate) fn named(path: &Path, notices: &mut Vec<String>) -> Result<Named, Failure> {
    match recognize(path) {
        Holding::ModelDirectory => Ok(Named::Model(path.to_owned())),
        Holding::Adapter => whole_adapter(path).map(Named::Adapter),
        Holding::Checkpoint => Ok(checkpoint(path.to_owned())),
        Holding::Run => result_of(path, notices),
        Holding::Directory if is_checkpoints_of_a_run(path) => newest_of(path, "", notices),
        Holding::Gguf => gguf(path).map(Named::Model),
        Holding::Missing => of_hub(path),
        holding => Err(not_a_model(path, holding)),
    }
}

/// The adapter that `--adapter` names.
pub(crate) fn adapter_directory(path: &Path, notices: &mut Vec<String>) -> Result<PathBuf, Failure> {
    let holding = recognize(path);
    match holding {
        Holding::ModelDirectory => return Err(not_an_adapter(path, holding)),
        Holding::Adapter | Holding::Checkpoint | Holding::Run | Holding::Missing => {}
        Holding::Directory if is_checkpoints_of_a_run(path) => {}
        holding => return Err(not_an_adapter(path, holding)),
    }
    match named(path, notices)? {
        Named::Adapter(adapter) => Ok(adapter),
        Named::Model(model) if holding == Holding::Missing => Err(Failure::arguments(
            format!("{} is a model of the hub, not an adapter", path.display()),
            format!("name it as the model instead of --adapter; in the cache it is {}", model.display()),
        )),
        Named::Model(model) => Err(Failure::arguments(
            format!(
                "{} has no adapter: all weights were trained, and {} is the model",
                path.display(),
                model.display()
            ),
            "name that as the model, without --adapter",
        )),
    }
}

/// A checkpoint holds an adapter, or all weights and their config.
fn checkpoint(path: PathBuf) -> Named {
    if path.join(ADAPTER_CONFIG).is_file() { Named::Adapter(path) } else { Named::Model(path) }
}

/// The result of a run: `adapter/` or `model/`. A run that has not finished has its newest
/// checkpoint.
fn result_of(run: &Path, notices: &mut Vec<String>) -> Result<Named, Failure> {
    let (adapter, model) = (run.join("adapter"), run.join("model"));
    if recognize(&adapter) == Holding::Adapter {
        return Ok(Named::Adapter(adapter));
    }
    if recognize(&model) == Holding::ModelDirectory {
        return Ok(Named::Model(model));
    }
    let why = format!("{} has not come to its end: ", run.display());
    newest_of(&run.join(CHECKPOINTS), &why, notices)
}

/// The newest checkpoint that verifies. `why` is the beginning of the line that names it.
fn newest_of(checkpoints: &Path, why: &str, notices: &mut Vec<String>) -> Result<Named, Failure> {
    let (newest, rejected) = newest_verified(&RealDisk, checkpoints, "step-")?;
    notices.extend(rejected.iter().map(|bad| format!("{} is passed over: {}", bad.path.display(), bad.why)));
    let run = checkpoints.parent().unwrap_or(checkpoints).display();
    match newest {
        Some((_, path, _)) => {
            notices.push(format!("{why}{} is used", path.display()));
            Ok(checkpoint(path))
        }
        None => Err(Failure::arguments(
            format!("{run} is a run of finetune that has no result and no checkpoint that verifies"),
            format!("train first: `finetune run {run} --resume` goes on with it"),
        )),
    }
}

fn is_checkpoints_of_a_run(path: &Path) -> bool {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    path.file_name().is_some_and(|name| name == CHECKPOINTS) && recognize(parent) == Holding::Run
}

fn of_hub(path: &Path) -> Result<Named, Failure> {
    let Some(id) = HubId::parse(&path.to_string_lossy()) else { return Err(missing(path)) };
    let snapshot = match id.name.contains('/') {
        true => hub_files::directory(&id, None)?,
        // A mistyped name of a directory is no reason to ask the hub.
        false => id.snapshot().ok_or_else(|| missing(path))?,
    };
    match recognize(&snapshot) {
        Holding::ModelDirectory => Ok(Named::Model(snapshot)),
        Holding::Gguf => gguf(&snapshot).map(Named::Model),
        Holding::Adapter => whole_adapter(&snapshot).map(Named::Adapter),
        holding => Err(not_a_model(&snapshot, holding)),
    }
}

/// A model directory as it is, and the GGUF file if it is one of those.
fn file_of_model(path: PathBuf) -> Result<PathBuf, Failure> {
    if recognize(&path) == Holding::Gguf { gguf(&path) } else { Ok(path) }
}

/// The GGUF file at a path: itself, or the only model of a directory.
fn gguf(path: &Path) -> Result<PathBuf, Failure> {
    if path.is_file() {
        return Ok(path.to_owned());
    }
    let mut models = FileSet::in_directory(path).map_err(ModelError::from)?;
    match models.len() {
        1 => Ok(models.remove(0)),
        _ => Err(several_ggufs(path, &models)),
    }
}

/// An adapter with its tensors in a format that is read.
fn whole_adapter(directory: &Path) -> Result<PathBuf, Failure> {
    let has = |name: &str| directory.join(name).is_file();
    let shown = directory.display();
    if !has("adapter_model.safetensors") && !has("adapters.safetensors") {
        if has("adapter_model.bin") {
            return Err(Failure::arguments(
                format!("{shown} has its tensors in adapter_model.bin, a pickle, which can run code and is not read"),
                "load it with PEFT and save it again: save_pretrained(DIR) writes adapter_model.safetensors",
            ));
        }
        return Err(Failure::arguments(
            format!("{shown} has {ADAPTER_CONFIG} and no adapter_model.safetensors"),
            "the download or copy is not complete: fetch it again",
        ));
    }
    if !has(ADAPTER_CONFIG) {
        return Err(Failure::arguments(
            format!("{shown} has the tensors of an adapter and no {ADAPTER_CONFIG}, which says how they are scaled"),
            "the download or copy is not complete: fetch it again",
        ));
    }
    Ok(directory.to_owned())
}

/// The base of an adapter. If the user does not name it, the adapter or its run does.
pub(crate) fn base_of(adapter: &Path, given: Option<&Path>) -> Result<PathBuf, Failure> {
    let Some(given) = given else { return recorded_base(adapter) };
    match named(given, &mut Vec::new())? {
        Named::Model(model) => Ok(model),
        Named::Adapter(_) => Err(not_a_model(given, Holding::Adapter)),
    }
}

fn recorded_base(adapter: &Path) -> Result<PathBuf, Failure> {
    let config = config_of(adapter);
    let text = |key: &str| config[key].as_str().filter(|text| !text.is_empty());
    // mlx-lm writes the options of its own command line.
    let name = text("base_model_name_or_path").or_else(|| text("model"));
    let is_model =
        |path: &PathBuf| matches!(recognize(path), Holding::ModelDirectory | Holding::Checkpoint | Holding::Gguf);
    let mut hub_id = None;
    if let Some(name) = name {
        let near = [PathBuf::from(name), adapter.join(name)];
        if let Some(path) = near.into_iter().find(is_model) {
            return file_of_model(path);
        }
        let id = HubId::parse(name).map(|id| match text("revision") {
            Some(revision) if id.revision.is_none() => HubId { name: id.name, revision: Some(revision.to_owned()) },
            _ => id,
        });
        if let Some(path) = id.as_ref().and_then(HubId::snapshot).filter(|path| is_model(path) && has_all_weights(path))
        {
            return file_of_model(path);
        }
        hub_id = id.filter(|id| id.name.contains('/'));
    }
    let of_run = run_of(adapter).and_then(|run| recipe_of(&run)).and_then(|recipe| model_directory(&recipe).ok());
    let is_whole = |path: &PathBuf| hub_id.is_none() || has_all_weights(path);
    match (of_run, &hub_id) {
        (Some(path), _) if is_whole(&path) => return Ok(path),
        // A rank of the run may have fetched the layers that it held. What is missing is named when it is read.
        (Some(path), Some(id)) => return hub_files::directory(id, None).or(Ok(path)).and_then(file_of_model),
        (None, Some(id)) => {
            let path = hub_files::directory(id, Some("or say where the base is with --base MODEL_DIR"))?;
            return file_of_model(path);
        }
        (_, None) => {}
    }
    let hint = "say where it is with --base MODEL_DIR".to_owned();
    let message = match name {
        Some(name) => format!("the base model of {}, {name}, is not there any more", adapter.display()),
        None => format!("{} does not say which model it was trained on", adapter.display()),
    };
    Err(Failure::bad_input(message, vec![hint]))
}

/// adapter_config.json. Null if it cannot be read: the code that needs more of it reports that.
fn config_of(adapter: &Path) -> Value {
    let mut text = String::new();
    let file = std::fs::File::open(adapter.join(ADAPTER_CONFIG));
    let _ = file.and_then(|file| file.take(LONGEST_CONFIG).read_to_string(&mut text));
    serde_json::from_str(&text).unwrap_or_default()
}

/// The run that a result or checkpoint lies in.
pub(crate) fn run_of(result: &Path) -> Option<PathBuf> {
    let parent = result.parent()?;
    [Some(parent), parent.parent()].into_iter().flatten().find_map(|run| {
        let run = if run.as_os_str().is_empty() { Path::new(".") } else { run };
        (recognize(run) == Holding::Run).then(|| run.to_owned())
    })
}

/// The recipe that a run was made with.
pub(crate) fn recipe_of(run: &Path) -> Option<Recipe> {
    Recipe::load(&run.join("recipe.toml"), &[], None).ok()
}

/// The file that the RECIPE of a command means: a recipe, or the one of a run.
pub(crate) fn recipe_path(path: &Path) -> Result<PathBuf, Failure> {
    match recognize(path) {
        // The recipe's reader points at the place of an error.
        Holding::Recipe | Holding::Text | Holding::EmptyFile => Ok(path.to_owned()),
        // `/dev/stdin` and the shell's `<(...)` can be read only once, so nothing is looked at
        // here.
        Holding::Binary if !path.is_file() => Ok(path.to_owned()),
        // One byte in an older encoding makes a recipe so. Its reader says where.
        Holding::Binary if path.extension().is_some_and(|extension| extension == "toml") => Ok(path.to_owned()),
        Holding::Run | Holding::Directory if path.join("recipe.toml").is_file() => Ok(path.join("recipe.toml")),
        holding => Err(not_a_recipe(path, holding)),
    }
}

/// Checks that an option names a file of rows. Its reader finds out the format.
pub(crate) fn data_file(option: &str, path: &Path) -> Result<(), Failure> {
    match recognize(path) {
        Holding::Missing => Err(no_rows(option, path)),
        Holding::ModelDirectory
        | Holding::Adapter
        | Holding::Run
        | Holding::Checkpoint
        | Holding::Directory
        | Holding::EmptyDirectory => Err(directory_of_rows(option, path)),
        _ => Ok(()),
    }
}

/// The command that fetches a model or adapter of the hub.
fn fetch(id: &HubId) -> String {
    let revision = id.revision.as_ref().map_or(String::new(), |revision| format!("@{revision}"));
    format!("`finetune download {}{revision}`", id.name)
}
