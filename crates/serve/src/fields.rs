//! The fields of a request's JSON object, with types and ranges. A field that is null is absent.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ApiError;

/// Values of a body. Each takes tens of bytes in memory, however short it is. A prompt of tokens is one of each.
const MOST_VALUES: usize = 1 << 20;

/// The fields of an object.
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    pub(crate) fn read(body: &[u8]) -> Result<Fields, ApiError> {
        // Some editors put a byte order mark in front of a file, and such a file may be sent.
        let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
        if has_more_values(body, MOST_VALUES) {
            return Err(ApiError::field("body", format!("the body has more than {MOST_VALUES} values")));
        }
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Fields(fields)),
            Ok(other) => Err(ApiError::field("body", format!("a JSON object is expected, not {}", kind(&other)))),
            Err(error) => Err(ApiError::field("body", format!("the body is not JSON: {error}"))),
        }
    }

    pub(crate) fn of(fields: Map<String, Value>) -> Fields {
        Fields(fields)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// A number within a range.
    pub(crate) fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_f64().ok_or_else(|| wrong(name, value, "a number"))?;
        if !range.contains(&number) {
            let (least, most) = range.into_inner();
            return Err(ApiError::field(name, format!("`{name}` is {value}, and must be from {least} to {most}")));
        }
        Ok(Some(number))
    }

    /// A whole number within a range.
    pub(crate) fn whole(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        // Some clients write 5.0.
        let whole = value.as_f64().filter(|number| number.fract() == 0.0 && number.abs() < 9e15);
        let is_fraction = value.as_f64().is_some_and(|number| number.fract() != 0.0);
        let refused = || match value.is_number() {
            true if is_fraction => ApiError::field(name, format!("`{name}` must be a whole number, not {value}")),
            true => ApiError::field(name, format!("`{name}` is {value}, which is too large")),
            false => wrong(name, value, "a whole number"),
        };
        let number = value.as_i64().or(whole.map(|number| number as i64)).ok_or_else(refused)?;
        if !range.contains(&number) {
            let (least, most) = range.into_inner();
            let most = if most == i64::MAX { "or more".to_owned() } else { format!("to {most}") };
            return Err(ApiError::field(name, format!("`{name}` is {number}, and must be {least} {most}")));
        }
        Ok(Some(number))
    }

    /// A count, of at least `least`.
    pub(crate) fn count(&self, name: &str, least: i64) -> Result<Option<usize>, ApiError> {
        let number = self.whole(name, least..=i64::MAX)?;
        Ok(number.map(|number| usize::try_from(number).unwrap_or(usize::MAX)))
    }

    pub(crate) fn flag(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.get(name).map(|value| value.as_bool().ok_or_else(|| wrong(name, value, "true or false"))).transpose()
    }

    pub(crate) fn text(&self, name: &str) -> Result<Option<&str>, ApiError> {
        self.get(name).map(|value| value.as_str().ok_or_else(|| wrong(name, value, "a string"))).transpose()
    }

    pub(crate) fn list(&self, name: &str) -> Result<Option<&[Value]>, ApiError> {
        let list = |value: &Value| value.as_array().map(Vec::len).ok_or_else(|| wrong(name, value, "a list"));
        self.get(name).map(list).transpose()?;
        Ok(self.get(name).and_then(Value::as_array).map(Vec::as_slice))
    }

    pub(crate) fn object(&self, name: &str) -> Result<Option<&Map<String, Value>>, ApiError> {
        self.get(name).map(|value| value.as_object().ok_or_else(|| wrong(name, value, "an object"))).transpose()
    }
}

/// Whether JSON has more values than these, before any of them is read: each but the first stands behind one of `[`, `{`,
/// `,` and `:`.
fn has_more_values(body: &[u8], most: usize) -> bool {
    let (mut count, mut in_text, mut is_escaped) = (0, false, false);
    for byte in body {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if in_text => is_escaped = true,
            b'"' => in_text = !in_text,
            b'[' | b'{' | b',' | b':' if !in_text => count += 1,
            _ => {}
        }
    }
    count > most
}

/// The error for a value of another type.
pub(crate) fn wrong(name: &str, value: &Value, wanted: &str) -> ApiError {
    ApiError::field(name, format!("`{name}` must be {wanted}, not {}", kind(value)))
}

/// What a JSON value is.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_order_mark_is_passed_over() {
        let fields = Fields::read("\u{feff}{\"n\": 1}".as_bytes()).expect("JSON");
        assert_eq!(fields.whole("n", 0..=1), Ok(Some(1)));
    }

    #[test]
    fn whole_numbers() {
        let read = |text: &str| {
            let fields = Fields::read(format!("{{\"n\": {text}}}").as_bytes()).expect("JSON");
            fields.whole("n", 0..=i64::MAX).map_err(|error| error.object().to_string())
        };
        for (text, want) in [("5", Some(5)), ("5.0", Some(5)), ("9223372036854775807", Some(i64::MAX)), ("null", None)]
        {
            assert_eq!(read(text), Ok(want), "{text}");
        }
        for (text, words) in [
            ("1.5", "must be a whole number, not 1.5"),
            ("9223372036854775808", "is 9223372036854775808, which is too large"),
            ("1e30", "which is too large"),
            ("-1", "must be 0 or more"),
            ("\"5\"", "must be a whole number, not a string"),
        ] {
            assert!(read(text).is_err_and(|error| error.contains(words)), "{text}: {:?}", read(text));
        }
    }

    #[test]
    fn values_are_counted_outside_of_texts() {
        for (body, most, want) in [
            (r#"{"a": [1, 2]}"#, 4, false),
            (r#"{"a": [1, 2]}"#, 3, true),
            (r#"{"a": ",[,[,["}"#, 2, false),
            (r#"{"a": "\",["}"#, 2, false),
            (r#"{"a": "\\",["#, 3, true),
            ("", 0, false),
        ] {
            assert_eq!(has_more_values(body.as_bytes(), most), want, "{body} {most}");
        }
    }
}
