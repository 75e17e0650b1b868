//! The headers of files of weights, without the files: names, number types and shapes of their tensors. They are
//! asked for by range, and kept apart from the snapshot, where only whole files may lie.
//!
//! A header has no hash of its own on the hub. So nothing but sizes is taken from it, and the ranks compare it with
//! that of the whole file, which one of them has.

use finetune_store::{has_header, header_bytes, keep_header, missing_shards};
use futures::{StreamExt, TryStreamExt};

use crate::cache::Folder;
use crate::download::AT_A_TIME;
use crate::error::HubError;
use crate::lock::hold;
use crate::news::{Listener, News};
use crate::repository::{Listed, Repository};

/// Bytes that are asked for first: more than most headers have.
const MOST_HEADERS: u64 = 256 << 10;

/// Keeps the headers of all files of weights that the snapshot's index names and that are not here.
pub(crate) async fn bring_headers(
    repository: &Repository<'_>,
    commit: &str,
    listing: &[Listed],
    listener: &Listener<'_>,
) -> Result<(), HubError> {
    let folder = Folder::new(&repository.hub.cache, repository.kind, &repository.id);
    let snapshot = &folder.snapshot(commit);
    let missing = || missing_shards(snapshot).into_iter().filter(|shard| !has_header(snapshot, shard));
    if missing().next().is_none() {
        return Ok(());
    }
    let _held = hold(&folder, &repository.id, repository.hub.patience, listener).await?;
    // Another process may have brought some meanwhile. A file that the hub does not list is named when it is read.
    let listed = |shard: String| listing.iter().find(|file| file.path == shard);
    let files: Vec<&Listed> = missing().filter_map(listed).collect();
    let note = format!("{}: the headers of {} files of weights, which say who needs which", repository.id, files.len());
    listener(News::Note(&note));
    let coming = futures::stream::iter(files).map(|file| async move {
        let start = header_of(repository, commit, file, listener).await?;
        keep_header(snapshot, &file.path, &start, file.size).map_err(HubError::from)
    });
    coming.buffer_unordered(AT_A_TIME).try_collect::<()>().await
}

/// The first bytes of a file of weights, its header at least.
async fn header_of(
    repository: &Repository<'_>,
    commit: &str,
    file: &Listed,
    listener: &Listener<'_>,
) -> Result<Vec<u8>, HubError> {
    let start = repository.start(file, commit, MOST_HEADERS, listener).await?;
    let differs = |what: String| HubError::Differs { file: file.path.clone(), what };
    let header = header_bytes(&start, file.size).map_err(differs)?;
    match header > start.len() as u64 {
        true => repository.start(file, commit, header, listener).await,
        false => Ok(start),
    }
}
