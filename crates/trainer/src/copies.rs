//! Copies of checkpoints on other hosts, so that no progress is lost with rank 0's host.
//!
//! After each save rank 0 sends what is new to one rank of each of as many other hosts as
//! `checkpoint.copies` says. They keep it as `copies/step-NNNNNN` of their own run directory, with
//! the rows of `metrics.jsonl`. A run that goes on from its newest checkpoint takes the newest one
//! that verifies on any of its hosts. Rank 0 gets it from there.
//!
//! The bytes travel over the group's own connections, so hosts need no shared disk. On a shared
//! disk the checkpoint is there already, and nothing is sent.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use finetune_allreduce::{Group, GroupError};
use finetune_recipe::Recipe;
use finetune_store::{
    MANIFEST_NAME, Manifest, Operation, RealDisk, SafeName, Staging, StoreError, ensure_directory, numbered,
    remove_directory, replace_file, set_aside, sweep, verify_directory,
};

use crate::error::TrainError;
use crate::events::Event;
use crate::identity::Identity;
use crate::metrics;
use crate::names::{CHECKPOINTS, COPIES};
use crate::ranks::Ranks;
use crate::resume::Resume;
use crate::samples::SAMPLES_FILE;
use crate::state::{belongs, name};

/// Files beside the checkpoints that a resumed run continues.
const BESIDE: [&str; 2] = [metrics::FILE, SAMPLES_FILE];

/// Bytes of a file that are sent at a time.
const PIECE: usize = 4 << 20;

/// The ranks that keep copies: the first rank of each host other than rank 0's, at most `copies` of
/// them.
pub(crate) fn holders<'a>(hosts: impl Iterator<Item = &'a str>, copies: usize) -> Vec<usize> {
    let (mut seen, mut holders) = (Vec::new(), Vec::new());
    for (rank, host) in hosts.enumerate() {
        if !seen.contains(&host) {
            seen.push(host);
            holders.extend((rank > 0).then_some(rank));
        }
    }
    holders.truncate(copies);
    holders
}

