//! A snapshot: the wanted files of one commit, in the cache.

use std::path::{Path, PathBuf};

use finetune_store::{HubId, SafeName, StoreError, has_all_weights, has_gguf, has_header, missing_shards, no_shard};
use futures::StreamExt;

use crate::cache::Folder;
use crate::error::HubError;
use crate::file::{fetch, left_over};
use crate::headers::bring_headers;
use crate::hub::Hub;
use crate::lock::hold;
use crate::news::{Listener, News};
use crate::repository::{Kind, Listed, Repository};
use crate::selection::{Need, select};

/// Files that are fetched at a time.
pub(crate) const AT_A_TIME: usize = 4;

/// Largest index of weights that is read, in bytes.
const LARGEST_INDEX: u64 = 64 << 20;

/// Files of one commit, in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where they are.
    pub directory: PathBuf,
    /// The commit.
    pub commit: String,
    /// The commit that the same branch or tag stood for before, if it was another one.
    pub moved_from: Option<String>,
    /// Bytes that came over the network.
    pub fetched: u64,
    /// The wanted files, relative to the directory. Empty if the hub was not asked.
    pub files: Vec<String>,
}

impl Snapshot {
    fn cached(directory: PathBuf) -> Snapshot {
        let commit = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Snapshot { directory, commit, moved_from: None, fetched: 0, files: Vec::new() }
    }
}

impl Hub {
    /// A model or adapter that is in the cache with all that is needed. Nothing is asked of the
    /// hub, so a branch is what it was when it was fetched.
    pub fn cached(&self, id: &HubId, need: &Need) -> Option<Snapshot> {
        let directory = id.snapshot_in(&self.cache)?;
        let has = |names: &[&str]| names.iter().any(|name| directory.join(name).is_file());
        let complete = match need {
            Need::Model => is_complete(&directory) && (has_text(&directory) || has(&["adapter_config.json"])),
            Need::Text => has_text(&directory),
            Need::Headers => {
                // Without an index all weights are in one file, or there are none yet.
                let has_index = has(&["model.safetensors.index.json"]);
                let is_known = |shard: &String| has_header(&directory, shard);
                let has_headers = has_index && missing_shards(&directory).iter().all(is_known);
                has_text(&directory) && (has_headers || is_complete(&directory))
            }
            Need::Shards(names) => names.iter().all(|name| has(&[name.as_str()])),
            Need::Files(_) | Need::All => false,
        };
        complete.then(|| Snapshot::cached(directory))
    }

    /// A model or adapter: from the cache, or from the hub if something is missing. `commit`: the
    /// one to take, if it is known; the id's revision is recorded as standing for it.
    ///
    /// # Errors
    /// As [`Hub::download`]. [`HubError::Offline`] if something is missing and the network is
    /// forbidden.
    pub fn resolve(
        &self,
        id: &HubId,
        need: &Need,
        commit: Option<&str>,
        listener: &Listener<'_>,
    ) -> Result<Snapshot, HubError> {
        let exact = match commit {
            Some(commit) => HubId { name: id.name.clone(), revision: Some(commit.to_owned()) },
            None => id.clone(),
        };
        if let Some(snapshot) = self.cached(&exact, need) {
            return Ok(snapshot);
        }
        // Whoever reads the directory says what it lacks, as of one without a hub.
        let here = exact.snapshot_in(&self.cache);
        match (self.fetched(Kind::Model, id, need, commit, listener), here) {
            // Named here, before another file is read in vain.
            (Err(HubError::Offline { .. }), Some(directory))
                if matches!(need, Need::Model | Need::Shards(_)) && !missing_shards(&directory).is_empty() =>
            {
                Err(HubError::Disk(first_missing(&directory, need)))
            }
            (Err(HubError::Offline { .. }), Some(directory)) => Ok(Snapshot::cached(directory)),
            (Err(error @ (HubError::Unreachable { .. } | HubError::Answer { .. })), Some(directory))
                if is_complete(&directory) =>
            {
                listener(News::Note(&format!("{error}; the cache has {} without a tokenizer", id.name)));
                Ok(Snapshot::cached(directory))
            }
            (outcome, _) => outcome,
        }
    }

