//! jinja2's filters, tests and functions that minijinja lacks or has in another form, as jinja2
//! 3.1.6 has them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use crate::integers::LongInteger;
use crate::python::{self, given};
use crate::{percent, python_text};

pub(crate) fn install(environment: &mut Environment<'_>) {
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("trim", trim);
    environment.add_filter("replace", replace);
    environment.add_filter("wordcount", |text: &Value| {
        let text = python::text(text);
        text.split(|it: char| !it.is_alphanumeric() && it != '_').filter(|word| !word.is_empty()).count()
    });
    environment.add_filter("center", |text: &Value, width: Option<usize>| {
        python_text::center(&python::text(text), width.unwrap_or(80), ' ')
    });
    environment.add_filter("upper", |text: &Value| python::text(text).to_uppercase());
    environment.add_filter("lower", |text: &Value| python::text(text).to_lowercase());
    environment.add_filter("capitalize", |text: &Value| capitalize(&python::text(text)));
    environment.add_filter("safe", |text: &Value| python::text(text));
    environment.add_filter("title", |text: &Value| title(&python::text(text)));
    environment.add_filter("escape", |text: &Value| escape(&python::text(text)));
    environment.add_filter("e", |text: &Value| escape(&python::text(text)));
    environment.add_filter("forceescape", |text: &Value| escape(&python::text(text)));
    environment.add_filter("truncate", truncate);
    environment.add_filter("striptags", |text: &Value| strip_tags(&python::text(text)));
    environment.add_filter("urlencode", url_encode);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("round", round);
    environment.add_filter("sum", sum);
    environment.add_filter("format", percent::filter);
    environment.add_function(percent::FUNCTION, percent::function);
    environment.add_function("cycler", |values: Rest<Value>| {
        if values.is_empty() {
            return Err(invalid("at least one item has to be provided"));
        }
        Ok(Value::from_object(Cycler { values: values.0, next: AtomicUsize::new(0) }))
    });
    environment.add_function("joiner", |between: Option<Value>| {
        let between = between.unwrap_or_else(|| Value::from(", "));
        Value::from_object(Joiner { between, used: AtomicBool::new(false) })
    });
    environment.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
            || value.downcast_object_ref::<LongInteger>().is_some()
    });
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// The filter `length`. An undefined value has no items.
fn length(value: &Value) -> Result<usize, Error> {
    match value.len() {
        Some(length) => Ok(length),
        None if value.is_undefined() => Ok(0),
        None => Err(invalid(format!("cannot calculate length of value of type {}", value.kind()))),
    }
}

fn trim(value: &Value, characters: Option<&str>) -> String {
    python_text::strip(&python::text(value), characters, true, true).to_owned()
}

fn replace(text: &Value, positional: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let options = given(&positional, &named, &["old", "new", "count"])?;
    let (text, old, new) = (python::text(text), python::text(&options[0]), python::text(&options[1]));
    Ok(match options[2].is_none() || options[2].is_undefined() {
        true => text.replace(&old, &new),
        false => match usize::try_from(options[2].clone()) {
            Ok(count) => text.replacen(&old, &new, count),
            Err(_) => text.replace(&old, &new),
        },
    })
}

fn capitalize(text: &str) -> String {
    let mut rest = text.chars();
    rest.next()
        .map_or_else(String::new, |first| first.to_uppercase().chain(rest.as_str().to_lowercase().chars()).collect())
}

/// The filter `title`. Words begin behind white space, a hyphen and an opening bracket, not behind
/// an apostrophe: "It's A-B (C)".
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut begins = true;
    for character in text.chars() {
        if begins {
            out.extend(character.to_uppercase());
        } else {
            out.extend(character.to_lowercase());
        }
        begins = python_text::is_space(character) || "-({[<".contains(character);
    }
    out
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            other => out.push(other),
        }
    }
    out
}