/// Brings the copies on other hosts up to what rank 0 has saved after `step` steps. If a host
/// cannot keep its copy, it is named, and the run goes on. `directory`: rank 0's run directory,
/// `None` on other ranks.
pub(crate) fn spread(
    ranks: &Ranks,
    recipe: &Recipe,
    directory: Option<&Path>,
    step: u64,
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<(), TrainError> {
    let group = ranks.group();
    let hosts = group.who().iter().map(|who| who.host.as_str());
    let holders = holders(hosts, recipe.checkpoint.copies.unwrap_or(1));
    if let Some(directory) = directory {
        for holder in holders {
            let why = send(group, holder, directory)?;
            let host = group.who()[holder].host.clone();
            tell(Event::Copied { step, host, failed: (!why.is_empty()).then_some(why) });
        }
    } else if holders.contains(&group.rank()) {
        receive(group, &recipe.output_dir)?;
    }
    Ok(())
}

/// Rank 0's side: sends all checkpoints that it keeps and the other host lacks. Returns why the
/// other host could not keep them, or nothing.
fn send(group: &Group, to: usize, directory: &Path) -> Result<String, TrainError> {
    let mut kept: Vec<(u64, PathBuf, Vec<u8>)> = Vec::new();
    for (step, path) in numbered(&RealDisk, &directory.join(CHECKPOINTS), "step-")? {
        if let Ok(manifest) = std::fs::read(path.join(MANIFEST_NAME)) {
            kept.push((step, path, manifest));
        }
    }
    let steps: Vec<u64> = kept.iter().map(|(step, ..)| *step).collect();
    group.send(&[steps.len() as u64], to)?;
    group.send(&steps, to)?;
    for (_, path, manifest) in &kept {
        send_bytes(group, to, manifest)?;
        let mut wanted = [0u8];
        group.recv(&mut wanted, to)?;
        if wanted[0] == 1 {
            send_files(group, to, path, manifest)?;
        }
    }
    for file in BESIDE {
        send_tail(group, to, &std::fs::read(directory.join(file)).unwrap_or_default())?;
    }
    Ok(String::from_utf8_lossy(&receive_bytes(group, to)?).into_owned())
}

/// The side of a rank that keeps copies below its own `directory`.
fn receive(group: &Group, directory: &Path) -> Result<(), GroupError> {
    let copies = directory.join(COPIES);
    let mut count = [0u64];
    group.recv(&mut count, 0)?;
    let mut steps = vec![0u64; count[0] as usize];
    group.recv(&mut steps, 0)?;
    // An error here is told at the end, because rank 0 sends all messages in any case.
    let mut outcome = clear(&copies, &steps);
    for &step in &steps {
        let bytes = receive_bytes(group, 0)?;
        let manifest = Manifest::parse(&copies.join(MANIFEST_NAME), &bytes);
        let is_there = |parent: &Path, manifest: &Manifest| has(&parent.join(name(step)), manifest);
        let wanted = match &manifest {
            Ok(manifest) => {
                outcome.is_ok() && !is_there(&copies, manifest) && !is_there(&directory.join(CHECKPOINTS), manifest)
            }
            Err(_) => false,
        };
        group.send(&[u8::from(wanted)], 0)?;
        if let (true, Ok(manifest)) = (wanted, manifest) {
            let received = receive_files(group, 0, &copies, step, &manifest)?;
            outcome = outcome.and(received.map(|_| ()));
        }
    }
    // On a shared disk all is in its place already, and there is no folder of copies.
    let kept = copies.is_dir();
    for file in BESIDE {
        let path = if kept { copies.join(file) } else { directory.join(file) };
        let own = std::fs::read(&path).unwrap_or_default();
        let whole = receive_tail(group, 0, &own)?;
        if kept && outcome.is_ok() && whole != own {
            outcome = replace_file(&RealDisk, &path, &whole);
        }
    }
    send_bytes(group, 0, outcome.err().map(|error| error.to_string()).unwrap_or_default().as_bytes())
}

/// Removes the copies that rank 0 does not keep any more.
fn clear(copies: &Path, keep: &[u64]) -> Result<(), StoreError> {
    sweep(&RealDisk, copies)?;
    for (step, path) in numbered(&RealDisk, copies, "step-")? {
        if !keep.contains(&step) {
            remove_directory(&RealDisk, &path)?;
        }
    }
    Ok(())
}

/// Whether a directory has this manifest. Its other bytes are verified when a run goes on from it.
fn has(path: &Path, manifest: &Manifest) -> bool {
    let file = path.join(MANIFEST_NAME);
    std::fs::read(&file).is_ok_and(|bytes| Manifest::parse(&file, &bytes).is_ok_and(|found| found == *manifest))
}

/// Brings the newest checkpoint on any rank's host to rank 0, if rank 0 is to go on from the
/// newest. A run that starts from the beginning sets older copies aside, so that no resume takes
/// them for its own.
pub(crate) fn bring_newest(
    directory: &Path,
    resume: &Resume,
    ranks: &Ranks,
    identity: &Identity,
    notices: &mut Vec<String>,
) -> Result<(), TrainError> {
    let group = ranks.group();
    let mut asked = [u8::from(*resume == Resume::Newest), u8::from(*resume == Resume::No)];
    group.broadcast(&mut asked, 0)?;
    if asked[1] == 1 && !ranks.is_first() {
        // On a shared disk another rank may have done it first.
        let _ = set_copies_aside(directory);
    }
    if asked[0] == 0 {
        return Ok(());
    }
    let own = if ranks.is_first() {
        finetune_store::newest_verified(&RealDisk, &directory.join(CHECKPOINTS), "step-")?.0
    } else {
        None
    };
    let mut known = [own.map_or(0, |(step, ..)| step)];
    group.broadcast(&mut known, 0)?;
    let found = newer(directory, known[0], identity);
    let mut all = vec![0u64; group.world()];
    group.all_gather(&[found.as_ref().map_or(0, |(step, _)| *step)], &mut all)?;
    let newest = all.iter().copied().max().unwrap_or(0);
    if newest == 0 {
        return Ok(());
    }
    let from = all.iter().position(|step| *step == newest).unwrap_or(0);
    let checkpoints = directory.join(CHECKPOINTS);
    if ranks.is_first() {
        ensure_directory(&RealDisk, &checkpoints)?;
        let path = checkpoints.join(name(newest));
        if path.exists() {
            set_aside(&RealDisk, &path)?;
        }
        let host = &group.who()[from].host;
        notices.push(match from {
            0 => format!("step {newest} is kept on {host}: the run goes on from this copy"),
            _ => format!("step {newest} is kept on {host}, and is brought here from there"),
        });
    }
    match (group.rank(), found) {
        (0, Some((_, path))) if from == 0 => adopt(&path, directory, newest)?,
        (0, _) => {
            let bytes = receive_bytes(group, from)?;
            let manifest = Manifest::parse(&checkpoints.join(MANIFEST_NAME), &bytes)?;
            receive_files(group, from, &checkpoints, newest, &manifest)??;
            for file in BESIDE {
                let bytes = receive_bytes(group, from)?;
                put_beside(directory, file, &bytes)?;
            }
        }
        (rank, Some((_, path))) if rank == from => {
            let file = path.join(MANIFEST_NAME);
            let manifest = std::fs::read(&file).map_err(|source| StoreError::io(&file, Operation::Read, 0, source))?;
            send_bytes(group, 0, &manifest)?;
            send_files(group, 0, &path, &manifest)?;
            for file in BESIDE {
                send_bytes(group, 0, &std::fs::read(beside(&path, file)).unwrap_or_default())?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// The newest checkpoint of this run below a run directory that verifies and is beyond step
/// `known`.
fn newer(directory: &Path, known: u64, identity: &Identity) -> Option<(u64, PathBuf)> {
    let mut all: Vec<(u64, PathBuf)> = [COPIES, CHECKPOINTS]
        .iter()
        .flat_map(|folder| numbered(&RealDisk, &directory.join(folder), "step-").unwrap_or_default())
        .filter(|(step, _)| *step > known)
        .collect();
    all.sort();
    let fits = |path: &Path| verify_directory(&RealDisk, path).is_ok() && belongs(path, identity);
    all.into_iter().rev().find(|(_, path)| fits(path))
}

/// Makes a checkpoint of a copy that rank 0's own host has kept for another host.
fn adopt(path: &Path, directory: &Path, step: u64) -> Result<(), TrainError> {
    let manifest = verify_directory(&RealDisk, path)?;
    let checkpoints = directory.join(CHECKPOINTS);
    let mut staging = Staging::begin(&RealDisk, &checkpoints, &name(step))?;
    for record in &manifest.files {
        let (from, to) = (path.join(&record.name), staging.directory().join(&record.name));
        std::fs::copy(&from, &to).map_err(|source| StoreError::io(&to, Operation::Write, record.size, source))?;
        staging.record(&record.name)?;
    }
    staging.publish(&about(&manifest))?;
    for file in BESIDE {
        put_beside(directory, file, &std::fs::read(beside(path, file)).unwrap_or_default())?;
    }
    Ok(())
}

/// A file beside a checkpoint: in the folder of the copies, or in the run directory.
fn beside(checkpoint: &Path, file: &str) -> PathBuf {
    let folder = checkpoint.parent().unwrap_or(Path::new("."));
    let is_copies = folder.file_name().is_some_and(|name| name == COPIES);
    if is_copies { folder.join(file) } else { folder.parent().unwrap_or(Path::new(".")).join(file) }
}

/// Takes a file that another host has kept, if it is longer than the own one.
fn put_beside(directory: &Path, file: &str, bytes: &[u8]) -> Result<(), TrainError> {
    let path = directory.join(file);
    let own = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
    if bytes.len() as u64 > own {
        replace_file(&RealDisk, &path, bytes)?;
    }
    Ok(())
}

/// Moves the copies of an earlier run out of the way.
fn set_copies_aside(directory: &Path) -> Result<(), StoreError> {
    let copies = directory.join(COPIES);
    if copies.is_dir() {
        set_aside(&RealDisk, &copies)?;
    }
    Ok(())
}

/// What [`Staging::publish`] needs to write the same manifest again.
fn about(manifest: &Manifest) -> serde_json::Value {
    let mut about = serde_json::Map::new();
    about.insert("kind".to_owned(), manifest.kind.clone().into());
    about.extend(manifest.fields.clone());
    about.into()
}

/// Sends the files of a checkpoint, in the order of its manifest.
fn send_files(group: &Group, to: usize, path: &Path, manifest: &[u8]) -> Result<(), TrainError> {
    let mut piece = vec![0; PIECE];
    for record in Manifest::parse(path, manifest)?.files {
        let path = path.join(&record.name);
        let failed = |source| StoreError::io(&path, Operation::Read, 0, source);
        let mut file = File::open(&path).map_err(failed)?;
        let mut left = record.size;
        while left > 0 {
            let length = left.min(PIECE as u64) as usize;
            file.read_exact(&mut piece[..length]).map_err(failed)?;
            group.send(&piece[..length], to)?;
            left -= length as u64;
        }
    }
    Ok(())
}

/// Receives what [`send_files`] sends, as a directory that appears whole or not at all. The inner
/// error is this host's: then all bytes were received, and nothing is kept.
fn receive_files(
    group: &Group,
    from: usize,
    parent: &Path,
    step: u64,
    manifest: &Manifest,
) -> Result<Result<PathBuf, StoreError>, GroupError> {
    let mut staging = Staging::begin(&RealDisk, parent, &name(step));
    let mut piece = vec![0; PIECE];
    for record in &manifest.files {
        let mut file = match &staging {
            Ok(staging) => new_file(staging, &record.name),
            Err(_) => Ok(None),
        };
        let mut left = record.size;
        while left > 0 {
            let length = left.min(PIECE as u64) as usize;
            group.recv(&mut piece[..length], from)?;
            if let Ok(Some((path, open))) = &mut file
                && let Err(source) = open.write_all(&piece[..length])
            {
                file = Err(StoreError::io(path, Operation::Write, record.size, source));
            }
            left -= length as u64;
        }
        staging = staging.and_then(|mut staging| {
            file?;
            staging.record(&record.name)?;
            Ok(staging)
        });
    }
    Ok(staging.and_then(|staging| {
        let path = staging.publish(&about(manifest))?;
        if !has(&path, manifest) {
            remove_directory(&RealDisk, &path)?;
            return Err(StoreError::Malformed { path, what: "its bytes changed on the way".to_owned() });
        }
        Ok(path)
    }))
}

/// Creates a file of a directory that is being written. Its name cannot lead out of the directory.
fn new_file(staging: &Staging<'_>, name: &str) -> Result<Option<(PathBuf, File)>, StoreError> {
    let path = staging.directory().join(SafeName::parse(name)?.as_str());
    let file = OpenOptions::new().write(true).create_new(true).open(&path);
    match file {
        Ok(file) => Ok(Some((path, file))),
        Err(source) => Err(StoreError::io(&path, Operation::Write, 0, source)),
    }
}

/// Sends a length, then the bytes.
fn send_bytes(group: &Group, to: usize, bytes: &[u8]) -> Result<(), GroupError> {
    group.send(&[bytes.len() as u64], to)?;
    bytes.chunks(PIECE).try_for_each(|piece| group.send(piece, to))
}

/// Receives what [`send_bytes`] sends.
fn receive_bytes(group: &Group, from: usize) -> Result<Vec<u8>, GroupError> {
    let mut length = [0u64];
    group.recv(&mut length, from)?;
    let mut bytes = vec![0; length[0] as usize];
    bytes.chunks_mut(PIECE).try_for_each(|piece| group.recv(piece, from))?;
    Ok(bytes)
}

/// Sends the part of a file that the other side lacks. Rows are only ever appended.
fn send_tail(group: &Group, to: usize, bytes: &[u8]) -> Result<(), GroupError> {
    let (mut length, mut hash) = ([0u64], [0u8; blake3::OUT_LEN]);
    group.recv(&mut length, to)?;
    group.recv(&mut hash, to)?;
    let there = length[0] as usize;
    let same = bytes.get(..there).is_some_and(|head| *blake3::hash(head).as_bytes() == hash);
    let from = if same { there } else { 0 };
    group.send(&[from as u64], to)?;
    send_bytes(group, to, &bytes[from..])
}

/// Receives a file whose beginning this side may have as `own`. Returns all of it.
fn receive_tail(group: &Group, from: usize, own: &[u8]) -> Result<Vec<u8>, GroupError> {
    group.send(&[own.len() as u64], from)?;
    group.send(blake3::hash(own).as_bytes(), from)?;
    let mut start = [0u64];
    group.recv(&mut start, from)?;
    let mut whole = own[..(start[0] as usize).min(own.len())].to_vec();
    whole.extend(receive_bytes(group, from)?);
    Ok(whole)
}

#[cfg(test)]
mod tests;
