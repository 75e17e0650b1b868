//! Which base an adapter was trained on: what the adapter says, and what the bytes say.

use std::path::Path;

use finetune_packed::Scheme;
use finetune_store::{
    FileDigest, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, OpenedFile, TensorSet, content_hash, hex,
};
use serde_json::Value;

use crate::adapter::Adapter;
use crate::error::ModelError;
use crate::files::packing::{scheme_named, scheme_word};
use crate::files::text::read_bounded;
use crate::gguf::gguf_file;
use crate::gguf::read::{GgufBase, digest_of as gguf_digest_of};

/// What adapter_config.json calls the base model: a hub id, or a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BaseName {
    /// A hub id, or the path of a directory.
    pub name: String,
    /// The commit of the hub, if the name is a hub id.
    pub revision: Option<String>,
}

/// What an adapter says about its base.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordedBase {
    /// A hub id, or the path of a directory.
    pub name: Option<String>,
    /// The commit of the hub.
    pub revision: Option<String>,
    /// [`base_digest`] of the base, if this program trained the adapter.
    pub digest: Option<String>,
    /// How the base was packed while it was loaded (`model.quantization`), if it was.
    pub quantization: Option<Scheme>,
}

/// The result of a comparison with a base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BaseCheck {
    /// The directory is the adapter's base.
    Same,
    /// The adapter does not say enough to tell.
    Unknown,
    /// The name or the settings differ. The text is a notice for the user.
    OtherName(String),
    /// The weights are others. The text is the refusal, unless the user forces it.
    Other(String),
}

/// Largest trainer_state.json that is read, in bytes.
const STATE_LIMIT: u64 = 16 << 20;

/// What identifies a base model: the digest of its weights (all bytes of all files) and the hash of
/// its config.json, joined by a colon. A GGUF file has no config.json: the word `gguf` stands for it.
/// All files are read.
///
/// # Errors
/// If a file is missing or cannot be read.
pub fn base_digest(directory: &Path) -> Result<String, ModelError> {
    if let Some(base) = GgufBase::open(directory)? {
        return Ok(format!("{}:gguf", base.digest()?));
    }
    let config = hex(&content_hash(&directory.join("config.json"))?);
    Ok(format!("{}:{config}", TensorSet::open_model(directory)?.digest()?))
}

/// A file of a base's weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseFile {
    /// What identifies it on any host.
    pub digest: FileDigest,
    /// The file as it was opened here. `None`: only its header is here.
    pub opened: Option<OpenedFile>,
}

