//! Values as Python writes them: `str()`, `repr()` and `json.dumps()`. Templates for jinja2 expect
//! them so.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use crate::integers::LongInteger;

/// `str(value)`. An undefined value is the empty string, as jinja2 prints it.
pub(crate) fn text(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        _ => repr(value),
    }
}

/// The name of the function that `a ~ b` becomes a call of (`operators.rs`).
pub(crate) const JOINED: &str = "_joined";

/// The texts of values, one behind the other.
///
/// # Errors
/// One of them nests too deeply.
pub(crate) fn joined(values: Rest<Value>) -> Result<String, Error> {
    let mut out = String::with_capacity(values.iter().filter_map(Value::as_str).map(str::len).sum());
    for value in values.iter() {
        match value.as_str() {
            Some(text) => out.push_str(text),
            None => out.push_str(&printed(value)?),
        }
    }
    Ok(out)
}

/// `repr(value)`. A value that nests too deeply is cut with "...", as Python does for a list in
/// itself.
pub(crate) fn repr(value: &Value) -> String {
    let mut out = String::new();
    write_repr(&mut out, value, 0);
    out
}

/// As [`text`].
///
/// # Errors
/// The value nests too deeply.
pub(crate) fn printed(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    if value.is_undefined() || write_repr(&mut out, value, 0) {
        return Ok(out);
    }
    Err(invalid(format!("a value nests deeper than {DEEPEST} levels")))
}

/// Writes `repr(value)`. Returns whether all of it was written.
fn write_repr(out: &mut String, value: &Value, depth: usize) -> bool {
    if depth > DEEPEST {
        out.push_str("...");
        return false;
    }
    let mut is_whole = true;
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => write_string_repr(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (index, item) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                is_whole &= write_repr(out, &item, depth + 1);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                is_whole &= write_repr(out, &key, depth + 1);
                out.push_str(": ");
                is_whole &= write_repr(out, &value.get_item(&key).unwrap_or_default(), depth + 1);
            }
            out.push('}');
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
    is_whole
}

fn write_string_repr(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            _ if character == quote => out.extend(['\\', quote]),
            _ if is_printable(character) => out.push(character),
            '\0'..='\u{ff}' => out.push_str(&format!("\\x{:02x}", character as u32)),
            '\u{100}'..='\u{ffff}' => out.push_str(&format!("\\u{:04x}", character as u32)),
            _ => out.push_str(&format!("\\U{:08x}", character as u32)),
        }
    }
    out.push(quote);
}

/// `str.isprintable`. Rust's own escaping leaves the same Unicode categories alone, except for
/// combining characters at the start of a string. So a letter is put in front.
fn is_printable(character: char) -> bool {
    matches!(character, ' '..='~') || format!("a{character}").escape_debug().nth(1) == Some(character)
}

fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => float_repr(float),
        _ => value.to_string(),
    }
}

