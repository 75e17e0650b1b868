//! Models and adapters that are in the Hugging Face cache already. Nothing is downloaded.
//!
//! The cache is looked for where `huggingface_hub/constants.py` looks for it. It is laid out as
//! `file_download.py` of the same package writes it: `models--<owner>--<name>/refs/<revision>`
//! holds a commit, `snapshots/<commit>` its files.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::names::SafeName;

/// The id of a model or adapter on the hub: `owner/name` or `name`, or with a revision
/// `owner/name@revision`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId {
    /// `owner/name` or `name`.
    pub name: String,
    /// A branch, a tag or a commit. `None`: main.
    pub revision: Option<String>,
}

impl HubId {
    /// Reads an id. `None`: the text cannot be one.
    pub fn parse(text: &str) -> Option<HubId> {
        let (name, revision) = match text.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (text, None),
        };
        let parts: Vec<&str> = name.split('/').collect();
        let safe = |part: &&str| SafeName::parse(part).is_ok() && !part.starts_with('-') && !part.contains("--");
        let revision_is_safe = revision.is_none_or(|text| text.split('/').all(|part| SafeName::parse(part).is_ok()));
        (parts.len() <= 2 && parts.iter().all(safe) && revision_is_safe)
            .then(|| HubId { name: name.to_owned(), revision: revision.map(str::to_owned) })
    }

    /// The directory of its files in the cache, if it is there.
    pub fn snapshot(&self) -> Option<PathBuf> {
        self.snapshot_in(&hub_cache()?)
    }

    /// The same in a cache that the caller names.
    pub fn snapshot_in(&self, cache: &Path) -> Option<PathBuf> {
        let repository = cache.join(format!("models--{}", self.name.replace('/', "--")));
        let snapshots = repository.join("snapshots");
        let has_config = |path: &PathBuf| {
            ["config.json", "adapter_config.json"].iter().any(|name| path.join(name).is_file()) || has_gguf(path)
        };
        let revision = self.revision.as_deref().unwrap_or("main");
        let commit = std::fs::read_to_string(repository.join("refs").join(revision)).ok();
        if let Some(commit) = commit.as_deref().and_then(|commit| SafeName::parse(commit.trim()).ok()) {
            let found = Some(snapshots.join(commit.as_str())).filter(has_config);
            if found.is_some() || self.revision.is_some() {
                return found;
            }
        }
        match &self.revision {
            // A commit, in full or its first digits.
            Some(revision) => {
                let is_commit = |path: &PathBuf| {
                    let name = path.file_name().unwrap_or_default().to_string_lossy();
                    name == revision.as_str() || (revision.len() >= 7 && name.starts_with(revision.as_str()))
                };
                let mut found = all(&snapshots).into_iter().filter(is_commit).filter(has_config);
                let first = found.next()?;
                found.next().is_none().then_some(first)
            }
            None => newest(all(&snapshots).into_iter().filter(has_config).collect()),
        }
    }
}

/// The directory of a model or adapter (`owner/name`, `owner/name@revision`) in the local cache.
pub fn cached_snapshot(id: &str) -> Option<PathBuf> {
    HubId::parse(id)?.snapshot()
}

/// Where the cache is. `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME` and the
/// home directory are asked, in this order.
pub fn hub_cache() -> Option<PathBuf> {
    cache_of(&|name| std::env::var(name).ok())
}

fn cache_of(variable: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let home = || variable("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    let path = |name: &str| {
        let text = variable(name).filter(|text| !text.is_empty())?;
        match text.strip_prefix('~') {
            Some("") => home(),
            Some(rest) if rest.starts_with('/') => home().map(|home| home.join(&rest[1..])),
            _ => Some(PathBuf::from(text)),
        }
    };
    path("HF_HUB_CACHE")
        .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| path("HF_HOME").map(|hub| hub.join("hub")))
        .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
        .or_else(|| home().map(|home| home.join(".cache/huggingface/hub")))
}

/// Every snapshot of a model, by name.
fn all(snapshots: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(snapshots).into_iter().flatten().filter_map(Result::ok);
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    found.sort();
    found
}