/// The files of a base's weights, of which only the headers of some may be here. Those that are here and that `wanted`
/// accepts by their names are read.
///
/// # Errors
/// If neither a file nor its header is here, or one cannot be read.
pub fn base_files(directory: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<BaseFile>, ModelError> {
    let (digests, opened): (Vec<FileDigest>, Vec<Option<OpenedFile>>) = match GgufBase::open(directory)? {
        Some(base) => (base.file_digests(wanted)?, base.opened().cloned().map(Some).collect()),
        None => {
            let files = TensorSet::open_model(directory)?;
            (files.file_digests(wanted)?, files.each_opened().map(|file| file.cloned()).collect())
        }
    };
    Ok(digests.into_iter().zip(opened).map(|(digest, opened)| BaseFile { digest, opened }).collect())
}

/// [`base_digest`] of a base whose files several processes have read: the same text as of one that reads them all.
/// `None`: the content of a file is not known.
///
/// # Errors
/// If config.json cannot be read.
pub fn base_digest_of(directory: &Path, files: &[FileDigest]) -> Result<Option<String>, ModelError> {
    if gguf_file(directory)?.is_some() {
        return Ok(gguf_digest_of(files).map(|weights| format!("{weights}:gguf")));
    }
    let config = hex(&content_hash(&directory.join("config.json"))?);
    Ok(FileDigest::of_all(files).map(|weights| format!("{weights}:{config}")))
}

impl RecordedBase {
    /// From the directory of an adapter or a checkpoint, and its adapter_config.json.
    pub(super) fn read(directory: &Path, config: &Value) -> RecordedBase {
        let text = |key: &str| config.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
        // mlx-lm calls it `model`.
        let name = text("base_model_name_or_path").or(text("model"));
        RecordedBase {
            name: name.map(str::to_owned),
            revision: text("revision").map(str::to_owned),
            digest: manifest_digest(directory).or_else(|| state_digest(directory)),
            quantization: manifest_quantization(directory).or_else(|| state_quantization(directory)),
        }
    }
}

/// What a manifest says. A manifest that cannot be read says nothing: other code checks whether the
/// directory is whole.
fn manifest_field(directory: &Path, field: &str) -> Option<Value> {
    let path = directory.join(MANIFEST_NAME);
    let bytes = read_bounded(&path, MAX_MANIFEST_BYTES).ok()?;
    Manifest::parse(&path, &bytes).ok()?.field(field).cloned()
}

/// What a manifest says about the base.
fn manifest_digest(directory: &Path) -> Option<String> {
    digest_of_weights(&manifest_field(directory, "base_digest")?)
}

/// How the base was packed while it was loaded, as a manifest says it.
fn manifest_quantization(directory: &Path) -> Option<Scheme> {
    scheme_named(manifest_field(directory, "quantization")?.as_str()?)
}

/// What a run's state says that it is made of.
fn state_identity(directory: &Path) -> Option<Value> {
    let bytes = read_bounded(&directory.join("trainer_state.json"), STATE_LIMIT).ok()?;
    let mut state: Value = serde_json::from_slice(&bytes).ok()?;
    Some(state.get_mut("identity")?.take())
}

/// What a checkpoint's state says about the base.
fn state_digest(directory: &Path) -> Option<String> {
    digest_of_weights(&state_identity(directory)?["model"])
}

/// The value of `model.quantization` in a checkpoint's state.
fn state_quantization(directory: &Path) -> Option<Scheme> {
    let identity = state_identity(directory)?;
    let values = identity["recipe"].as_array()?;
    let value = values.iter().find(|pair| pair[0] == "model.quantization")?;
    scheme_named(value[1].as_str()?.trim_matches('"'))
}

/// Weights that were made from a seed have no digest.
fn digest_of_weights(value: &Value) -> Option<String> {
    value.as_str().filter(|digest| digest.contains(':') && !digest.starts_with("fresh:")).map(str::to_owned)
}

impl Adapter {
    /// Whether a model directory is the base that the adapter was trained on, as far as the adapter
    /// says. All weights are read if the adapter knows their digest.
    ///
    /// # Errors
    /// If the base's files are missing or cannot be read.
    pub fn check_base(&self, base: &Path) -> Result<BaseCheck, ModelError> {
        if let Some(recorded) = &self.base.digest {
            let found = base_digest(base)?;
            let weights = |digest: &str| digest.split(':').next().unwrap_or_default().to_owned();
            return Ok(if *recorded == found {
                BaseCheck::Same
            } else if weights(recorded) == weights(&found) {
                let base = base.display();
                BaseCheck::OtherName(format!("{base}/config.json is not what it was when the adapter was trained"))
            } else {
                BaseCheck::Other(self.describe_other(base))
            });
        }
        let Some(name) = &self.base.name else { return Ok(BaseCheck::Unknown) };
        Ok(match (same_directory(name, base), may_be(name, self.base.revision.as_deref(), base)) {
            (true, _) => BaseCheck::Same,
            (false, true) => BaseCheck::Unknown,
            (false, false) => {
                BaseCheck::OtherName(format!("the adapter names `{name}` as its base, not {}", base.display()))
            }
        })
    }

    /// Whether an embedding or an output layer comes along, in the place of the base's.
    pub fn brings_vocabulary(&self) -> bool {
        !self.vocabulary.is_empty()
    }

    /// What to say if the base is packed in another way than when the adapter was trained.
    /// `quantization`: how it is packed while it is loaded now.
    pub fn quantization_notice(&self, quantization: Option<Scheme>) -> Option<String> {
        let words = |scheme: Option<Scheme>| match scheme {
            Some(scheme) => format!("packed as {} while it is loaded", scheme_word(scheme)),
            None => "as its files have it".to_owned(),
        };
        // Of an adapter that this program did not train nothing is known.
        let is_known = self.base.digest.is_some() || self.base.quantization.is_some();
        (is_known && self.base.quantization != quantization).then(|| {
            format!(
                "the adapter was trained over its base {}; here the base is {}, so answers differ a little",
                words(self.base.quantization),
                words(quantization)
            )
        })
    }

    /// The refusal for other weights.
    fn describe_other(&self, base: &Path) -> String {
        let named = self.base.name.as_ref().map_or(String::new(), |name| format!(" (it names `{name}`)"));
        format!("the adapter was trained on other weights than those of {}{named}", base.display())
    }
}

fn same_directory(name: &str, base: &Path) -> bool {
    match (Path::new(name).canonicalize(), base.canonicalize()) {
        (Ok(named), Ok(base)) => named == base,
        _ => false,
    }
}

/// Whether a name can mean this directory. It can if the last parts of both are the same, or if
/// config.json was written under that name. A directory in the Hugging Face cache has to be the
/// name's snapshot, and of the recorded commit if one is recorded.
fn may_be(name: &str, revision: Option<&str>, base: &Path) -> bool {
    let base = base.canonicalize().unwrap_or_else(|_| base.to_owned());
    let parts: Vec<&str> = base.iter().filter_map(|part| part.to_str()).collect();
    if let Some(at) = parts.iter().rposition(|part| part.starts_with("models--")) {
        let id = parts[at].trim_start_matches("models--").replacen("--", "/", 1);
        let commit = parts.get(at + 2).copied();
        let is_commit = |text: &str| text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let other_commit = revision.is_some_and(|revision| is_commit(revision) && commit != Some(revision));
        return id.eq_ignore_ascii_case(name) && !other_commit;
    }
    let last = |text: &str| text.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_lowercase();
    let own = parts.last().copied().unwrap_or_default();
    if !last(name).is_empty() && last(name) == own.to_lowercase() {
        return true;
    }
    let config = read_bounded(&base.join("config.json"), crate::files::config_json::LIMIT).unwrap_or_default();
    let config: Value = serde_json::from_slice(&config).unwrap_or_default();
    config["_name_or_path"].as_str() == Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (name, revision, directory, whether the name can mean it)
    #[test]
    fn names_that_can_mean_a_directory() {
        let commit = "0123456789012345678901234567890123456789";
        let snapshot = format!("/cache/models--Qwen--Qwen3-0.6B/snapshots/{commit}");
        let other = "f".repeat(40);
        for (name, revision, directory, want) in [
            ("Qwen/Qwen3-0.6B", None, "/models/Qwen3-0.6B", true),
            ("/old/place/qwen3-0.6b/", None, "/models/Qwen3-0.6B", true),
            ("Qwen/Qwen3-1.7B", None, "/models/Qwen3-0.6B", false),
            ("Qwen/Qwen3-0.6B", None, snapshot.as_str(), true),
            ("Qwen/Qwen3-0.6B", Some(commit), snapshot.as_str(), true),
            ("Qwen/Qwen3-0.6B", Some("main"), snapshot.as_str(), true),
            ("Qwen/Qwen3-0.6B", Some(other.as_str()), snapshot.as_str(), false),
            ("other/Qwen3-0.6B", None, snapshot.as_str(), false),
        ] {
            assert_eq!(may_be(name, revision, Path::new(directory)), want, "{name} {revision:?} {directory}");
        }
    }
}
