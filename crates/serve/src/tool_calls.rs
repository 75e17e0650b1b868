//! Calls of tools in an answer, as the families of models write them:
//!
//! - Qwen and Hermes: `<tool_call>{"name", "arguments"}</tool_call>`, as often as there are calls;
//! - Mistral: `[TOOL_CALLS][{"name", "arguments"}, ...]`, newer ones `[TOOL_CALLS]name[ARGS]{...}`;
//! - Llama 3: the answer is `{"name", "parameters"}`, perhaps behind `<|python_tag|>`.
//!
//! Anything else is text.

use finetune_dataset::beginning;
use serde_json::{Deserializer, Value};

/// Marks in front of calls that may be special tokens, whose text is left out otherwise.
pub(crate) const MARKS: [&str; 6] =
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"];

/// Marks that begin calls, wherever they stand.
const BEGINNINGS: [&str; 3] = ["<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"];

/// A call of a tool.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ToolCall {
    pub(crate) name: String,
    /// JSON.
    pub(crate) arguments: String,
}

/// Tells text from calls as the answer comes. Text that may be the beginning of a call is held
/// back, and calls until the answer's end.
#[derive(Default)]
pub(crate) struct CallReader {
    held: String,
    /// Whether anything but white space has been passed on.
    has_text: bool,
    is_call: bool,
}

impl CallReader {
    /// The text that may be shown once this has come.
    pub(crate) fn push(&mut self, new: &str) -> String {
        self.held += new;
        let end = if self.is_call { 0 } else { self.end_of_text() };
        let rest = self.held.split_off(end);
        let text = std::mem::replace(&mut self.held, rest);
        self.has_text |= !text.trim().is_empty();
        text
    }

    /// How many bytes of what is held are surely text.
    fn end_of_text(&mut self) -> usize {
        if let Some(start) = BEGINNINGS.iter().filter_map(|mark| self.held.find(mark)).min() {
            self.is_call = true;
            return start;
        }
        if !self.has_text {
            let begun = self.held.trim_start();
            // An answer that begins with JSON may be a call as a whole.
            self.is_call = begun.starts_with('{') || begun.starts_with("[{");
            if self.is_call || begun.is_empty() || begun == "[" {
                return 0;
            }
        }
        self.held.len() - BEGINNINGS.iter().map(|mark| beginning(&self.held, mark)).max().unwrap_or(0)
    }

    /// The text that was held back, or the calls, at the end of the answer.
    pub(crate) fn finish(self) -> (String, Vec<ToolCall>) {
        match calls(&self.held) {
            Some(calls) => (String::new(), calls),
            None => (self.held, Vec::new()),
        }
    }
}

/// The calls that a text consists of. `None`: it is something else.
fn calls(text: &str) -> Option<Vec<ToolCall>> {
    let text = text.trim();
    let found = if text.starts_with("<tool_call>") {
        let blocks = text.split("<tool_call>").skip(1);
        let of_block = |block: &str| json_calls(block.split("</tool_call>").next().unwrap_or_default());
        blocks.map(of_block).collect::<Option<Vec<_>>>()?.concat()
    } else if let Some(rest) = text.strip_prefix("[TOOL_CALLS]") {
        match json_calls(rest) {
            Some(calls) => calls,
            None => rest.split("[TOOL_CALLS]").map(named_call).collect::<Option<Vec<_>>>()?,
        }
    } else {
        json_calls(text.strip_prefix("<|python_tag|>").unwrap_or(text))?
    };
    (!found.is_empty()).then_some(found)
}

/// `name[ARGS]{...}`, perhaps with `[CALL_ID]id` between them.
fn named_call(text: &str) -> Option<ToolCall> {
    let (name, arguments) = text.split_once("[ARGS]").or_else(|| Some(text.split_at(text.find('{')?)))?;
    let name = name.split("[CALL_ID]").next().unwrap_or_default().trim();
    let arguments: Value = serde_json::from_str(arguments.trim()).ok()?;
    (!name.is_empty() && arguments.is_object())
        .then(|| ToolCall { name: name.to_owned(), arguments: arguments.to_string() })
}

