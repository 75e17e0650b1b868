//! Which base model an adapter belongs to.

use std::path::Path;

use finetune_store::TensorSet;

use crate::ModelError;

/// What adapter_config.json calls the base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseName {
    pub name: String,
    pub revision: Option<String>,
}

/// What an adapter says of its base.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordedBase {
    pub name: Option<String>,
    pub revision: Option<String>,
    pub digest: Option<String>,
}

/// Whether a model directory is an adapter's base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BaseCheck {
    Same,
    Unknown,
    OtherName(String),
    Other(String),
}

/// Digest of weights and config of a model directory.
pub fn base_digest(directory: &Path) -> Result<String, ModelError> {
    let config = finetune_store::hex(&finetune_store::content_hash(&directory.join("config.json"))?);
    Ok(format!("{}:{config}", TensorSet::open_model(directory)?.digest()))
}