fn truncate(text: &Value, positional: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let options = given(&positional, &named, &["length", "killwords", "end", "leeway"])?;
    let number = |value: &Value, usual: usize| match value.is_undefined() || value.is_none() {
        true => Ok(usual),
        false => usize::try_from(value.clone()),
    };
    let (length, leeway) = (number(&options[0], 255)?, number(&options[3], 5)?);
    let (text, end) = (python::text(text), options[2].as_str().unwrap_or("..."));
    let room = length.checked_sub(end.chars().count());
    let Some(room) = room else { return Err(invalid(format!("expected length >= {}, got {length}", end.len()))) };
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let kept: String = text.chars().take(room).collect();
    let kept =
        if options[1].is_true() { kept.as_str() } else { kept.rsplit_once(' ').map_or(&*kept, |(kept, _)| kept) };
    Ok(format!("{kept}{end}"))
}

/// The filter `striptags`: without comments and tags, and with single white space.
fn strip_tags(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('<') {
        let close = if rest[start..].starts_with("<!--") { "-->" } else { ">" };
        let Some(length) = rest[start..].find(close) else { break };
        out.push_str(&rest[..start]);
        rest = &rest[start + length + close.len()..];
    }
    out.push_str(rest);
    let words: Vec<&str> = out.split(python_text::is_space).filter(|word| !word.is_empty()).collect();
    let mut text = words.join(" ");
    for (entity, character) in
        [("&lt;", "<"), ("&gt;", ">"), ("&#39;", "'"), ("&#34;", "\""), ("&quot;", "\""), ("&amp;", "&")]
    {
        text = text.replace(entity, character);
    }
    text
}

fn url_encode(value: &Value) -> Result<String, Error> {
    let quoted = |text: &str, plus: bool| {
        let mut out = String::with_capacity(text.len());
        for byte in text.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => out.push(char::from(byte)),
                b'/' if !plus => out.push('/'),
                b' ' if plus => out.push('+'),
                _ => out.push_str(&format!("%{byte:02X}")),
            }
        }
        out
    };
    let pair = |key: &Value, value: &Value| {
        format!("{}={}", quoted(&python::text(key), true), quoted(&python::text(value), true))
    };
    match value.kind() {
        ValueKind::Map => {
            let keys = value.try_iter()?;
            let pairs = keys.map(|key| Ok(pair(&key, &value.get_item(&key)?))).collect::<Result<Vec<_>, Error>>()?;
            Ok(pairs.join("&"))
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| {
                let parts: Vec<Value> = item.try_iter()?.collect();
                match &parts[..] {
                    [key, value] => Ok(pair(key, value)),
                    _ => Err(invalid("urlencode takes pairs")),
                }
            });
            Ok(items.collect::<Result<Vec<_>, Error>>()?.join("&"))
        }
        _ => Ok(quoted(&python::text(value), false)),
    }
}

fn int(value: &Value, positional: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let options = given(&positional, &named, &["default", "base"])?;
    let default = || if options[0].is_undefined() { Value::from(0) } else { options[0].clone() };
    let base = if options[1].is_undefined() { 10 } else { u32::try_from(options[1].clone())? };
    if let Some(text) = value.as_str() {
        let text = python_text::strip(text, None, true, true).replace('_', "");
        let (sign, digits) = match text.strip_prefix('-') {
            Some(digits) => (-1, digits),
            None => (1, text.strip_prefix('+').unwrap_or(&text)),
        };
        let prefix = match base {
            16 => ["0x", "0X"],
            8 => ["0o", "0O"],
            2 => ["0b", "0B"],
            _ => ["", ""],
        };
        let bare = digits.strip_prefix(prefix[0]).or_else(|| digits.strip_prefix(prefix[1])).unwrap_or(digits);
        let whole = (2..=36).contains(&base).then(|| i128::from_str_radix(bare, base).ok()).flatten();
        if let Some(whole) = whole.filter(|_| !bare.starts_with(['+', '-'])) {
            return Ok(small(sign * whole));
        }
        return Ok(text.parse::<f64>().ok().and_then(truncated).unwrap_or_else(default));
    }
    Ok(match value.kind() {
        ValueKind::Bool => Value::from(i64::from(value.is_true())),
        ValueKind::Number if value.is_integer() => value.clone(),
        ValueKind::Number => f64::try_from(value.clone()).ok().and_then(truncated).unwrap_or_else(default),
        _ if value.downcast_object_ref::<LongInteger>().is_some() => value.clone(),
        _ => default(),
    })
}

