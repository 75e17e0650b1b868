//! One file on its way into the cache. What has arrived stays when the connection is cut, and the
//! rest is asked for by range. The file gets its name when its size and its hash are those of the
//! listing.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use finetune_store::{Disk, Operation, RealDisk, StoreError};
use futures::StreamExt;

use crate::cache::Folder;
use crate::checksum::Checksum;
use crate::error::HubError;
use crate::news::{Listener, News};
use crate::repository::{Listed, Repository};

/// What has arrived of a file, in `blobs/NAME.incomplete`.
struct Partial<'f> {
    file: &'f Listed,
    path: PathBuf,
    disk: File,
    done: u64,
    checksum: Checksum,
}

/// Why a pass over the connection has ended before the file was complete.
enum Ended {
    /// The connection was cut, or nothing came: what is there stays.
    Cut { error: HubError, wait: Option<std::time::Duration> },
    /// Other bytes than those of the listing.
    Differs(String),
    /// Nothing to be done.
    For(HubError),
}

impl<'f> Partial<'f> {
    fn path(folder: &Folder, file: &Listed) -> PathBuf {
        folder.blob(&format!("{}.incomplete", file.oid))
    }

    /// What an earlier process has left, or nothing.
    fn open(folder: &Folder, file: &'f Listed) -> Result<Partial<'f>, StoreError> {
        let path = Partial::path(folder, file);
        let failed = |operation| {
            let path = path.clone();
            move |source: io::Error| StoreError::io(&path, operation, file.size, source)
        };
        RealDisk.create_dir_all(&folder.root().join("blobs")).map_err(failed(Operation::CreateDirectory))?;
        let options = || OpenOptions::new().create(true).read(true).append(true).open(&path);
        let disk = options().map_err(failed(Operation::Write))?;
        let mut partial =
            Partial { file, disk, done: 0, checksum: Checksum::new(file.large, file.size), path: path.clone() };
        partial.read_again().map_err(failed(Operation::Read))?;
        if partial.done > file.size {
            partial.clear()?;
        }
        Ok(partial)
    }

    /// Hashes what is on the disk.
    fn read_again(&mut self) -> io::Result<()> {
        let mut piece = vec![0; 1 << 20];
        loop {
            match self.disk.read(&mut piece)? {
                0 => return Ok(()),
                read => {
                    self.checksum.update(&piece[..read]);
                    self.done += read as u64;
                }
            }
        }
    }

    fn clear(&mut self) -> Result<(), StoreError> {
        self.done = 0;
        self.checksum = Checksum::new(self.file.large, self.file.size);
        self.disk.set_len(0).map_err(|source| StoreError::io(&self.path, Operation::Write, 0, source))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let left = self.file.size - self.done;
        self.disk.write_all(bytes).map_err(|source| StoreError::io(&self.path, Operation::Write, left, source))?;
        self.checksum.update(bytes);
        self.done += bytes.len() as u64;
        Ok(())
    }

    /// Gives the file its name. `None`: its bytes are others than those of the listing.
    fn finish(&mut self, folder: &Folder) -> Result<Option<String>, StoreError> {
        let (name, listed) = self.checksum.clone().names();
        if listed != self.file.oid {
            return Ok(None);
        }
        let failed = |operation| {
            let path = self.path.clone();
            move |source: io::Error| StoreError::io(&path, operation, 0, source)
        };
        self.disk.sync_all().map_err(failed(Operation::Sync))?;
        RealDisk.rename(&self.path, &folder.blob(&name)).map_err(failed(Operation::Rename))?;
        sync(&folder.root().join("blobs"))?;
        Ok(Some(name))
    }
}

fn sync(path: &Path) -> Result<(), StoreError> {
    RealDisk.sync_dir(path).map_err(|source| StoreError::io(path, Operation::Sync, 0, source))
}

/// Bytes of a file that an earlier process has left.
pub(crate) fn left_over(folder: &Folder, file: &Listed) -> u64 {
    let length = std::fs::metadata(Partial::path(folder, file)).map_or(0, |metadata| metadata.len());
    if length > file.size { 0 } else { length }
}

/// Fetches a file. Returns the name of its blob.
pub(crate) async fn fetch(
    repository: &Repository<'_>,
    folder: &Folder,
    commit: &str,
    file: &Listed,
    listener: &Listener<'_>,
) -> Result<String, HubError> {
    let mut partial = Partial::open(folder, file)?;
    let patience = repository.hub.patience;
    let (mut tries, mut pause, mut begun_again) = (0, patience.pause, false);
    loop {
        let before = partial.done;
        let ended = match pass(repository, &mut partial, commit, listener).await {
            Ok(()) => match partial.finish(folder)? {
                Some(name) => {
                    listener(News::Done { name: &file.path });
                    return Ok(name);
                }
                None => Ended::Differs("its hash is another one".to_owned()),
            },
            Err(ended) => ended,
        };
        let (error, wait) = match ended {
            Ended::For(error) => return Err(error),
            Ended::Differs(what) => {
                // What an earlier process has left may be the reason: once more from the start.
                partial.clear()?;
                let error = HubError::Differs { file: file.path.clone(), what };
                if begun_again {
                    return Err(error);
                }
                begun_again = true;
                (error, None)
            }
            Ended::Cut { error, wait } => {
                if partial.done > before {
                    (tries, pause) = (0, patience.pause);
                }
                tries += 1;
                if tries >= patience.tries || wait.is_some_and(|wait| wait > patience.longest_pause) {
                    return Err(gave_up(&partial, error));
                }
                (error, wait)
            }
        };
        let wait = wait.unwrap_or(pause);
        listener(News::Again { name: &file.path, why: &error.to_string(), pause: wait });
        tokio::time::sleep(wait).await;
        pause *= 2;
    }
}

/// The error of a file that does not come. Refusals stay what they are.
fn gave_up(partial: &Partial<'_>, error: HubError) -> HubError {
    match error {
        HubError::Limited { .. } => error,
        error if partial.done == 0 => error,
        error => HubError::Interrupted {
            file: partial.file.path.clone(),
            done: partial.done,
            size: partial.file.size,
            what: error.to_string(),
        },
    }
}

/// One connection: what is missing, or as much of it as comes.
async fn pass(
    repository: &Repository<'_>,
    partial: &mut Partial<'_>,
    commit: &str,
    listener: &Listener<'_>,
) -> Result<(), Ended> {
    let (name, size) = (partial.file.path.as_str(), partial.file.size);
    listener(News::File { name, done: partial.done, size });
    if partial.done == size {
        return Ok(());
    }
    let (coming, mut stream) =
        repository.bytes(partial.file, commit, partial.done).await.map_err(|trouble| match trouble.passes {
            true => Ended::Cut { error: trouble.error, wait: trouble.wait },
            false => Ended::For(trouble.error),
        })?;
    // A hub that does not know ranges sends the file from its start.
    let mut skip = if coming == Some(size) { partial.done } else { 0 };
    loop {
        let piece = match tokio::time::timeout(repository.hub.patience.silence, stream.next()).await {
            Err(_) => return Err(Ended::Cut { error: repository.silent().error, wait: None }),
            Ok(None) => break,
            Ok(Some(Err(error))) => {
                return Err(Ended::Cut { error: repository.trouble(error).error, wait: None });
            }
            Ok(Some(Ok(piece))) => piece,
        };
        let passed = skip.min(piece.len() as u64);
        skip -= passed;
        let piece = &piece[passed as usize..];
        if piece.len() as u64 > size - partial.done {
            return Err(Ended::Differs(format!("more than its {size} bytes came")));
        }
        partial.write(piece).map_err(|error| Ended::For(error.into()))?;
        listener(News::File { name, done: partial.done, size });
    }
    if partial.done < size {
        let what = format!("the connection ended {} bytes early", size - partial.done);
        let error = HubError::Unreachable { endpoint: repository.hub.endpoint.clone(), what };
        return Err(Ended::Cut { error, wait: None });
    }
    Ok(())
}
