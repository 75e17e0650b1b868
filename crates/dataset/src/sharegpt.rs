//! ShareGPT's rows: `conversations` of turns with `from` and `value`.

use serde_json::{Map, Value, json};

use crate::calls;
use crate::format_problem::FormatProblem;
use crate::messages::{self, Messages};
use crate::row::{self, Chat, Example, message, optional, shortened, string_at};

pub(crate) fn read(row: &mut Map<String, Value>, unused: &mut Vec<String>) -> Result<Example, FormatProblem> {
    row::refuse_lost(row)?;
    let turns = row::list(row, "conversations")?;
    // TRL and Unsloth take messages under this name too.
    if turns.iter().all(|turn| turn.get("role").is_some() && turn.get("from").is_none()) {
        let messages = messages::read(turns, "conversations")?;
        return row::chat(row, messages, "conversations", unused).map(Example::Chat);
    }
    let mut messages = Messages::default();
    let system = optional(row, "system")?;
    let mut lists = vec![("conversations", turns.len())];
    if let Some(text) = &system {
        messages.put_first(message("system", text));
        lists.insert(0, ("system", 1));
    }
    let mut has_calls = false;
    for (index, turn) in turns.iter().enumerate() {
        let path = format!("conversations[{index}]");
        let Some(turn) = turn.as_object() else {
            return Err(FormatProblem::wrong(&path, turn, "an object with \"from\" and \"value\""));
        };
        let (role, message) = read_turn(turn, &path)?;
        has_calls |= message.get("tool_calls").is_some();
        messages.training.push(messages::training(turn, role, &path, "value")?);
        messages.list.push(message);
        for (key, value) in turn {
            if !value.is_null() && key != "from" && key != "value" && !messages::is_flag(key) {
                messages.unknown(format!("conversations[].{key}"));
            }
        }
    }
    unused.append(&mut messages.unknown);
    // LLaMA-Factory writes tools as text, and as bare functions, which it wraps itself.
    let are_bare = has_calls || row.get("tools").is_some_and(Value::is_string);
    let tools = match row::tools(row)? {
        Some(Value::Array(items)) if are_bare => Some(calls::tools(items)),
        other => other,
    };
    Ok(Example::Chat(Chat {
        messages: messages.list,
        training: messages.training,
        lists,
        tools,
        variables: row::variables(row)?,
        trained_from: 0,
    }))
}

/// The role of a turn, and its message.
fn read_turn(turn: &Map<String, Value>, path: &str) -> Result<(&'static str, Value), FormatProblem> {
    let from = string_at(turn, "from", &format!("{path}.from"))?;
    let value = string_at(turn, "value", &format!("{path}.value"))?;
    let role = match from.as_str() {
        "human" | "user" => "user",
        "gpt" | "assistant" | "bot" | "chatbot" | "model" => "assistant",
        "system" => "system",
        "tool" | "observation" => "tool",
        "function_call" => {
            let (content, calls) = calls::of_text(&value, &format!("{path}.value"))?;
            return Ok(("assistant", json!({"role": "assistant", "content": content, "tool_calls": calls})));
        }
        other => return Err(FormatProblem::SharegptRole { path: path.to_owned(), role: shortened(other) }),
    };
    Ok((role, message(role, &value)))
}
