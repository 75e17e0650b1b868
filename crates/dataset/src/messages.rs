//! Messages of a row as a chat template gets them: checked, without the keys that are null, and with what their flags say
//! about training on them.

use std::ops::Range;

use serde_json::{Map, Value};

use crate::jsonl::{self, RowProblem, kind};
use crate::row::{missing, wrong};

/// Keys of a message that say whether it is trained on: OpenAI's and Mistral's fine-tuning, axolotl, ms-swift.
const FLAGS: [&str; 8] = ["weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight", "loss_scale"];

/// Of these, the ones that ask for training on a message of any role.
const ASKING: [&str; 3] = ["train", "training", "trainable"];

/// axolotl's lists of characters that are trained on or not.
const DETAILS: [&str; 2] = ["train_detail", "training_detail"];

/// Other keys that templates or this program know.
const KNOWN: [&str; 8] =
    ["role", "content", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking", "tool_plan"];

/// What the flags of a message say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Training {
    /// Not to be trained on.
    pub(crate) muted: bool,
    /// The key that asks for training on a message that is not the assistant's.
    pub(crate) asked: Option<&'static str>,
    /// Characters of its content that are not to be trained on.
    pub(crate) untrained: Vec<Range<usize>>,
}

#[derive(Debug, Default)]
pub(crate) struct Messages {
    pub(crate) list: Vec<Value>,
    /// One for each message.
    pub(crate) training: Vec<Training>,
    /// Keys that nothing here knows.
    pub(crate) unknown: Vec<String>,
}

/// Checks the messages of a list, and drops what is null: transformers' `apply_chat_template` drops a message's keys whose
/// value is null, at its top level only, since within the arguments of a call null is data.
pub(crate) fn read(items: Vec<Value>, list: &str) -> Result<Messages, RowProblem> {
    let mut messages = Messages::default();
    for (index, item) in items.into_iter().enumerate() {
        messages.push(item, &format!("{list}[{index}]"), list)?;
    }
    Ok(messages)
}

impl Messages {
    fn push(&mut self, item: Value, path: &str, list: &str) -> Result<(), RowProblem> {
        let mut message = match item {
            Value::Object(message) => message,
            other => return Err(wrong(path, &other, "an object with \"role\" and \"content\"")),
        };
        let role = match message.get("role") {
            Some(Value::String(role)) if !role.is_empty() => role.clone(),
            Some(Value::String(_)) => return Err(RowProblem::new(format!("{path}.role is empty"))),
            Some(other) => return Err(wrong(&format!("{path}.role"), other, "a string")),
            None => return Err(missing(&format!("{path}.role"))),
        };
        check_calls(&mut message, path)?;
        check_content(&message, path)?;
        let training = training(&message, &role, path, "content")?;
        message.retain(|_, value| !value.is_null());
        for key in message.keys() {
            let name_of_tool = key == "name" && role != "user" && role != "assistant" && role != "system";
            if !name_of_tool && !is_known(key) {
                self.unknown(format!("{list}[].{key}"));
            }
        }
        self.list.push(Value::Object(message));
        self.training.push(training);
        Ok(())
    }

    pub(crate) fn unknown(&mut self, key: String) {
        if !self.unknown.contains(&key) {
            self.unknown.push(key);
        }
    }

    /// Puts a message in front of the others.
    pub(crate) fn put_first(&mut self, message: Value) {
        self.list.insert(0, message);
        self.training.insert(0, Training::default());
    }
}

/// Whether a key of a message has its meaning here.
fn is_known(key: &str) -> bool {
    KNOWN.contains(&key) || is_flag(key)
}

/// Whether a key says something about training on a message.
pub(crate) fn is_flag(key: &str) -> bool {
    FLAGS.contains(&key) || DETAILS.contains(&key)
}

/// Calls of tools: a list of objects, or a string that holds one. No calls and an empty list are the same: Arrow fills in
/// either, and templates that only ask whether the key is there would write the end of a call that never began.
fn check_calls(message: &mut Map<String, Value>, path: &str) -> Result<(), RowProblem> {
    if message.get("function_call").is_some_and(|call| !call.is_null()) {
        return Err(RowProblem::new(format!(
            "{path}.function_call is the old form of a call, which no chat template knows"
        ))
        .expected("\"tool_calls\": [{\"type\": \"function\", \"function\": {\"name\", \"arguments\"}}]"));
    }
    let Some(calls) = message.get_mut("tool_calls") else { return Ok(()) };
    let parsed = match calls {
        Value::String(text) if text.trim().is_empty() => Some(Value::Null),
        Value::String(text) => Some(
            jsonl::value(text)
                .map_err(|error| RowProblem::new(format!("{path}.tool_calls is a string that is not JSON: {error}")))?,
        ),
        _ => None,
    };
    if let Some(parsed) = parsed {
        *calls = parsed;
    }
    if matches!(calls, Value::Array(items) if items.is_empty()) {
        *calls = Value::Null;
    }
    match calls {
        Value::Null => Ok(()),
        Value::Array(items) => match items.iter().position(|item| !item.is_object()) {
            None => Ok(()),
            Some(index) => {
                Err(wrong(&format!("{path}.tool_calls[{index}]"), &items[index], "an object with \"function\""))
            }
        },
        other => Err(wrong(&format!("{path}.tool_calls"), other, "a list of calls")),
    }
}

