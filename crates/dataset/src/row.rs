//! Row formats: a JSON object in, one of four kinds of example out. The messages of a chat are
//! checked in `messages.rs`, rows of tokens are read in `row_of_tokens.rs`.

use finetune_recipe::{Format, RESERVED_VARIABLES};
use serde_json::{Map, Value, json};

use crate::calls;
use crate::format_problem::FormatProblem;
use crate::json;
use crate::messages::{self, Messages, TrainingFlags};
use crate::problem::RowProblem;
use crate::row_of_tokens::{self, Tokens};
use crate::sharegpt;
use crate::texts::REASONING_KEYS;

/// What a row says, whatever format it was written in.
#[derive(Debug)]
pub(crate) enum Example {
    Chat(Chat),
    /// Plain strings, which no template is given.
    PromptCompletion {
        prompt: String,
        completion: String,
    },
    Text(String),
    /// A row that was tokenized elsewhere: one sequence, unless several were packed into it.
    Tokens(Vec<Tokens>),
}

/// Messages for the chat template.
#[derive(Debug)]
pub(crate) struct Chat {
    pub(crate) messages: Vec<Value>,
    /// What the flags of each message say.
    pub(crate) training: Vec<TrainingFlags>,
    /// The keys of the row that the messages came from, each with the number of its messages.
    /// Errors name places by them.
    pub(crate) lists: Vec<(&'static str, usize)>,
    pub(crate) tools: Option<Value>,
    /// Further variables of the template, from `chat_template_kwargs` and `documents`.
    pub(crate) variables: Vec<(String, Value)>,
    /// Assistant turns before this one are context.
    pub(crate) trained_from: usize,
}

impl Chat {
    /// What the template gets as `documents`.
    pub(crate) fn documents(&self) -> Option<&Value> {
        self.variables.iter().find(|(name, _)| name == DOCUMENTS).map(|(_, documents)| documents)
    }

    /// Where a message stands in its row: `messages[2]`.
    pub(crate) fn path(&self, message: usize) -> String {
        let mut index = message;
        for (list, length) in &self.lists {
            if index < *length {
                return if *list == "system" { (*list).to_owned() } else { format!("{list}[{index}]") };
            }
            index -= length;
        }
        format!("message {}", message + 1)
    }
}

/// A row that was read, and its keys that have no use in its format.
#[derive(Debug)]
pub(crate) struct Parsed {
    pub(crate) example: Example,
    pub(crate) unused: Vec<String>,
}

/// (format, the key that tells it from the others, the keys that every row of it has). They are in
/// order of detection: many published datasets carry a `prompt` beside their `messages`.
const FORMATS: [(Format, &str, &str); 6] = [
    (Format::Messages, "messages", "\"messages\": a list of {\"role\", \"content\"}"),
    (Format::Sharegpt, "conversations", "\"conversations\": a list of {\"from\", \"value\"}"),
    (Format::Tokens, "input_ids", "\"input_ids\": a list of token ids, and \"labels\""),
    (Format::PromptCompletion, "prompt", "\"prompt\" and \"completion\": strings"),
    (Format::Alpaca, "instruction", "\"instruction\" and \"output\": strings"),
    (Format::Text, "text", "\"text\": a string"),
];

/// The format that the keys of a row tell.
pub(crate) fn detect(row: &Map<String, Value>) -> Result<Format, RowProblem> {
    let has = |key: &str| row.contains_key(key);
    if (has("chosen") && has("rejected")) || (has("preferred_output") && has("non_preferred_output")) {
        return Err(RowProblem::Preferences);
    }
    if has("prompt") && has("completion") && row.get("label").is_some_and(Value::is_boolean) {
        return Err(RowProblem::Labelled);
    }
    // Arrow fills the keys of other rows with null.
    let says = |key: &str| row.get(key).is_some_and(|value| !value.is_null());
    let format = FORMATS.iter().find(|(_, key, _)| says(key));
    if let Some((format, ..)) = format.or_else(|| FORMATS.iter().find(|(_, key, _)| row.contains_key(*key))) {
        return Ok(*format);
    }
    // For a half-written row the error names the missing half.
    for (key, format) in
        [("completion", Format::PromptCompletion), ("output", Format::Alpaca), ("labels", Format::Tokens)]
    {
        if row.contains_key(key) {
            return Ok(format);
        }
    }
    let (keys, more) = shown_keys(row);
    Err(RowProblem::UnknownFormat { keys, more })
}

/// The first keys of a row, for a message, and whether there are more.
pub(crate) fn shown_keys(row: &Map<String, Value>) -> (Vec<String>, bool) {
    (row.keys().take(SHOWN_KEYS).map(|key| shortened(key)).collect(), row.len() > SHOWN_KEYS)
}

/// Keys of a row that a message names.
const SHOWN_KEYS: usize = 8;

/// The first 40 characters of a key or a role, for a message.
pub(crate) fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}

