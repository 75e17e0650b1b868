//! Brings files to other hosts and back. A file that is there already with the same content is not
//! sent again.
//!
//! Only the user may read a copy (0600, 0700), whatever the modes are here.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::session::{Next, Session, ended};
use crate::shell::quoted;
use crate::ssh::Remote;
use crate::unanswered::Unanswered;

#[cfg(test)]
mod tests;

/// Where copies lie on the other hosts, below the home directory.
const FOLDER: &str = ".cache/finetune/launch";

/// A copy that has not moved a byte for so long is given up. A disk may need a while for the bytes
/// that it has taken.
const PATIENCE: Duration = Duration::from_secs(45);

/// Most levels of folders. A model directory has one or two.
const MOST_DEPTH: usize = 32;

/// The exit code that says that there is nothing to fetch.
const NOTHING: i32 = 44;

/// Time of all files, in seconds since 1970: some day in the past, which no tar warns about.
const MODIFIED: u64 = 1_153_704_088;

/// A file of a bundle, or a folder with all files in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleFile {
    /// The file or folder on this host.
    pub from: PathBuf,
    /// Its path in the folder of the copy.
    pub to: String,
}

/// A copy that failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CopyError {
    /// A file or folder here cannot be read.
    #[error("{}: {error}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// A link that leads out of the folder that is to be copied: what it names is not part of it.
    #[error("{} is a link to {}, outside of the folder that is to be copied", path.display(), target.display())]
    Leads {
        /// The link.
        path: PathBuf,
        /// What it names.
        target: PathBuf,
    },
    /// A file here cannot be copied.
    #[error("{} {what}", path.display())]
    Unfit {
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        what: &'static str,
    },
    /// The host has not answered.
    #[error("{0}")]
    Host(#[from] Unanswered),
    /// What a host has sent is not what it was asked for.
    #[error("what it sent cannot be used: {0}")]
    Received(String),
    /// A signal came meanwhile.
    #[error("stopped by a signal")]
    Stopped,
}

/// A file on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Item {
    /// Its name in the copy.
    name: String,
    path: PathBuf,
    digest: String,
    bytes: u64,
}

/// Files that can be brought to any number of hosts.
pub struct Bundle {
    items: Vec<Item>,
    folder: String,
}

/// The folder of a copy on other hosts, below the home directory. It depends on `name` and `what`,
/// not on the files.
pub fn folder(name: &str, what: &str) -> String {
    let plain: String =
        name.chars().map(|letter| if letter.is_ascii_alphanumeric() || letter == '-' { letter } else { '_' }).collect();
    let plain: String = plain.trim_start_matches('-').chars().take(40).collect();
    format!("{FOLDER}/{plain}-{}", &blake3::hash(what.as_bytes()).to_hex()[..12])
}

impl Bundle {
    /// Lists and hashes everything. It will be brought to `folder`.
    ///
    /// # Errors
    /// If a file cannot be read or copied, or a signal number appears in `stop`.
    pub fn pack(folder: &str, files: &[BundleFile], stop: &AtomicI32) -> Result<Bundle, CopyError> {
        let mut items = Vec::new();
        for file in files {
            let root = std::fs::canonicalize(&file.from)
                .map_err(|error| CopyError::Read { path: file.from.clone(), error })?;
            list(&root, &file.from, &file.to, 0, &mut items)?;
        }
        items.sort();
        let items = items.into_iter().map(|(name, path)| {
            let (digest, bytes) = hash(&path, stop)?;
            Ok(Item { name, path, digest, bytes })
        });
        Ok(Bundle { items: items.collect::<Result<_, CopyError>>()?, folder: folder.to_owned() })
    }

    /// The folder of the copy, below the home directory.
    pub fn folder(&self) -> &str {
        &self.folder
    }

    /// A line per file: digest and name.
    fn manifest(&self) -> String {
        self.items.iter().map(|item| format!("{} {}\n", item.digest, item.name)).collect()
    }

