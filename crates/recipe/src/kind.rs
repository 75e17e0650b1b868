//! What a key takes. Each kind reads a TOML value with its checks, writes it back, and describes it
//! for `recipes/README.md` and for the JSON schema.

use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeArray, DeValue};

use crate::problem::{Location, Problem};
use crate::{hint, path};

mod columns;
mod log;
mod modules;
mod numbers;
mod paths;
mod texts;
mod variables;
mod words;

pub use columns::COLUMN_KEYS;
pub(crate) use columns::Columns;
pub(crate) use log::{Events, ShellCommand};
pub(crate) use modules::{ByName, Layers, Names, Targets};
pub(crate) use numbers::Bounds::{BelowOne, Between, NotNegative, Positive, Share};
pub(crate) use numbers::{Count, CountOrAuto, Counts, Epochs, Integer, Number, NumberPair, Numbers};
pub(crate) use paths::{ModelPath, OnePath, RowPaths};
pub(crate) use texts::{Address, Day, Period, Ports};
pub(crate) use variables::Variables;
pub use variables::{RESERVED_VARIABLES, Variable};
pub(crate) use words::{Switch, word};

/// What a key takes.
pub(crate) trait Kind {
    /// The value in the checked recipe.
    type Value;

    /// Reads what the user wrote.
    ///
    /// # Errors
    ///
    /// The value has another type, or is out of range.
    fn read(&self, written: &Written<'_, '_>) -> Result<Self::Value, Problem>;

    /// The value as canonical TOML on one line, which [`Kind::read`] reads back to the same value.
    fn write(&self, value: &Self::Value) -> String;

    /// The value as it counts in the digest.
    fn meaning(&self, value: &Self::Value) -> String {
        self.write(value)
    }

    /// A default as the documentation shows it: TOML text that is JSON too. `declared` is the text
    /// of the declaration.
    fn default_text(&self, _declared: &str, value: &Self::Value) -> String {
        self.write(value)
    }

    /// Whether `--set` may name one entry of the value: `data.columns.prompt=question`.
    fn is_table(&self) -> bool {
        false
    }

    /// What a value may be, in the words of `recipes/README.md`.
    fn words(&self) -> String;

    /// What a value may be: the members of a JSON schema (draft 7), without braces.
    fn schema(&self) -> String;
}

/// A value that the user wrote, with all that is needed to read it and to point at it.
pub(crate) struct Written<'a, 'i> {
    /// The path of the key, for messages.
    pub(crate) key: &'a str,
    pub(crate) value: &'a DeValue<'i>,
    pub(crate) location: &'a Location,
    /// The recipe, whose folder paths are relative to.
    pub(crate) file: &'a Path,
}

impl<'a, 'i> Written<'a, 'i> {
    pub(crate) fn problem(&self, message: impl Into<String>) -> Problem {
        Problem::new(self.location.clone(), message)
    }

    /// The value has another type than `expected`.
    pub(crate) fn wrong_type(&self, expected: &str) -> Problem {
        let problem = self.problem(format!("expected {expected}, found {}", hint::type_of(self.value)));
        match self.value {
            // YAML habits: 2e-4 in quotes, "true".
            DeValue::String(text) if unquoted_helps(expected, text) => {
                problem.hint(format!("write it without quotes: {}", text.trim()))
            }
            DeValue::Integer(_) | DeValue::Float(_) if expected.contains("duration") => {
                problem.hint("write it with a unit and in quotes, such as \"5s\"")
            }
            DeValue::Integer(_) | DeValue::Float(_) if expected.contains("string") || expected.contains("path") => {
                problem.hint("write it in quotes")
            }
            _ => problem,
        }
    }

    /// A string that is not empty.
    pub(crate) fn text(&self) -> Result<&'a str, Problem> {
        match self.value {
            DeValue::String(text) if text.trim().is_empty() => {
                Err(self.problem(format!("`{}` must not be empty", self.key)))
            }
            DeValue::String(text) => Ok(text),
            _ => Err(self.wrong_type("a string")),
        }
    }

    /// The text of a path, as written.
    pub(crate) fn path_text(&self) -> Result<&'a str, Problem> {
        let text = self.text()?;
        let key = self.key;
        let first = text.split('/').next().unwrap_or_default();
        let is_variable = |name: &str| name.starts_with(|first: char| first == '{' || first.is_ascii_uppercase());
        if first == "~" || first.strip_prefix('$').is_some_and(is_variable) {
            let message = format!("`{key}` starts with `{first}`, which only a shell replaces");
            return Err(self.problem(message).hint("write the whole path, or one relative to the recipe"));
        }
        if text.contains('\0') {
            return Err(self.problem(format!("`{key}` has a zero byte, which no path may have")));
        }
        Ok(text)
    }

    /// A path, joined to the recipe's folder.
    pub(crate) fn path(&self) -> Result<PathBuf, Problem> {
        let text = self.path_text()?;
        if text.contains("://") {
            let message = format!("`{}` is an address, and a path is meant", self.key);
            return Err(self
                .problem(message)
                .hint("name a path on this machine: nothing is fetched from addresses, nor written to them"));
        }
        Ok(path::joined(self.file, text))
    }

    /// Reads a part of the value, such as an item of a list.
    pub(crate) fn part<T>(
        &self,
        part: &Spanned<DeValue<'i>>,
        read: impl Fn(&Written<'_, '_>) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        let location = self.location.part(part.span());
        read(&Written { key: self.key, value: part.get_ref(), location: &location, file: self.file })
    }

    /// Reads every item of a list. The first problem ends it.
    pub(crate) fn items<T>(
        &self,
        items: &DeArray<'i>,
        read: impl Fn(&Written<'_, '_>) -> Result<T, Problem>,
    ) -> Result<Vec<T>, Problem> {
        items.iter().map(|item| self.part(item, &read)).collect()
    }
}

/// Whether a text without its quotes is what was expected.
fn unquoted_helps(expected: &str, text: &str) -> bool {
    let text = text.trim();
    let number = text.starts_with(|letter: char| letter.is_ascii_digit() || letter == '-');
    match expected {
        "an integer" => text.parse::<i64>().is_ok(),
        "a number" => number && text.parse::<f64>().is_ok_and(f64::is_finite),
        "true or false" => matches!(text, "true" | "false"),
        _ => false,
    }
}
