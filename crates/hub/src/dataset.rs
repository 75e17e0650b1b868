//! Rows of the hub: which files of a dataset hold a split.
//!
//! The hub converts most datasets to Parquet, on the branch `refs/convert/parquet`, as
//! `CONFIG/SPLIT/0000.parquet`. If a dataset has no such branch, or the user names a revision, the
//! files of the repository itself are taken: those whose names have the split's.

use std::path::PathBuf;

use finetune_store::HubId;

use crate::cache::Folder;
use crate::download::{bring, is_commit};
use crate::error::HubError;
use crate::hub::Hub;
use crate::news::{Listener, News};
use crate::repository::{Kind, Listed, Repository};

/// The branch with the hub's own Parquet files.
const CONVERTED: &str = "refs/convert/parquet";

/// Endings of files of rows, the most welcome first.
const ENDINGS: [&str; 13] = [
    ".parquet",
    ".jsonl",
    ".jsonl.gz",
    ".jsonl.zst",
    ".ndjson",
    ".json",
    ".json.gz",
    ".json.zst",
    ".csv",
    ".csv.gz",
    ".csv.zst",
    ".tsv",
    ".txt",
];

/// Names that mean the same split.
const SAME: [&[&str]; 3] =
    [&["train", "training"], &["validation", "valid", "val", "dev"], &["test", "testing", "eval"]];

/// The most names that a message lists.
const SHOWN: usize = 8;

/// Rows on the hub: `hf://OWNER/NAME[@REVISION][/CONFIG]/SPLIT`, or a file of the repository,
/// `hf://OWNER/NAME/data/train.jsonl` (a pattern too).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatasetName {
    /// The repository.
    pub id: HubId,
    /// One of the dataset's configurations (subsets); `None`: the only one, or `default`.
    pub config: Option<String>,
    /// The split; `None`: `train`.
    pub split: Option<String>,
    /// A file of the repository instead of a split.
    pub file: Option<String>,
}

/// The files of a split, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatasetFiles {
    /// Their paths in the cache.
    pub paths: Vec<PathBuf>,
    /// The commit that they are of.
    pub commit: String,
    /// Bytes that came over the network.
    pub fetched: u64,
}

impl DatasetName {
    /// Whether a text means rows on the hub, rightly written or not.
    pub fn is_meant(text: &str) -> bool {
        text.starts_with("hf:/")
    }

    /// Reads `hf://…`. A slash in a revision is written `%2F`, as in `@refs%2Fpr%2F1`.
    ///
    /// # Errors
    /// [`HubError::NotAnId`].
    pub fn parse(text: &str) -> Result<DatasetName, HubError> {
        let wrong = || HubError::NotAnId { text: text.to_owned() };
        // A path that was joined and normalized has one slash.
        let rest = text.strip_prefix("hf://").or_else(|| text.strip_prefix("hf:/")).ok_or_else(wrong)?;
        let rest = rest.strip_prefix("datasets/").unwrap_or(rest);
        let parts: Vec<&str> = rest.trim_end_matches('/').split('/').collect();
        let (owner, name, more) = match parts[..] {
            [owner, name, ref more @ ..] => (owner, name, more),
            _ => return Err(wrong()),
        };
        let id = HubId::parse(&format!("{owner}/{name}").replace("%2F", "/").replace("%2f", "/")).ok_or_else(wrong)?;
        if more.iter().any(|part| part.is_empty()) {
            return Err(wrong());
        }
        let text = |part: &&str| Some((**part).to_owned());
        let (config, split, file) = match more {
            [.., last] if ENDINGS.iter().any(|ending| last.ends_with(ending)) => (None, None, Some(more.join("/"))),
            [] => (None, None, None),
            [split] => (None, text(split), None),
            [config, split] => (text(config), text(split), None),
            _ => return Err(wrong()),
        };
        Ok(DatasetName { id, config, split, file })
    }

    fn split(&self) -> &str {
        self.split.as_deref().unwrap_or("train")
    }
}