fn check_content(message: &Map<String, Value>, path: &str) -> Result<(), RowProblem> {
    let without_content = message.get("tool_calls").is_some_and(Value::is_array);
    match message.get("content") {
        Some(Value::String(_)) => Ok(()),
        Some(Value::Array(parts)) => check_parts(parts, path),
        None | Some(Value::Null) if without_content => Ok(()),
        Some(other) => Err(wrong(&format!("{path}.content"), other, "a string, or a list of text parts")),
        None => Err(missing(&format!("{path}.content"))),
    }
}

fn check_parts(parts: &[Value], path: &str) -> Result<(), RowProblem> {
    for (index, part) in parts.iter().enumerate() {
        let path = format!("{path}.content[{index}]");
        match (part.get("type").and_then(Value::as_str), part.get("text")) {
            (Some("text"), Some(Value::String(_))) => {}
            (Some("text"), Some(other)) => return Err(wrong(&format!("{path}.text"), other, "a string")),
            (Some("text"), None) => return Err(missing(&format!("{path}.text"))),
            (Some(other), _) => {
                let shown: String = other.chars().take(40).collect();
                return Err(RowProblem::new(format!("{path} has the type {shown:?}: only text can be trained on")));
            }
            (None, _) => {
                return Err(
                    RowProblem::new(format!("{path} has no type")).expected("{\"type\": \"text\", \"text\": \"...\"}")
                );
            }
        }
    }
    Ok(())
}

/// What the flags of a message say. `text` is the key of its content.
pub(crate) fn training(
    message: &Map<String, Value>,
    role: &str,
    path: &str,
    text: &str,
) -> Result<Training, RowProblem> {
    let mut training = Training::default();
    for key in FLAGS {
        let Some(value) = message.get(key).filter(|value| !value.is_null()) else { continue };
        match flag(value) {
            Some(true) if role != "assistant" && ASKING.contains(&key) => training.asked = Some(key),
            Some(true) => {}
            Some(false) => training.muted = true,
            None => {
                let what = match value {
                    Value::Number(number) => format!("{path}.{key} is {number}: a message is trained on or not"),
                    other => format!("{path}.{key} is {}", kind(other)),
                };
                return Err(RowProblem::new(what).expected("0 or 1 (or false or true)"));
            }
        }
    }
    if let Some(value) = message.get("mask").filter(|value| !value.is_null()) {
        // Some dumps hide what is marked so, others show it.
        let what = format!("{path}.mask is {}, which has no one meaning", kind(value));
        return Err(RowProblem::new(what).expected("\"weight\": 0 on a message that is not to be trained on"));
    }
    for key in DETAILS {
        let Some(value) = message.get(key).filter(|value| !value.is_null()) else { continue };
        details(value, &format!("{path}.{key}"), &mut training, role, key)?;
        if !training.untrained.is_empty() && !message.get(text).is_some_and(Value::is_string) {
            return Err(RowProblem::new(format!("{path}.{key} counts the characters of a string, and {text} is none")));
        }
    }
    Ok(training)
}

/// 0 or 1, false or true.
fn flag(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        Value::Number(number) if number.as_f64() == Some(0.0) => Some(false),
        Value::Number(number) if number.as_f64() == Some(1.0) => Some(true),
        _ => None,
    }
}

/// axolotl's `train_detail`: ranges of characters, of which `end_offset` is the last. What no range names is trained on.
fn details(
    value: &Value,
    path: &str,
    training: &mut Training,
    role: &str,
    key: &'static str,
) -> Result<(), RowProblem> {
    let expected = "a list of {\"begin_offset\", \"end_offset\", \"train\"}";
    let Value::Array(items) = value else { return Err(wrong(path, value, expected)) };
    for (index, item) in items.iter().enumerate() {
        let offset = |key: &str| item.get(key).and_then(Value::as_u64).and_then(|offset| usize::try_from(offset).ok());
        let train = item.get("train").and_then(flag);
        let (Some(begin), Some(end), Some(train)) = (offset("begin_offset"), offset("end_offset"), train) else {
            return Err(RowProblem::new(format!("{path}[{index}] is no range of characters")).expected(expected));
        };
        match train {
            true if role != "assistant" => training.asked = Some(key),
            true => {}
            false => training.untrained.push(begin..end.saturating_add(1)),
        }
    }
    training.untrained.sort_by_key(|range| (range.start, range.end));
    Ok(())
}