/// `repr(float)`: the shortest digits that read back, in scientific form outside 1e-4 to 1e16.
fn float_repr(float: f64) -> String {
    if float.is_nan() {
        return "nan".to_owned();
    }
    if float.is_infinite() {
        return if float > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{float:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if float != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{float}");
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// Arguments in the order of their names. Those that are not given are undefined.
pub(crate) fn given(positional: &[Value], named: &Kwargs, names: &[&str]) -> Result<Vec<Value>, Error> {
    if positional.len() > names.len() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let mut values = Vec::with_capacity(names.len());
    for (index, name) in names.iter().enumerate() {
        let value = if named.has(name) { named.get::<Value>(name)? } else { Value::UNDEFINED };
        values.push(if value.is_undefined() { positional.get(index).cloned().unwrap_or_default() } else { value });
    }
    named.assert_all_used()?;
    Ok(values)
}

/// transformers' `tojson`, which does not escape HTML as jinja2's own does:
/// `json.dumps(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(crate) fn to_json(value: &Value, positional: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let options = given(&positional, &named, &["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let indent = match &options[1] {
        none if none.is_none() || none.is_undefined() => None,
        string if string.as_str().is_some() => string.as_str().map(str::to_owned),
        // For 0 and negative numbers Python breaks lines without indenting them.
        count => Some(" ".repeat(i64::try_from(count.clone())?.clamp(0, 64) as usize)),
    };
    let (item, key) = if options[2].is_none() || options[2].is_undefined() {
        (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned())
    } else {
        let pair: Vec<Value> = options[2].try_iter()?.collect();
        match pair.as_slice() {
            [item, key] => (text(item), text(key)),
            _ => return Err(invalid("tojson: separators is a pair, (item, key)")),
        }
    };
    let mut writer = JsonWriter {
        out: String::new(),
        ascii: options[0].is_true(),
        sort_keys: options[3].is_true(),
        indent,
        item,
        key,
    };
    writer.write(value, 0)?;
    Ok(Value::from(writer.out))
}

/// `json.dumps(value, ensure_ascii=False)` of a value of a row. `None`: it holds what no template
/// may be given.
pub(crate) fn json_text(value: &serde_json::Value) -> Option<String> {
    let value = crate::template::to_value(value).ok()?;
    let (item, key) = (", ".to_owned(), ": ".to_owned());
    let mut writer = JsonWriter { out: String::new(), ascii: false, sort_keys: false, indent: None, item, key };
    writer.write(&value, 0).ok()?;
    Some(writer.out)
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

struct JsonWriter {
    out: String,
    ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

/// The deepest nesting that is written: deeper than any parsed row (128) and any schema, and
/// shallow enough for the stack of a thread.
const DEEPEST: usize = 256;

impl JsonWriter {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEEPEST {
            return Err(invalid("tojson: nested too deeply"));
        }
        if let Some(LongInteger(digits)) = value.downcast_object_ref::<LongInteger>() {
            self.out.push_str(digits);
            return Ok(());
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&json_number(value)),
            ValueKind::String => self.write_string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.out.push('[');
                for (index, item) in items.iter().enumerate() {
                    self.start_item(index, depth);
                    self.write(item, depth + 1)?;
                }
                self.end_items(items.len(), depth);
                self.out.push(']');
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort_by_cached_key(text);
                }
                self.out.push('{');
                for (index, key) in keys.iter().enumerate() {
                    self.start_item(index, depth);
                    match key.kind() {
                        ValueKind::Bool => self.write_string(if key.is_true() { "true" } else { "false" }),
                        ValueKind::None => self.write_string("null"),
                        _ => self.write_string(&text(key)),
                    }
                    self.out.push_str(&self.key);
                    self.write(&value.get_item(key)?, depth + 1)?;
                }
                self.end_items(keys.len(), depth);
                self.out.push('}');
            }
            kind => return Err(invalid(format!("tojson: a value of type {kind} is not JSON"))),
        }
        Ok(())
    }

    fn start_item(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.out.push_str(&self.item);
        }
        self.break_line(depth + 1);
    }

    fn end_items(&mut self, count: usize, depth: usize) {
        if count > 0 {
            self.break_line(depth);
        }
    }

    fn break_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn write_string(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\x08' => self.out.push_str("\\b"),
                '\x0c' => self.out.push_str("\\f"),
                _ if (character as u32) < 0x20 || (self.ascii && !matches!(character, ' '..='~')) => {
                    for unit in character.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                _ => self.out.push(character),
            }
        }
        self.out.push('"');
    }
}

fn json_number(value: &Value) -> String {
    match number(value).as_str() {
        "nan" => "NaN".to_owned(),
        "inf" => "Infinity".to_owned(),
        "-inf" => "-Infinity".to_owned(),
        plain => plain.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_as_python_prints_them() {
        // Left: the float. Right: what CPython 3.12 prints.
        for (float, printed) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (123_456_789_012_345.6, "123456789012345.6"),
            (9_007_199_254_740_993.0, "9007199254740992.0"),
            (0.0001, "0.0001"),
            (0.000_012_5, "1.25e-05"),
            (1.5e300, "1.5e+300"),
            (5e-324, "5e-324"),
        ] {
            assert_eq!(float_repr(float), printed);
        }
    }

    #[test]
    fn values_as_python_prints_them() {
        let value: serde_json::Value =
            serde_json::from_str(r#"{"b": [1, 2.0, null, true], "a": "it's\n\"é\"\u0001"}"#).expect("JSON");
        let value = Value::from_serialize(value);
        assert_eq!(text(&value), r#"{'b': [1, 2.0, None, True], 'a': 'it\'s\n"é"\x01'}"#);
        assert_eq!(text(&Value::from("it's")), "it's");
        assert_eq!(text(&Value::from(vec!["it's"])), r#"["it's"]"#);
    }
}
