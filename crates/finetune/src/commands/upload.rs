//! `finetune upload`: an adapter or a model with its card to the hub.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use finetune_hub::{Hub, Upload};
use finetune_store::{Holding, HubId, MANIFEST_NAME, refuse_links_out, refuse_stand_ins};
use serde_json::{Value, json};

use crate::cli::UploadArguments;
use crate::failure::Failure;
use crate::output;
use crate::progress::Verbosity;
use crate::source::{Named, named};
use crate::transfer::Transfer;

/// Files that only a run needs.
const OF_A_RUN: [&str; 3] = [MANIFEST_NAME, "optimizer.safetensors", "trainer_state.json"];

const CARD: &str = "README.md";

pub(crate) fn upload(arguments: &UploadArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let mut notices = Vec::new();
    if finetune_store::recognize(&arguments.source) == Holding::Missing {
        return Err(Failure::arguments(
            format!("there is no {}", arguments.source.display()),
            "name a run, a checkpoint, an adapter or a model directory of this machine",
        ));
    }
    if let Some((name, branch)) = arguments.repository.split_once('@') {
        return Err(Failure::arguments(
            format!("{} names a revision, and an upload makes a new one", arguments.repository),
            format!("name a branch beside it: {name} --revision {branch}"),
        ));
    }
    let (Named::Adapter(directory) | Named::Model(directory)) = named(&arguments.source, &mut notices)?;
    refuse_links_out(&directory)?;
    refuse_stand_ins(&directory)?;
    let files = files(&directory)?;
    notices.extend(base_that_others_lack(&directory));
    let card = (!files.iter().any(|(name, _)| name == CARD)).then(|| card(&arguments.repository, &directory));
    let upload = Upload {
        repository: arguments.repository.clone(),
        files,
        card,
        private: arguments.private,
        branch: arguments.revision.clone(),
        message: arguments.message.clone().unwrap_or_else(|| "Upload of finetune".to_owned()),
    };
    if verbosity > Verbosity::Quiet {
        notices.iter().for_each(|notice| crate::stderr::complain!("{notice}"));
    }
    let shown = Transfer::default();
    let uploaded = Hub::from_environment()?.upload(&upload, &|news| shown.hear(news))?;
    if arguments.json {
        let object = json!({ "url": uploaded.page, "repository": uploaded.repository, "commit": uploaded.commit });
        output::line(&object.to_string())?;
    } else {
        output::line(&uploaded.page)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The files of a directory that others need.
fn files(directory: &Path) -> Result<Vec<(String, PathBuf)>, Failure> {
    let unreadable = |error: std::io::Error| {
        Failure::arguments(format!("{}: {error}", directory.display()), "name a directory that can be read")
    };
    let entries = std::fs::read_dir(directory).map_err(unreadable)?;
    let mut files: Vec<(String, PathBuf)> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.path().is_file())
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()))
        .filter(|(name, _)| !name.starts_with('.') && !OF_A_RUN.contains(&name.as_str()))
        .collect();
    files.sort();
    Ok(files)
}

fn base(directory: &Path) -> Option<String> {
    let text = std::fs::read_to_string(directory.join("adapter_config.json")).ok()?;
    let config: Value = serde_json::from_str(&text).ok()?;
    config["base_model_name_or_path"].as_str().map(str::to_owned)
}

/// An adapter names its base by a path of this machine, which others do not have.
fn base_that_others_lack(directory: &Path) -> Option<String> {
    let base = base(directory)?;
    let is_local = HubId::parse(&base).is_none_or(|id| !id.name.contains('/'));
    is_local.then(|| {
        format!("the adapter names its base as {base}, a path of this machine: others have to name it with --base")
    })
}

/// A card for a directory that has none.
fn card(repository: &str, directory: &Path) -> Vec<u8> {
    let is_adapter = directory.join("adapter_config.json").is_file();
    let (library, what) = if is_adapter { ("peft", "A LoRA adapter") } else { ("transformers", "A model") };
    let base = base(directory).filter(|base| HubId::parse(base).is_some_and(|id| id.name.contains('/')));
    let base = base.map_or(String::new(), |base| format!("base_model: {}\n", Value::from(base)));
    let name = repository.rsplit('/').next().unwrap_or(repository);
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "---\n{base}library_name: {library}\npipeline_tag: text-generation\ntags:\n- finetune\n---\n\n# {name}\n\n{what}, written by finetune {version}.\n"
    )
    .into_bytes()
}