impl Hub {
    /// The files of a split, in the cache. Those that are there already are not fetched again.
    ///
    /// # Errors
    /// As [`Hub::download`], or [`HubError::NoFile`] if no file has the split.
    pub fn dataset_files(&self, name: &DatasetName, listener: &Listener<'_>) -> Result<DatasetFiles, HubError> {
        let id = &name.id;
        let fetch = format!("--dataset {}", id.name);
        let connection = match self.connection(&format!("the dataset {}", id.name), &fetch) {
            Err(offline) => return self.cached_rows(name)?.ok_or(offline),
            Ok(connection) => connection,
        };
        let repository = self.repository(connection, Kind::Dataset, id);
        let outcome = connection.block_on(async {
            let (revision, commit, files) = chosen(&repository, name, listener).await?;
            if files.iter().any(|file| file.path.contains("/partial-")) {
                listener(News::Note(&format!("{}: the hub has converted only the first rows of this split", id.name)));
            }
            let fetched = bring(&repository, &commit, &files, listener).await?;
            let folder = Folder::new(&self.cache, Kind::Dataset, &id.name);
            if !is_commit(revision) {
                folder.set_reference(revision, &commit)?;
            }
            let paths = files.iter().map(|file| folder.snapshot(&commit).join(&file.path)).collect();
            Ok(DatasetFiles { paths, commit, fetched })
        });
        match outcome {
            Err(error @ (HubError::Unreachable { .. } | HubError::Answer { .. })) => match self.cached_rows(name)? {
                Some(files) => {
                    listener(News::Note(&format!("{error}; the cache's {} is used", id.name)));
                    Ok(files)
                }
                None => Err(error),
            },
            outcome => outcome,
        }
    }

    /// The files of a split that were fetched before.
    fn cached_rows(&self, name: &DatasetName) -> Result<Option<DatasetFiles>, HubError> {
        let folder = Folder::new(&self.cache, Kind::Dataset, &name.id.name);
        let of = |revision: &str| {
            let commit = if is_commit(revision) { Some(revision.to_owned()) } else { folder.reference(revision) };
            commit.filter(|commit| folder.snapshot(commit).is_dir())
        };
        let (commit, is_converted) = match &name.id.revision {
            Some(revision) => (of(revision), false),
            None => match of(CONVERTED).filter(|_| name.file.is_none()) {
                Some(commit) => (Some(commit), true),
                None => (of("main"), false),
            },
        };
        let Some(commit) = commit else { return Ok(None) };
        let listed = |path: String| Listed { path, size: 0, oid: String::new(), large: false };
        let listing: Vec<Listed> = folder.files(&commit).into_iter().map(listed).collect();
        let files = if is_converted { converted(name, &listing) } else { in_repository(name, &listing) };
        let Ok(files) = files else { return Ok(None) };
        let paths = files.iter().map(|file| folder.snapshot(&commit).join(&file.path)).collect();
        Ok(Some(DatasetFiles { paths, commit, fetched: 0 }))
    }
}

