//! Python's methods, filters and tests where minijinja and its `pycompat` lack them or differ from jinja2.

use minijinja::value::{ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use crate::python;

/// Sets up filters, tests and methods as transformers' jinja2 environment has them.
pub(crate) fn install(environment: &mut Environment<'_>) {
    environment.set_unknown_method_callback(method);
    environment.add_filter("tojson", python::to_json);
    environment.add_filter("string", |value: &Value| python::text(value));
    environment.add_filter("trim", trim);
    environment.add_filter("join", join);
    environment.add_test("iterable", |value: &Value| value.as_str().is_some() || value.try_iter().is_ok());
    // What has a length and can be indexed, which in Python a string and a dict do too.
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    Err(invalid(python::text(message)))
}

/// The local time, as Python's `datetime.now().strftime(format)`.
fn strftime_now(format: &str) -> Result<String, Error> {
    use std::fmt::Write;
    let mut out = String::new();
    match write!(out, "{}", chrono::Local::now().format(format)) {
        Ok(()) => Ok(out),
        Err(_) => Err(invalid(format!("strftime_now: {format:?} is not a time format"))),
    }
}

fn trim(value: &Value, characters: Option<&str>) -> String {
    let text = python::text(value);
    match characters {
        Some(characters) => text.trim_matches(|character| characters.contains(character)).to_owned(),
        None => text.trim().to_owned(),
    }
}

fn join(values: &Value, between: Option<&Value>, options: minijinja::value::Kwargs) -> Result<String, Error> {
    let attribute: Option<String> = options.get("attribute")?;
    options.assert_all_used()?;
    let between = between.map(python::text).unwrap_or_default();
    // A Python string iterates over its characters.
    if let Some(text) = values.as_str() {
        return Ok(text.chars().map(String::from).collect::<Vec<_>>().join(&between));
    }
    let mut texts = Vec::new();
    for value in values.try_iter()? {
        texts.push(match &attribute {
            Some(attribute) => python::text(&value.get_attr(attribute)?),
            None => python::text(&value),
        });
    }
    Ok(texts.join(&between))
}

fn method(state: &State<'_, '_>, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = string_method(text, name, arguments)
    {
        return result;
    }
    match (value.kind(), name) {
        (ValueKind::Map, "copy") | (ValueKind::Seq, "copy") => Ok(value.clone()),
        (ValueKind::Seq, "index") => {
            let (wanted,): (&Value,) = from_args(arguments)?;
            let found = value.try_iter()?.position(|item| item == *wanted);
            found.map(Value::from).ok_or_else(|| invalid("list.index: no such item"))
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments),
    }
}

/// String methods that pycompat lacks, or answers in bytes where Python counts characters.
fn string_method(text: &str, name: &str, arguments: &[Value]) -> Option<Result<Value, Error>> {
    let characters = |bytes: usize| text[..bytes].chars().count() as i64;
    let one = || one_string(arguments);
    let all = |test: fn(char) -> bool| Value::from(!text.is_empty() && text.chars().all(test));
    Some(match name {
        "find" => one().map(|part| Value::from(text.find(part).map_or(-1, characters))),
        "rfind" => one().map(|part| Value::from(text.rfind(part).map_or(-1, characters))),
        "index" => one().and_then(|part| {
            text.find(part).map(characters).map(Value::from).ok_or_else(|| invalid("str.index: substring not found"))
        }),
        "removeprefix" => one().map(|part| Value::from(text.strip_prefix(part).unwrap_or(text))),
        "removesuffix" => one().map(|part| Value::from(text.strip_suffix(part).unwrap_or(text))),
        "partition" => one().map(|part| match text.split_once(part) {
            Some((before, after)) => strings([before, part, after]),
            None => strings([text, "", ""]),
        }),
        "rpartition" => one().map(|part| match text.rsplit_once(part) {
            Some((before, after)) => strings([before, part, after]),
            None => strings(["", "", text]),
        }),
        "rsplit" => rsplit(text, arguments),
        "split" if matches!(arguments.first().and_then(Value::as_str), Some("")) => Err(invalid("empty separator")),
        "join" => from_args::<(&Value,)>(arguments).and_then(|(values,)| {
            let texts = values.try_iter()?.map(|value| python::text(&value)).collect::<Vec<_>>();
            Ok(Value::from(texts.join(text)))
        }),
        "casefold" => from_args::<()>(arguments).map(|()| Value::from(text.to_lowercase())),
        "isspace" => from_args::<()>(arguments).map(|()| all(char::is_whitespace)),
        "isalpha" => from_args::<()>(arguments).map(|()| all(char::is_alphabetic)),
        "isalnum" => from_args::<()>(arguments).map(|()| all(char::is_alphanumeric)),
        "isdigit" | "isnumeric" | "isdecimal" => from_args::<()>(arguments).map(|()| all(char::is_numeric)),
        "islower" => Ok(Value::from(text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase))),
        "isupper" => Ok(Value::from(text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase))),
        _ => return None,
    })
}

fn one_string(arguments: &[Value]) -> Result<&str, Error> {
    from_args::<(&str,)>(arguments).map(|(argument,)| argument)
}

fn strings<'a>(texts: impl IntoIterator<Item = &'a str>) -> Value {
    texts.into_iter().map(Value::from).collect()
}

fn rsplit(text: &str, arguments: &[Value]) -> Result<Value, Error> {
    let (separator, most): (Option<&str>, Option<i64>) = from_args(arguments)?;
    let pieces = most.and_then(|most| usize::try_from(most).ok()).map_or(usize::MAX, |most| most.saturating_add(1));
    let mut parts: Vec<&str> = match separator {
        Some("") => return Err(invalid("empty separator")),
        Some(separator) => text.rsplitn(pieces, separator).collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest = text.trim_end();
            while !rest.is_empty() {
                match rest.rfind(char::is_whitespace) {
                    Some(space) if parts.len() + 1 < pieces => {
                        parts.push(rest[space..].trim_start());
                        rest = rest[..space].trim_end();
                    }
                    _ => {
                        parts.push(rest.trim_start());
                        break;
                    }
                }
            }
            parts
        }
    };
    parts.reverse();
    Ok(strings(parts))
}

/// Python's rules are applied to what a template prints as well: `True`, `None`, lists and dicts by `repr`.
pub(crate) fn print(out: &mut minijinja::Output<'_>, _state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    let written = match value.as_str() {
        Some(text) => out.write_str(text),
        None => out.write_str(&python::text(value)),
    };
    written.map_err(Error::from)
}
