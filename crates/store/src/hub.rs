//! Models that are in the Hugging Face cache already.

use std::path::PathBuf;

use crate::names::SafeName;

/// The directory of the main revision of a model (`owner/name`) in the local cache, where `HF_HUB_CACHE`,
/// `HF_HOME` or the home directory says it is. Nothing is downloaded.
pub fn cached_snapshot(id: &str) -> Option<PathBuf> {
    let (owner, name) = id.split_once('/')?;
    SafeName::parse(owner).ok()?;
    SafeName::parse(name).ok()?;
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = variable("HF_HUB_CACHE")
        .or_else(|| variable("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/huggingface/hub")))?;
    let model = cache.join(format!("models--{owner}--{name}"));
    let revision = std::fs::read_to_string(model.join("refs/main")).ok()?;
    let revision = SafeName::parse(revision.trim()).ok()?;
    Some(model.join("snapshots").join(revision.as_str())).filter(|path| path.join("config.json").is_file())
}