/// The files of a split: revision, commit, listing of them.
async fn chosen<'n>(
    repository: &Repository<'_>,
    name: &'n DatasetName,
    listener: &Listener<'_>,
) -> Result<(&'n str, String, Vec<Listed>), HubError> {
    if name.id.revision.is_none() && name.file.is_none() {
        match repository.commit(CONVERTED, listener).await {
            Ok(commit) => {
                let listing = repository.listing(&commit, listener).await?;
                return Ok((CONVERTED, commit, converted(name, &listing)?));
            }
            // The hub converts no data set that needs a script, and none of some kinds of files.
            Err(HubError::NoRevision { .. } | HubError::Answer { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let revision = name.id.revision.as_deref().unwrap_or("main");
    let commit = match is_commit(revision) {
        true => revision.to_owned(),
        false => repository.commit(revision, listener).await?,
    };
    let listing = repository.listing(&commit, listener).await?;
    Ok((revision, commit, in_repository(name, &listing)?))
}

/// The hub's own Parquet files of a split.
fn converted(name: &DatasetName, listing: &[Listed]) -> Result<Vec<Listed>, HubError> {
    let parts = |file: &Listed| -> Option<(String, String)> {
        let [config, split, file] = file.path.split('/').collect::<Vec<_>>()[..] else { return None };
        let split = split.strip_prefix("partial-").unwrap_or(split);
        file.ends_with(".parquet").then(|| (config.to_owned(), split.to_owned()))
    };
    let mut configs: Vec<String> = listing.iter().filter_map(parts).map(|(config, _)| config).collect();
    configs.sort();
    configs.dedup();
    let config = match (&name.config, &configs[..]) {
        (Some(config), _) => config.clone(),
        (None, [only]) => only.clone(),
        (None, several) if several.iter().any(|config| config == "default") => "default".to_owned(),
        (None, several) => {
            let wanted = "of one configuration, and the dataset has several: write hf://OWNER/NAME/CONFIG/SPLIT";
            return Err(none(name, wanted.to_owned(), several.to_vec()));
        }
    };
    let is_wanted =
        |file: &&Listed| parts(file).is_some_and(|(found, split)| found == config && is_same(&split, name.split()));
    let files: Vec<Listed> = listing.iter().filter(is_wanted).cloned().collect();
    if files.is_empty() {
        let mut there: Vec<String> =
            listing.iter().filter_map(parts).map(|(config, split)| format!("{config}/{split}")).collect();
        there.dedup();
        return Err(none(name, format!("of {config}/{}", name.split()), there));
    }
    Ok(files)
}

/// Files of rows in the repository itself. Names without any split are all of `train`.
fn in_repository(name: &DatasetName, listing: &[Listed]) -> Result<Vec<Listed>, HubError> {
    if let Some(file) = &name.file {
        let pattern = glob::Pattern::new(file).unwrap_or_default();
        let is_wanted = |listed: &&Listed| listed.path == *file || pattern.matches(&listed.path);
        let files: Vec<Listed> = listing.iter().filter(is_wanted).cloned().collect();
        let there = || listing.iter().map(|file| file.path.clone()).collect();
        return if files.is_empty() { Err(none(name, format!("in {file}"), there())) } else { Ok(files) };
    }
    let rows: Vec<&Listed> = listing
        .iter()
        .filter(|file| ENDINGS.iter().any(|ending| file.path.ends_with(ending)) && !is_text_about(&file.path))
        .filter(|file| name.config.as_ref().is_none_or(|config| file.path.split('/').any(|part| part == config)))
        .collect();
    // `train_sft-0.parquet` is of the split `train_sft`, and of `train` only if no other file is.
    let of = |exact: bool| -> Vec<&Listed> {
        rows.iter().copied().filter(|file| has_split(&file.path, name.split(), exact)).collect()
    };
    let mut files = of(true);
    if files.is_empty() {
        files = of(false);
    }
    let names_a_split = |file: &&Listed| SAME.iter().any(|names| has_split(&file.path, names[0], false));
    if files.is_empty() && is_same(name.split(), "train") && !rows.iter().any(names_a_split) {
        files = rows.clone();
    }
    let best = ENDINGS.iter().find(|ending| files.iter().any(|file| file.path.ends_with(**ending)));
    let files: Vec<Listed> =
        files.into_iter().filter(|file| best.is_some_and(|ending| file.path.ends_with(ending))).cloned().collect();
    if files.is_empty() {
        let there = listing.iter().map(|file| file.path.clone()).collect();
        return Err(none(name, format!("(Parquet, JSONL, CSV) with {} in the name", name.split()), there));
    }
    Ok(files)
}

fn none(name: &DatasetName, wanted: String, there: Vec<String>) -> HubError {
    let more = if there.len() > SHOWN { format!(" and {} more", there.len() - SHOWN) } else { String::new() };
    let found = if there.is_empty() {
        "none".to_owned()
    } else {
        format!("{}{more}", there[..there.len().min(SHOWN)].join(", "))
    };
    HubError::NoRows { id: name.id.name.clone(), wanted, found }
}

/// Files that describe a dataset.
fn is_text_about(path: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or(path);
    ["dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json", "requirements.txt", "LICENSE.txt"]
        .contains(&file)
}

/// Whether a word of a path is a split's name. `exact`: the words end at `/`, `.` and `-` only.
fn has_split(path: &str, split: &str, exact: bool) -> bool {
    let ends = |letter: char| if exact { "/.-".contains(letter) } else { !letter.is_alphanumeric() };
    path.split(ends).any(|word| is_same(word, split))
}

/// Whether two names mean the same split.
fn is_same(a: &str, b: &str) -> bool {
    let (a, b) = (a.to_ascii_lowercase(), b.to_ascii_lowercase());
    a == b || SAME.iter().any(|names| names.contains(&a.as_str()) && names.contains(&b.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_rows() {
        for (text, id, revision, config, split) in [
            ("hf://acme/rows", "acme/rows", None, None, None),
            ("hf://acme/rows/test", "acme/rows", None, None, Some("test")),
            ("hf:/acme/rows/test", "acme/rows", None, None, Some("test")),
            ("hf://datasets/acme/rows/en/test", "acme/rows", None, Some("en"), Some("test")),
            ("hf://acme/rows@v2/train", "acme/rows", Some("v2"), None, Some("train")),
            ("hf://acme/rows@refs%2Fpr%2F1/train", "acme/rows", Some("refs/pr/1"), None, Some("train")),
        ] {
            let name = DatasetName::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            let found =
                (name.id.name.as_str(), name.id.revision.as_deref(), name.config.as_deref(), name.split.as_deref());
            assert_eq!(found, (id, revision, config, split), "{text}");
        }
        let file = DatasetName::parse("hf://acme/rows/data/train.jsonl").expect("a name");
        assert_eq!((file.file.as_deref(), file.split), (Some("data/train.jsonl"), None));
        for text in ["hf://", "hf://acme", "hf://acme/rows/a/b/c", "hf://acme/../x", "hf://acme/rows//x", "acme/rows"] {
            assert!(DatasetName::parse(text).is_err(), "{text}");
        }
    }

    fn chosen(text: &str, names: &[&str], of_hub: bool) -> String {
        let file = |name: &&str| Listed { path: (*name).to_owned(), size: 1, oid: String::new(), large: false };
        let listing: Vec<Listed> = names.iter().map(file).collect();
        let name = DatasetName::parse(text).expect("a name");
        match if of_hub { converted(&name, &listing) } else { in_repository(&name, &listing) } {
            Ok(files) => files.iter().map(|file| file.path.as_str()).collect::<Vec<_>>().join(" "),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_split_of_the_hubs_own_files() {
        let one =
            ["default/partial-train/0000.parquet", "default/partial-train/0001.parquet", "default/test/0000.parquet"];
        let two = ["de/train/0000.parquet", "en/train/0000.parquet"];
        for (text, names, want) in [
            ("hf://a/b", &one[..], "default/partial-train/0000.parquet default/partial-train/0001.parquet"),
            ("hf://a/b/test", &one, "default/test/0000.parquet"),
            ("hf://a/b/dev", &one, "a/b has no rows of default/dev; it has default/train, default/test"),
            ("hf://a/b/en/train", &two, "en/train/0000.parquet"),
            (
                "hf://a/b/train",
                &two,
                "a/b has no rows of one configuration, and the dataset has several: write hf://OWNER/NAME/CONFIG/SPLIT; it has de, en",
            ),
        ] {
            assert_eq!(chosen(text, names, true), want, "{text}");
        }
    }

    #[test]
    fn a_split_of_the_repositorys_files() {
        for (text, names, want) in [
            (
                "hf://a/b",
                &["README.md", "data/train-00000-of-00001.parquet", "train.csv"][..],
                "data/train-00000-of-00001.parquet",
            ),
            ("hf://a/b/validation", &["train.jsonl", "valid.jsonl", "README.md"], "valid.jsonl"),
            ("hf://a/b", &["rows.jsonl", "dataset_infos.json"], "rows.jsonl"),
            (
                "hf://a/b/train",
                &["test.jsonl"],
                "a/b has no rows (Parquet, JSONL, CSV) with train in the name; it has test.jsonl",
            ),
            ("hf://a/b/en/train", &["de/train.jsonl", "en/train.jsonl"], "en/train.jsonl"),
            (
                "hf://a/b/train_sft",
                &["data/train_sft-0.parquet", "data/train_gen-0.parquet"],
                "data/train_sft-0.parquet",
            ),
            ("hf://a/b/de/rows.csv", &["de/rows.csv", "en/rows.csv"], "de/rows.csv"),
            ("hf://a/b/*/rows.csv", &["de/rows.csv", "en/rows.csv"], "de/rows.csv en/rows.csv"),
            ("hf://a/b/x.csv", &["de/rows.csv"], "a/b has no rows in x.csv; it has de/rows.csv"),
            ("hf://a/b", &["training.jsonl", "retrained.jsonl"], "training.jsonl"),
        ] {
            assert_eq!(chosen(text, names, false), want, "{text}");
        }
    }
}
