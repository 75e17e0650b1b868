//! What the hub on loopback holds: repositories of commits, and large files by their SHA-256.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use sha1::{Digest as _, Sha1};
use sha2::Sha256;

/// Who may read a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Everyone,
    /// Everyone sees it; only owners of a token that was let in read files.
    Gated,
    /// Only owners of a token see it.
    Private,
}

/// A repository.
#[derive(Clone, Debug)]
pub struct Repository {
    pub access: Access,
    /// Branches and tags, and the commits that they stand for.
    pub refs: BTreeMap<String, String>,
    /// The files of each commit.
    pub commits: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
}

impl Repository {
    fn new(access: Access) -> Repository {
        let mut repository = Repository { access, refs: BTreeMap::new(), commits: BTreeMap::new() };
        repository.commit("main", BTreeMap::new());
        repository
    }

    /// Makes a commit of these files and lets a branch stand for it. Its name follows from the files
    /// and the number of commits before it.
    pub fn commit(&mut self, branch: &str, files: BTreeMap<String, Vec<u8>>) -> String {
        let mut hash = Sha1::new();
        hash.update(self.commits.len().to_le_bytes());
        for (name, bytes) in &files {
            hash.update(name);
            hash.update(bytes);
        }
        let commit = hex(&hash.finalize());
        self.commits.insert(commit.clone(), files);
        self.refs.insert(branch.to_owned(), commit.clone());
        commit
    }

    /// The commit of a branch, a tag or a commit's own name.
    pub fn resolve(&self, revision: &str) -> Option<&str> {
        let commit = self.refs.get(revision).map_or(revision, String::as_str);
        self.commits.get_key_value(commit).map(|(commit, _)| commit.as_str())
    }

    /// The files of a branch.
    pub fn files(&self, revision: &str) -> &BTreeMap<String, Vec<u8>> {
        &self.commits[self.resolve(revision).expect("a commit")]
    }
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub struct Store {
    /// By kind (`models`, `datasets`) and name.
    pub repositories: BTreeMap<(String, String), Repository>,
    /// Names that were others once.
    pub moved: BTreeMap<String, String>,
    /// Large files that were sent, and are in no commit yet.
    pub sent: BTreeMap<String, Vec<u8>>,
    /// The token of the user `tester`, who is let into gated repositories.
    pub token: Option<String>,
    /// A valid token that is not let in.
    pub stranger: Option<String>,
}

impl Store {
    /// Adds a repository with these files on main. Returns the commit.
    pub fn add(&mut self, kind: &str, name: &str, files: &[(&str, &[u8])]) -> String {
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect();
        self.repository(kind, name).commit("main", files)
    }

    /// A repository, made if it is not there.
    pub fn repository(&mut self, kind: &str, name: &str) -> &mut Repository {
        let key = (kind.to_owned(), name.to_owned());
        self.repositories.entry(key).or_insert_with(|| Repository::new(Access::Everyone))
    }

    /// The repositories of a directory: `models/OWNER/NAME/…` and `datasets/OWNER/NAME/…`.
    pub fn read(root: &Path) -> Store {
        let mut store = Store::default();
        for kind in ["models", "datasets"] {
            for owner in folders(&root.join(kind)) {
                for name in folders(&owner) {
                    let id = format!("{}/{}", last(&owner), last(&name));
                    let mut files = BTreeMap::new();
                    read_into(&name, "", &mut files);
                    store.repository(kind, &id).commit("main", files);
                }
            }
        }
        store
    }

    /// A large file, in a commit or sent.
    pub fn large(&self, oid: &str) -> Option<&Vec<u8>> {
        let in_commits = self.repositories.values().flat_map(|repository| repository.commits.values()).flatten();
        let mut large = in_commits.filter(|(name, _)| is_large(name)).map(|(_, bytes)| bytes);
        self.sent.get(oid).or_else(|| large.find(|bytes| sha256(bytes) == oid))
    }
}

fn folders(path: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(path).into_iter().flatten().filter_map(Result::ok);
    let mut found: Vec<_> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    found.sort();
    found
}

fn last(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn read_into(folder: &Path, prefix: &str, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok) {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            read_into(&entry.path(), &format!("{name}/"), files);
        } else {
            files.insert(name, std::fs::read(entry.path()).expect("a file"));
        }
    }
}

/// Whether a file lies in large file storage, by its name, as `.gitattributes` of the hub say.
pub fn is_large(name: &str) -> bool {
    [".safetensors", ".parquet", ".bin", ".gguf"].iter().any(|ending| name.ends_with(ending))
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&<Sha256 as sha2::Digest>::digest(bytes))
}

/// Git's name of a file, or of the pointer to a large one.
pub fn git_name(name: &str, bytes: &[u8]) -> String {
    let blob = |bytes: &[u8]| {
        let mut hash = Sha1::new_with_prefix(format!("blob {}\0", bytes.len()));
        hash.update(bytes);
        hex(&hash.finalize())
    };
    if is_large(name) { blob(pointer(bytes).as_bytes()) } else { blob(bytes) }
}

pub fn pointer(bytes: &[u8]) -> String {
    let (oid, size) = (sha256(bytes), bytes.len());
    format!("version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
