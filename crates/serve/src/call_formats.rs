//! How the families of models write calls of tools: a table, by the text that their chat templates have.

use serde_json::{Deserializer, Map, Value};

use crate::literals::{Literals, QUOTE, word_value};
use crate::tool_calls::{ToolCall, Tools};

/// How some models write calls.
pub(crate) struct CallFormat {
    /// What chat templates have that write it. Empty: it is read of all models, as templates do not show it.
    sign: &'static str,
    /// What begins calls, wherever it stands in an answer.
    pub(crate) begins: &'static [&'static str],
    /// Marks that may be special tokens, whose text is left out otherwise.
    pub(crate) marks: &'static [&'static str],
    /// How arguments are written.
    pub(crate) notation: Notation,
    /// The calls that a text consists of, which one of `begins` begins. `None`: it is something else.
    pub(crate) read: fn(&str, &Tools) -> Option<Vec<ToolCall>>,
}

/// How the arguments of a call are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notation {
    /// As a JSON object.
    Json,
    /// Each between marks; this one stands in front of a key.
    Tagged(&'static str),
    /// As literals of Gemma 4.
    Gemma,
    /// As literals of Python.
    Python,
}

/// The formats. Of several with the same beginning, the first one that fits is meant.
static FORMATS: [CallFormat; 12] = [
    // Qwen, Hermes, Granite 4, SmolLM3: <tool_call>{"name", "arguments"}</tool_call>, as often as there are calls.
    CallFormat {
        sign: "",
        begins: &["<tool_call>"],
        marks: &["<tool_call>", "</tool_call>"],
        notation: Notation::Json,
        read: tagged,
    },
    // Qwen3-Coder, Qwen3.5: <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>.
    CallFormat {
        sign: "<function=",
        begins: &["<tool_call>", "<function="],
        marks: &[],
        notation: Notation::Tagged("<parameter="),
        read: parameters,
    },
    // GLM-4.5 and later: <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>.
    CallFormat {
        sign: "<arg_key>",
        begins: &["<tool_call>"],
        marks: &["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
        notation: Notation::Tagged("<arg_key>"),
        read: keys,
    },
    // Mistral: [TOOL_CALLS][{"name", "arguments"}, ...]; newer ones [TOOL_CALLS]NAME[ARGS]{...}.
    CallFormat {
        sign: "",
        begins: &["[TOOL_CALLS]"],
        marks: &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
        notation: Notation::Json,
        read: bracketed,
    },
    // Llama 3: {"name", "parameters"}, perhaps behind the mark.
    CallFormat {
        sign: "",
        begins: &["<|python_tag|>"],
        marks: &["<|python_tag|>"],
        notation: Notation::Json,
        read: behind_mark,
    },
    // Granite 3, Phi-4: a list of {"name", "arguments"}.
    CallFormat {
        sign: "",
        begins: &["<|tool_call|>"],
        marks: &["<|tool_call|>", "<|/tool_call|>"],
        notation: Notation::Json,
        read: behind_mark,
    },
    // DeepSeek-V3 and R1: function, NAME and arguments as Markdown; V3.1: NAME and arguments.
    CallFormat {
        sign: "<｜tool▁calls▁begin｜>",
        begins: &["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"],
        marks: &[
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ],
        notation: Notation::Json,
        read: deepseek,
    },
    // Kimi K2: functions.NAME:NUMBER and arguments.
    CallFormat {
        sign: "<|tool_calls_section_begin|>",
        begins: &["<|tool_calls_section_begin|>", "<|tool_call_begin|>"],
        marks: &[
            "<|tool_calls_section_begin|>",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            "<|tool_calls_section_end|>",
        ],
        notation: Notation::Json,
        read: kimi,
    },
    // Gemma 4: <|tool_call>call:NAME{KEY:<|"|>VALUE<|"|>}<tool_call|>.
    CallFormat {
        sign: "<|tool_call>call:",
        begins: &["<|tool_call>"],
        marks: &["<|tool_call>", "<tool_call|>", QUOTE],
        notation: Notation::Gemma,
        read: gemma,
    },
    // LFM2: [NAME(KEY=VALUE), ...] in Python.
    CallFormat {
        sign: "",
        begins: &["<|tool_call_start|>"],
        marks: &["<|tool_call_start|>", "<|tool_call_end|>"],
        notation: Notation::Python,
        read: python,
    },
    // OLMo 3: NAME(KEY=VALUE) in Python, a line each.
    CallFormat {
        sign: "<function_calls>",
        begins: &["<function_calls>"],
        marks: &["<function_calls>"],
        notation: Notation::Python,
        read: python,
    },
    // Llama 4: [NAME(KEY=VALUE), ...] in Python. Without the marks, as Llama 3.2 has it, only an answer that begins so is
    // meant.
    CallFormat {
        sign: "",
        begins: &["<|python_start|>"],
        marks: &["<|python_start|>", "<|python_end|>"],
        notation: Notation::Python,
        read: between_python_marks,
    },
];

/// The formats of a model, whose template has some texts.
pub(crate) fn formats(template_has: impl Fn(&str) -> bool) -> Vec<&'static CallFormat> {
    FORMATS.iter().filter(|format| template_has(format.sign)).collect()
}

