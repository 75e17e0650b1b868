//! Python's methods, filters and tests that minijinja and its `pycompat` lack or have in another
//! form than jinja2.

use chrono::NaiveDateTime;
use minijinja::value::{ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use crate::{python, python_filters, python_text};

/// Sets up filters, tests and methods as transformers' jinja2 environment has them. `now` is what a
/// template is told when it asks for the time.
pub(crate) fn install(environment: &mut Environment<'_>, now: NaiveDateTime) {
    python_filters::install(environment);
    environment.set_unknown_method_callback(method);
    environment.add_filter("tojson", python::to_json);
    environment.add_filter("string", |value: &Value| python::text(value));
    environment.add_function(python::JOINED, python::joined);
    environment.add_filter("join", join);
    environment.add_test("iterable", |value: &Value| {
        // minijinja iterates over none as over an empty list; Python does not.
        !value.is_none() && (value.as_str().is_some() || value.try_iter().is_ok())
    });
    // Values that have a length and can be indexed. In Python these include strings and dicts.
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    environment.add_function(EACH, |value: &Value| each(value).cloned());
    environment.add_filter("list", |state: &State<'_, '_>, value: &Value| {
        minijinja::filters::list(state, each(value)?.clone())
    });
    environment.add_function("raise_exception", raise_exception);
    environment.add_function(STRFTIME, move |format: &str| strftime(now, format));
}

/// The function that `template_loops.rs` puts around what a loop goes over.
pub(crate) const EACH: &str = "_each";

/// A value that is gone over. Python refuses none, and jinja2 takes what is undefined for an empty list.
fn each(value: &Value) -> Result<&Value, Error> {
    if value.is_none() { Err(invalid("'NoneType' object is not iterable")) } else { Ok(value) }
}

/// The method that `template_rewrite.rs` turns slices with a step into.
pub(crate) const SLICE: &str = "_slice";

/// Python's `value[start:stop:step]`.
fn slice(value: &Value, arguments: &[Value]) -> Result<Value, Error> {
    let (start, stop, step): (Option<i64>, Option<i64>, Option<i64>) = from_args(arguments)?;
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(invalid("slice step cannot be zero"));
    }
    let items: Vec<Value> = match (value.as_str(), value.kind()) {
        (Some(text), _) => text.chars().map(|character| Value::from(character.to_string())).collect(),
        (None, ValueKind::Seq | ValueKind::Iterable) => value.try_iter()?.collect(),
        (None, kind) => return Err(invalid(format!("a value of type {kind} cannot be sliced"))),
    };
    let length = items.len() as i64;
    // The bounds of a place: with a negative step the end is one before the first item.
    let (lowest, highest) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let place = |given: i64| (if given < 0 { given.saturating_add(length) } else { given }).clamp(lowest, highest);
    let (from, to) = if step > 0 { (lowest, highest) } else { (highest, lowest) };
    let (mut at, stop) = (start.map_or(from, place), stop.map_or(to, place));
    let mut taken = Vec::new();
    while if step > 0 { at < stop } else { at > stop } {
        taken.extend(usize::try_from(at).ok().and_then(|at| items.get(at)).cloned());
        at = at.saturating_add(step);
    }
    match value.as_str() {
        Some(_) => Ok(Value::from(taken.iter().filter_map(Value::as_str).collect::<String>())),
        None => Ok(Value::from(taken)),
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    Err(invalid(python::text(message)))
}

/// The function by which a template asks for the time.
pub(crate) const STRFTIME: &str = "strftime_now";

/// Python's `datetime.strftime(format)` of a time without a zone: `%Z` and `%z` are empty.
fn strftime(now: NaiveDateTime, format: &str) -> Result<String, Error> {
    use std::fmt::Write;
    // chrono's %f has nine digits, Python's six.
    let without_zone = format.replace("%Z", "").replace("%z", "").replace("%f", "%6f");
    let mut out = String::new();
    match write!(out, "{}", now.format(&without_zone)) {
        Ok(()) => Ok(out),
        Err(_) => Err(invalid(format!("strftime_now: {format:?} is not a time format"))),
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
    for value in each(values)?.try_iter()? {
        texts.push(match &attribute {
            Some(attribute) => python::text(&value.get_attr(attribute)?),
            None => python::text(&value),
        });
    }
    Ok(texts.join(&between))
}

fn method(state: &State<'_, '_>, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    if name == SLICE {
        return slice(value, arguments);
    }
    if let Some(text) = value.as_str()
        && let Some(result) = python_text::method(text, name, arguments)
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

/// Prints a value as Python does: `True`, `None`, lists and dicts by `repr`.
pub(crate) fn print(out: &mut minijinja::Output<'_>, _state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    let written = match value.as_str() {
        Some(text) => out.write_str(text),
        None => out.write_str(&python::printed(value)?),
    };
    written.map_err(Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_python_s() {
        // Each line: arguments, and what CPython makes of list(range(5)).
        for (arguments, taken) in [
            ((None, None, Some(-1)), vec![4, 3, 2, 1, 0]),
            ((Some(2), Some(0), Some(-1)), vec![2, 1]),
            ((Some(-2), None, Some(-2)), vec![3, 1]),
            ((Some(99), Some(-99), Some(-3)), vec![4, 1]),
            ((Some(1), Some(-1), Some(2)), vec![1, 3]),
            ((None, Some(3), None), vec![0, 1, 2]),
            ((Some(3), Some(1), Some(1)), vec![]),
        ] {
            let arguments = [arguments.0, arguments.1, arguments.2].map(Value::from);
            assert_eq!(
                slice(&Value::from((0..5).collect::<Vec<i64>>()), &arguments).expect("a slice"),
                Value::from(taken)
            );
            assert_eq!(slice(&Value::from(Vec::<i64>::new()), &arguments).expect("a slice").len(), Some(0));
        }
        let reversed = slice(&Value::from("aé"), &[Value::from(()), Value::from(()), Value::from(-1)]);
        assert_eq!(reversed.expect("a slice"), Value::from("éa"));
    }
}
