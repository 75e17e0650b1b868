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

/// Files of rows: as [`Paths`], with patterns (`data/*.jsonl`) and data sets of the hub
/// (`hf://owner/name/split`), which stay as they are written.
pub(crate) struct RowPaths;

impl RowPaths {
    fn one(written: &Written<'_, '_>) -> Result<PathBuf, Problem> {
        let text = written.path_text()?;
        if path::is_hub_rows(Path::new(text)) {
            return match path::hub_rows_fault(text) {
                None => Ok(PathBuf::from(text)),
                Some(fault) => {
                    let message = format!("`{}` names no data set of the hub: {fault}", written.key);
                    Err(written.problem(message).hint("for example \"hf://owner/name\", or \"hf://owner/name/split\""))
                }
            };
        }
        if let Some(name) = path::hub_page(text) {
            let message = format!("`{}` is an address: a path, or a data set of the hub, is meant", written.key);
            return Err(written.problem(message).hint(format!("write \"{}{name}\"", path::HUB_ROWS)));
        }
        written.path()
    }
}

impl Kind for RowPaths {
    type Value = Vec<PathBuf>;

    fn read(&self, written: &Written<'_, '_>) -> Result<Vec<PathBuf>, Problem> {
        match written.value {
            DeValue::Array(items) if !items.is_empty() => written.items(items, Self::one),
            DeValue::String(_) => Ok(vec![Self::one(written)?]),
            _ => Paths.read(written),
        }
    }

    fn write(&self, value: &Vec<PathBuf>) -> String {
        let text = |path: &PathBuf| match path::is_hub_rows(path) {
            true => quoted(&path.to_string_lossy()),
            false => path_text(path),
        };
        list(value, text)
    }

    fn words(&self) -> String {
        Paths.words()
    }

    fn schema(&self) -> String {
        Paths.schema()
    }
}

pub(super) fn path_text(path: &Path) -> String {
    quoted(&absolute(path).to_string_lossy())
}
