//! Row formats: a JSON object in, one of four kinds of example out.

use finetune_recipe::Format;
use serde_json::{Map, Value, json};

use crate::jsonl::{RowProblem, kind};

/// What a row says, whatever format it was written in.
#[derive(Debug, PartialEq)]
pub(crate) enum Example {
    /// Messages for the chat template. Assistant turns before `trained_from` are context.
    Chat {
        messages: Vec<Value>,
        tools: Option<Value>,
        trained_from: usize,
    },
    /// Plain strings, which no template sees.
    PromptCompletion {
        prompt: String,
        completion: String,
    },
    Text(String),
    /// Tokenized elsewhere.
    Tokens {
        ids: Vec<u32>,
        trained: Vec<bool>,
    },
}

/// A format, the keys that every row of it has, and the key that tells it from the others. In order of detection: many
/// published datasets carry a `prompt` beside their `messages`.
const FORMATS: [(Format, &str, &str); 6] = [
    (Format::Messages, "messages", "\"messages\": a list of {\"role\", \"content\"}"),
    (Format::Sharegpt, "conversations", "\"conversations\": a list of {\"from\", \"value\"}"),
    (Format::Tokens, "input_ids", "\"input_ids\": a list of token ids, and \"labels\""),
    (Format::PromptCompletion, "prompt", "\"prompt\" and \"completion\": strings"),
    (Format::Alpaca, "instruction", "\"instruction\" and \"output\": strings"),
    (Format::Text, "text", "\"text\": a string"),
];

/// The format that a row's keys tell.
pub(crate) fn detect(row: &Map<String, Value>) -> Result<Format, RowProblem> {
    if let Some((format, ..)) = FORMATS.iter().find(|(_, key, _)| row.contains_key(*key)) {
        return Ok(*format);
    }
    // A half-written row is told the missing half.
    for (key, format) in
        [("completion", Format::PromptCompletion), ("output", Format::Alpaca), ("labels", Format::Tokens)]
    {
        if row.contains_key(key) {
            return Ok(format);
        }
    }
    let expected = "one of the keys messages, prompt, text, instruction, conversations, input_ids";
    Err(RowProblem::new(format!("no key that tells the format; {}", keys(row))).expected(expected))
}

fn keys(row: &Map<String, Value>) -> String {
    match row.len() {
        0 => "the object is empty".to_owned(),
        _ => {
            let shown: Vec<String> = row.keys().take(8).map(|key| key.chars().take(40).collect()).collect();
            format!("its keys are {}{}", shown.join(", "), if row.len() > 8 { ", …" } else { "" })
        }
    }
}

/// Reads a row in a format that is not `Auto`.
pub(crate) fn read(mut row: Map<String, Value>, format: Format) -> Result<Example, RowProblem> {
    let example = match format {
        Format::Messages => messages_row(&mut row),
        Format::Sharegpt => sharegpt_row(&mut row),
        Format::Alpaca => alpaca_row(&mut row),
        Format::PromptCompletion => prompt_completion_row(&mut row),
        Format::Text => string(&row, "text").map(Example::Text),
        Format::Tokens => tokens_row(&row),
        Format::Auto => detect(&row).and_then(|format| read(row.clone(), format)),
    };
    example.map_err(|problem| {
        let needed = FORMATS.iter().find(|(known, ..)| *known == format).map(|(.., needed)| *needed);
        match (problem.expected.is_some(), needed) {
            (false, Some(needed)) => problem.expected(needed),
            _ => problem,
        }
    })
}

fn missing(key: &str) -> RowProblem {
    RowProblem::new(format!("the key {key} is missing"))
}

fn wrong(path: &str, value: &Value, wanted: &str) -> RowProblem {
    RowProblem::new(format!("{path} is {}", kind(value))).expected(wanted)
}

fn string(row: &Map<String, Value>, key: &str) -> Result<String, RowProblem> {
    match row.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(wrong(key, other, "a string")),
        None => Err(missing(key)),
    }
}

/// An optional string: absent, null and empty are the same.
fn optional(row: &Map<String, Value>, key: &str) -> Result<Option<String>, RowProblem> {
    match row.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
        Some(other) => Err(wrong(key, other, "a string, or nothing")),
    }
}

