//! `finetune download`: from the hub into the Hugging Face cache.

use std::process::ExitCode;

use finetune_hub::{DatasetFiles, DatasetName, Hub, HubError, Kind, Need, News, Snapshot};
use finetune_store::HubId;
use serde_json::json;

use crate::cli::DownloadArguments;
use crate::failure::Failure;
use crate::output;
use crate::progress::Verbosity;
use crate::transfer::Transfer;

pub(crate) fn download(arguments: &DownloadArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    if let Some(name) = split(arguments) {
        return rows(&name, arguments.json);
    }
    let (id, is_dataset) = id(arguments)?;
    let need = match (&arguments.include[..], is_dataset) {
        ([], false) => Need::Model,
        ([], true) => Need::All,
        (patterns, _) => Need::Files(patterns.to_vec()),
    };
    let hub = Hub::from_environment()?;
    let shown = Transfer::default();
    let hear = |news: News<'_>| shown.hear(news);
    let snapshot = match (hub.is_offline(), is_dataset) {
        // Without a network the command says where a model is that was fetched before.
        (true, false) if need == Need::Model => hub.resolve(&id, &need, None, &hear)?,
        (_, true) => hub.download(Kind::Dataset, &id, &need, &hear)?,
        (_, false) => match hub.download(Kind::Model, &id, &need, &hear) {
            Err(missing @ HubError::Missing { .. }) => {
                let need = if arguments.include.is_empty() { Need::All } else { need };
                hub.download(Kind::Dataset, &id, &need, &hear).map_err(|error| match error {
                    // What was looked for first was meant, more likely.
                    HubError::Missing { .. } => missing,
                    error => error,
                })?
            }
            outcome => outcome?,
        },
    };
    if verbosity > Verbosity::Quiet {
        tell(&id, &snapshot);
    }
    if arguments.json {
        let Snapshot { directory, commit, files, fetched, moved_from } = &snapshot;
        output::line(
            &json!({
                "path": directory, "commit": commit, "files": files, "fetched_bytes": fetched, "moved_from": moved_from,
            })
            .to_string(),
        )?;
    } else {
        output::line(&snapshot.directory.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The split or file of a dataset that is named as in `data.train`.
fn split(arguments: &DownloadArguments) -> Option<DatasetName> {
    let mut name = DatasetName::parse(&arguments.repository).ok()?;
    let is_part = name.split.is_some() || name.file.is_some();
    if arguments.revision.is_some() && name.id.revision.is_none() {
        name.id.revision.clone_from(&arguments.revision);
    }
    let is_plain =
        arguments.include.is_empty() && (arguments.revision.is_none() || name.id.revision == arguments.revision);
    (is_part && is_plain).then_some(name)
}

/// Fetches the files that `data.train` would name so, and prints their paths.
fn rows(name: &DatasetName, json: bool) -> Result<ExitCode, Failure> {
    let shown = Transfer::default();
    let DatasetFiles { paths, commit, fetched } =
        Hub::from_environment()?.dataset_files(name, &|news| shown.hear(news))?;
    if json {
        output::line(&json!({ "files": paths, "commit": commit, "fetched_bytes": fetched }).to_string())?;
    } else {
        paths.iter().try_for_each(|path| output::line(&path.display().to_string()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Says what came of it beside the path.
fn tell(id: &HubId, snapshot: &Snapshot) {
    let revision = id.revision.as_deref().unwrap_or("main");
    if let Some(before) = &snapshot.moved_from {
        crate::stderr::complain!("{revision} of {} has moved from {before} to {}", id.name, snapshot.commit);
    }
    if snapshot.fetched == 0 {
        crate::stderr::complain!("{}: all of it is here already, commit {}", id.name, snapshot.commit);
    } else {
        crate::stderr::complain!("{}: commit {}", id.name, snapshot.commit);
    }
}

/// The repository, and whether it is named as a dataset.
fn id(arguments: &DownloadArguments) -> Result<(HubId, bool), Failure> {
    let text = &arguments.repository;
    let page = ["https://huggingface.co/", "https://hf.co/", "hf://"].iter().find_map(|start| text.strip_prefix(start));
    let of_page = page.map(|page| {
        let parts = if page.starts_with("datasets/") { 3 } else { 2 };
        page.split('/').take(parts).collect::<Vec<_>>().join("/")
    });
    let named = of_page.as_ref().unwrap_or(text);
    let (name, is_dataset) = match named.strip_prefix("datasets/") {
        Some(name) => (name, true),
        None => (named.as_str(), arguments.dataset),
    };
    let mut id = HubId::parse(name).ok_or_else(|| HubError::NotAnId { text: text.clone() })?;
    if let Some(revision) = &arguments.revision {
        let with = HubId::parse(&format!("{}@{revision}", id.name)).filter(|_| id.revision.is_none());
        id = with.ok_or_else(|| {
            Failure::arguments(
                format!("--revision {revision} is no revision, or {text} names one already"),
                "name a branch, a tag or a commit once",
            )
        })?;
    }
    Ok((id, is_dataset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_is_told_from_a_repository() {
        for (text, want) in [
            ("hf://acme/rows/train", true),
            ("hf://acme/rows@v2/en/train", true),
            ("hf://acme/rows/data/train.jsonl", true),
            ("hf://acme/rows", false),
            ("acme/rows", false),
            ("https://huggingface.co/datasets/acme/rows/tree/main", false),
        ] {
            let arguments = DownloadArguments {
                repository: text.to_owned(),
                include: vec![],
                dataset: false,
                revision: None,
                json: false,
            };
            assert_eq!(split(&arguments).is_some(), want, "{text}");
        }
    }

    #[test]
    fn repositories_by_every_name_that_people_paste() {
        let arguments = |repository: &str, revision: Option<&str>| DownloadArguments {
            repository: repository.to_owned(),
            include: vec![],
            dataset: false,
            revision: revision.map(str::to_owned),
            json: false,
        };
        for (text, revision, want) in [
            ("acme/tiny", None, Some(("acme/tiny", None, false))),
            ("acme/tiny@v2", None, Some(("acme/tiny", Some("v2"), false))),
            ("acme/tiny", Some("v2"), Some(("acme/tiny", Some("v2"), false))),
            ("gpt2", None, Some(("gpt2", None, false))),
            ("datasets/acme/rows", None, Some(("acme/rows", None, true))),
            ("https://huggingface.co/acme/tiny/tree/main", None, Some(("acme/tiny", None, false))),
            ("https://huggingface.co/datasets/acme/rows", None, Some(("acme/rows", None, true))),
            ("hf://datasets/acme/rows/train", None, Some(("acme/rows", None, true))),
            ("acme/tiny@v2", Some("v3"), None),
            ("acme/../tiny", None, None),
            ("a/b/c", None, None),
        ] {
            let found = id(&arguments(text, revision)).ok();
            let found = found.as_ref().map(|(id, set)| (id.name.as_str(), id.revision.as_deref(), *set));
            assert_eq!(found, want, "{text} {revision:?}");
        }
    }
}
