//! What a file calls the keys of its rows (`data.columns`), and values that columns hold as text.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::calls;
use crate::format_problem::FormatProblem;
use crate::json;
use crate::problem::RowProblem;
use crate::row;

/// Keys that a row cannot do without if they are given a column.
const NEEDED: [&str; 8] =
    ["messages", "conversations", "prompt", "completion", "text", "instruction", "output", "input_ids"];

/// Keys whose values are lists or objects. A column may hold them as JSON text.
const JSON: [&str; 13] = [
    "messages",
    "conversations",
    "tools",
    "functions",
    "history",
    "chat_template_kwargs",
    "input_ids",
    "labels",
    "attention_mask",
    "position_ids",
    "seq_lengths",
    "completion_mask",
    "assistant_masks",
];

/// Keys whose values are texts, or lists of messages.
const EITHER: [&str; 2] = ["prompt", "completion"];

/// Keys whose values are texts.
const TEXTS: [&str; 7] = ["prompt", "completion", "text", "instruction", "input", "output", "system"];

/// Lists of messages.
const LISTS: [&str; 4] = ["messages", "conversations", "prompt", "completion"];

/// Other words for who speaks.
const ROLES: [(&str, &str); 7] = [
    ("human", "user"),
    ("gpt", "assistant"),
    ("bot", "assistant"),
    ("model", "assistant"),
    ("chatbot", "assistant"),
    ("observation", "tool"),
    ("function_response", "tool"),
];

/// The keys of rows, each with the name that the files have for it.
#[derive(Debug, Default)]
pub(crate) struct Columns {
    keys: Vec<(String, String)>,
    /// Of messages. `None`: messages are as they are.
    turns: Option<Turns>,
}

#[derive(Debug)]
struct Turns {
    role: Option<String>,
    content: Option<String>,
    /// Words for who speaks, each with the role.
    tags: Vec<(String, &'static str)>,
}

/// The role of a turn that is a call of a tool, until it is one.
const CALL: &str = "function_call";

impl Columns {
    pub(crate) fn new(columns: &BTreeMap<String, String>) -> Self {
        const TAGS: [(&str, &str); 5] = [
            ("user_tag", "user"),
            ("assistant_tag", "assistant"),
            ("system_tag", "system"),
            ("tool_tag", "tool"),
            ("call_tag", CALL),
        ];
        let tags = TAGS.iter().filter_map(|(key, role)| Some((columns.get(*key)?.clone(), *role))).collect::<Vec<_>>();
        let (role, content) = (columns.get("role").cloned(), columns.get("content").cloned());
        let is_of_row = |key: &str| key != "role" && key != "content" && !key.ends_with("_tag");
        let keys = columns.iter().filter(|(key, _)| is_of_row(key)).map(|(key, name)| (key.clone(), name.clone()));
        let turns = (role.is_some() || content.is_some() || !tags.is_empty()).then_some(Turns { role, content, tags });
        Self { keys: keys.collect(), turns }
    }