fn list(row: &mut Map<String, Value>, key: &str) -> Result<Vec<Value>, RowProblem> {
    match row.remove(key) {
        Some(Value::Array(items)) if items.is_empty() => Err(RowProblem::new(format!("{key} is empty"))),
        Some(Value::Array(items)) => Ok(items),
        Some(other) => Err(wrong(key, &other, "a list")),
        None => Err(missing(key)),
    }
}

/// The `tools` of a row: a list, or, as LLaMA-Factory writes it, a string that holds one.
fn tools(row: &mut Map<String, Value>) -> Result<Option<Value>, RowProblem> {
    let tools = match row.remove("tools") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => serde_json::from_str(&text)
            .map_err(|error| RowProblem::new(format!("tools is a string that is not JSON: {error}")))?,
        Some(other) => other,
    };
    match &tools {
        Value::Array(items) if items.iter().all(Value::is_object) => {
            Ok(Some(tools).filter(|tools| tools != &json!([])))
        }
        other => Err(wrong("tools", other, "a list of objects")),
    }
}

fn messages_row(row: &mut Map<String, Value>) -> Result<Example, RowProblem> {
    let messages = list(row, "messages")?;
    check_messages(&messages, "messages")?;
    Ok(Example::Chat { messages, tools: tools(row)?, trained_from: 0 })
}

