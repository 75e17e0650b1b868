//! `--set key.path=value`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

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
    let (key, entry) = match (keys::find(table, name), name.split_once('.')) {
        (Some(key), _) => (key, None),
        (None, Some((name, entry))) if keys::find(table, name).is_some_and(|key| (key.is_table)()) => {
            (keys::find(table, name).expect("it was found above"), Some(entry))
        }
        (None, _) => return Err(unknown_key(table, name, location())),
    };
    // What the key excludes is removed too: `--set train.max_steps=5` removes `epochs = 3`.
    let replaces = |other: &&keys::Key| other.replaces() == Some(key.path) || key.replaces() == Some(other.path);
    for other in KEYS.iter().filter(replaces) {
        given.remove(other.path);
    }
    let value = match entry {
        None => parse_value(value.trim()),
        Some(entry) => with_entry(given.remove(key.path), entry, value.trim()),
    };
    given.insert(key.path, Given { value, location: location() });
    Ok(())
}

/// A table with one more entry. What was given and is no table is replaced.
fn with_entry<'a>(given: Option<Given<'a>>, entry: &'a str, value: &'a str) -> DeValue<'a> {
    let mut table = match given.map(|given| given.value) {
        Some(DeValue::Table(table)) => table,
        _ => DeTable::new(),
    };
    let name = Cow::Borrowed(entry.trim().trim_matches(['"', '\'']));
    table.insert(Spanned::new(0..0, name), Spanned::new(0..0, parse_value(value)));
    DeValue::Table(table)
}

/// A value as TOML, or else as a string without quotes, or a list of such. Shells take quotes away,
/// and `auto` or `5s` need none. Between quotes that are there a backslash stands for itself if TOML
/// has no such escape.
fn parse_value(text: &str) -> DeValue<'_> {
    let unquoted = || text.strip_prefix('"')?.strip_suffix('"').filter(|inside| !inside.contains('"'));
    match DeValue::parse(text) {
        Ok(value) => value.into_inner(),
        Err(_) => bare_list(text).unwrap_or(DeValue::String(Cow::Borrowed(unquoted().unwrap_or(text)))),
    }
}

/// `[q_proj,v_proj]`.
fn bare_list(text: &str) -> Option<DeValue<'_>> {
    let words = text.strip_prefix('[')?.strip_suffix(']')?;
    if words.contains(['[', ']', '{', '}', '"', '\'']) {
        return None;
    }
    let word = |word| Spanned::new(0..0, DeValue::String(Cow::Borrowed(word)));
    Some(DeValue::Array(words.split(',').map(str::trim).map(word).collect()))
}

/// A `--set` of the first key of a table.
fn example(table: &str) -> String {
    let key = KEYS.iter().find(|key| key.table() == table);
    key.map_or_else(String::new, |key| format!("{}=…", key.path))
}