    /// Sends the files that the host lacks, and removes those that are no part of the copy any
    /// more. `tell` gets the bytes sent and the bytes in all. Returns the number of files sent.
    ///
    /// # Errors
    /// If the host does not answer, a file cannot be read, or a signal number appears in `stop`.
    pub fn bring(&self, remote: &Remote, stop: &AtomicI32, tell: &mut dyn FnMut(u64, u64)) -> Result<usize, CopyError> {
        let folder = quoted(&self.folder);
        let script =
            format!("umask 077\ncd && mkdir -p {folder} && cd {folder} || exit 2\ncat manifest 2>/dev/null\nexit 0");
        let mut session = Session::open(remote, &script, stop)?;
        let there = String::from_utf8_lossy(&rest(&mut session, stop)?).into_owned();
        let manifest = self.manifest();
        if there == manifest {
            return Ok(0);
        }
        let old: Vec<(&str, &str)> = there.lines().filter_map(|line| line.split_once(' ')).collect();
        let is_there = |item: &Item| old.contains(&(item.digest.as_str(), item.name.as_str()));
        let missing: Vec<&Item> = self.items.iter().filter(|item| !is_there(item)).collect();
        let is_gone = |name: &str| {
            let ours = inside(Path::new(name)).as_deref() == Some(name);
            ours && !self.items.iter().any(|item| item.name == name)
        };
        let gone = old.iter().filter(|(_, name)| is_gone(name)).map(|(_, name)| format!("{name}\n"));
        let gone: String = gone.collect();
        // The manifest comes last: a copy that broke off has none.
        let script = format!(
            "umask 077\ncd && cd {folder} && chmod 700 . && rm -f manifest || exit 2\ntar -xof - || exit 2\n\
             while IFS= read -r name; do rm -f -- \"./$name\"; done <manifest.gone\nrm -f manifest.gone\n\
             mv manifest.new manifest || exit 2"
        );
        let texts = [("manifest.gone", gone.as_str()), ("manifest.new", manifest.as_str())];
        let files: Vec<Sent<'_>> =
            missing.iter().map(|item| Sent { name: &item.name, path: &item.path, bytes: item.bytes }).collect();
        send(remote, &script, &files, &texts, stop, tell)?;
        Ok(files.len())
    }
}

/// Sends files, with their names there, to `folder` of a host, below the home directory.
///
/// # Errors
/// As [`Bundle::bring`].
pub fn send_files(
    remote: &Remote,
    folder: &str,
    files: &[(String, PathBuf)],
    stop: &AtomicI32,
) -> Result<(), CopyError> {
    let folder = quoted(folder);
    let script = format!("umask 077\ncd && mkdir -p {folder} && cd {folder} || exit 2\ntar -xof - || exit 2");
    let sized: Vec<(&str, &Path, u64)> = files
        .iter()
        .map(|(name, path)| {
            let length = std::fs::metadata(path).map_err(|error| CopyError::Read { path: path.clone(), error })?.len();
            Ok((name.as_str(), path.as_path(), length))
        })
        .collect::<Result<_, CopyError>>()?;
    let files: Vec<Sent<'_>> = sized.iter().map(|&(name, path, bytes)| Sent { name, path, bytes }).collect();
    send(remote, &script, &files, &[], stop, &mut |_, _| {})
}

/// Fetches all files of `folder` of a host, below the home directory, except those below the names
/// in `skip`. `take` gets each file's name and its bytes. False if there is no such folder.
///
/// # Errors
/// If the host does not answer, or sends something that is no archive of plain files.
pub fn fetch(
    remote: &Remote,
    folder: &str,
    skip: &[String],
    stop: &AtomicI32,
    take: &mut dyn FnMut(&str, &mut dyn Read) -> io::Result<()>,
) -> Result<bool, CopyError> {
    let skip: Vec<String> = skip.iter().map(|name| quoted(&format!("--exclude=./{name}"))).collect();
    let folder = quoted(folder);
    let script = format!(
        "cd && cd {folder} 2>/dev/null || exit {NOTHING}\nexport COPYFILE_DISABLE=1\ntar {} -cf - .",
        skip.join(" ")
    );
    let mut stream = Stream { session: Session::open(remote, &script, stop)?, stop, piece: Vec::new(), ended: None };
    let unpacked = unpack(&mut stream, take);
    // What follows the end of an archive is padding.
    let drained = if unpacked.is_ok() { io::copy(&mut stream, &mut io::sink()) } else { Ok(0) };
    match (stream.ended, unpacked) {
        (Some(Ok(NOTHING)), _) => Ok(false),
        (Some(Ok(0)), Ok(())) => drained.map(|_| true).map_err(|error| CopyError::Received(error.to_string())),
        (Some(Ok(code)), _) if code != 0 => Err(ended(code, stream.session.words()).into()),
        (Some(Err(error)), _) => Err(error.into()),
        (_, Err(error)) => Err(CopyError::Received(error.to_string())),
        (_, Ok(())) => Err(CopyError::Received("it broke off".to_owned())),
    }
}

