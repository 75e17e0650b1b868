//! One process fetches a repository at a time. The others wait, and find it in the cache then.

use std::fs::{File, OpenOptions, TryLockError};
use std::time::{Duration, Instant};

use finetune_store::{Disk, Operation, RealDisk, StoreError};

use crate::cache::Folder;
use crate::error::HubError;
use crate::hub::Patience;
use crate::news::{Listener, News};

/// Time between two tries to get the lock.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The right to fetch a repository. It ends with this value, or with the process.
pub(crate) struct Held {
    /// `None` on a file system without locks: then two processes may fetch the same bytes twice,
    /// and each blob is still complete when it gets its name.
    _file: Option<File>,
}

/// Waits while another process fetches the repository and bytes come.
pub(crate) async fn hold(
    folder: &Folder,
    id: &str,
    patience: Patience,
    listener: &Listener<'_>,
) -> Result<Held, HubError> {
    let path = folder.lock();
    let failed = |operation| move |source| StoreError::io(path, operation, 0, source);
    if let Some(parent) = path.parent() {
        RealDisk.create_dir_all(parent).map_err(failed(Operation::CreateDirectory))?;
    }
    let file = OpenOptions::new().create(true).append(true).open(path).map_err(failed(Operation::Write))?;
    let (mut waited, mut last) = (false, (bytes(folder), Instant::now()));
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Held { _file: Some(file) }),
            Err(TryLockError::Error(_)) => return Ok(Held { _file: None }),
            Err(TryLockError::WouldBlock) => {}
        }
        if !waited {
            listener(News::Waiting { id });
            waited = true;
        }
        let now = bytes(folder);
        if now != last.0 {
            last = (now, Instant::now());
        }
        if last.1.elapsed() > patience.held {
            return Err(HubError::Held { id: id.to_owned(), waited: patience.held });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Bytes of a repository that are on the disk, complete or not.
fn bytes(folder: &Folder) -> u64 {
    let entries = std::fs::read_dir(folder.root().join("blobs")).into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
}
