//! Calls of tools in an answer, as it comes. How families of models write them is in `call_formats.rs`. What is no call
//! is text.

use std::sync::Arc;

use finetune_dataset::beginning;
use serde_json::Value;

use crate::call_form::Begins;
use crate::call_formats::{CallFormat, json_calls, python_list, typed};
use crate::free_forms::is_strict;
use crate::schema_kinds::{kinds, resolved};

/// A call of a tool.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ToolCall {
    /// The name of the call, if the model gives it one.
    pub(crate) id: Option<String>,
    pub(crate) name: String,
    /// JSON.
    pub(crate) arguments: String,
}

impl ToolCall {
    pub(crate) fn new(name: &str, arguments: String) -> ToolCall {
        ToolCall { id: None, name: name.to_owned(), arguments }
    }
}

/// The tools of a request.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    all: Arc<Value>,
    /// Nothing holds calls to a form. So those of tools with `strict` are none.
    are_unheld: bool,
}

impl Tools {
    /// `tools`: as the request has them.
    pub(crate) fn new(tools: Value) -> Tools {
        Tools { all: Arc::new(tools), are_unheld: false }
    }

    /// Of answers whose calls nothing holds to a form: what looks like a call of a tool with `strict` stays text.
    pub(crate) fn unheld(tools: Value) -> Tools {
        Tools { are_unheld: true, ..Tools::new(tools) }
    }

    /// Whether calls of this name are given to the client.
    fn takes(&self, call: &ToolCall) -> bool {
        let mut tools = self.all.as_array().into_iter().flatten();
        let is_meant = |tool: &Value| tool["function"]["name"] == *call.name && is_strict(tool);
        !(self.are_unheld && tools.any(is_meant))
    }

    fn function(&self, name: &str) -> Option<&Value> {
        self.all.as_array()?.iter().map(|tool| &tool["function"]).find(|function| function["name"] == *name)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.function(name).is_some()
    }

    /// The types that an argument may have. None: its schema does not say.
    fn kinds(&self, tool: &str, key: &str) -> Vec<&str> {
        let Some(root) = self.function(tool).and_then(|tool| tool.get("parameters")) else { return Vec::new() };
        let schema = resolved(root, root).and_then(|schema| schema.get("properties")?.get(key));
        schema.map(|schema| kinds(schema, root)).unwrap_or_default()
    }

    /// Whether an argument can be nothing but a text.
    pub(crate) fn is_text(&self, tool: &str, key: &str) -> bool {
        self.kinds(tool, key) == ["string"]
    }

    /// Whether an argument can be anything but a text.
    pub(crate) fn is_no_text(&self, tool: &str, key: &str) -> bool {
        let kinds = self.kinds(tool, key);
        !kinds.is_empty() && !kinds.contains(&"string")
    }

    /// Whether a text begins with a list in Python of a call of one of them, or may as more comes.
    fn begins_list(&self, text: &str) -> Beginning {
        let Some(call) = text.strip_prefix('[').map(str::trim_start) else { return Beginning::Other };
        let names = self.all.as_array().into_iter().flatten().filter_map(|tool| tool["function"]["name"].as_str());
        let of_name = |name: &str| match call.strip_prefix(name).map(str::trim_start) {
            Some(behind) if behind.starts_with('(') => Beginning::Call,
            Some("") => Beginning::Open,
            None if name.starts_with(call) => Beginning::Open,
            _ => Beginning::Other,
        };
        names.map(of_name).max().unwrap_or(Beginning::Other)
    }

    /// The value of an argument that is written as a text.
    pub(crate) fn value(&self, tool: &str, key: &str, text: &str) -> Value {
        typed(text, &self.kinds(tool, key))
    }
}

/// What an answer begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Beginning {
    Other,
    /// That is not known yet.
    Open,
    Call,
}

/// Tells text from calls as the answer comes. Text that may be the beginning of a call is held
/// back, and calls until the answer's end.
pub(crate) struct CallReader {
    formats: Vec<&'static CallFormat>,
    tools: Tools,
    /// What alone begins calls, if answers have a form. `None`: any of the formats does, and JSON and lists as well.
    only: Option<Begins>,
    held: String,
    /// Whether anything but white space has been passed on.
    has_text: bool,
    is_call: bool,
}

