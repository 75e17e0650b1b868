//! Paths, relative to the recipe's folder.

use std::path::{Path, PathBuf};

use toml::de::DeValue;

use super::{Kind, Written};
use crate::canonical::{list, quoted};
use crate::path::{self, absolute};
use crate::problem::Problem;

/// The members of a JSON schema for a text that is not blank.
pub(super) const TEXT_SCHEMA: &str = r#""type": "string", "pattern": "\\S""#;

/// One path.
pub(crate) struct OnePath;

impl Kind for OnePath {
    type Value = PathBuf;

    fn read(&self, written: &Written<'_, '_>) -> Result<PathBuf, Problem> {
        written.path()
    }

    /// Absolute, so that it holds in any folder.
    fn write(&self, value: &PathBuf) -> String {
        path_text(value)
    }

    /// The last name only: a run may move. What the file holds is compared elsewhere.
    fn meaning(&self, value: &PathBuf) -> String {
        quoted(&value.file_name().unwrap_or(value.as_os_str()).to_string_lossy())
    }

    fn words(&self) -> String {
        "path".to_owned()
    }

    fn schema(&self) -> String {
        TEXT_SCHEMA.to_owned()
    }
}

/// A path, or a list of paths.
pub(crate) struct Paths;

impl Kind for Paths {
    type Value = Vec<PathBuf>;

    fn read(&self, written: &Written<'_, '_>) -> Result<Vec<PathBuf>, Problem> {
        match written.value {
            DeValue::Array(items) if items.is_empty() => {
                Err(written.problem(format!("`{}` must name a file", written.key)))
            }
            DeValue::Array(items) => written.items(items, |item| item.path()),
            DeValue::String(_) => Ok(vec![written.path()?]),
            _ => Err(written.wrong_type("a path or a list of paths")),
        }
    }

    fn write(&self, value: &Vec<PathBuf>) -> String {
        list(value, |path| path_text(path))
    }

    fn words(&self) -> String {
        "path, or list of paths".to_owned()
    }

    fn schema(&self) -> String {
        let items = format!(r#""type": "array", "items": {{ {TEXT_SCHEMA} }}, "minItems": 1"#);
        format!(r#""anyOf": [{{ {TEXT_SCHEMA} }}, {{ {items} }}]"#)
    }
}

/// A model directory, or a hub id.
pub(crate) struct ModelPath;

impl Kind for ModelPath {
    type Value = String;

    fn read(&self, written: &Written<'_, '_>) -> Result<String, Problem> {
        Ok(path::model(written.file, written.path_text()?))
    }

    fn write(&self, value: &String) -> String {
        if path::is_hub_id(value) { quoted(value) } else { path_text(Path::new(value)) }
    }

    fn words(&self) -> String {
        "text".to_owned()
    }

    fn schema(&self) -> String {
        TEXT_SCHEMA.to_owned()
    }
}

pub(super) fn path_text(path: &Path) -> String {
    quoted(&absolute(path).to_string_lossy())
}
