//! Messages of a row as a chat template gets them: checked, without the keys that are null, and
//! with what their flags say about training.

use std::ops::Range;

use serde_json::{Map, Value};

use crate::calls;
use crate::format_problem::{FLAG, FormatProblem, PART, RANGES};
use crate::json::{self, kind};
use crate::row;

/// Keys of a message that say whether it is trained on, as OpenAI's and Mistral's fine-tuning,
/// axolotl and ms-swift have them.
const FLAGS: [&str; 8] = ["weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight", "loss_scale"];

/// Those of [`FLAGS`] that ask for training on a message of any role.
const ASKING: [&str; 3] = ["train", "training", "trainable"];

/// axolotl's keys for ranges of characters that are trained on or not.
const DETAILS: [&str; 2] = ["train_detail", "training_detail"];

/// Other keys that templates or this program know.
const KNOWN: [&str; 8] =
    ["role", "content", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking", "tool_plan"];

/// What the flags of a message say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TrainingFlags {
    /// Not to be trained on.
    pub(crate) muted: bool,
    /// The key that asks for training on a message that is not the assistant's.
    pub(crate) asked: Option<&'static str>,
    /// Ranges of characters of its content that are not to be trained on, ascending.
    pub(crate) untrained: Vec<Range<usize>>,
}

#[derive(Debug, Default)]
pub(crate) struct Messages {
    pub(crate) list: Vec<Value>,
    /// One for each message.
    pub(crate) training: Vec<TrainingFlags>,
    /// Keys that have no use, each once.
    pub(crate) unknown: Vec<String>,
}

/// Checks the messages of a list, and drops their keys that are null, as transformers'
/// `apply_chat_template` does. Only keys at the top level of a message are dropped, since null
/// within the arguments of a call is data.
///
/// OpenAI's former `function_call` becomes a call of today, and the role `function` beside it
/// `tool`.
pub(crate) fn read(mut items: Vec<Value>, list: &str) -> Result<Messages, FormatProblem> {
    let mut messages = Messages::default();
    let has_old_call = |item: &Value| item.get("function_call").is_some_and(|call| !call.is_null());
    if items.iter().any(has_old_call) {
        items.iter_mut().filter(|item| item["role"] == "function").for_each(|item| item["role"] = "tool".into());
    }
    for (index, item) in items.into_iter().enumerate() {
        messages.push(item, &format!("{list}[{index}]"), list)?;
    }
    Ok(messages)
}

impl Messages {
    fn push(&mut self, item: Value, path: &str, list: &str) -> Result<(), FormatProblem> {
        let mut message = match item {
            Value::Object(message) => message,
            other => return Err(FormatProblem::wrong(path, &other, "an object with \"role\" and \"content\"")),
        };
        let role = row::string_at(&message, "role", &format!("{path}.role"))?;
        if role.is_empty() {
            return Err(FormatProblem::Empty(format!("{path}.role")));
        }
        check_calls(&mut message, path)?;
        check_content(&message, &role, path)?;
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
        self.training.insert(0, TrainingFlags::default());
    }
}

/// Whether a key of a message has a use.
fn is_known(key: &str) -> bool {
    KNOWN.contains(&key) || is_flag(key)
}

/// Whether a key says something about training on a message.
pub(crate) fn is_flag(key: &str) -> bool {
    FLAGS.contains(&key) || DETAILS.contains(&key)
}

/// Checks the calls of tools: a list of objects, or a string that holds one. An empty list becomes
/// null, since Arrow fills in either. Templates that only ask whether the key is there would
/// otherwise write the end of a call that never began.
fn check_calls(message: &mut Map<String, Value>, path: &str) -> Result<(), FormatProblem> {
    if let Some(call) = message.shift_remove("function_call").filter(|call| !call.is_null()) {
        let has_calls = message.get("tool_calls").is_some_and(|calls| !calls.is_null());
        let call = if has_calls { None } else { calls::call(call) };
        let call = call.ok_or_else(|| FormatProblem::OldCall(path.to_owned()))?;
        message.insert("tool_calls".to_owned(), Value::Array(vec![call]));
    }
    let Some(calls) = message.get_mut("tool_calls") else { return Ok(()) };
    let parsed = match calls {
        Value::String(text) if text.trim().is_empty() => Some(Value::Null),
        Value::String(text) => Some(json::value(text).map_err(|error| FormatProblem::NotJson {
            path: format!("{path}.tool_calls"),
            reason: error.to_string(),
        })?),
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
        Value::Array(items) => {
            let mut numbered = items.iter().enumerate();
            numbered.try_for_each(|(index, call)| calls::check(call, &format!("{path}.tool_calls[{index}]")))
        }
        other => Err(FormatProblem::wrong(&format!("{path}.tool_calls"), other, "a list of calls")),
    }
}

/// Roles of what a tool answers.
const TOOLS: [&str; 3] = ["tool", "ipython", "function"];