/// The calls of JSON objects, one after the other or in a list.
fn json_calls(text: &str) -> Option<Vec<ToolCall>> {
    let (mut calls, mut rest) = (Vec::new(), text.trim());
    while !rest.is_empty() {
        let mut values = Deserializer::from_str(rest).into_iter::<Value>();
        match values.next()?.ok()? {
            Value::Array(items) => calls.extend(items.iter().map(call).collect::<Option<Vec<_>>>()?),
            value => calls.push(call(&value)?),
        }
        // Llama 3 puts `;` between several calls.
        let end = values.byte_offset();
        rest = rest.get(end..)?.trim_start_matches(|letter: char| letter.is_whitespace() || letter == ';');
    }
    (!calls.is_empty()).then_some(calls)
}

fn call(value: &Value) -> Option<ToolCall> {
    let value = value.get("function").filter(|function| function.is_object()).unwrap_or(value);
    let name = value.get("name")?.as_str().filter(|name| !name.is_empty())?;
    let arguments = match value.get("arguments").or_else(|| value.get("parameters")) {
        None | Some(Value::Null) => "{}".to_owned(),
        Some(Value::String(text)) => serde_json::from_str::<Value>(text).ok()?.to_string(),
        Some(arguments @ Value::Object(_)) => arguments.to_string(),
        Some(_) => return None,
    };
    Some(ToolCall { name: name.to_owned(), arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an answer letter by letter.
    fn read(answer: &str) -> (String, Vec<ToolCall>) {
        let mut reader = CallReader::default();
        let mut text: String = answer.chars().map(|letter| reader.push(&letter.to_string())).collect();
        let (rest, calls) = reader.finish();
        text += &rest;
        (text, calls)
    }

    #[test]
    fn calls_of_the_families() {
        let paris = ("weather", "{\"city\":\"Paris\"}");
        let rome = ("weather", "{\"city\":\"Rome; Italy\"}");
        let qwen = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>";
        let two = format!("{qwen}\n{}", qwen.replace("Paris", "Rome; Italy"));
        let llama = "{\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}";
        for (answer, text, want) in [
            (qwen.to_owned(), "", vec![paris]),
            (format!("Let me see.\n{qwen}"), "Let me see.\n", vec![paris]),
            (two, "", vec![paris, rome]),
            (llama.to_owned(), "", vec![paris]),
            (format!("<|python_tag|>{llama}"), "", vec![paris]),
            (format!("{llama}; {}", llama.replace("Paris", "Rome; Italy")), "", vec![paris, rome]),
            ("[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}]".to_owned(), "", vec![paris]),
            ("[{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}]".to_owned(), "", vec![paris]),
            ("[TOOL_CALLS]weather[ARGS]{\"city\": \"Paris\"}".to_owned(), "", vec![paris]),
            ("[TOOL_CALLS]now[CALL_ID]abc[ARGS]{}".to_owned(), "", vec![("now", "{}")]),
            ("<tool_call>{\"name\": \"now\"}".to_owned(), "", vec![("now", "{}")]),
            ("<tool_call>{\"name\": \"now\", \"arguments\": \"{}\"}</tool_call>".to_owned(), "", vec![("now", "{}")]),
        ] {
            let want: Vec<ToolCall> = want
                .into_iter()
                .map(|(name, arguments)| ToolCall { name: name.to_owned(), arguments: arguments.to_owned() })
                .collect();
            assert_eq!(read(&answer), (text.to_owned(), want), "{answer}");
        }
    }

    #[test]
    fn what_is_no_call_is_text() {
        for answer in [
            "",
            "Hello",
            "  Hello",
            "{\"city\": \"Paris\"}",
            "{never closed",
            "[1, 2]",
            "[link](x)",
            "[TOOL",
            "<tool_call>{\"name\": 3}</tool_call>",
            "<tool_call>nonsense",
            "a < b, <tool",
            "[TOOL_CALLS]weather",
        ] {
            assert_eq!(read(answer), (answer.to_owned(), Vec::new()), "{answer}");
        }
    }
}