/// The snapshot to take if no ref says which is meant: the only one, or of several the newest with
/// all its weights.
fn newest(mut found: Vec<PathBuf>) -> Option<PathBuf> {
    if found.len() > 1 {
        found.retain(|path| has_all_weights(path));
    }
    let time = |path: &PathBuf| path.metadata().and_then(|found| found.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    found.into_iter().max_by_key(time)
}

/// Whether a snapshot has weights, and every file that its index names.
pub fn has_all_weights(snapshot: &Path) -> bool {
    let has = |name: &str| snapshot.join(name).is_file();
    if let Ok(text) = std::fs::read_to_string(snapshot.join("model.safetensors.index.json")) {
        let index: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let shards = index["weight_map"].as_object();
        return shards.is_some_and(|map| map.values().filter_map(|name| name.as_str()).all(has));
    }
    has("model.safetensors") || has("adapter_model.safetensors") || has_gguf(snapshot)
}

/// Whether a directory has a GGUF file, which is a model with config and tokenizer.
pub fn has_gguf(directory: &Path) -> bool {
    let entries = std::fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
    entries
        .map(|entry| entry.path())
        .any(|path| path.extension().is_some_and(|ending| ending == "gguf") && path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (variables, the cache)
    #[test]
    fn the_cache_is_where_huggingface_hub_has_it() {
        #[expect(clippy::type_complexity, reason = "a table of cases")]
        let cases: [(&[(&str, &str)], Option<&str>); 9] = [
            (&[("HOME", "/h")], Some("/h/.cache/huggingface/hub")),
            (&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")], Some("/x/huggingface/hub")),
            (&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/f")], Some("/f/hub")),
            (&[("HF_HOME", "/f"), ("HUGGINGFACE_HUB_CACHE", "/g")], Some("/g")),
            (&[("HF_HUB_CACHE", "/c"), ("HUGGINGFACE_HUB_CACHE", "/g")], Some("/c")),
            (&[("HOME", "/h"), ("HF_HUB_CACHE", "")], Some("/h/.cache/huggingface/hub")),
            (&[("HOME", "/h"), ("HF_HOME", "~/models")], Some("/h/models/hub")),
            (&[("HOME", "/h"), ("HF_HUB_CACHE", "~")], Some("/h")),
            (&[], None),
        ];
        for (variables, want) in cases {
            let variable =
                |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
            assert_eq!(cache_of(&variable), want.map(PathBuf::from), "{variables:?}");
        }
    }

    #[test]
    fn ids_are_told_from_other_texts() {
        for text in ["gpt2", "acme/tiny", "acme/tiny-1.5@main", "acme/tiny@refs/pr/3", "acme/tiny@0123abc"] {
            assert!(HubId::parse(text).is_some(), "{text}");
        }
        for text in
            ["", "/", "a/b/c", "../x", "./x", "a/..", "acme/ti ny", "acme/tiny@", "acme/tiny@../x", "https://x", "-a/b"]
        {
            assert!(HubId::parse(text).is_none(), "{text}");
        }
        let id = HubId::parse("acme/tiny@v1").unwrap();
        assert_eq!((id.name.as_str(), id.revision.as_deref()), ("acme/tiny", Some("v1")));
    }

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        crate::replace_file(&crate::RealDisk, path, text.as_bytes()).unwrap();
    }

    /// (id, the snapshot that is found)
    #[test]
    fn a_snapshot_is_found_by_ref_commit_or_by_being_the_only_one() {
        let directory = tempfile::tempdir().unwrap();
        let cache = directory.path();
        let snapshot = |repository: &str, commit: &str| cache.join(repository).join("snapshots").join(commit);
        for (repository, commit, files) in [
            ("models--acme--one", "aaaa", &["config.json"][..]),
            ("models--acme--two", "1111111aaa", &["config.json", "model.safetensors"]),
            ("models--acme--two", "2222222bbb", &["config.json"]),
            ("models--acme--ref", "cccc", &["config.json", "model.safetensors"]),
            ("models--acme--ref", "dddd", &["config.json", "model.safetensors"]),
            ("models--acme--adapter", "eeee", &["adapter_config.json", "adapter_model.safetensors"]),
            ("models--gpt2", "ffff", &["config.json"]),
            ("models--acme--empty", "9999", &["README.md"]),
            ("models--acme--tiny-GGUF", "8888", &["tiny-q4_0.gguf"]),
        ] {
            for name in files {
                write(&snapshot(repository, commit).join(name), "{}");
            }
        }
        write(&cache.join("models--acme--ref/refs/main"), "cccc\n");
        write(&cache.join("models--acme--ref/refs/v2"), "dddd");
        write(&cache.join("models--acme--ref/refs/bad"), "../../x");
        for (id, want) in [
            ("acme/one", Some(("models--acme--one", "aaaa"))),
            ("acme/one@aaaa", Some(("models--acme--one", "aaaa"))),
            // The newer one is not complete.
            ("acme/two", Some(("models--acme--two", "1111111aaa"))),
            ("acme/two@2222222", Some(("models--acme--two", "2222222bbb"))),
            ("acme/two@222", None),
            ("acme/ref", Some(("models--acme--ref", "cccc"))),
            ("acme/ref@v2", Some(("models--acme--ref", "dddd"))),
            ("acme/ref@bad", None),
            ("acme/ref@v3", None),
            ("acme/adapter", Some(("models--acme--adapter", "eeee"))),
            ("gpt2", Some(("models--gpt2", "ffff"))),
            ("acme/empty", None),
            ("acme/tiny-GGUF", Some(("models--acme--tiny-GGUF", "8888"))),
            ("acme/none", None),
        ] {
            let found = HubId::parse(id).unwrap().snapshot_in(cache);
            assert_eq!(found, want.map(|(repository, commit)| snapshot(repository, commit)), "{id}");
        }
    }
}
