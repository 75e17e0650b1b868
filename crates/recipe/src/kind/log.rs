//! Where event files go, and a command of a shell.

use toml::de::DeValue;

use super::paths::path_text;
use super::{Kind, Written};
use crate::canonical::quoted;
use crate::choices::EventFolder;
use crate::problem::Problem;

/// `true`, `false` or a path.
pub(crate) struct Events;

impl Kind for Events {
    type Value = EventFolder;

    fn read(&self, written: &Written<'_, '_>) -> Result<EventFolder, Problem> {
        match written.value {
            DeValue::Boolean(false) => Ok(EventFolder::Off),
            DeValue::Boolean(true) => Ok(EventFolder::InRun),
            DeValue::String(text) if matches!(text.trim(), "true" | "false") => {
                Err(written.wrong_type("true or false"))
            }
            DeValue::String(_) => Ok(EventFolder::Below(written.path()?)),
            _ => Err(written.wrong_type("true, false or a folder")),
        }
    }

    fn write(&self, value: &EventFolder) -> String {
        match value {
            EventFolder::Off => "false".to_owned(),
            EventFolder::InRun => "true".to_owned(),
            EventFolder::Below(path) => path_text(path),
        }
    }

    fn words(&self) -> String {
        "`true`, `false`, or path".to_owned()
    }

    fn schema(&self) -> String {
        format!(r#""anyOf": [{{ "type": "boolean" }}, {{ {} }}]"#, super::paths::TEXT_SCHEMA)
    }
}

/// A command for a POSIX shell.
pub(crate) struct ShellCommand;

impl Kind for ShellCommand {
    type Value = String;

    fn read(&self, written: &Written<'_, '_>) -> Result<String, Problem> {
        let text = written.text()?;
        if text.contains('\0') {
            return Err(written.problem(format!("`{}` has a zero byte, which no command may have", written.key)));
        }
        Ok(text.to_owned())
    }

    fn write(&self, value: &String) -> String {
        quoted(value)
    }

    fn words(&self) -> String {
        "command".to_owned()
    }

    fn schema(&self) -> String {
        super::paths::TEXT_SCHEMA.to_owned()
    }
}
