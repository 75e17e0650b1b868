//! Other forms of the same messages, for templates that do not take the form of the row.
//!
//! Arguments of calls that are JSON text (OpenAI's form) may become objects. A call that has name and
//! arguments at its own level may get them in `function`, and one without arguments may get empty ones.
//! Content that is a list of text parts may become a string, and so may data that a tool answered, as
//! JSON. The form of the row comes first, so that a template that takes it gets it. Last comes OpenAI's form of a row that is not in it ([`as_openai`]): the
//! templates of DeepSeek-V3 and R1 add arguments and content to other text.

use std::borrow::Cow;
use std::ops::Range;

use serde_json::{Map, Value};

use crate::json;
use crate::messages::{is_data, is_tool};
use crate::problem::RowProblem;
use crate::python;
use crate::template;

/// The messages as they are, and then in each other form that they can have.
pub(crate) fn of(messages: &[Value]) -> impl Iterator<Item = Cow<'_, [Value]>> {
    let with_text = messages.iter().any(|message| calls(message).any(|call| is_flat(call) || parsed(call).is_some()));
    let with_parts = messages.iter().any(|message| !is_text(message));
    let forms = [(false, false), (true, false), (false, true), (true, true)];
    let possible = move |(parse, join): &(bool, bool)| (with_text || !parse) && (with_parts || !join);
    forms.into_iter().filter(possible).map(move |(parse, join)| match (parse, join) {
        (false, false) => Cow::Borrowed(messages),
        _ => Cow::Owned(messages.iter().map(|message| changed(message, parse, join)).collect()),
    })
}

/// The messages with their contents as texts.
pub(crate) fn joined(messages: &[Value]) -> Vec<Value> {
    messages.iter().map(|message| changed(message, false, true)).collect()
}

/// The messages with the arguments of calls as JSON text, and with an empty content beside calls
/// where there is none. `None`: they are so already.
pub(crate) fn as_openai(messages: &[Value]) -> Option<Vec<Value>> {
    let mut messages = messages.to_vec();
    let mut is_changed = false;
    for message in &mut messages {
        let Some(list) = message.get_mut("tool_calls").and_then(Value::as_array_mut) else { continue };
        for call in list {
            if is_flat(call) {
                wrap(call);
                is_changed = true;
            }
            let object = arguments(call).filter(|given| given.is_object());
            let Some(text) = object.and_then(python::json_text) else { continue };
            function_mut(call)["arguments"] = Value::String(text);
            is_changed = true;
        }
        if message.get("content").is_none() {
            message["content"] = Value::String(String::new());
            is_changed = true;
        }
    }
    is_changed.then_some(messages)
}

/// Whether a message has no content but a string.
fn is_text(message: &Value) -> bool {
    !matches!(message["content"], Value::Array(_) | Value::Object(_))
}

fn calls(message: &Value) -> impl Iterator<Item = &Value> {
    message.get("tool_calls").and_then(Value::as_array).into_iter().flatten()
}

fn arguments(call: &Value) -> Option<&Value> {
    call.get("function").filter(|function| function.is_object()).unwrap_or(call).get("arguments")
}

/// Where a call has its name and arguments.
fn function_mut(call: &mut Value) -> &mut Value {
    match call.get("function").is_some_and(Value::is_object) {
        true => &mut call["function"],
        false => call,
    }
}

/// Whether a call has its name and arguments at its own level.
fn is_flat(call: &Value) -> bool {
    call.get("name").is_some() && !call.get("function").is_some_and(Value::is_object)
}

/// Puts name and arguments of such a call into `function`, as OpenAI has them. Its other keys stay.
fn wrap(call: &mut Value) {
    let Some(keys) = call.as_object_mut() else { return };
    let moved = ["name", "arguments"].into_iter().filter_map(|key| Some((key.to_owned(), keys.shift_remove(key)?)));
    let function = Value::Object(moved.collect());
    keys.insert("type".to_owned(), "function".into());
    keys.insert("function".to_owned(), function);
}

/// The arguments of a call, if they are the text of an object. An empty text is an empty object, and
/// so are arguments that are not there.
fn parsed(call: &Value) -> Option<Map<String, Value>> {
    let Some(arguments) = arguments(call) else { return Some(Map::new()) };
    let text = json::text(arguments)?.trim();
    if text.is_empty() {
        return Some(Map::new());
    }
    match json::value(text) {
        Ok(Value::Object(object)) => Some(object),
        _ => None,
    }
}

/// The calls of a message whose arguments are text, and not the text of an object.
pub(crate) fn unread(message: &Value) -> usize {
    let is_text = |call: &&Value| arguments(call).is_some_and(|given| json::text(given).is_some());
    calls(message).filter(is_text).filter(|call| parsed(call).is_none()).count()
}

fn changed(message: &Value, parse: bool, join: bool) -> Value {
    let mut message = message.clone();
    if join && let Some(json) = message.get("content").filter(|content| is_data(content)).and_then(python::json_text) {
        message["content"] = Value::String(json);
    } else if join && let Some(parts) = message.get("content").and_then(Value::as_array) {
        // The parts are joined without anything between them, as in mlx-lm and in templates that take parts (Gemma 3,
        // Llama 4, Qwen2.5-VL). Other servers put a space (transformers, SGLang) or a line break (vLLM, llama.cpp) there.
        let text: String = parts.iter().filter_map(|part| part.get("text").and_then(Value::as_str)).collect();
        message["content"] = Value::String(text);
    }
    if parse && let Some(calls) = message.get_mut("tool_calls").and_then(Value::as_array_mut) {
        for call in calls {
            if is_flat(call) {
                wrap(call);
            }
            let Some(object) = parsed(call) else { continue };
            function_mut(call)["arguments"] = Value::Object(object);
        }
    }
    message
}