    /// The commit that [`Hub::resolve`] would take.
    ///
    /// # Errors
    /// If the cache does not say it and the hub cannot be asked.
    pub fn pin(&self, id: &HubId, need: &Need, listener: &Listener<'_>) -> Result<String, HubError> {
        if let Some(snapshot) = self.cached(id, need) {
            return Ok(snapshot.commit);
        }
        if let Some(commit) = id.revision.as_deref().filter(|revision| is_commit(revision)) {
            return Ok(commit.to_owned());
        }
        let connection = match self.connection(&id.name, &id.name) {
            Err(error) => return id.snapshot_in(&self.cache).map(|path| Snapshot::cached(path).commit).ok_or(error),
            Ok(connection) => connection,
        };
        let repository = self.repository(connection, Kind::Model, id);
        connection.block_on(repository.commit(id.revision.as_deref().unwrap_or("main"), listener))
    }

    /// The wanted files of a repository as it is now. What is in the cache already is not fetched
    /// again.
    ///
    /// # Errors
    /// If the hub cannot be reached, has no such repository or does not give it, sends other bytes
    /// than it lists, or if the disk is full.
    pub fn download(&self, kind: Kind, id: &HubId, need: &Need, listener: &Listener<'_>) -> Result<Snapshot, HubError> {
        self.fetched(kind, id, need, None, listener)
    }

    fn fetched(
        &self,
        kind: Kind,
        id: &HubId,
        need: &Need,
        commit: Option<&str>,
        listener: &Listener<'_>,
    ) -> Result<Snapshot, HubError> {
        let revision = id.revision.as_deref();
        let full = revision.map_or(id.name.clone(), |revision| format!("{}@{revision}", id.name));
        let connection = self.connection(&full, &full)?;
        let repository = self.repository(connection, kind, id);
        connection.block_on(async {
            let revision = revision.unwrap_or("main");
            let known = commit.is_some();
            let commit = match commit {
                Some(commit) => commit.to_owned(),
                None if is_commit(revision) => revision.to_owned(),
                None => repository.commit(revision, listener).await?,
            };
            let listing = repository.listing(&commit, listener).await?;
            let wanted = select(need, id, &listing)?;
            let fetched = bring(&repository, &commit, &wanted, listener).await?;
            let folder = Folder::new(&self.cache, kind, &id.name);
            let rest = unnamed_shards(&folder.snapshot(&commit), &listing, need)?;
            let more = bring(&repository, &commit, &rest, listener).await?;
            if *need == Need::Headers {
                bring_headers(&repository, &commit, &listing, listener).await?;
            }
            let before = folder.reference(revision).filter(|before| *before != commit && !is_commit(revision));
            // A commit that others have named is not asked of the hub: the branch may be elsewhere.
            if !is_commit(revision) && (!known || folder.reference(revision).is_none()) {
                folder.set_reference(revision, &commit)?;
            }
            let files = wanted.iter().chain(&rest).map(|file| file.path.clone()).collect();
            let directory = folder.snapshot(&commit);
            Ok(Snapshot { directory, commit, moved_from: before, fetched: fetched + more, files })
        })
    }
}