/// Whether anything is there.
fn some(calls: Vec<ToolCall>) -> Option<Vec<ToolCall>> {
    (!calls.is_empty()).then_some(calls)
}

/// What stands between two marks at the beginning of a text, which goes on behind them. `None`: one of them is not
/// there, as in an answer that was cut off.
fn between<'a>(rest: &mut &'a str, open: &str, close: &str) -> Option<&'a str> {
    let text = rest.trim_start().strip_prefix(open)?;
    let (within, behind) = text.split_once(close)?;
    *rest = behind;
    Some(within)
}

/// Marks within a block that may be text of its arguments.
const MOST_MARKS: usize = 64;

/// The calls of blocks, each from a mark on to another. What stands outside of them is not looked at. A block ends at the
/// first mark that leaves something to read: texts of arguments may have marks, too.
fn blocks(text: &str, open: &str, close: &str, read: impl Fn(&str) -> Option<Vec<ToolCall>>) -> Option<Vec<ToolCall>> {
    let (mut calls, mut rest) = (Vec::new(), text);
    while let Some((_, within)) = rest.split_once(open) {
        let marks = [open, close].into_iter().flat_map(|mark| within.match_indices(mark).take(MOST_MARKS));
        let mut ends: Vec<usize> = marks.map(|(place, _)| place).chain([within.len()]).collect();
        ends.sort_unstable();
        let (found, end) = ends.into_iter().find_map(|end| Some((read(&within[..end])?, end)))?;
        calls.extend(found);
        rest = &within[end..];
    }
    some(calls)
}

/// The value of an argument, which ends at a mark. The text goes on behind it. Values that are no texts may have the
/// mark in texts of theirs.
fn argument(rest: &mut &str, mark: &str, is_text: bool) -> Option<String> {
    let begun = rest.trim_start();
    if !is_text && begun.starts_with(['{', '[']) {
        let mut values = Deserializer::from_str(begun).into_iter::<Value>();
        if let Some(Ok(_)) = values.next()
            && let Some((value, behind)) = begun.split_at_checked(values.byte_offset())
            && let Some(behind) = behind.trim_start().strip_prefix(mark)
        {
            *rest = behind;
            return Some(value.to_owned());
        }
    }
    let (value, behind) = rest.split_once(mark)?;
    *rest = behind;
    Some(value.to_owned())
}

/// A call whose arguments are the text of a JSON object.
fn of_json(name: &str, arguments: &str) -> Option<ToolCall> {
    let arguments: Value = serde_json::from_str(arguments.trim()).ok()?;
    let name = name.trim();
    (!name.is_empty() && arguments.is_object()).then(|| ToolCall::new(name, arguments.to_string()))
}

fn of_map(name: &str, arguments: Map<String, Value>) -> Option<ToolCall> {
    let name = name.trim();
    let is_name = !name.is_empty() && !name.contains(['<', '>', '{', '"', '\n']);
    is_name.then(|| ToolCall::new(name, Value::Object(arguments).to_string()))
}

fn tagged(text: &str, _: &Tools) -> Option<Vec<ToolCall>> {
    blocks(text, "<tool_call>", "</tool_call>", json_calls)
}

fn behind_mark(text: &str, tools: &Tools) -> Option<Vec<ToolCall>> {
    if let Some(text) = text.strip_prefix("<|python_tag|>") {
        return json_calls(text).or_else(|| python_list(text, tools)).or_else(|| built_in(text, tools));
    }
    json_calls(text.strip_prefix("<|tool_call|>")?.split("<|/tool_call|>").next().unwrap_or_default())
}

fn bracketed(text: &str, _: &Tools) -> Option<Vec<ToolCall>> {
    let rest = text.strip_prefix("[TOOL_CALLS]")?;
    let named = |text: &str| {
        let (name, arguments) = text.split_once("[ARGS]").or_else(|| Some(text.split_at(text.find('{')?)))?;
        of_json(name.split("[CALL_ID]").next().unwrap_or_default(), arguments)
    };
    json_calls(rest).or_else(|| rest.split("[TOOL_CALLS]").map(named).collect())
}