    /// The row under our keys. `as_text`: it came out of columns, which may hold lists as text.
    ///
    /// # Errors
    /// A column is missing, or holds no JSON where a list is due.
    pub(crate) fn apply(&self, mut row: Map<String, Value>, as_text: bool) -> Result<Map<String, Value>, RowProblem> {
        let mut renamed = Vec::with_capacity(self.keys.len());
        for (key, name) in &self.keys {
            match row.get(name) {
                Some(value) => renamed.push((key.clone(), value.clone())),
                None if NEEDED.contains(&key.as_str()) => {
                    let (keys, more) = row::shown_keys(&row);
                    return Err(RowProblem::NoColumn { key: key.clone(), column: name.clone(), keys, more });
                }
                None => {}
            }
        }
        for (key, name) in &self.keys {
            row.shift_remove(name);
            row.shift_remove(key);
        }
        row.extend(renamed);
        if as_text {
            typed(&mut row).map_err(of_format)?;
        }
        if let Some(turns) = &self.turns {
            for list in LISTS {
                if let Some(Value::Array(items)) = row.get_mut(list) {
                    for (index, item) in items.iter_mut().enumerate() {
                        turns.apply(item, &format!("{list}[{index}]")).map_err(of_format)?;
                    }
                }
            }
        }
        Ok(row)
    }
}

fn of_format(problem: FormatProblem) -> RowProblem {
    let expected = problem.expected().unwrap_or_else(|| "JSON as json.dumps writes it".to_owned());
    RowProblem::Format { problem, expected }
}

impl Turns {
    /// A turn with `role` and `content`.
    fn apply(&self, turn: &mut Value, path: &str) -> Result<(), FormatProblem> {
        let Value::Object(turn) = turn else { return Ok(()) };
        let mut rename = |given: &Option<String>, usual: &str, ours: &str| {
            let name = given.as_deref().unwrap_or(if turn.contains_key(ours) { ours } else { usual });
            if let Some(value) = turn.shift_remove(name) {
                turn.insert(ours.to_owned(), value);
            }
        };
        rename(&self.role, "from", "role");
        rename(&self.content, "value", "content");
        let Some(Value::String(word)) = turn.get("role") else { return Ok(()) };
        let tag = self.tags.iter().find(|(tag, _)| tag == word).map(|(_, role)| *role);
        let usual = ROLES.iter().find(|(theirs, _)| theirs == word).map(|(_, role)| *role);
        let role = tag.or(usual).unwrap_or(word).to_owned();
        if role == CALL && !turn.contains_key("tool_calls") {
            let text = turn.get("content").and_then(json::text).unwrap_or_default();
            let (content, calls) = calls::of_text(text, &format!("{path}.content"))?;
            turn.insert("content".to_owned(), json!(content));
            turn.insert("tool_calls".to_owned(), calls);
            turn.insert("role".to_owned(), json!("assistant"));
        } else {
            turn.insert("role".to_owned(), json!(role));
        }
        Ok(())
    }
}

/// Values of columns as rows of JSON have them: lists that are text become lists, numbers where a
/// text is due become text.
fn typed(row: &mut Map<String, Value>) -> Result<(), FormatProblem> {
    for (key, value) in row.iter_mut() {
        let key = key.as_str();
        match value {
            Value::String(text) if JSON.contains(&key) || key == "loss_mask" => *value = list(text, key)?,
            Value::String(text) if EITHER.contains(&key) && text.trim_start().starts_with('[') => {
                // Text may begin with a bracket too. Messages are told by their roles.
                let is_message = |item: &Value| item.get("role").is_some_and(Value::is_string);
                if let Ok(Value::Array(items)) = json::value(text)
                    && !items.is_empty()
                    && items.iter().all(is_message)
                {
                    *value = Value::Array(items);
                }
            }
            Value::Number(number) if TEXTS.contains(&key) => *value = Value::String(number.to_string()),
            _ => {}
        }
    }
    Ok(())
}

/// The list or object that a cell holds. An empty cell holds nothing.
fn list(text: &str, key: &str) -> Result<Value, FormatProblem> {
    if text.trim().is_empty() {
        return Ok(Value::Null);
    }
    json::value(text).map_err(|error| {
        // What pandas writes into CSV.
        let is_python = text.trim_start().starts_with(['[', '{']) && (text.contains("{'") || text.contains("['"));
        match is_python {
            true => FormatProblem::Python(key.to_owned()),
            false => FormatProblem::NotJson { path: key.to_owned(), reason: error.to_string() },
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(columns: &[(&str, &str)], row: Value, as_text: bool) -> String {
        let columns = columns.iter().map(|(key, name)| ((*key).to_owned(), (*name).to_owned())).collect();
        let Value::Object(row) = row else { panic!("a row is an object") };
        match Columns::new(&columns).apply(row, as_text) {
            Ok(row) => json!(row).to_string(),
            Err(problem) => format!("! {problem}"),
        }
    }

    #[test]
    fn every_key_that_is_read_may_have_a_column() {
        use finetune_recipe::{COLUMN_KEYS, Format};
        let formats = [
            Format::Messages,
            Format::Sharegpt,
            Format::Alpaca,
            Format::PromptCompletion,
            Format::Text,
            Format::Tokens,
        ];
        let without_use = ["parallel_tool_calls", "token_type_ids", "length"];
        for key in formats.iter().flat_map(|format| row::used(*format)) {
            assert!(COLUMN_KEYS.contains(key) || without_use.contains(key), "{key}");
        }
    }

    #[test]
    fn columns_take_our_names() {
        let row = json!({"question": "a", "answer": "b", "prompt": "other"});
        let both = [("prompt", "question"), ("completion", "answer")];
        assert_eq!(applied(&both, row.clone(), false), r#"{"completion":"b","prompt":"a"}"#);
        assert_eq!(applied(&[], row.clone(), false), row.to_string());
        let swapped = [("prompt", "answer"), ("completion", "prompt")];
        assert_eq!(applied(&swapped, row.clone(), false), r#"{"question":"a","completion":"other","prompt":"b"}"#);
        assert_eq!(
            applied(&[("text", "body")], row, false),
            "! there is no column body, which data.columns names for text; its keys are question, answer, prompt"
        );
        assert_eq!(applied(&[("input", "context")], json!({"instruction": "a"}), false), r#"{"instruction":"a"}"#);
    }

    #[test]
    fn turns_take_our_names_and_roles() {
        let row = json!({"chat": [{"who": "Kunde", "says": "a"}, {"who": "gpt", "says": "b"},
            {"who": "function_call", "says": "{\"name\": \"f\", \"arguments\": {}}"}, {"who": "observation", "says": "1"}]});
        let columns = [("messages", "chat"), ("role", "who"), ("content", "says"), ("user_tag", "Kunde")];
        assert_eq!(
            applied(&columns, row, false),
            r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"assistant","content":"","tool_calls":[{"type":"function","function":{"name":"f","arguments":{}}}]},{"role":"tool","content":"1"}]}"#
        );
    }

    #[test]
    fn cells_become_lists_and_texts() {
        for (row, expected) in [
            (json!({"messages": "[{\"role\": \"user\"}]"}), r#"{"messages":[{"role":"user"}]}"#),
            (json!({"messages": "", "tools": " "}), r#"{"messages":null,"tools":null}"#),
            (json!({"prompt": "[1]", "completion": 42}), r#"{"prompt":"[1]","completion":"42"}"#),
            (json!({"prompt": "[{\"role\": \"user\"}]"}), r#"{"prompt":[{"role":"user"}]}"#),
            (json!({"messages": "[{'role': 'user'}]"}), "! messages is a list as Python writes it, which is no JSON"),
            (
                json!({"tools": "[{\"name\": "}),
                "! tools is a string that is not JSON: EOF while parsing a value at line 1 column 10",
            ),
        ] {
            assert_eq!(applied(&[], row, true), expected);
        }
    }
}