/// Refuses a rendering of the messages in `scope` in which the template wrote text parts as Python
/// or JSON code, data of a tool as Python, or the text of a call's arguments as a quoted string.
pub(crate) fn check_written(
    messages: &[Value],
    scope: Range<usize>,
    rendering: &str,
    path: &dyn Fn(usize) -> String,
) -> Result<(), RowProblem> {
    let has_parts = messages[scope.clone()].iter().any(|message| !is_text(message));
    let code = if has_parts { code_in(rendering, messages) } else { Vec::new() };
    for index in scope {
        let message = &messages[index];
        // The result of a tool may hold JSON.
        let is_code = || code.iter().any(|is_json| !(*is_json && is_tool(message)));
        let as_code = match is_data(&message["content"]) {
            true => is_written_as_python(&message["content"], rendering),
            false => !is_text(message) && is_code(),
        };
        if as_code {
            return Err(RowProblem::WrittenAsCode(path(index)));
        }
        for (number, call) in calls(message).enumerate() {
            let Some(text) = arguments(call).and_then(Value::as_str).map(str::trim) else { continue };
            // Arguments that are the text of no object may be meant as a text.
            let is_text = parsed(call).is_none() && rendering.contains(text);
            if !is_text && is_quoted(rendering, text) {
                return Err(RowProblem::QuotedArguments { path: path(index), call: number });
            }
        }
    }
    Ok(())
}

/// How a part begins as Python or JSON code, and whether it is JSON.
const CODE: [(&str, bool); 4] =
    [("{'type': 'text'", false), ("{'text': '", false), ("{'text': \"", false), ("{\"type\": \"text\"", true)];

/// Of each kind of code that a rendering has and no message says, whether it is JSON.
fn code_in(rendering: &str, messages: &[Value]) -> Vec<bool> {
    let is_there = |code: &str| rendering.contains(code) && !messages.iter().any(|message| says(message, code));
    CODE.iter().filter(|(code, _)| is_there(code)).map(|(_, is_json)| *is_json).collect()
}

/// Whether data stands in a rendering as Python prints it, where JSON is another text.
fn is_written_as_python(data: &Value, rendering: &str) -> bool {
    let Ok(value) = template::to_value(data) else { return false };
    let printed = python::repr(&value);
    rendering.contains(&printed) && python::json_text(data).is_some_and(|json| json != printed)
}

/// Whether one of the texts within a value holds `text`.
fn says(value: &Value, text: &str) -> bool {
    match value {
        Value::String(it) => it.contains(text),
        Value::Array(items) => items.iter().any(|item| says(item, text)),
        Value::Object(entries) => entries.values().any(|value| says(value, text)),
        _ => false,
    }
}

/// Whether a rendering has the text of arguments only between quotes. If it has the text without
/// quotes too, the quoted one may belong to another part.
fn is_quoted(rendering: &str, text: &str) -> bool {
    if text.is_empty() {
        return true;
    }
    let is_bare = |(place, _): (usize, &str)| {
        let quoted = rendering[..place].ends_with('"') && rendering[place + text.len()..].starts_with('"');
        !quoted
    };
    !rendering.match_indices(text).any(is_bare)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn other_forms_are_tried_where_there_are_some() {
        let plain = [json!({"role": "user", "content": "a"})];
        assert_eq!(of(&plain).count(), 1);
        let call = |arguments: Value| json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]});
        assert_eq!(of(&[call(json!({"a": 1}))]).count(), 1);
        assert_eq!(of(&[call(json!("no JSON"))]).count(), 1);
        let data = [json!({"role": "tool", "content": {"a": [1.0, "é"]}})];
        assert_eq!(of(&data).nth(1).expect("as text")[0]["content"], json!("{\"a\": [1.0, \"é\"]}"));
        assert_eq!(of(&data).count(), 2);
        let messages = [call(json!("{\"a\": 1}")), json!({"role": "user", "content": [{"type": "text", "text": "b"}]})];
        let forms: Vec<_> = of(&messages).collect();
        assert_eq!(forms.len(), 4);
        assert_eq!(forms[0][..], messages);
        assert_eq!(forms[1][0], call(json!({"a": 1})));
        assert_eq!(forms[2][1]["content"], json!("b"));
        assert_eq!(of(&[call(json!(""))]).nth(1).expect("no arguments")[0], call(json!({})));
    }

    #[test]
    fn openai_s_form_is_made_where_a_row_is_not_in_it() {
        let call = |arguments: Value| json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]});
        let made = as_openai(&[call(json!({"a": [1.0, "é"], "b": {}}))]).expect("another form");
        assert_eq!(made[0]["content"], json!(""));
        assert_eq!(made[0]["tool_calls"][0]["function"]["arguments"], json!("{\"a\": [1.0, \"é\"], \"b\": {}}"));
        assert_eq!(as_openai(&made), None);
        assert_eq!(as_openai(&[json!({"role": "user"})]), None);
    }

    #[test]
    fn quoted_arguments_are_told_from_bare_ones() {
        for (rendering, quotes) in [
            (r#"{"arguments": {"a": 1}}"#, false),
            (r#"{"arguments": "{\"a\": 1}"}"#, true),
            (r#""{"a": 1}""#, true),
            ("```json\n{\"a\": 1}\n```", false),
        ] {
            assert_eq!(is_quoted(rendering, r#"{"a": 1}"#), quotes, "{rendering}");
        }
        assert!(is_quoted(r#""arguments": "{}""#, "{}"));
    }
}