/// Reads a row in a format.
pub(crate) fn read(mut row: Map<String, Value>, format: Format) -> Result<Parsed, RowProblem> {
    let mut unused = unused(&row, format);
    let example = match format {
        Format::Messages => messages_row(&mut row, &mut unused),
        Format::Sharegpt => sharegpt::read(&mut row, &mut unused),
        Format::Alpaca => alpaca_row(&mut row),
        Format::PromptCompletion => prompt_completion_row(&mut row, &mut unused),
        Format::Text => string(&row, "text").map(Example::Text),
        Format::Tokens => row_of_tokens::read(&row).map(Example::Tokens),
        Format::Auto => {
            let format = detect(&row)?;
            return read(row, format);
        }
    };
    let example = example.map_err(|problem| in_format(problem, format))?;
    Ok(Parsed { example, unused })
}

/// The problem of a row of this format.
pub(crate) fn in_format(problem: FormatProblem, format: Format) -> RowProblem {
    let needed = || FORMATS.iter().find(|(known, ..)| *known == format).map(|(.., needed)| (*needed).to_owned());
    let expected = problem.expected().or_else(needed).unwrap_or_default();
    RowProblem::Format { problem, expected }
}

/// The keys that a format reads.
pub(crate) fn used(format: Format) -> &'static [&'static str] {
    match format {
        Format::Messages => &["messages", "tools", "functions", "system", "parallel_tool_calls", DOCUMENTS, VARIABLES],
        Format::Sharegpt => &["conversations", "tools", "functions", "system", DOCUMENTS, VARIABLES],
        Format::Alpaca => &["instruction", "input", "output", "system", "history", "tools", DOCUMENTS, VARIABLES],
        Format::PromptCompletion => &["prompt", "completion", "tools", "functions", "system", DOCUMENTS, VARIABLES],
        Format::Text => &["text"],
        Format::Tokens => &row_of_tokens::KEYS,
        Format::Auto => &[],
    }
}

/// Keys of a row that its format has no use for.
pub(crate) fn unused(row: &Map<String, Value>, format: Format) -> Vec<String> {
    let used = used(format);
    // Under this key some data sets have what is no list for a template.
    let is_read = |key: &str, value: &Value| {
        used.contains(&key) && (key != DOCUMENTS || value.is_array() || value == "" || documents(value).is_some())
    };
    let without_use = row.iter().filter(|(key, value)| !value.is_null() && !is_read(key, value));
    without_use.map(|(key, _)| shortened(key)).collect()
}

fn string(row: &Map<String, Value>, key: &str) -> Result<String, FormatProblem> {
    string_at(row, key, key)
}

/// The string under a key of an object; `path` is where it stands in the row.
pub(crate) fn string_at(object: &Map<String, Value>, key: &str, path: &str) -> Result<String, FormatProblem> {
    let value = object.get(key).ok_or_else(|| FormatProblem::Missing(path.to_owned()))?;
    json::text(value).map(str::to_owned).ok_or_else(|| FormatProblem::wrong(path, value, "a string"))
}

/// An optional string: absent, null and empty are the same.
pub(crate) fn optional(row: &Map<String, Value>, key: &str) -> Result<Option<String>, FormatProblem> {
    let Some(value) = row.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
    let text = json::text(value).ok_or_else(|| FormatProblem::wrong(key, value, "a string, or nothing"))?;
    Ok(Some(text.to_owned()).filter(|text| !text.is_empty()))
}

pub(crate) fn list(row: &mut Map<String, Value>, key: &str) -> Result<Vec<Value>, FormatProblem> {
    match row.remove(key) {
        Some(Value::Array(items)) if items.is_empty() => Err(FormatProblem::Empty(key.to_owned())),
        Some(Value::Array(items)) => Ok(items),
        Some(other) => Err(FormatProblem::wrong(key, &other, "a list")),
        None => Err(FormatProblem::Missing(key.to_owned())),
    }
}