fn check_messages(messages: &[Value], list: &str) -> Result<(), RowProblem> {
    for (index, message) in messages.iter().enumerate() {
        let path = format!("{list}[{index}]");
        let Some(message) = message.as_object() else {
            return Err(wrong(&path, message, "an object with \"role\" and \"content\""));
        };
        match message.get("role") {
            Some(Value::String(role)) if !role.is_empty() => {}
            Some(Value::String(_)) => return Err(RowProblem::new(format!("{path}.role is empty"))),
            Some(other) => return Err(wrong(&format!("{path}.role"), other, "a string")),
            None => return Err(missing(&format!("{path}.role"))),
        }
        let without_content =
            message.get("tool_calls").is_some_and(|calls| calls.as_array().is_some_and(|it| !it.is_empty()));
        match message.get("content") {
            Some(Value::String(_)) => {}
            Some(Value::Array(parts)) => check_parts(parts, &path)?,
            None | Some(Value::Null) if without_content => {}
            Some(other) => return Err(wrong(&format!("{path}.content"), other, "a string, or a list of text parts")),
            None => return Err(missing(&format!("{path}.content"))),
        }
    }
    Ok(())
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

fn prompt_completion_row(row: &mut Map<String, Value>) -> Result<Example, RowProblem> {
    match (row.get("prompt"), row.get("completion")) {
        (Some(Value::Array(_)), Some(Value::Array(_))) => {
            let (mut messages, completion) = (list(row, "prompt")?, list(row, "completion")?);
            check_messages(&messages, "prompt")?;
            check_messages(&completion, "completion")?;
            let trained_from = messages.len();
            messages.extend(completion);
            Ok(Example::Chat { messages, tools: tools(row)?, trained_from })
        }
        (Some(Value::Array(_)), Some(Value::String(_))) | (Some(Value::String(_)), Some(Value::Array(_))) => {
            Err(RowProblem::new("of prompt and completion one is a string and one a list")
                .expected("two strings, or two lists of messages"))
        }
        _ => Ok(Example::PromptCompletion { prompt: string(row, "prompt")?, completion: string(row, "completion")? }),
    }
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

fn alpaca_row(row: &mut Map<String, Value>) -> Result<Example, RowProblem> {
    let (mut user, answer) = (string(row, "instruction")?, string(row, "output")?);
    if let Some(input) = optional(row, "input")? {
        // Joined by a line break, as LLaMA-Factory does.
        user = format!("{user}\n{input}");
    }
    let mut messages: Vec<Value> = optional(row, "system")?.iter().map(|text| message("system", text)).collect();
    match row.remove("history") {
        None | Some(Value::Null) => {}
        Some(Value::Array(turns)) => {
            for (index, turn) in turns.iter().enumerate() {
                match turn.as_array().map(Vec::as_slice) {
                    Some([Value::String(question), Value::String(answer)]) => {
                        messages.extend([message("user", question), message("assistant", answer)]);
                    }
                    _ => {
                        return Err(RowProblem::new(format!("history[{index}] is {}", kind(turn)))
                            .expected("[question, answer], two strings"));
                    }
                }
            }
        }
        Some(other) => return Err(wrong("history", &other, "a list of [question, answer]")),
    }
    messages.extend([message("user", &user), message("assistant", &answer)]);
    Ok(Example::Chat { messages, tools: None, trained_from: 0 })
}

fn sharegpt_row(row: &mut Map<String, Value>) -> Result<Example, RowProblem> {
    let turns = list(row, "conversations")?;
    let mut messages: Vec<Value> = optional(row, "system")?.iter().map(|text| message("system", text)).collect();
    for (index, turn) in turns.iter().enumerate() {
        let path = format!("conversations[{index}]");
        let Some(turn) = turn.as_object() else {
            return Err(wrong(&path, turn, "an object with \"from\" and \"value\""));
        };
        let within = |mut problem: RowProblem| {
            problem.reason = problem.reason.replacen("the key ", &format!("the key {path}."), 1);
            if !problem.reason.contains(&path) {
                problem.reason = format!("{path}.{}", problem.reason);
            }
            problem
        };
        let from = string(turn, "from").map_err(within)?;
        let value = string(turn, "value").map_err(within)?;
        let role = match from.as_str() {
            "human" | "user" => "user",
            "gpt" | "assistant" => "assistant",
            "system" => "system",
            "tool" | "observation" => "tool",
            "function_call" => {
                return Err(RowProblem::new(format!("{path}.from is function_call, which is not supported"))
                    .expected("the call in \"messages\" form: an assistant message with \"tool_calls\""));
            }
            other => {
                let shown: String = other.chars().take(40).collect();
                return Err(RowProblem::new(format!("{path}.from is {shown:?}"))
                    .expected("human, user, gpt, assistant, system, tool or observation"));
            }
        };
        messages.push(message(role, &value));
    }
    Ok(Example::Chat { messages, tools: tools(row)?, trained_from: 0 })
}

/// The label of a token outside the loss.
const IGNORED: i64 = -100;

fn tokens_row(row: &Map<String, Value>) -> Result<Example, RowProblem> {
    let numbers = |key: &str| match row.get(key) {
        Some(Value::Array(items)) => Ok(Some(items)),
        Some(Value::Null) | None => Ok(None),
        Some(other) => Err(wrong(key, other, "a list of numbers")),
    };
    let Some(items) = numbers("input_ids")? else { return Err(missing("input_ids")) };
    if items.is_empty() {
        return Err(RowProblem::new("input_ids is empty"));
    }
    let mut ids = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        match item.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => ids.push(id),
            None => {
                return Err(
                    RowProblem::new(format!("input_ids[{index}] is {}", shown(item))).expected("a token id, 0 or more")
                );
            }
        }
    }
    let Some(labels) = numbers("labels")? else {
        return Ok(Example::Tokens { trained: vec![true; ids.len()], ids });
    };
    if labels.len() != ids.len() {
        return Err(RowProblem::new(format!("{} input_ids but {} labels", ids.len(), labels.len()))
            .expected("one label for each token, unshifted"));
    }
    let mut trained = Vec::with_capacity(ids.len());
    for (index, (label, id)) in labels.iter().zip(&ids).enumerate() {
        match label.as_i64() {
            Some(IGNORED) => trained.push(false),
            Some(label) if label == i64::from(*id) => trained.push(true),
            _ => {
                return Err(RowProblem::new(format!(
                    "labels[{index}] is {} where input_ids[{index}] is {id}: labels of one's own are not supported",
                    shown(label)
                ))
                .expected("the token itself (unshifted), or -100 for no loss"));
            }
        }
    }
    Ok(Example::Tokens { ids, trained })
}

fn shown(value: &Value) -> String {
    if value.is_number() { value.to_string() } else { kind(value).to_owned() }
}

/// The text of a message's content, for a person to read; its tool calls where it has no text.
pub(crate) fn content_text(message: &Value) -> String {
    match message.get("content") {
        Some(Value::String(text)) if !text.is_empty() => text.clone(),
        Some(Value::Array(parts)) => parts.iter().filter_map(|part| part.get("text").and_then(Value::as_str)).collect(),
        _ => message.get("tool_calls").map(Value::to_string).unwrap_or_default(),
    }
}