/// Roles that every conversation may have.
const USUAL: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Whether every conversation may have this role.
pub(crate) fn is_usual(role: &str) -> bool {
    USUAL.contains(&role) || TOOLS.contains(&role)
}

/// Whether the role is that of a tool.
pub(crate) fn is_tool(message: &Value) -> bool {
    message["role"].as_str().is_some_and(|role| TOOLS.contains(&role))
}

/// Whether a content is data: an object, or a list of objects that are no parts of a text. Tools
/// answer so.
pub(crate) fn is_data(content: &Value) -> bool {
    match content {
        Value::Object(_) => true,
        Value::Array(items) => {
            !items.is_empty() && items.iter().all(|item| item.is_object() && item.get("type").is_none())
        }
        _ => false,
    }
}

fn check_content(message: &Map<String, Value>, role: &str, path: &str) -> Result<(), FormatProblem> {
    let without_content = message.get("tool_calls").is_some_and(Value::is_array);
    match message.get("content") {
        Some(content) if json::text(content).is_some() => Ok(()),
        Some(content) if TOOLS.contains(&role) && is_data(content) => Ok(()),
        Some(Value::Array(parts)) => check_parts(parts, path),
        None | Some(Value::Null) if without_content => Ok(()),
        Some(other) => {
            Err(FormatProblem::wrong(&format!("{path}.content"), other, "a string, or a list of text parts"))
        }
        None => Err(FormatProblem::Missing(format!("{path}.content"))),
    }
}

fn check_parts(parts: &[Value], path: &str) -> Result<(), FormatProblem> {
    for (index, part) in parts.iter().enumerate() {
        let path = format!("{path}.content[{index}]");
        if !part.is_object() {
            return Err(FormatProblem::wrong(&path, part, PART));
        }
        match (part.get("type").and_then(Value::as_str), part.get("text")) {
            (Some("text"), Some(text)) if json::text(text).is_some() => {}
            (Some("text"), Some(other)) => {
                return Err(FormatProblem::wrong(&format!("{path}.text"), other, "a string"));
            }
            (Some("text"), None) => return Err(FormatProblem::Missing(format!("{path}.text"))),
            (Some(other), _) => {
                let kind = other.chars().take(40).collect();
                return Err(FormatProblem::OtherPart { path, kind });
            }
            (None, _) => return Err(FormatProblem::PartWithoutType(path)),
        }
    }
    Ok(())
}

/// Reads the flags of a message. `text` is the key of its content.
pub(crate) fn training(
    message: &Map<String, Value>,
    role: &str,
    path: &str,
    text: &'static str,
) -> Result<TrainingFlags, FormatProblem> {
    let mut training = TrainingFlags::default();
    for key in FLAGS {
        let Some(value) = message.get(key).filter(|value| !value.is_null()) else { continue };
        match flag(value) {
            Some(true) if role != "assistant" && ASKING.contains(&key) => training.asked = Some(key),
            Some(true) => {}
            Some(false) => training.muted = true,
            None => {
                let path = format!("{path}.{key}");
                return Err(match value {
                    Value::Number(number) => FormatProblem::PartialWeight { path, number: number.to_string() },
                    other => FormatProblem::wrong(&path, other, FLAG),
                });
            }
        }
    }
    if let Some(value) = message.get("mask").filter(|value| !value.is_null()) {
        // Some dumps train on what is marked so, others on the rest.
        return Err(FormatProblem::Mask { path: path.to_owned(), found: kind(value) });
    }
    for key in DETAILS {
        let Some(value) = message.get(key).filter(|value| !value.is_null()) else { continue };
        details(value, &format!("{path}.{key}"), &mut training, role, key)?;
        if !training.untrained.is_empty() && !message.get(text).is_some_and(Value::is_string) {
            return Err(FormatProblem::UncountedCharacters { path: format!("{path}.{key}"), content: text });
        }
    }
    Ok(training)
}

/// The value of a flag: 0 or 1, false or true.
fn flag(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        Value::Number(number) if number.as_f64() == Some(0.0) => Some(false),
        Value::Number(number) if number.as_f64() == Some(1.0) => Some(true),
        _ => None,
    }
}

/// Reads axolotl's `train_detail`: ranges of characters, of which `end_offset` is the last.
/// Characters in no range are trained on.
fn details(
    value: &Value,
    path: &str,
    training: &mut TrainingFlags,
    role: &str,
    key: &'static str,
) -> Result<(), FormatProblem> {
    let Value::Array(items) = value else { return Err(FormatProblem::wrong(path, value, RANGES)) };
    for (index, item) in items.iter().enumerate() {
        let offset = |key: &str| item.get(key).and_then(Value::as_u64).and_then(|offset| usize::try_from(offset).ok());
        let train = item.get("train").and_then(flag);
        let (Some(begin), Some(end), Some(train)) = (offset("begin_offset"), offset("end_offset"), train) else {
            return Err(FormatProblem::NoRange(format!("{path}[{index}]")));
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