/// The `tools` of a row: a list, or, as LLaMA-Factory writes it, a string that holds one. Without
/// them its `functions`, OpenAI's former name.
pub(crate) fn tools(row: &mut Map<String, Value>) -> Result<Option<Value>, FormatProblem> {
    if let Some(Value::Array(items)) = row.remove("functions").filter(|functions| functions != &json!([])) {
        let says = |tools: &Value| !tools.is_null() && tools != &json!([]) && tools != "";
        return match row.get("tools").is_some_and(says) {
            true => Err(FormatProblem::OldTools),
            false => Ok(Some(calls::tools(items))),
        };
    }
    let tools = match row.remove("tools") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => json_text(&text, "tools")?,
        Some(other) => other,
    };
    match &tools {
        Value::Array(items) if items.iter().all(Value::is_object) => {
            Ok(Some(tools).filter(|tools| tools != &json!([])))
        }
        other => Err(FormatProblem::wrong("tools", other, "a list of objects")),
    }
}

/// The JSON value that the string at `path` holds.
fn json_text(text: &str, path: &str) -> Result<Value, FormatProblem> {
    json::value(text).map_err(|error| FormatProblem::NotJson { path: path.to_owned(), reason: error.to_string() })
}

/// The key of further variables of the template, as TRL reads it.
const VARIABLES: &str = "chat_template_kwargs";

/// The key of documents that answers are taken from, as `apply_chat_template` has it.
pub(crate) const DOCUMENTS: &str = "documents";

/// `chat_template_kwargs`: an object, or a string that holds one; and the documents of the row,
/// which are a variable too. Keys that are null are left out, as in TRL: Arrow gives each row the
/// keys of all rows.
pub(crate) fn variables(row: &mut Map<String, Value>) -> Result<Vec<(String, Value)>, FormatProblem> {
    let given = match row.remove(VARIABLES) {
        None | Some(Value::Null) => Value::Object(Map::new()),
        Some(Value::String(text)) => json_text(&text, VARIABLES)?,
        Some(other) => other,
    };
    let given = match given {
        Value::Object(given) => given,
        other => return Err(FormatProblem::wrong(VARIABLES, &other, "an object")),
    };
    if let Some(key) = given.keys().find(|key| RESERVED_VARIABLES.contains(&key.as_str())) {
        return Err(FormatProblem::ReservedVariable(key.clone()));
    }
    let mut variables: Vec<(String, Value)> = given.into_iter().filter(|(_, value)| !value.is_null()).collect();
    if let Some(documents) = row.remove(DOCUMENTS).as_ref().and_then(documents) {
        match variables.iter().find(|(name, _)| name == DOCUMENTS) {
            Some((_, others)) if *others != documents => return Err(FormatProblem::TwoDocuments),
            Some(_) => {}
            None => variables.push((DOCUMENTS.to_owned(), documents)),
        }
    }
    Ok(variables)
}

/// A list of documents, or a string that holds one.
fn documents(value: &Value) -> Option<Value> {
    let list = match value {
        Value::String(text) => json::value(text).ok()?,
        other => other.clone(),
    };
    list.as_array().is_some_and(|items| !items.is_empty()).then_some(list)
}

/// Keys of a row that hold images, video or audio.
const MEDIA: [&str; 6] = ["image", "images", "video", "videos", "audio", "audios"];

/// Refuses keys that hold no text, and keys whose text no template is given.
pub(crate) fn refuse_lost(row: &Map<String, Value>) -> Result<(), FormatProblem> {
    let says = |key: &&&str| match row.get(**key) {
        None | Some(Value::Null) => false,
        Some(Value::Array(items)) => items.iter().any(|item| !item.is_null()),
        Some(Value::String(text)) => !text.is_empty(),
        Some(Value::Object(_)) => true,
        Some(_) => false,
    };
    if let Some(&key) = MEDIA.iter().find(says) {
        return Err(FormatProblem::NotText(key));
    }
    match row.get("functions") {
        None | Some(Value::Null | Value::Array(_)) => Ok(()),
        Some(other) => Err(FormatProblem::wrong("functions", other, "a list of functions")),
    }
}

fn messages_row(row: &mut Map<String, Value>, unused: &mut Vec<String>) -> Result<Example, FormatProblem> {
    asked(row, unused).map(Example::Chat)
}

/// The conversation of an object with `messages`, whether it is answered already or not.
pub(crate) fn asked(row: &mut Map<String, Value>, unused: &mut Vec<String>) -> Result<Chat, FormatProblem> {
    refuse_lost(row)?;
    let messages = messages::read(list(row, "messages")?, "messages")?;
    chat(row, messages, "messages", unused)
}