/// Removes the folder of a copy.
///
/// # Errors
/// If the host does not answer, or cannot remove it.
pub fn remove(remote: &Remote, folder: &str, stop: &AtomicI32) -> Result<(), CopyError> {
    let mut session = Session::open(remote, &format!("cd && rm -rf -- {}", quoted(folder)), stop)?;
    rest(&mut session, stop).map(|_| ())
}

/// A file to be sent.
struct Sent<'a> {
    name: &'a str,
    path: &'a Path,
    bytes: u64,
}

/// Feeds an archive to `script` at a host, for as long as bytes move.
fn send(
    remote: &Remote,
    script: &str,
    files: &[Sent<'_>],
    texts: &[(&str, &str)],
    stop: &AtomicI32,
    tell: &mut dyn FnMut(u64, u64),
) -> Result<(), CopyError> {
    let mut session = Session::open(remote, script, stop)?;
    let stdin = session.stdin.take().expect("nobody else takes it");
    let moved = AtomicU64::new(0);
    let total: u64 = files.iter().map(|file| file.bytes).sum();
    std::thread::scope(|scope| {
        let feeding = scope.spawn(|| write_archive(Counted { to: stdin, moved: &moved }, files, texts));
        let (mut since, mut before) = (Instant::now(), 0);
        let code = loop {
            match session.listen(stop) {
                Err(error) => break Err(error),
                Ok(Some(Next::Ended(code))) => break Ok(code),
                Ok(_) => {}
            }
            let now = moved.load(Ordering::Relaxed);
            if now != before {
                (since, before) = (Instant::now(), now);
                tell(now.min(total), total);
            }
            if since.elapsed() > PATIENCE {
                break Err(Unanswered::Silent { seconds: PATIENCE.as_secs(), words: session.words() });
            }
        };
        let words = session.words();
        // The feeder's pipe breaks with it.
        drop(session);
        match (code, feeding.join().expect("feeding does not panic")) {
            (Err(error), _) => Err(error.into()),
            (Ok(0), Ok(())) => Ok(()),
            // A file of ours that cannot be read is not the host's fault.
            (Ok(_), Err(error)) if error.kind() != io::ErrorKind::BrokenPipe => Err(Unanswered::Read(error).into()),
            (Ok(code), _) => Err(ended(code, words).into()),
        }
    })
}

fn write_archive(to: impl Write, files: &[Sent<'_>], texts: &[(&str, &str)]) -> io::Result<()> {
    let mut archive = tar::Builder::new(to);
    for file in files {
        let mut header = header(file.bytes, if file.name == "finetune" { 0o700 } else { 0o600 });
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", file.path.display()));
        let reader = File::open(file.path).map_err(named)?.take(file.bytes);
        archive.append_data(&mut header, file.name, reader)?;
    }
    for (name, text) in texts {
        archive.append_data(&mut header(text.len() as u64, 0o600), name, text.as_bytes())?;
    }
    archive.finish()
}

fn header(bytes: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(bytes);
    header.set_mode(mode);
    header.set_mtime(MODIFIED);
    header
}

/// Counts what passes.
struct Counted<'a, W> {
    to: W,
    moved: &'a AtomicU64,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.to.write(bytes)?;
        self.moved.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// All that a session says until its end.
fn rest(session: &mut Session, stop: &AtomicI32) -> Result<Vec<u8>, CopyError> {
    const MOST: usize = 64 << 20;
    let mut said = Vec::new();
    loop {
        match session.next(stop, PATIENCE, &|| 0)? {
            Next::Output(bytes) if said.len() < MOST => said.extend(bytes),
            Next::Output(_) => return Err(CopyError::Received("a list without an end".to_owned())),
            Next::Ended(0) => return Ok(said),
            Next::Ended(code) => return Err(ended(code, session.words()).into()),
        }
    }
}

/// What a session says, as a file.
struct Stream<'a> {
    session: Session,
    stop: &'a AtomicI32,
    piece: Vec<u8>,
    /// Its exit code, or why there is none.
    ended: Option<Result<i32, Unanswered>>,
}

impl Read for Stream<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && self.ended.is_none() {
            match self.session.next(self.stop, PATIENCE, &|| 0) {
                Ok(Next::Output(piece)) => self.piece = piece,
                Ok(Next::Ended(code)) => self.ended = Some(Ok(code)),
                Err(error) => self.ended = Some(Err(error)),
            }
        }
        let count = bytes.len().min(self.piece.len());
        bytes[..count].copy_from_slice(&self.piece[..count]);
        self.piece.drain(..count);
        Ok(count)
    }
}