/// The calls of JSON objects, one after the other or in a list.
pub(crate) fn json_calls(text: &str) -> Option<Vec<ToolCall>> {
    let (mut calls, mut rest) = (Vec::new(), text.trim());
    while !rest.is_empty() {
        let mut values = Deserializer::from_str(rest).into_iter::<Value>();
        match values.next()?.ok()? {
            Value::Array(items) => calls.extend(items.iter().map(json_call).collect::<Option<Vec<_>>>()?),
            value => calls.push(json_call(&value)?),
        }
        // Llama 3 puts `;` between several calls.
        let end = values.byte_offset();
        rest = rest.get(end..)?.trim_start_matches(|letter: char| letter.is_whitespace() || letter == ';');
    }
    some(calls)
}

fn json_call(value: &Value) -> Option<ToolCall> {
    let value = value.get("function").filter(|function| function.is_object()).unwrap_or(value);
    let name = value.get("name")?.as_str().filter(|name| !name.is_empty())?;
    let arguments = match value.get("arguments").or_else(|| value.get("parameters")) {
        None | Some(Value::Null) => "{}".to_owned(),
        Some(Value::String(text)) => serde_json::from_str::<Value>(text).ok()?.to_string(),
        Some(arguments @ Value::Object(_)) => arguments.to_string(),
        Some(_) => return None,
    };
    Some(ToolCall::new(name, arguments))
}

fn parameters(text: &str, tools: &Tools) -> Option<Vec<ToolCall>> {
    let (mut calls, mut rest) = (Vec::new(), text.trim());
    while !rest.is_empty() {
        // Some answers leave out the mark around the function.
        rest = rest.strip_prefix("<tool_call>").unwrap_or(rest);
        let name = between(&mut rest, "<function=", ">")?;
        let mut arguments = Map::new();
        while let Some(key) = between(&mut rest, "<parameter=", ">") {
            let value = argument(&mut rest, "</parameter>", tools.is_text(name, key.trim()))?;
            // The lines of the marks are not the value's.
            let value = value.strip_prefix('\n').unwrap_or(&value);
            let value = value.strip_suffix('\n').unwrap_or(value);
            arguments.insert(key.trim().to_owned(), tools.value(name, key.trim(), value));
        }
        calls.push(of_map(name, arguments)?);
        let behind = ["</function>", "</tool_call>"]
            .iter()
            .fold(rest.trim_start(), |rest, mark| rest.strip_prefix(mark).unwrap_or(rest).trim_start());
        // A call that was cut off may lack arguments.
        if behind == rest.trim_start() {
            return None;
        }
        rest = behind;
        if !rest.starts_with("<tool_call>") && !rest.starts_with("<function=") {
            break;
        }
    }
    some(calls)
}

fn keys(text: &str, tools: &Tools) -> Option<Vec<ToolCall>> {
    let (mut calls, mut rest) = (Vec::new(), text.trim());
    while let Some(behind) = rest.trim_start().strip_prefix("<tool_call>") {
        let (name, behind) = behind.split_at(end_of_name(behind)?);
        rest = behind;
        let mut arguments = Map::new();
        while let Some(key) = between(&mut rest, "<arg_key>", "</arg_key>") {
            rest = rest.trim_start().strip_prefix("<arg_value>")?;
            let value = argument(&mut rest, "</arg_value>", tools.is_text(name.trim(), key.trim()))?;
            arguments.insert(key.trim().to_owned(), tools.value(name.trim(), key.trim(), &value));
        }
        rest = rest.trim_start().strip_prefix("</tool_call>")?;
        calls.push(of_map(name, arguments)?);
    }
    some(calls)
}

/// Where the name of GLM's call ends.
fn end_of_name(text: &str) -> Option<usize> {
    ["<arg_key>", "</tool_call>"].iter().filter_map(|mark| text.find(mark)).min()
}

fn deepseek(text: &str, _: &Tools) -> Option<Vec<ToolCall>> {
    blocks(text, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", |block| {
        let (first, second) = block.split_once("<｜tool▁sep｜>")?;
        if second.trim_start().starts_with('{') {
            return Some(vec![of_json(first, second)?]);
        }
        let (name, arguments) = second.split_once('\n')?;
        let arguments = arguments.trim().trim_start_matches("```json").trim_end_matches("```");
        Some(vec![of_json(name, arguments)?])
    })
}

fn kimi(text: &str, _: &Tools) -> Option<Vec<ToolCall>> {
    blocks(text, "<|tool_call_begin|>", "<|tool_call_end|>", |block| {
        let (id, arguments) = block.split_once("<|tool_call_argument_begin|>")?;
        let id = id.trim();
        let name = id.strip_prefix("functions.").unwrap_or(id);
        let name = name.split_once(':').map_or(name, |(name, _)| name);
        let call = of_json(name, arguments)?;
        // The template of the next request writes it in front of the result.
        Some(vec![ToolCall { id: Some(id.to_owned()), ..call }])
    })
}

