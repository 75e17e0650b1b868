//! Files of weights that are not here. Of ranks that hold the layers of a model together, each fetches the files
//! of its own layers only. Of the others it keeps the headers, which say names, number types and shapes.
//!
//! A kept header lies beside the snapshots of its repository in the Hugging Face cache, as
//! `headers/COMMIT/SHARD.header`: a snapshot holds nothing but whole files. It is the length of the shard in bytes
//! (8 bytes, little-endian), then the first bytes of the shard, up to the end of its header.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::disk::RealDisk;
use crate::error::StoreError;
use crate::header::{Header, LENGTH_BYTES};
use crate::names::SafeName;
use crate::replace::replace_file;
use crate::tensor_set::{INDEX_NAME, SINGLE_NAME, weight_map};
use crate::tensors::TensorFile;

/// The most names that are listed beside layers.
const SHOWN: usize = 4;

/// The cache's folder of a repository, and the commit, if this directory is a snapshot in it.
fn repository(snapshot: &Path) -> Option<(&Path, &str)> {
    let (commit, snapshots) = (snapshot.file_name()?.to_str()?, snapshot.parent()?);
    let root = snapshots.parent()?;
    let is_model = root.file_name()?.to_str()?.starts_with("models--");
    (is_model && snapshots.file_name()? == "snapshots").then_some((root, commit))
}

/// Where the header of a shard is kept, if the directory is a snapshot in the Hugging Face cache.
fn kept_at(snapshot: &Path, shard: &str) -> Option<PathBuf> {
    let (root, commit) = repository(snapshot)?;
    Some(root.join("headers").join(commit).join(format!("{shard}.header")))
}

/// Whether the header of a shard is kept beside a snapshot in the Hugging Face cache.
pub fn has_header(snapshot: &Path, shard: &str) -> bool {
    kept_at(snapshot, shard).is_some_and(|path| path.is_file())
}

/// How many bytes at the start of a safetensors file its header takes. `start`: its first 8 bytes or more;
/// `length`: bytes of the whole file.
///
/// # Errors
/// What is wrong with it.
pub fn header_bytes(start: &[u8], length: u64) -> Result<u64, String> {
    Ok((LENGTH_BYTES + Header::json_length(start, length)?) as u64)
}

/// Keeps the header of a shard that is not fetched. `start`: the first bytes of the shard, its header at least;
/// `length`: bytes of the whole shard.
///
/// # Errors
/// [`StoreError::Malformed`] if this is no header of such a file, [`StoreError::UnsafeName`], or a failure of the
/// disk.
///
/// # Panics
/// If the directory is no snapshot in the Hugging Face cache.
pub fn keep_header(snapshot: &Path, shard: &str, start: &[u8], length: u64) -> Result<(), StoreError> {
    let path = kept_at(snapshot, SafeName::parse(shard)?.as_str()).expect("a snapshot in the cache");
    let wrong = |what: String| StoreError::malformed(&snapshot.join(shard), what);
    let header = header_bytes(start, length).map_err(wrong)?;
    let Some(header) = start.get(..header as usize) else {
        return Err(wrong(format!("its header has {header} bytes, and {} came", start.len())));
    };
    parse(header, length).map_err(wrong)?;
    replace_file(&RealDisk, &path, &[&length.to_le_bytes()[..], header].concat())
}

/// The header, of the first bytes of a file of this length: no fewer than it takes, and no more.
pub(crate) fn parse(start: &[u8], length: u64) -> Result<Header, String> {
    if header_bytes(start, length)? != start.len() as u64 {
        return Err("it is not one header as a whole".to_owned());
    }
    let data = usize::try_from(length - start.len() as u64);
    Header::parse_json(&start[LENGTH_BYTES..], data.map_err(|_| "it is too large for this machine".to_owned())?)
}

/// Opens a file of weights. One that is not here is opened by its header, if that is kept: then only reading a
/// tensor's bytes is an error.
pub(crate) fn open(directory: &Path, shard: &str) -> Result<TensorFile, StoreError> {
    let path = directory.join(SafeName::parse(shard)?.as_str());
    match TensorFile::open(&path) {
        Err(StoreError::Io { ref source, .. }) if source.kind() == ErrorKind::NotFound => {
            let kept = kept_at(directory, shard).filter(|kept| kept.is_file());
            kept.map_or_else(|| Err(no_shard(directory, shard)), |kept| TensorFile::open_header(&path, &kept))
        }
        outcome => outcome,
    }
}

/// The files of weights that a model directory should have, by its index. Empty: the weights are in one file, or
/// there is no index that can be read.
fn shards(directory: &Path) -> BTreeSet<String> {
    let index = directory.join(INDEX_NAME);
    if directory.join(SINGLE_NAME).exists() {
        return BTreeSet::new();
    }
    let map = weight_map(&index).unwrap_or_default();
    map.into_iter().map(|(_, shard)| shard).filter(|shard| SafeName::parse(shard).is_ok()).collect()
}