/// Brings files of a commit into the cache, at most [`AT_A_TIME`] at once. Returns the bytes that
/// came over the network.
pub(crate) async fn bring(
    repository: &Repository<'_>,
    commit: &str,
    wanted: &[Listed],
    listener: &Listener<'_>,
) -> Result<u64, HubError> {
    if wanted.is_empty() {
        return Ok(0);
    }
    let folder = Folder::new(&repository.hub.cache, repository.kind, &repository.id);
    let _held = hold(&folder, &repository.id, repository.hub.patience, listener).await?;
    let blobs = folder.blobs();
    // Files with the same bytes are fetched once.
    let mut missing: Vec<Vec<&Listed>> = Vec::new();
    for file in wanted.iter().filter(|file| !folder.has(commit, file, &blobs)) {
        if let Some((blob, _)) = blobs.get(&file.oid).filter(|(_, size)| *size == file.size) {
            folder.link(commit, file, blob)?;
        } else if let Some(same) = missing.iter_mut().find(|same| same[0].oid == file.oid) {
            same.push(file);
        } else {
            missing.push(vec![file]);
        }
    }
    if missing.is_empty() {
        return Ok(0);
    }
    let bytes: u64 = missing.iter().map(|same| same[0].size).sum();
    let present: u64 = missing.iter().map(|same| left_over(&folder, same[0])).sum();
    room_for(&folder, bytes - present)?;
    listener(News::Begin { id: &repository.id, files: missing.len(), bytes, present });
    let folder = &folder;
    let mut coming = futures::stream::iter(missing)
        .map(|same| async move {
            let blob = fetch(repository, folder, commit, same[0], listener).await?;
            same.into_iter().try_for_each(|file| folder.link(commit, file, &blob)).map_err(HubError::from)
        })
        .buffer_unordered(AT_A_TIME);
    while let Some(outcome) = coming.next().await {
        outcome?;
    }
    listener(News::End);
    Ok(bytes - present)
}

/// The error for the first file of weights that is needed and not here.
fn first_missing(directory: &Path, need: &Need) -> StoreError {
    let missing = missing_shards(directory);
    let wanted = |shard: &&String| match need {
        Need::Shards(names) => names.contains(shard),
        _ => true,
    };
    no_shard(directory, missing.iter().find(wanted).or(missing.first()).map_or("", String::as_str))
}

/// Refuses to begin what the disk has no room for.
fn room_for(folder: &Folder, bytes: u64) -> Result<(), HubError> {
    let there = folder.root().ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("."));
    let Ok(status) = rustix::fs::statvfs(there) else { return Ok(()) };
    let free = status.f_bavail.saturating_mul(status.f_frsize);
    if free >= bytes {
        return Ok(());
    }
    let source = std::io::Error::from(std::io::ErrorKind::StorageFull);
    Err(HubError::Disk(StoreError::NoSpace { path: folder.root().to_owned(), needed_bytes: bytes, source }))
}

/// Shards that the index names and that have other names than usual.
fn unnamed_shards(snapshot: &Path, listing: &[Listed], need: &Need) -> Result<Vec<Listed>, HubError> {
    let index = snapshot.join("model.safetensors.index.json");
    if *need != Need::Model || !std::fs::metadata(&index).is_ok_and(|metadata| metadata.len() < LARGEST_INDEX) {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(&index).unwrap_or_default();
    let index: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let names = index["weight_map"].as_object().into_iter().flat_map(|map| map.values());
    let mut names: Vec<&str> = names.filter_map(|name| name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let missing = |name: &&str| SafeName::parse(name).is_ok() && !snapshot.join(name).exists();
    let listed = |name: &str| listing.iter().find(|file| file.path == name).cloned();
    Ok(names.into_iter().filter(missing).filter_map(listed).collect())
}

/// Whether a revision is a commit: nothing else can come to stand for it.
pub(crate) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether all weights of a model, or the tensors of an adapter, are there.
fn is_complete(directory: &Path) -> bool {
    has_all_weights(directory) || directory.join("adapters.safetensors").is_file()
}

fn has_text(directory: &Path) -> bool {
    let has = |names: &[&str]| names.iter().any(|name| directory.join(name).is_file());
    // A GGUF file has config and tokenizer in it.
    let is_gguf = has_gguf(directory) && !has(&["model.safetensors", "model.safetensors.index.json"]);
    if is_gguf {
        return true;
    }
    has(&["config.json"])
        && has(&[
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
            "spiece.model",
            "tekken.json",
            "tokenizer_config.json",
        ])
}
