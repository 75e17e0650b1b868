//! Brings files to other machines, once: what is there already in the same form is left alone.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use thiserror::Error;

use crate::workers::{Remote, quoted};

/// Where copies lie over there, below the home directory.
const FOLDER: &str = ".cache/finetune/launch";

/// Something to copy: a file, or a folder with all that is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parcel {
    pub from: PathBuf,
    /// Its path in the folder of the copy.
    pub to: String,
}

/// A copy that failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CopyError {
    #[error("{}: {error}", path.display())]
    Read { path: PathBuf, error: io::Error },
    #[error("{command} cannot be started: {error}")]
    Start { command: &'static str, error: io::Error },
    #[error("the copy failed: {why}")]
    Failed { why: String },
}

/// Files ready to be brought to any number of machines.
pub struct Cargo {
    /// Names in the copy and the files that they are.
    files: Vec<(String, PathBuf)>,
    /// A line per file: digest and name.
    manifest: String,
    folder: String,
}

impl Cargo {
    /// Lists and hashes everything.
    pub fn pack(parcels: &[Parcel]) -> Result<Cargo, CopyError> {
        let mut files = Vec::new();
        for parcel in parcels {
            list(&parcel.from, &parcel.to, &mut files)?;
        }
        files.sort();
        let mut manifest = String::new();
        for (name, path) in &files {
            manifest += &format!("{} {name}\n", hash(path)?);
        }
        let digest = blake3::hash(manifest.as_bytes()).to_hex();
        Ok(Cargo { files, folder: format!("{FOLDER}/{}", &digest[..16]), manifest })
    }

    /// The folder of the copy, below the home directory.
    pub fn folder(&self) -> &str {
        &self.folder
    }

    /// Brings everything to a machine, if it is not there. Returns whether it was sent.
    pub fn bring(&self, remote: &Remote) -> Result<bool, CopyError> {
        let folder = quoted(&self.folder);
        let there = run(remote.ssh(&format!("cat {folder}/manifest 2>/dev/null; exit 0")), |_| Ok(()))?;
        if there == self.manifest {
            return Ok(false);
        }
        // The manifest comes last: a copy that broke off has none.
        let unpack = format!(
            "mkdir -p {folder} && tar -xf - -C {folder} && chmod +x {folder}/finetune && mv {folder}/manifest.new {folder}/manifest"
        );
        run(remote.ssh(&unpack), |stdin| self.write_archive(stdin))?;
        Ok(true)
    }

    fn write_archive(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut archive = tar::Builder::new(out);
        archive.mode(tar::HeaderMode::Deterministic);
        for (name, path) in &self.files {
            archive.append_file(name, &mut File::open(path)?)?;
        }
        let mut header = tar::Header::new_ustar();
        header.set_size(self.manifest.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, "manifest.new", self.manifest.as_bytes())?;
        archive.finish()
    }
}

/// Adds a file, or all files below a folder; links are followed.
fn list(path: &Path, name: &str, files: &mut Vec<(String, PathBuf)>) -> Result<(), CopyError> {
    let failed = |error| CopyError::Read { path: path.to_owned(), error };
    if !std::fs::metadata(path).map_err(failed)?.is_dir() {
        files.push((name.to_owned(), path.to_owned()));
        return Ok(());
    }
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        list(&entry.path(), &format!("{name}/{}", entry.file_name().to_string_lossy()), files)?;
    }
    Ok(())
}

fn hash(path: &Path) -> Result<String, CopyError> {
    let mut hasher = blake3::Hasher::new();
    let read = File::open(path).and_then(|file| hasher.update_reader(file).map(|_| ()));
    read.map_err(|error| CopyError::Read { path: path.to_owned(), error })?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Runs a command that `feed` writes to, and returns what it printed.
fn run(mut ssh: Command, feed: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<String, CopyError> {
    ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = ssh.spawn().map_err(|error| CopyError::Start { command: "ssh", error })?;
    let mut stdin = child.stdin.take().expect("asked for");
    // What it prints before it has read all is a word or two: the pipe holds it.
    let fed = feed(&mut stdin);
    drop(stdin);
    let output = child.wait_with_output().map_err(|error| CopyError::Start { command: "ssh", error })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match (output.status.success(), fed) {
        (true, Ok(())) => Ok(text(&output.stdout)),
        (false, _) => Err(CopyError::Failed { why: text(&output.stderr).trim().to_owned() }),
        (true, Err(error)) => Err(CopyError::Failed { why: error.to_string() }),
    }
}