/// The files of weights that a model directory should have, by its index, and that are not here.
pub fn missing_shards(directory: &Path) -> Vec<String> {
    shards(directory).into_iter().filter(|shard| !directory.join(shard).is_file()).collect()
}

/// The error for a file of weights that is not here: what it holds, by the index, and how to get it.
pub fn no_shard(directory: &Path, shard: &str) -> StoreError {
    let map = weight_map(&directory.join(INDEX_NAME)).unwrap_or_default();
    let names = map.iter().filter(|(_, of)| of == shard).map(|(name, _)| name.as_str());
    no_file(&directory.join(shard), names)
}

/// The same with the names of its tensors.
pub(crate) fn no_file<'a>(path: &Path, names: impl Iterator<Item = &'a str>) -> StoreError {
    StoreError::NoShard { path: path.to_path_buf(), holds: described(names) }
}

/// The arguments of `finetune download` that fetch the rest of a snapshot.
pub(crate) fn fetched_by(path: &Path) -> Option<String> {
    let (root, commit) = repository(path.parent()?)?;
    let name = root.file_name()?.to_str()?.strip_prefix("models--")?.replacen("--", "/", 1);
    Some(format!("{name}@{commit}"))
}

/// What tensors are of, such as `layers 0 to 3, lm_head, model.norm`.
fn described<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let (mut layers, mut others) = (BTreeSet::new(), BTreeSet::new());
    for name in names {
        match layer_of(name) {
            Some(layer) => layers.insert(layer),
            None => others.insert(name.rsplit_once('.').map_or(name, |(module, _)| module)),
        };
    }
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for layer in layers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == layer => *last = layer,
            _ => runs.push((layer, layer)),
        }
    }
    let run = |(first, last): &(usize, usize)| match last - first {
        0 => first.to_string(),
        _ => format!("{first} to {last}"),
    };
    let many = if matches!(runs.as_slice(), [(first, last)] if first == last) { "layer" } else { "layers" };
    let layers: Vec<String> = runs.iter().map(run).collect();
    let mut parts: Vec<String> = Vec::new();
    if !layers.is_empty() {
        parts.push(format!("{many} {}", layers.join(", ")));
    }
    let more = others.len().saturating_sub(SHOWN);
    parts.extend(others.into_iter().take(SHOWN).map(str::to_owned));
    if more > 0 {
        parts.push(format!("{more} more"));
    }
    if parts.is_empty() { "weights".to_owned() } else { parts.join(", ") }
}

/// The layer of the text model that a tensor is of.
fn layer_of(name: &str) -> Option<usize> {
    let is_other = |word: &str| ["vision", "visual", "audio"].iter().any(|other| word.contains(other));
    let mut words = name.split('.');
    let before = words.by_ref().take_while(|word| !matches!(*word, "layers" | "h")).any(is_other);
    words.next()?.parse().ok().filter(|_| !before)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (tensors, what they are of)
    #[test]
    fn a_shard_says_which_layers_it_holds() {
        let cases: [(&[&str], &str); 6] = [
            (&["model.layers.3.mlp.up_proj.weight", "model.layers.3.input_layernorm.weight"], "layer 3"),
            (
                &["model.layers.4.a.weight", "model.layers.0.a.weight", "model.layers.1.a.weight", "lm_head.weight"],
                "layers 0 to 1, 4, lm_head",
            ),
            (&["transformer.h.12.attn.weight"], "layer 12"),
            (&["model.embed_tokens.weight", "model.norm.weight"], "model.embed_tokens, model.norm"),
            (&["vision_tower.layers.3.a.weight"], "vision_tower.layers.3.a"),
            (&[], "weights"),
        ];
        for (names, want) in cases {
            assert_eq!(described(names.iter().copied()), want, "{names:?}");
        }
    }

    #[test]
    fn only_a_snapshot_in_the_cache_keeps_headers() {
        for (directory, want) in [
            ("/c/models--acme--tiny/snapshots/c0ffee", Some("/c/models--acme--tiny/headers/c0ffee/a.header")),
            ("/c/models--acme--tiny/c0ffee", None),
            ("/c/tiny/snapshots/c0ffee", None),
            ("tiny", None),
        ] {
            assert_eq!(kept_at(Path::new(directory), "a").as_deref(), want.map(Path::new), "{directory}");
        }
        let shard = Path::new("/c/models--acme--tiny/snapshots/c0ffee/a.safetensors");
        assert_eq!(fetched_by(shard).as_deref(), Some("acme/tiny@c0ffee"));
    }
}
