//! What can go wrong with files, with the path in every message and what to do next.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use finetune_advice::Advice;

use crate::absent;
use crate::holding::Holding;
use crate::size::human_bytes;
use crate::stand_in::StandIn;

/// What was being done to a path when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reading a file.
    Read,
    /// Listing a directory.
    List,
    /// Asking what lies there.
    Inspect,
    /// Creating a directory.
    CreateDirectory,
    /// Writing a file.
    Write,
    /// Syncing a file or directory.
    Sync,
    /// Giving another name.
    Rename,
    /// Removing a file or directory.
    Remove,
    /// Locking a file.
    Lock,
}

impl Operation {
    /// True for the operations that change the disk. A failure of one of them is a failure of the
    /// disk, a failure to read is one of the input.
    pub fn is_write(self) -> bool {
        !matches!(self, Self::Read | Self::List | Self::Inspect | Self::Lock)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Read => "read",
            Self::List => "list",
            Self::Inspect => "look at",
            Self::CreateDirectory => "create the directory",
            Self::Write => "write",
            Self::Sync => "sync to disk",
            Self::Rename => "rename",
            Self::Remove => "remove",
            Self::Lock => "lock",
        })
    }
}

/// An error of this crate. Each names the path; [`StoreError::hints`] says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The system failed to do something.
    #[error("could not {operation} {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was being done.
        operation: Operation,
        /// What the system says.
        source: io::Error,
    },

    /// The disk, the quota or the largest allowed file size is exhausted.
    #[error("no space left at {}: {} were to be written ({source})", path.display(), human_bytes(*needed_bytes))]
    NoSpace {
        /// The file or directory.
        path: PathBuf,
        /// Bytes that were to be written.
        needed_bytes: u64,
        /// What the system says.
        source: io::Error,
    },

    /// The bytes do not follow their format.
    #[error("{} is malformed: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },

    /// A file was written to while it was in use.
    #[error("{} was changed while it was in use: {what}", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// How it differs from the file that was opened.
        what: String,
    },

    /// A file is not what its manifest or its index says.
    #[error("{}: {file} {what}", path.display())]
    Mismatch {
        /// The directory.
        path: PathBuf,
        /// The name of the file in it.
        file: String,
        /// How it differs, as "has 3 bytes, …".
        what: String,
    },

    /// The name is taken.
    #[error("{} exists already", path.display())]
    AlreadyExists {
        /// The file or directory.
        path: PathBuf,
    },

    /// A directory that was to be replaced was not written by this program.
    #[error("{} was not written by finetune and will not be replaced: {what}", path.display())]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// What shows that it was not.
        what: String,
    },

    /// The directory that was to be replaced is of this program and of another kind than what would
    /// take its place.
    #[error("{} is {} of finetune and will not be replaced by {}", path.display(), with_article(found), with_article(wanted))]
    OtherKind {
        /// The directory.
        path: PathBuf,
        /// Its kind, as its manifest has it.
        found: String,
        /// The kind that would take its place.
        wanted: String,
    },

    /// A file lies where a directory is needed.
    #[error("{} is a file, and a directory is needed", path.display())]
    NotADirectory {
        /// The file or directory.
        path: PathBuf,
    },

    /// The lock file is no file that this program made.
    #[error("{} is no lock of finetune ({what}) and is left as it is", path.display())]
    ForeignLock {
        /// The lock file.
        path: PathBuf,
        /// What lies there.
        what: &'static str,
    },

    /// A link in a directory that came from elsewhere may lead to any file of this machine.
    #[error("{} is a link that leads out of its directory, to {}", path.display(), target.display())]
    LinkOut {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },

    /// A file of a model directory is there in name only, since a download went wrong.
    #[error("{} is {}", path.display(), holding.describe())]
    StandIn {
        /// The file.
        path: PathBuf,
        /// What lies there.
        holding: Holding,
    },

    /// Another process holds the run directory. Process and host are unknown for the instant
    /// between its taking the lock and its writing them down.
    #[error("{} is in use by {}", path.display(), owner(*pid, host.as_deref()))]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// The process that holds it.
        pid: Option<u32>,
        /// The host of that process.
        host: Option<String>,
    },

    /// A name from outside could leave its directory, or means other things on other systems.
    #[error("{name:?} is not a safe file name: {what}")]
    UnsafeName {
        /// The name, cut to 96 characters.
        name: String,
        /// What is wrong with it.
        what: &'static str,
    },

    /// The directory has no model of a format that is read.
    #[error("{} has neither model.safetensors nor model.safetensors.index.json; it has {found}", path.display())]
    NoModel {
        /// The directory.
        path: PathBuf,
        /// The names of what it has.
        found: String,
        /// Whether it has weights as a pickle.
        only_pickle: bool,
    },

    /// A file of weights that the index names is not here.
    #[error("{} is not here; it holds {holds}", path.display())]
    NoShard {
        /// The file.
        path: PathBuf,
        /// What it holds, such as `layers 0 to 3`.
        holds: String,
    },

    /// A file of tensors is something else, by its first bytes.
    #[error("{} is {}, not the file itself", path.display(), what.describe())]
    InItsPlace {
        /// The file.
        path: PathBuf,
        /// What lies there.
        what: StandIn,
    },

    /// What the caller wants written does not fit the format.
    #[error("{} cannot be written: {what}", path.display())]
    CannotWrite {
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        what: String,
    },
}

fn with_article(kind: &str) -> String {
    if kind == "merged" {
        return "a merged model".to_owned();
    }
    let article = if kind.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {kind}")
}

