//! Values as TOML text, always the same for the same value.

use std::collections::BTreeMap;
use std::fmt::Write;

/// Rust's shortest form that reads back to the same bits. It always has a point or an exponent, so
/// TOML reads a float.
pub(crate) fn float(number: f64) -> String {
    format!("{number:?}")
}

/// A list on one line.
pub(crate) fn list<T>(items: &[T], text: impl Fn(&T) -> String) -> String {
    format!("[{}]", items.iter().map(text).collect::<Vec<_>>().join(", "))
}

/// An inline table.
pub(crate) fn by_name<T>(items: &BTreeMap<String, T>, text: impl Fn(&T) -> String) -> String {
    if items.is_empty() {
        return "{}".to_owned();
    }
    let entries: Vec<String> = items.iter().map(|(name, item)| format!("{} = {}", quoted(name), text(item))).collect();
    format!("{{ {} }}", entries.join(", "))
}

/// A TOML basic string on one line, which is a JSON string too.
pub(crate) fn quoted(text: &str) -> String {
    let mut result = String::from("\"");
    for letter in text.chars() {
        match letter {
            '"' | '\\' => {
                result.push('\\');
                result.push(letter);
            }
            letter if letter.is_control() => {
                let _ = write!(result, "\\u{:04X}", letter as u32);
            }
            letter => result.push(letter),
        }
    }
    result + "\""
}
