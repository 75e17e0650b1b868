//! Calls of tools in the forms of other programs, as the messages of today have them.

use serde_json::{Map, Value, json};

use crate::format_problem::FormatProblem;
use crate::json;
use crate::row;

/// The calls of a turn whose text is JSON, as ShareGPT's `function_call` has them: an object with
/// `name` and `arguments`, or a list of such objects. Reasoning between `<think>` and `</think>` may
/// stand in front. Returned are the text in front, and the calls.
pub(crate) fn of_text<'a>(text: &'a str, path: &str) -> Result<(&'a str, Value), FormatProblem> {
    let (before, rest) = match text.find("</think>") {
        Some(end) if text.trim_start().starts_with("<think>") => text.split_at(end + "</think>".len()),
        _ => ("", text),
    };
    let no_call = || FormatProblem::NoCall(path.to_owned());
    let found = json::value(rest.trim()).map_err(|_| no_call())?;
    let items = match found {
        Value::Array(items) if !items.is_empty() => items,
        Value::Object(_) => vec![found],
        _ => return Err(no_call()),
    };
    let calls = items.into_iter().map(|item| call(item).ok_or_else(no_call)).collect::<Result<Vec<_>, _>>()?;
    Ok((before, Value::Array(calls)))
}

/// One call, with its function in an object of its own.
pub(crate) fn call(item: Value) -> Option<Value> {
    let Value::Object(mut item) = item else { return None };
    if item.get("function").is_some_and(Value::is_object) {
        return Some(Value::Object(item));
    }
    let name = item.get("name").filter(|name| name.is_string())?.clone();
    let arguments = item.remove("arguments").or_else(|| item.remove("parameters")).unwrap_or_else(|| json!({}));
    Some(json!({"type": "function", "function": {"name": name, "arguments": arguments}}))
}

/// Refuses a call that names no function. It may have name and arguments in `function`, as OpenAI
/// writes it, or at its own level.
pub(crate) fn check(call: &Value, path: &str) -> Result<(), FormatProblem> {
    const CALL: &str = "an object with \"function\": {\"name\", \"arguments\"}";
    let Some(keys) = call.as_object() else { return Err(FormatProblem::wrong(path, call, CALL)) };
    match keys.get("function") {
        Some(Value::Object(function)) => row::string_at(function, "name", &format!("{path}.function.name")).map(drop),
        None | Some(Value::Null) if keys.contains_key("name") => {
            row::string_at(keys, "name", &format!("{path}.name")).map(drop)
        }
        None => Err(FormatProblem::Missing(format!("{path}.function"))),
        Some(other) => Err(FormatProblem::wrong(&format!("{path}.function"), other, CALL)),
    }
}

/// Descriptions of functions as tools: `{"name", …}` becomes `{"type": "function", "function"}`.
pub(crate) fn tools(items: Vec<Value>) -> Value {
    let wrapped = |item: Value| match &item {
        Value::Object(object) if is_bare(object) => json!({"type": "function", "function": item}),
        _ => item,
    };
    Value::Array(items.into_iter().map(wrapped).collect())
}

fn is_bare(tool: &Map<String, Value>) -> bool {
    tool.get("name").is_some_and(Value::is_string) && !tool.contains_key("function") && !tool.contains_key("type")
}