fn gemma(text: &str, _: &Tools) -> Option<Vec<ToolCall>> {
    let (mut calls, mut rest) = (Vec::new(), text.trim());
    while let Some(call) = rest.strip_prefix("<|tool_call>") {
        let mut literals = Literals::new(call.trim_start().strip_prefix("call:")?);
        let name = literals.name('{')?;
        calls.push(of_map(name, literals.object("}", ":")?)?);
        literals.takes("<tool_call|>");
        rest = literals.rest().trim_start();
    }
    some(calls)
}

fn python(text: &str, _: &Tools) -> Option<Vec<ToolCall>> {
    let text = ["<|tool_call_start|>", "<function_calls>"].iter().find_map(|mark| text.strip_prefix(mark))?;
    let mut literals = Literals::new(text);
    literals.takes("[");
    let calls = python_calls(&mut literals)?;
    some(calls.into_iter().map(|(name, arguments)| of_map(name, arguments)).collect::<Option<_>>()?)
}

/// Calls one behind the other, with commas between them or without.
fn python_calls<'a>(literals: &mut Literals<'a>) -> Option<Vec<(&'a str, Map<String, Value>)>> {
    let mut calls = Vec::new();
    while let Some(name) = literals.name('(') {
        calls.push((name, literals.object(")", "=")?));
        literals.takes(",");
    }
    Some(calls)
}

fn between_python_marks(text: &str, tools: &Tools) -> Option<Vec<ToolCall>> {
    let text = text.strip_prefix("<|python_start|>")?;
    let (within, behind) = text.split_once("<|python_end|>").unwrap_or((text, ""));
    // Llama 4's template has the text of a message between the marks, and its calls behind them.
    let calls = match (within.trim(), behind.trim()) {
        ("", calls) | (calls, "") => calls,
        _ => return None,
    };
    python_list(calls, tools).or_else(|| json_calls(calls))
}

/// The calls of a list in Python, and nothing else. All of them are of tools that there are: a text may be such a list,
/// too.
pub(crate) fn python_list(text: &str, tools: &Tools) -> Option<Vec<ToolCall>> {
    let mut literals = Literals::new(text.trim().strip_prefix('[')?);
    let calls = python_calls(&mut literals)?;
    if !literals.takes("]") || !literals.rest().trim().is_empty() {
        return None;
    }
    some(calls.into_iter().map(|(name, arguments)| of_tool(name, arguments, tools)).collect::<Option<_>>()?)
}

/// Llama 3's call of a tool that its template knows by itself: `NAME.call(KEY=VALUE)`.
fn built_in(text: &str, tools: &Tools) -> Option<Vec<ToolCall>> {
    let mut literals = Literals::new(text.trim());
    let name = literals.name('(')?;
    let arguments = literals.object(")", "=")?;
    let call = of_tool(name.strip_suffix(".call")?, arguments, tools)?;
    literals.rest().trim().is_empty().then(|| vec![call])
}

/// A call of a tool that there is. Some templates put quotes around whatever is no text.
fn of_tool(name: &str, arguments: Map<String, Value>, tools: &Tools) -> Option<ToolCall> {
    let typed = |(key, value): (String, Value)| {
        let value = match value.as_str().filter(|_| tools.is_no_text(name, &key)) {
            Some(text) => tools.value(name, &key, text),
            None => value,
        };
        (key, value)
    };
    tools.has(name).then(|| of_map(name, arguments.into_iter().map(typed).collect())).flatten()
}

/// A value that is written as it is if it is a text, and as JSON or Python if it is not. `kinds`: the types that the
/// tool's parameters allow, if they say so.
pub(crate) fn typed(text: &str, kinds: &[&str]) -> Value {
    let word = text.trim();
    let parsed = word_value(word).or_else(|| serde_json::from_str(word).ok()).filter(|value| !value.is_string());
    match parsed {
        Some(value) if kinds.is_empty() || kinds.iter().any(|kind| is_of(&value, kind)) => value,
        Some(value) if !kinds.contains(&"string") => value,
        _ => text.into(),
    }
}

fn is_of(value: &Value, kind: &str) -> bool {
    match value {
        Value::Null => kind == "null",
        Value::Bool(_) => kind == "boolean",
        Value::Number(number) => kind == "number" || kind == "integer" && !number.is_f64(),
        Value::String(_) => kind == "string",
        Value::Array(_) => kind == "array",
        Value::Object(_) => kind == "object",
    }
}

#[cfg(test)]
mod tests;