/// A chat whose messages came from one list of the row, with a `system` text beside them put in
/// front.
pub(crate) fn chat(
    row: &mut Map<String, Value>,
    mut messages: Messages,
    list: &'static str,
    unused: &mut Vec<String>,
) -> Result<Chat, FormatProblem> {
    let mut lists = vec![(list, messages.list.len())];
    if let Some(text) = optional(row, "system")? {
        let first = messages.list.first().filter(|first| first["role"] == "system" || first["role"] == "developer");
        let same = first.is_some_and(|first| first["content"] == *text);
        if first.is_some() && !same {
            return Err(FormatProblem::TwoSystemMessages(list));
        }
        if !same {
            messages.put_first(message("system", &text));
            lists.insert(0, ("system", 1));
        }
    }
    unused.append(&mut messages.unknown);
    Ok(Chat {
        messages: messages.list,
        training: messages.training,
        lists,
        tools: tools(row)?,
        variables: variables(row)?,
        trained_from: 0,
    })
}

fn prompt_completion_row(row: &mut Map<String, Value>, unused: &mut Vec<String>) -> Result<Example, FormatProblem> {
    refuse_lost(row)?;
    match (row.get("prompt"), row.get("completion")) {
        (Some(Value::Array(_)), Some(Value::Array(_))) => {
            let (prompt, completion) = (list(row, "prompt")?, list(row, "completion")?);
            let messages = messages::read(prompt, "prompt")?;
            let mut completion = messages::read(completion, "completion")?;
            let mut chat = chat(row, messages, "prompt", unused)?;
            chat.trained_from = chat.messages.len();
            chat.lists.push(("completion", completion.list.len()));
            chat.messages.append(&mut completion.list);
            chat.training.append(&mut completion.training);
            unused.append(&mut completion.unknown);
            Ok(Example::Chat(chat))
        }
        (Some(Value::Array(_)), Some(Value::String(_))) | (Some(Value::String(_)), Some(Value::Array(_))) => {
            Err(FormatProblem::StringAndList)
        }
        _ => {
            let example =
                Example::PromptCompletion { prompt: string(row, "prompt")?, completion: string(row, "completion")? };
            let beside = match (optional(row, "system")?, tools(row)?) {
                (Some(_), _) => "system",
                (None, Some(_)) => "tools",
                (None, None) => {
                    // No template sees them.
                    unused.extend(row.get(DOCUMENTS).and_then(documents).map(|_| DOCUMENTS.to_owned()));
                    return Ok(example);
                }
            };
            Err(FormatProblem::BesidePlainStrings(beside))
        }
    }
}

pub(crate) fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

fn alpaca_row(row: &mut Map<String, Value>) -> Result<Example, FormatProblem> {
    refuse_lost(row)?;
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
                let both = match turn.as_array().map(Vec::as_slice) {
                    Some([question, answer]) => json::text(question).zip(json::text(answer)),
                    _ => None,
                };
                match both {
                    Some((question, answer)) => {
                        messages.extend([message("user", question), message("assistant", answer)]);
                    }
                    None => {
                        let path = format!("history[{index}]");
                        return Err(FormatProblem::wrong(&path, turn, "[question, answer], two strings"));
                    }
                }
            }
        }
        Some(other) => return Err(FormatProblem::wrong("history", &other, "a list of [question, answer]")),
    }
    messages.extend([message("user", &user), message("assistant", &answer)]);
    let training = vec![TrainingFlags::default(); messages.len()];
    // No list of the row holds these messages, so errors name them by their number.
    let lists = Vec::new();
    Ok(Example::Chat(Chat {
        messages,
        training,
        lists,
        tools: tools(row)?,
        variables: variables(row)?,
        trained_from: 0,
    }))
}

/// Whether a message has neither text nor calls nor reasoning.
pub(crate) fn says_nothing(message: &Value) -> bool {
    let reasons = |key: &str| message.get(key).and_then(Value::as_str).is_some_and(|text| !text.trim().is_empty());
    content_text(message).trim().is_empty() && !REASONING_KEYS.iter().any(|key| reasons(key))
}

/// The text of a message's content, for a person to read. For a message without text its tool
/// calls.
pub(crate) fn content_text(message: &Value) -> String {
    match message.get("content") {
        Some(Value::String(text)) if !text.is_empty() => text.clone(),
        Some(Value::Array(parts)) => parts.iter().filter_map(|part| part.get("text").and_then(Value::as_str)).collect(),
        _ => message.get("tool_calls").map(Value::to_string).unwrap_or_default(),
    }
}