impl CallReader {
    pub(crate) fn new(formats: Vec<&'static CallFormat>, tools: Tools) -> CallReader {
        CallReader { formats, tools, only: None, held: String::new(), has_text: false, is_call: false }
    }

    /// Of answers whose calls have a form: nothing else that looks like a call is one.
    pub(crate) fn of_form(self, begins: Begins) -> CallReader {
        CallReader { only: Some(begins), ..self }
    }

    /// Whether an answer may be a call that no mark begins.
    fn may_be(&self, begins: Begins) -> bool {
        self.only.is_none_or(|only| only == begins)
    }

    fn beginnings(&self) -> impl Iterator<Item = &'static str> {
        let all = self.formats.iter().flat_map(|format| format.begins).copied();
        all.filter(|mark| self.may_be(Begins::Mark(mark)))
    }

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
        if let Some(start) = self.beginnings().filter_map(|mark| self.held.find(mark)).min() {
            self.is_call = true;
            return start;
        }
        if !self.has_text {
            let begun = self.held.trim_start();
            // An answer that begins with JSON, or with a list in Python, may be a call as a whole.
            let list = if self.may_be(Begins::List) { self.tools.begins_list(begun) } else { Beginning::Other };
            let is_json = self.may_be(Begins::Json) && begun.starts_with('{');
            // A list of objects is no form of any family.
            let is_list = self.only.is_none() && begun.starts_with("[{");
            self.is_call = is_json || is_list || list == Beginning::Call;
            if self.is_call || begun.is_empty() || begun == "[" || list == Beginning::Open {
                return 0;
            }
        }
        self.held.len() - self.beginnings().map(|mark| beginning(&self.held, mark)).max().unwrap_or(0)
    }

    /// The text that was held back, or the calls, at the end of the answer.
    pub(crate) fn finish(self) -> (String, Vec<ToolCall>) {
        match self.calls() {
            Some(calls) if calls.iter().all(|call| self.tools.takes(call)) => (String::new(), calls),
            _ => (self.held, Vec::new()),
        }
    }

    /// The calls that what is held consists of. `None`: it is something else.
    fn calls(&self) -> Option<Vec<ToolCall>> {
        let text = self.held.trim();
        let begun: Vec<&str> = self.beginnings().filter(|mark| text.starts_with(mark)).collect();
        let mut fitting = self.formats.iter().filter(|format| format.begins.iter().any(|mark| begun.contains(mark)));
        fitting
            .find_map(|format| (format.read)(text, &self.tools))
            .or_else(|| if self.may_be(Begins::Json) { json_calls(text) } else { None })
            .or_else(|| if self.may_be(Begins::List) { python_list(text, &self.tools) } else { None })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::call_formats::formats;

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
            let mut reader = CallReader::new(formats(str::is_empty), Tools::new(json!([])));
            let mut text: String = answer.chars().map(|letter| reader.push(&letter.to_string())).collect();
            let (rest, calls) = reader.finish();
            text += &rest;
            assert_eq!((text.as_str(), calls), (answer, Vec::new()), "{answer}");
        }
    }

    /// (what the model says, whether that is a call where nothing holds calls to a form)
    #[test]
    fn calls_of_strict_tools_that_nothing_holds_are_text() {
        let tool = |name: &str, strict: bool| json!({"type": "function", "function": {"name": name, "strict": strict}});
        let tools = json!([tool("order", true), tool("now", false)]);
        let read = |tools: Tools, answer: &str| {
            let mut reader = CallReader::new(formats(str::is_empty), tools);
            let text = reader.push(answer);
            let (rest, calls) = reader.finish();
            (text + &rest, calls.len())
        };
        for (answer, calls) in [
            ("{\"name\": \"order\", \"parameters\": {\"count\": \"many\"}}", 0),
            ("{\"name\": \"now\", \"parameters\": {}}", 1),
            ("{\"name\": \"other\", \"parameters\": {}}", 1),
            ("<tool_call>{\"name\": \"order\", \"arguments\": {}}</tool_call>", 0),
            ("[order(count=1)]", 0),
            ("[now()]", 1),
        ] {
            let want = if calls == 0 { answer } else { "" };
            assert_eq!(read(Tools::unheld(tools.clone()), answer), (want.to_owned(), calls), "{answer}");
            assert_eq!(read(Tools::new(tools.clone()), answer), (String::new(), 1), "{answer}");
        }
    }
}