fn truncated(float: f64) -> Option<Value> {
    (float.is_finite() && float.abs() < 1e38).then(|| small(float.trunc() as i128))
}

/// A whole number as a value: an i64 if it fits, so that equal numbers are equal values.
fn small(number: i128) -> Value {
    i64::try_from(number).map_or_else(|_| Value::from(number), Value::from)
}

fn float(value: &Value, default: Option<Value>) -> Value {
    let number = match value.as_str() {
        Some(text) => python_text::strip(text, None, true, true).replace('_', "").parse::<f64>().ok(),
        None if value.kind() == ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        None => f64::try_from(value.clone()).ok(),
    };
    number.map(Value::from).or(default).unwrap_or_else(|| Value::from(0.0))
}

/// The filter `round`: half to even, as Python's `round`, which rounds the number that is stored
/// and not the one that was written.
fn round(value: &Value, positional: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let options = given(&positional, &named, &["precision", "method"])?;
    let precision = if options[0].is_undefined() { 0 } else { i32::try_from(options[0].clone())?.clamp(-300, 300) };
    let method = options[1].as_str().unwrap_or("common");
    if !["common", "ceil", "floor"].contains(&method) {
        return Err(invalid("method must be common, ceil or floor"));
    }
    if method == "common" && (value.is_integer() || value.kind() == ValueKind::Bool) {
        return Ok(value.clone());
    }
    let Ok(float) = f64::try_from(value.clone()) else {
        return Err(invalid(format!("cannot round value ({})", value.kind())));
    };
    let scale = 10f64.powi(precision);
    Ok(Value::from(match (method, usize::try_from(precision)) {
        ("ceil", _) => (float * scale).ceil() / scale,
        ("floor", _) => (float * scale).floor() / scale,
        (_, Ok(digits)) => format!("{float:.digits$}").parse().unwrap_or(float),
        (_, Err(_)) => (float * scale).round_ties_even() / scale,
    }))
}

fn sum(values: &Value, positional: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let options = given(&positional, &named, &["attribute", "start"])?;
    let start = if options[1].is_undefined() { Value::from(0) } else { options[1].clone() };
    let (mut whole, mut float) = (Some(0i128), 0.0);
    for item in std::iter::once(Ok(start)).chain(values.try_iter()?.map(|item| attribute(item, &options[0]))) {
        let item = item?;
        let number = f64::try_from(item.clone());
        float += number.map_err(|_| invalid(format!("cannot sum a value of type {}", item.kind())))?;
        let exact = if item.is_integer() || item.kind() == ValueKind::Bool { i128::try_from(item).ok() } else { None };
        whole = whole.zip(exact).and_then(|(sum, number)| sum.checked_add(number));
    }
    Ok(whole.map_or_else(|| Value::from(float), small))
}

/// The value at a path of keys as jinja2 writes it, `a.b.0`.
fn attribute(value: Value, path: &Value) -> Result<Value, Error> {
    if path.is_undefined() || path.is_none() {
        return Ok(value);
    }
    python::text(path).split('.').try_fold(value, |value, key| match key.parse::<i64>() {
        Ok(index) => value.get_item(&Value::from(index)),
        Err(_) => value.get_attr(key),
    })
}

#[derive(Debug)]
struct Cycler {
    values: Vec<Value>,
    next: AtomicUsize,
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let place = self.next.load(Ordering::Relaxed) % self.values.len();
        if key.as_str() == Some("current") { self.values.get(place).cloned() } else { None }
    }

    fn call_method(self: &Arc<Self>, _: &State<'_, '_>, method: &str, _: &[Value]) -> Result<Value, Error> {
        match method {
            "next" => {
                let place = self.next.fetch_add(1, Ordering::Relaxed) % self.values.len();
                Ok(self.values[place].clone())
            }
            "reset" => {
                self.next.store(0, Ordering::Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}

#[derive(Debug)]
struct Joiner {
    between: Value,
    used: AtomicBool,
}

impl Object for Joiner {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _: &State<'_, '_>, _: &[Value]) -> Result<Value, Error> {
        let used = self.used.swap(true, Ordering::Relaxed);
        Ok(if used { self.between.clone() } else { Value::from("") })
    }
}
