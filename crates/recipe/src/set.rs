//! `--set key.path=value`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use toml::de::DeValue;

use crate::keys::{self, EXCLUSIVE, TABLES};
use crate::parse::{Given, unknown_key, unknown_table};
use crate::problem::{Place, Problem};

/// Puts the value of one `--set` in place of what the file, or an earlier `--set`, gave.
pub(crate) fn apply<'a>(text: &'a str, given: &mut BTreeMap<&'static str, Given<'a>>) -> Result<(), Problem> {
    let place = || Place::Set(text.to_owned());
    let Some((path, value)) = text.split_once('=') else {
        return Err(Problem::new(place(), "expected key.path=value").hint("for example --set lora.rank=8"));
    };
    let path = path.trim();
    if TABLES.contains(&path) {
        let message = format!("[{path}] is a table: set its keys one by one");
        return Err(Problem::new(place(), message).hint(format!("for example --set {}", example(path))));
    }
    let (table, name) = path.split_once('.').unwrap_or(("", path));
    if !table.is_empty() && !TABLES.contains(&table) {
        return Err(unknown_table(table, place()));
    }
    let key = keys::find(table, name).ok_or_else(|| unknown_key(table, name, place()))?;
    // The command line wins over the file as a whole: `--set train.max_steps=5` also undoes `epochs = 3`.
    for [one, other] in EXCLUSIVE {
        if key.path == *one {
            given.remove(other);
        } else if key.path == *other {
            given.remove(one);
        }
    }
    given.insert(key.path, Given { value: parse_value(value.trim()), place: place() });
    Ok(())
}

/// As TOML, or where it is none, as a string without quotes: shells eat quotes, and `auto` or `5s` need none.
fn parse_value(text: &str) -> DeValue<'_> {
    match DeValue::parse(text) {
        Ok(value) => value.into_inner(),
        Err(_) => DeValue::String(Cow::Borrowed(text)),
    }
}

fn example(table: &str) -> String {
    let key = keys::KEYS.iter().find(|key| key.table() == table);
    key.map_or_else(String::new, |key| format!("{}=…", key.path))
}