/// Hands the files of an archive to `take`. Names that lead elsewhere, links and devices are
/// refused.
fn unpack(from: &mut dyn Read, take: &mut dyn FnMut(&str, &mut dyn Read) -> io::Result<()>) -> io::Result<()> {
    let mut archive = tar::Archive::new(from);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let refuse = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what.to_owned()));
        match entry.header().entry_type() {
            tar::EntryType::Directory => continue,
            tar::EntryType::Regular | tar::EntryType::Continuous => {}
            other => return refuse(&format!("an entry of the kind {other:?}")),
        }
        let path = entry.path()?.into_owned();
        let Some(name) = inside(&path) else { return refuse(&format!("the name {:?}", path.display().to_string())) };
        take(&name, &mut entry)?;
    }
    Ok(())
}

/// A path as the name of something below a folder, if it is one.
fn inside(path: &Path) -> Option<String> {
    let mut parts = Vec::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::Normal(part) => parts.push(part.to_str()?),
            _ => return None,
        }
    }
    let name = parts.join("/");
    (!name.is_empty() && !name.chars().any(char::is_control)).then_some(name)
}

/// Adds a file, or all files below a folder. Links are followed within `root`, and to the files of
/// the Hugging Face cache that it is part of; a link that leads anywhere else could put any file of
/// this machine into a copy.
fn list(
    root: &Path,
    path: &Path,
    name: &str,
    depth: usize,
    items: &mut Vec<(String, PathBuf)>,
) -> Result<(), CopyError> {
    let failed = |error| CopyError::Read { path: path.to_owned(), error };
    let unfit = |what| CopyError::Unfit { path: path.to_owned(), what };
    let target = std::fs::canonicalize(path).map_err(failed)?;
    if !target.starts_with(root) && !blobs(root).is_some_and(|blobs| target.starts_with(blobs)) {
        return Err(CopyError::Leads { path: path.to_owned(), target });
    }
    let kind = std::fs::metadata(path).map_err(failed)?;
    if kind.is_file() {
        items.push((name.to_owned(), path.to_owned()));
        return Ok(());
    }
    if !kind.is_dir() {
        return Err(unfit("is neither a file nor a folder"));
    }
    if depth == MOST_DEPTH {
        return Err(unfit("has more folders in folders than a copy takes"));
    }
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let own = entry.file_name();
        let plain = own.to_str().filter(|own| !own.chars().any(char::is_control));
        let plain = plain.ok_or(CopyError::Unfit {
            path: entry.path(),
            what: "has a name that is no plain text: rename it, or take it out of the folder",
        })?;
        list(root, &entry.path(), &format!("{name}/{plain}"), depth + 1, items)?;
    }
    Ok(())
}

/// Where the files lie that the links of a snapshot in a Hugging Face cache lead to.
fn blobs(snapshot: &Path) -> Option<PathBuf> {
    let snapshots = snapshot.parent().filter(|parent| parent.file_name().is_some_and(|name| name == "snapshots"))?;
    Some(snapshots.parent()?.join("blobs"))
}

/// BLAKE3 of a file and its length.
fn hash(path: &Path, stop: &AtomicI32) -> Result<(String, u64), CopyError> {
    let failed = |error| CopyError::Read { path: path.to_owned(), error };
    let (mut file, mut hasher) = (File::open(path).map_err(failed)?, blake3::Hasher::new());
    let (mut bytes, mut total) = (vec![0; 4 << 20], 0);
    loop {
        if stop.load(Ordering::SeqCst) != 0 {
            return Err(CopyError::Stopped);
        }
        match file.read(&mut bytes).map_err(failed)? {
            0 => return Ok((hasher.finalize().to_hex().to_string(), total)),
            count => {
                hasher.update_rayon(&bytes[..count]);
                total += count as u64;
            }
        }
    }
}
