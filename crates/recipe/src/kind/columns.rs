//! Which columns of a file are which keys of a row.

use std::collections::BTreeMap;

use toml::de::DeValue;

use super::paths::TEXT_SCHEMA;
use super::{Kind, Written};
use crate::canonical::{by_name, list, quoted};
use crate::hint;
use crate::problem::Problem;

/// Keys of rows, of their messages (`role`, `content`), and the words for who speaks (`…_tag`).
/// `data.columns` gives each of them the name that a file has for it.
pub const COLUMN_KEYS: [&str; 29] = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "text",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "tools",
    "functions",
    "documents",
    "chat_template_kwargs",
    "input_ids",
    "labels",
    "attention_mask",
    "position_ids",
    "seq_lengths",
    "completion_mask",
    "assistant_masks",
    "loss_mask",
    "role",
    "content",
    "user_tag",
    "assistant_tag",
    "system_tag",
    "tool_tag",
    "call_tag",
];

/// What the other programs call these keys.
const RIVALS: [(&str, &str); 13] = [
    ("query", "input"),
    ("response", "completion"),
    ("answer", "completion"),
    ("question", "prompt"),
    ("conversation", "conversations"),
    ("field_messages", "messages"),
    ("field_instruction", "instruction"),
    ("field_input", "input"),
    ("field_output", "output"),
    ("field_system", "system"),
    ("observation_tag", "tool_tag"),
    ("function_tag", "call_tag"),
    ("from", "role"),
];

/// A table of keys and the names of columns.
pub(crate) struct Columns;

impl Kind for Columns {
    type Value = BTreeMap<String, String>;

    fn read(&self, written: &Written<'_, '_>) -> Result<BTreeMap<String, String>, Problem> {
        let DeValue::Table(entries) = written.value else {
            let problem = written.wrong_type("a table of keys and the names of columns");
            return Err(problem.hint("for example { prompt = \"question\", completion = \"answer\" }"));
        };
        let mut columns = BTreeMap::new();
        for (name, value) in entries {
            let key = name.get_ref().as_ref();
            if !COLUMN_KEYS.contains(&key) {
                return written.part(value, |value| Err(unknown(value, key)));
            }
            let column = written.part(value, |value| value.text().map(str::to_owned))?;
            columns.insert(key.to_owned(), column);
        }
        Ok(columns)
    }

    fn write(&self, value: &BTreeMap<String, String>) -> String {
        by_name(value, |column| quoted(column))
    }

    fn is_table(&self) -> bool {
        true
    }

    fn words(&self) -> String {
        "table of names".to_owned()
    }

    fn schema(&self) -> String {
        let names = list(&COLUMN_KEYS, |name| quoted(name));
        format!(
            r#""type": "object", "propertyNames": {{ "enum": {names} }}, "additionalProperties": {{ {TEXT_SCHEMA} }}"#
        )
    }
}

/// The key is none that rows have. A name that the file has for a key is often written in its
/// place.
fn unknown(value: &Written<'_, '_>, key: &str) -> Problem {
    let problem = value.problem(format!("`{}` has no key `{}`", value.key, hint::shown(key)));
    let known = |text: &str| COLUMN_KEYS.iter().find(|known| **known == text);
    let turned = match value.value {
        DeValue::String(text) => known(text).map(|ours| format!("write it as {ours} = {}", quoted(key))),
        _ => None,
    };
    let rival = RIVALS.iter().find(|(theirs, _)| *theirs == key).map(|(_, ours)| format!("ours is `{ours}`"));
    let near = hint::nearest_of(key, &COLUMN_KEYS).map(|ours| format!("did you mean `{ours}`?"));
    let all = || format!("the keys are {}", COLUMN_KEYS.join(", "));
    problem.hint(turned.or(rival).or(near).unwrap_or_else(all))
}
