//! `--set key.path=value`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use toml::de::DeValue;

use crate::keys::{self, KEYS, TABLES};
use crate::parse::{Given, unknown_key, unknown_table};
use crate::problem::{Location, Problem};

/// Replaces what the file, or an earlier `--set`, gave for a key by the value of one `--set`.
///
/// # Errors
///
/// The text is not `key.path=value`, or the key is unknown.
pub(crate) fn apply<'a>(text: &'a str, given: &mut BTreeMap<&'static str, Given<'a>>) -> Result<(), Problem> {
    let location = || Location::Set(text.to_owned());
    let Some((path, value)) = text.split_once('=') else {
        return Err(Problem::new(location(), "expected key.path=value").hint("for example --set lora.rank=8"));
    };
    let path = path.trim();
    if TABLES.contains(&path) {
        let message = format!("[{path}] is a table: set its keys one by one");
        return Err(Problem::new(location(), message).hint(format!("for example --set {}", example(path))));
    }
    let (table, name) = path.split_once('.').unwrap_or(("", path));
    if !table.is_empty() && !TABLES.contains(&table) {
        return Err(unknown_table(table, location()));
    }
    let key = keys::find(table, name).ok_or_else(|| unknown_key(table, name, location()))?;
    // What the key excludes is removed too: `--set train.max_steps=5` removes `epochs = 3`.
    let replaces = |other: &&keys::Key| other.instead_of == Some(key.path) || key.instead_of == Some(other.path);
    for other in KEYS.iter().filter(replaces) {
        given.remove(other.path);
    }
    given.insert(key.path, Given { value: parse_value(value.trim()), location: location() });
    Ok(())
}

/// A value as TOML, or else as a string without quotes. Shells take quotes away, and `auto` or `5s`
/// need none.
fn parse_value(text: &str) -> DeValue<'_> {
    match DeValue::parse(text) {
        Ok(value) => value.into_inner(),
        Err(_) => DeValue::String(Cow::Borrowed(text)),
    }
}

/// A `--set` of the first key of a table.
fn example(table: &str) -> String {
    let key = KEYS.iter().find(|key| key.table() == table);
    key.map_or_else(String::new, |key| format!("{}=…", key.path))
}