fn owner(pid: Option<u32>, host: Option<&str>) -> String {
    match (pid, host) {
        (Some(pid), Some(host)) => format!("process {pid} on {host}"),
        (Some(pid), None) => format!("process {pid}"),
        _ => "another process".to_string(),
    }
}

/// Where room is from that was not there.
fn room_hint(needed_bytes: u64, source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::FileTooLarge => {
            "raise the limit on the size of a file (`ulimit -f`), or name a disk that has none (FAT's is 4 GiB)"
                .to_string()
        }
        _ => {
            let needed = human_bytes(needed_bytes);
            format!("free at least {needed} there (`df -h` shows what is left), or keep fewer checkpoints")
        }
    }
}

impl StoreError {
    /// [`StoreError::NoSpace`] if the disk is full or a file must not get larger, otherwise [`StoreError::Io`].
    pub fn io(path: &Path, operation: Operation, needed_bytes: u64, source: io::Error) -> Self {
        let path = path.to_path_buf();
        let is_full = matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
        );
        if operation.is_write() && is_full {
            Self::NoSpace { path, needed_bytes, source }
        } else {
            Self::Io { path, operation, source }
        }
    }

    pub(crate) fn reading(path: &Path, source: io::Error) -> Self {
        Self::io(path, Operation::Read, 0, source)
    }

    pub(crate) fn malformed(path: &Path, what: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_path_buf(), what: what.into() }
    }

    pub(crate) fn mismatch(path: &Path, file: &str, what: impl Into<String>) -> Self {
        Self::Mismatch { path: path.to_path_buf(), file: file.to_string(), what: what.into() }
    }
}

impl Advice for StoreError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::NoSpace { needed_bytes, source, .. } => vec![
                room_hint(*needed_bytes, source),
                "nothing that was complete before has been touched".to_string(),
            ],
            Self::Io { operation, source, .. } => match source.kind() {
                io::ErrorKind::NotFound => vec!["check the path".to_string()],
                io::ErrorKind::PermissionDenied => {
                    vec!["check who owns the path and its permissions (`ls -ld`)".to_string()]
                }
                io::ErrorKind::ReadOnlyFilesystem => {
                    vec!["that disk can only be read: name another place, or mount it for writing".to_string()]
                }
                io::ErrorKind::NotADirectory => {
                    vec!["something on the way is a file, not a directory: name another place".to_string()]
                }
                _ if operation.is_write() => vec![
                    "look for disk errors in the system log (`dmesg`, Console.app)".to_string(),
                    "nothing that was complete before has been touched".to_string(),
                ],
                _ => Vec::new(),
            },
            Self::Malformed { .. } => {
                vec!["the file is damaged or of another format: fetch or write it again".to_string()]
            }
            Self::Changed { .. } => vec![
                "put the file back as it was; a run then goes on from its last checkpoint with `--resume`, which refuses other weights".to_string(),
                "a new version of a model belongs in a directory of its own".to_string(),
            ],
            Self::Mismatch { .. } => vec![
                "the file was changed, cut or replaced after it was written: restore it, or use another checkpoint or download".to_string(),
            ],
            Self::AlreadyExists { .. } => {
                vec!["choose another name, or move the existing one away".to_string()]
            }
            Self::NotOurs { .. } | Self::OtherKind { .. } => {
                vec!["choose a new, empty or absent directory".to_string()]
            }
            Self::NotADirectory { .. } => vec!["name a directory, or a name that nothing has yet".to_string()],
            Self::ForeignLock { .. } => {
                vec!["move it away if nobody needs it, or use another run directory".to_string()]
            }
            Self::LinkOut { .. } => vec![
                "links may lead inside the directory or into the Hugging Face cache: put the file itself there, or name the directory that it lies in".to_string(),
            ],
            Self::StandIn { path, holding } => holding.remedy(path),
            Self::Locked { pid: Some(pid), .. } => {
                vec![format!("wait for it to end, or stop it with `kill {pid}`, or use another run directory")]
            }
            Self::Locked { .. } => {
                vec!["wait for it to end, or use another run directory".to_string()]
            }
            Self::UnsafeName { .. } => vec![
                "use 1 to 96 letters, digits, '.', '_' or '-', not starting with '.'".to_string(),
            ],
            Self::NoModel { found, only_pickle, .. } => vec![without_weights(found, *only_pickle).to_string()],
            Self::NoShard { path, .. } => vec![match absent::fetched_by(path) {
                Some(id) => format!("with a network, `HF_HUB_OFFLINE=0 finetune download {id}` fetches what is missing"),
                None => "get it from where the other files are from, or take another directory of the model".to_string(),
            }],
            Self::InItsPlace { path, what } => vec![what.hint(path)],
            Self::CannotWrite { .. } => Vec::new(),
        }
    }
}

/// What to do about a directory without weights that are read. `found`: what it has.
fn without_weights(found: &str, only_pickle: bool) -> &'static str {
    if only_pickle {
        "pytorch_model.bin is a pickle, which can run code when it is read, so it is not read: get the safetensors revision of this model, or convert it"
    } else if found.contains("-of-") {
        "its parts are here without their index: fetch model.safetensors.index.json from where they are from"
    } else {
        "give the directory that holds the model's safetensors files"
    }
}

impl StoreError {
    /// True if writing failed for want of space or because of the disk.
    pub fn is_disk(&self) -> bool {
        match self {
            Self::NoSpace { .. } => true,
            // There is no memory to read a file into.
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::OutOfMemory => true,
            Self::Io { operation, .. } => operation.is_write(),
            _ => false,
        }
    }
}
