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

/// The type of a JSON value, with its article.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
