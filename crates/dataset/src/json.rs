//! JSON values of rows.

use serde_json::Value;

use crate::integers;

/// Reads a JSON value. Whole numbers beyond 64 bits keep their digits (`integers.rs`).
///
/// # Errors
/// The text is no JSON, or nests deeper than 128 levels.
pub(crate) fn value(text: &str) -> Result<Value, serde_json::Error> {
    serde_json::from_str(&integers::marked(text))
}

/// The text of a string. `None`: the value is no string in its row. A long whole number is none,
/// though it passes through as a marked text (`integers.rs`).
pub(crate) fn text(value: &Value) -> Option<&str> {
    value.as_str().filter(|text| integers::digits(text).is_none())
}

/// The type of a JSON value, with its article.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(text) if integers::digits(text).is_some() => "a number",
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
