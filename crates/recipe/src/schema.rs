//! The JSON schema (draft 7) of recipes, for editors and for `taplo check`.
//!
//! Rules that look at the values of several keys are not in it: `finetune validate` has them.

use std::fmt::Write;

use crate::canonical::{list, quoted};
use crate::keys::{Absent, KEYS, Key, TABLES};

const OPENING: &str = r#"{
  "$schema": "http://json-schema.org/draft-07/schema#",
  "title": "A recipe of finetune",
  "description": "Made by `finetune schema`. recipes/README.md explains every key.",
"#;

/// The whole schema as JSON text.
pub fn json() -> String {
    let mut properties: Vec<String> = keys_of("").map(|key| property(key, "    ")).collect();
    for table in TABLES {
        let keys: Vec<String> = keys_of(table).map(|key| property(key, "        ")).collect();
        let required = names(keys_of(table).filter(|key| is_required(key)));
        properties.push(format!(
            "    {}: {{\n{}    }}",
            quoted(table),
            object(&keys, &required, &pairs(table), "      ")
        ));
    }
    let has_required = |table: &&&str| keys_of(table).any(is_required);
    let required: Vec<&str> = TABLES.iter().filter(has_required).copied().collect();
    format!("{OPENING}{}}}\n", object(&properties, &required, "", "  "))
}

/// The members of an object's schema, one a line. Other properties are refused.
fn object(properties: &[String], required: &[&str], more: &str, indent: &str) -> String {
    let mut text = format!("{indent}\"type\": \"object\",\n");
    let _ = writeln!(text, "{indent}\"properties\": {{\n{}\n{indent}}},", properties.join(",\n"));
    if !required.is_empty() {
        let _ = writeln!(text, "{indent}\"required\": {},", list(required, |name| quoted(name)));
    }
    if !more.is_empty() {
        let _ = writeln!(text, "{indent}{more},");
    }
    let _ = writeln!(text, "{indent}\"additionalProperties\": false");
    text
}

/// The schema of a key on one line.
fn property(key: &Key, indent: &str) -> String {
    let (about, default) = match key.absent {
        Absent::Is(text) => (key.about.to_owned(), format!(", \"default\": {}", text())),
        Absent::Required(_) => (key.about.to_owned(), String::new()),
        Absent::Unset(meaning) => (format!("{} (unset: {meaning})", key.about), String::new()),
    };
    let (name, about) = (quoted(key.name()), quoted(&about));
    format!("{indent}{name}: {{ \"description\": {about}, {}{default} }}", (key.schema)())
}

/// The pairs of keys of which only one may be given, as members of the table's schema.
fn pairs(table: &str) -> String {
    let pair = |key: &Key| {
        let one = key.replaces().and_then(|path| path.split_once('.')).map(|(_, name)| name)?;
        let both = list(&[one, key.name()], |name| quoted(name));
        Some(format!("{{ \"not\": {{ \"required\": {both} }} }}"))
    };
    let pairs: Vec<String> = keys_of(table).filter_map(pair).collect();
    if pairs.is_empty() { String::new() } else { format!("\"allOf\": [{}]", pairs.join(", ")) }
}

fn keys_of(table: &str) -> impl Iterator<Item = &'static Key> {
    KEYS.iter().filter(move |key| key.table() == table)
}

fn names(keys: impl Iterator<Item = &'static Key>) -> Vec<&'static str> {
    keys.map(Key::name).collect()
}

fn is_required(key: &Key) -> bool {
    matches!(key.absent, Absent::Required(_))
}
