//! The Hugging Face cache on disk, as `huggingface_hub/file_download.py` lays it out:
//! `models--OWNER--NAME/blobs/ETAG` has bytes, `snapshots/COMMIT/PATH` are links to them,
//! `refs/REVISION` holds a commit. An ETag is the SHA-256 of a large file, and git's SHA-1 of
//! another.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use finetune_store::{Disk, Operation, RealDisk, SafeName, StoreError, replace_file};

use crate::checksum::pointer_name;
use crate::repository::{Kind, Listed};

/// The folder of a repository in the cache.
pub(crate) struct Folder {
    root: PathBuf,
    lock: PathBuf,
}

/// The blobs of a repository by their names in a listing: name of the blob, and bytes.
pub(crate) type Blobs = HashMap<String, (String, u64)>;

impl Folder {
    pub(crate) fn new(cache: &Path, kind: Kind, id: &str) -> Folder {
        let kind = match kind {
            Kind::Model => "models",
            Kind::Dataset => "datasets",
        };
        let name = format!("{kind}--{}", id.replace('/', "--"));
        Folder { lock: cache.join(".locks").join(&name).join("finetune.lock"), root: cache.join(name) }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The file that a process locks while it fetches.
    pub(crate) fn lock(&self) -> &Path {
        &self.lock
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub(crate) fn blob(&self, name: &str) -> PathBuf {
        self.root.join("blobs").join(name)
    }

    /// The commit that a branch or tag stood for when it was last asked.
    pub(crate) fn reference(&self, revision: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        SafeName::parse(text.trim()).ok().map(|name| name.as_str().to_owned())
    }

    /// Records what a branch or tag stands for. Blobs and links are made to last first.
    pub(crate) fn set_reference(&self, revision: &str, commit: &str) -> Result<(), StoreError> {
        let path = self.root.join("refs").join(revision);
        replace_file(&RealDisk, &path, commit.as_bytes())
    }

    /// The blobs that are here. Their names say what is in them; a blob gets its name when it is
    /// complete and checked.
    pub(crate) fn blobs(&self) -> Blobs {
        let entries = std::fs::read_dir(self.root.join("blobs")).into_iter().flatten().filter_map(Result::ok);
        let mut blobs = Blobs::new();
        for entry in entries {
            let (Ok(name), Ok(metadata)) = (entry.file_name().into_string(), std::fs::metadata(entry.path())) else {
                continue;
            };
            if !name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                continue;
            }
            let listed = match name.len() {
                64 => pointer_name(&name, metadata.len()),
                40 => name.clone(),
                _ => continue,
            };
            blobs.insert(listed, (name, metadata.len()));
        }
        blobs
    }

    /// Whether a snapshot has a file already. A link says by its target which bytes it has; a plain
    /// file, made where links are not to be had, only how many.
    pub(crate) fn has(&self, commit: &str, file: &Listed, blobs: &Blobs) -> bool {
        let path = self.snapshot(commit).join(&file.path);
        let Ok(metadata) = std::fs::metadata(&path) else { return false };
        if metadata.len() != file.size {
            return false;
        }
        match std::fs::read_link(&path) {
            Ok(target) => {
                let blob = blobs.get(&file.oid).map(|(name, _)| name.as_str());
                target.file_name().and_then(|name| name.to_str()) == blob
            }
            Err(_) => true,
        }
    }

    /// Gives a blob its name in a snapshot.
    pub(crate) fn link(&self, commit: &str, file: &Listed, blob: &str) -> Result<(), StoreError> {
        let path = self.snapshot(commit).join(&file.path);
        let failed = |operation| {
            let path = path.clone();
            move |source: io::Error| StoreError::io(&path, operation, 0, source)
        };
        if let Some(parent) = path.parent() {
            RealDisk.create_dir_all(parent).map_err(failed(Operation::CreateDirectory))?;
        }
        if path.symlink_metadata().is_ok() {
            RealDisk.remove_file(&path).map_err(failed(Operation::Remove))?;
        }
        let up = "../".repeat(2 + file.path.matches('/').count());
        match std::os::unix::fs::symlink(format!("{up}blobs/{blob}"), &path) {
            Ok(()) => Ok(()),
            // A disk without links: the file itself, as huggingface_hub does it.
            Err(_) => RealDisk.rename(&self.blob(blob), &path).map_err(failed(Operation::Rename)),
        }
    }

    /// The files of a snapshot, sorted.
    pub(crate) fn files(&self, commit: &str) -> Vec<String> {
        let root = self.snapshot(commit);
        let (mut files, mut folders) = (Vec::new(), vec![root.clone()]);
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok) {
                let path = entry.path();
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(path);
                } else if path.is_file() {
                    files.extend(path.strip_prefix(&root).ok().and_then(|path| path.to_str()).map(str::to_owned));
                }
            }
        }
        files.sort();
        files
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_is_found_by_its_name_in_a_listing() {
        let directory = tempfile::tempdir().expect("a directory");
        let folder = Folder::new(directory.path(), Kind::Model, "acme/tiny");
        let large = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        let small = "ce013625030ba8dba906f756967f9e9ca394464a";
        for name in [large, small, "0123.incomplete"] {
            replace_file(&RealDisk, &folder.blob(name), b"hello\n").expect("a file");
        }
        let blobs = folder.blobs();
        assert_eq!(blobs.len(), 2);
        let listed =
            |oid: &str, path: &str, size| Listed { path: path.to_owned(), size, oid: oid.to_owned(), large: true };
        let file = listed(&pointer_name(large, 6), "deep/er/model.safetensors", 6);
        assert_eq!(blobs[&file.oid].0, large);
        assert!(!folder.has("c0ffee", &file, &blobs));
        folder.link("c0ffee", &file, large).expect("a link");
        assert!(folder.has("c0ffee", &file, &blobs));
        assert_eq!(std::fs::read(folder.snapshot("c0ffee").join(&file.path)).expect("the file"), b"hello\n");
        for other in [listed(small, &file.path, 6), listed(&file.oid, &file.path, 7), listed(&file.oid, "other", 6)] {
            assert!(!folder.has("c0ffee", &other, &blobs), "{other:?}");
        }
        assert_eq!(folder.files("c0ffee"), ["deep/er/model.safetensors"]);
    }
}
