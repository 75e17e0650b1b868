//! The forms that a request may ask of its answer: JSON, JSON of a schema, calls of tools. Each becomes the text of a
//! grammar (`grammar.rs`).

use finetune_dataset::{ChatTokenizer, REASONING_TAGS};
use serde_json::{Deserializer, Value, json};

use crate::error::ApiError;
use crate::fields::{Fields, wrong};
use crate::grammar::CALL;

/// White space between the parts of JSON. Without a bound some models write nothing else.
const SPACE: &str = r"[\x20\x0A\x0D\x09]{1,40}";
/// A tool of the conversation that shows how a template writes calls.
const SAMPLE: &str = "sample_name";

/// The schema of what `response_format` asks for. `None`: any text.
pub(crate) fn response_format(fields: &Fields) -> Result<Option<Value>, ApiError> {
    const PARAM: &str = "response_format";
    let Some(format) = fields.object(PARAM)? else { return Ok(None) };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(json!({"type": "object"}))),
        Some("json_schema") => {
            let schema = format.get("json_schema").and_then(|named| named.get("schema"));
            match schema {
                Some(schema @ Value::Object(_)) => Ok(Some(schema.clone())),
                Some(other) => Err(wrong("response_format.json_schema.schema", other, "an object")),
                None => Err(ApiError::field(PARAM, "`response_format` has no `json_schema.schema`")),
            }
        }
        _ => {
            let message = "the `type` of `response_format` may be \"text\", \"json_object\" or \"json_schema\"";
            Err(ApiError::unsupported(PARAM, message))
        }
    }
}

/// Which tools an answer has to call.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum ToolChoice {
    /// As the model likes.
    #[default]
    Auto,
    /// None: the model does not hear of tools.
    Off,
    /// Any, at least one. `one`: not more than one.
    Any { one: bool },
    /// This one, once.
    Named(String),
}

impl ToolChoice {
    pub(crate) fn read(fields: &Fields) -> Result<ToolChoice, ApiError> {
        const PARAM: &str = "tool_choice";
        let one = fields.flag("parallel_tool_calls")? == Some(false);
        let name = |choice: &Value| Some(choice.get("function")?.get("name")?.as_str()?.to_owned());
        match fields.get(PARAM) {
            None => Ok(ToolChoice::Auto),
            Some(Value::String(choice)) => match choice.as_str() {
                "auto" => Ok(ToolChoice::Auto),
                "none" => Ok(ToolChoice::Off),
                "required" => Ok(ToolChoice::Any { one }),
                other => {
                    let message = "`tool_choice` may be \"auto\", \"none\", \"required\" or a function";
                    Err(ApiError::unsupported(PARAM, format!("{message}, not {other:?}")))
                }
            },
            Some(choice) => name(choice).map(ToolChoice::Named).ok_or_else(|| {
                let message = "a function is {\"type\": \"function\", \"function\": {\"name\"}}";
                ApiError::field(PARAM, format!("`tool_choice` names no function: {message}"))
            }),
        }
    }

    pub(crate) fn is_forced(&self) -> bool {
        matches!(self, ToolChoice::Any { .. } | ToolChoice::Named(_))
    }
}

/// How a template writes a call of a tool: what stands before the name, between name and arguments, and behind them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CallForm {
    before: String,
    between: String,
    behind: String,
}

impl CallForm {
    /// Of a template that writes `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, as those of Hermes and Qwen
    /// do. `None`: it writes them in another way.
    pub(crate) fn of(tokenizer: &ChatTokenizer) -> Option<CallForm> {
        let function = json!({"name": SAMPLE, "arguments": {"key": "value"}});
        let called =
            json!({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]});
        let tool = json!({"type": "function", "function": {"name": SAMPLE, "description": "", "parameters": {}}});
        let messages = [json!({"role": "user", "content": "x"}), called];
        let rendered = tokenizer.render(&messages, Some(&json!([tool])), false).ok()?;
        CallForm::in_text(&rendered.text)
    }

    fn in_text(text: &str) -> Option<CallForm> {
        let (open, close) = CALL;
        let text = &text[text.rfind(open)?..];
        let text = &text[..text.find(close)? + close.len()];
        let call: Value = serde_json::from_str(text[open.len()..].strip_suffix(close)?).ok()?;
        if call != json!({"name": SAMPLE, "arguments": {"key": "value"}}) {
            return None;
        }
        let (before, rest) = text.split_once(&format!("\"{SAMPLE}\""))?;
        let (between, rest) = rest.split_at(rest.find('{')?);
        let mut values = Deserializer::from_str(rest).into_iter::<Value>();
        values.next()?.ok()?;
        let behind = rest.get(values.byte_offset()..)?;
        Some(CallForm { before: before.to_owned(), between: between.to_owned(), behind: behind.to_owned() })
    }
}

/// Reasoning in front of what has a form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Thought {
    Not,
    /// Between these tags, if the model likes.
    May(&'static str, &'static str),
    /// The prompt has opened it, and this tag closes it.
    Opened(&'static str),
}

impl Thought {
    /// Of an answer to a chat. `opened`: what the template has put in front of the answer, from a tag on.
    pub(crate) fn of(tokenizer: &ChatTokenizer, opened: Option<&str>) -> Thought {
        let mut tags = REASONING_TAGS.iter();
        if let Some(text) = opened {
            let tag = tags.find(|(open, _)| text.starts_with(open));
            return tag.map_or(Thought::Not, |(_, close)| Thought::Opened(close));
        }
        let tag = tags.find(|(open, _)| tokenizer.template_has(open));
        tag.map_or(Thought::Not, |(open, close)| Thought::May(open, close))
    }
}

/// The tools that an answer may call, as a grammar has them.
pub(crate) struct Calls<'a> {
    pub(crate) form: &'a CallForm,
    /// The tools of the request.
    pub(crate) tools: Vec<&'a Value>,
    /// Whether there may be one only.
    pub(crate) one: bool,
}

/// The text of a grammar: JSON of a schema, or calls, or what the model likes of both.
pub(crate) fn grammar(schema: Option<&Value>, calls: Option<&Calls<'_>>, thought: Thought) -> String {
    let body = match (schema.is_some(), calls.is_some()) {
        (true, true) => "@answer | calls",
        (false, true) => "calls",
        _ => "@answer",
    };
    let mut rules = match thought {
        Thought::Not => "start: body\n".to_owned(),
        Thought::May(open, _) => format!("start: body | {} thinking SPACE body\n", quoted(open)),
        Thought::Opened(_) => "start: thinking SPACE body\n".to_owned(),
    };
    if let Thought::May(_, close) | Thought::Opened(close) = thought {
        rules += &format!("thinking[lazy]: /(?s:.*){}/\nSPACE: /[ \\n\\r\\t]{{0,8}}/\n", escaped(close));
    }
    rules += &format!("body: {body}\n");
    let mut others = Vec::new();
    if let Some(schema) = schema {
        others.push(json!({"name": "answer", "json_schema": with_space(schema)}));
    }
    if let Some(Calls { form, tools, one }) = calls {
        rules += if *one { "calls: call\n" } else { "calls: call (\"\\n\" call)*\n" };
        let mut alternatives = Vec::new();
        for (n, tool) in tools.iter().enumerate() {
            let name = tool["function"]["name"].to_string();
            let CallForm { before, between, behind } = form;
            let [before, behind] = [format!("{before}{name}{between}"), behind.clone()].map(|text| quoted(&text));
            alternatives.push(format!("{before} @tool{n} {behind}"));
            others.push(json!({"name": format!("tool{n}"), "json_schema": arguments(tool)}));
        }
        rules += &format!("call: {}\n", alternatives.join(" | "));
    }
    let main = json!({"name": "main", "lark_grammar": rules});
    others.insert(0, main);
    json!({"grammars": others}).to_string()
}

/// The text of a grammar that a form is tried with: JSON of a schema, or arguments of tools, and nothing around them.
pub(crate) fn trial(schema: Option<&Value>, tools: &[&Value]) -> String {
    let mut others = Vec::new();
    others.extend(schema.map(|schema| json!({"name": "answer", "json_schema": with_space(schema)})));
    let of_tool = |(n, tool): (usize, &&Value)| json!({"name": format!("tool{n}"), "json_schema": arguments(tool)});
    others.extend(tools.iter().enumerate().map(of_tool));
    let names: Vec<String> =
        others.iter().map(|grammar| format!("@{}", grammar["name"].as_str().unwrap_or_default())).collect();
    let rules = format!("start: {}\n", names.join(" | "));
    others.insert(0, json!({"name": "main", "lark_grammar": rules}));
    json!({"grammars": others}).to_string()
}

/// The schema of a tool's arguments, which are an object in any case.
pub(crate) fn arguments(tool: &Value) -> Value {
    let parameters = tool["function"].get("parameters").filter(|parameters| !parameters.is_null());
    let mut schema = with_space(parameters.unwrap_or(&json!({})));
    if let Some(schema) = schema.as_object_mut() {
        schema.entry("type").or_insert_with(|| "object".into());
    }
    schema
}

/// A schema whose JSON has not much white space.
pub(crate) fn with_space(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Some(schema) = schema.as_object_mut() {
        schema.insert("x-guidance".to_owned(), json!({"whitespace_pattern": SPACE}));
    }
    schema
}

/// A text of a grammar.
pub(crate) fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// A text as a regular expression between slashes.
fn escaped(text: &str) -> String {
    let letter = |letter: char| match letter.is_ascii_alphanumeric() {
        true => letter.to_string(),
        false => format!("\\x{{{:X}}}", u32::from(letter)),
    };
    text.chars().map(letter).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use finetune_model::Form;

    use super::*;
    use crate::grammar::Grammars;

    fn tokenizer() -> ChatTokenizer {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/quickstart/base");
        ChatTokenizer::load(&directory, None).expect("a tokenizer")
    }

    fn allows(form: &mut dyn Form, token: u32) -> bool {
        let words = form.allowed().expect("something comes");
        words.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// Whether a text has the form of a grammar: all of its tokens may come, and the end behind them.
    pub(crate) fn fits(grammars: &Grammars, tokenizer: &ChatTokenizer, grammar: &str, text: &str, end: u32) -> bool {
        let mut form = grammars.read(grammar).expect("a grammar").begin();
        for token in tokenizer.encode(text, false).expect("tokens") {
            if !allows(form.as_mut(), token) {
                return false;
            }
            form.take(token).expect("it was allowed");
        }
        allows(form.as_mut(), end)
    }

    fn fits_tiny(grammars: &Grammars, grammar: &str, text: &str) -> bool {
        fits(grammars, &tokenizer(), grammar, text, 0)
    }

    #[test]
    fn answers_that_fit_schemas() {
        let grammars = Grammars::new(&tokenizer(), &[0]).expect("a vocabulary of bytes");
        let object = json!({"type": "object"});
        let person = json!({
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
            "required": ["name", "age"],
            "additionalProperties": false,
            "$defs": {"age": {"type": "integer", "minimum": 0}},
        });
        let colour = json!({"enum": ["red", "green"]});
        for (schema, text, want) in [
            (&object, "{}", true),
            (&object, "{\"a\": [1, true, null, \"é\\n\"]}", true),
            (&object, "{\n    \"a\": {\"b\": -1.5e3}\n}", true),
            (&object, "[1]", false),
            (&object, "{\"a\": 1", false),
            (&object, "{\"a\": 1}}", false),
            (&object, "{\"a\": 01}", false),
            (&object, "{a: 1}", false),
            (&object, "", false),
            (&object, "Here: {}", false),
            (&person, "{\"name\": \"Ada\", \"age\": 36}", true),
            (&person, "{\"name\":\"Ada\",\"age\":36}", true),
            (&person, "{\"name\": \"Ada\"}", false),
            (&person, "{\"name\": \"Ada\", \"age\": -1}", false),
            (&person, "{\"name\": \"Ada\", \"age\": 36, \"x\": 1}", false),
            (&colour, "\"red\"", true),
            (&colour, "\"blue\"", false),
        ] {
            let grammar = grammar(Some(schema), None, Thought::Not);
            assert_eq!(fits_tiny(&grammars, &grammar, text), want, "{schema}: {text}");
        }
        let space = format!("{{{}\"a\": 1}}", " ".repeat(60));
        assert!(!fits_tiny(&grammars, &grammar(Some(&object), None, Thought::Not), &space), "white space has a bound");
    }

    #[test]
    fn reasoning_stands_before_an_answer() {
        let grammars = Grammars::new(&tokenizer(), &[0]).expect("a vocabulary of bytes");
        let object = json!({"type": "object"});
        let may = Thought::May("<think>", "</think>");
        let opened = Thought::Opened("[/THINK]");
        for (thought, text, want) in [
            (Thought::Not, "<think>hm</think>{}", false),
            (may, "{}", true),
            (may, "<think>hm, {\"a\" <b>\n</think>\n\n{\"a\": 1}", true),
            (may, "<think>hm", false),
            (may, "<think>hm</think>\n\nHello", false),
            (opened, "{}", false),
            (opened, "hm\n[/THINK]{}", true),
            (opened, "[/THINK]\n{}", true),
        ] {
            let grammar = grammar(Some(&object), None, thought);
            assert_eq!(fits_tiny(&grammars, &grammar, text), want, "{thought:?}: {text}");
        }
    }

    #[test]
    fn calls_of_tools() {
        let grammars = Grammars::new(&tokenizer(), &[0]).expect("a vocabulary of bytes");
        let rendered = "<tool_call>\n{\"name\": <function-name>}\n</tool_call><|im_start|>assistant\n\
             <tool_call>\n{\"name\": \"sample_name\", \"arguments\": {\"key\": \"value\"}}\n</tool_call><|im_end|>";
        let form = CallForm::in_text(rendered).expect("calls as JSON");
        let parts = [&form.before, &form.between, &form.behind].map(String::as_str);
        assert_eq!(parts, ["<tool_call>\n{\"name\": ", ", \"arguments\": ", "}\n</tool_call>"]);
        let zone = json!({"type": "object", "properties": {"zone": {"type": "integer"}}, "required": ["zone"]});
        let now = json!({"type": "function", "function": {"name": "now", "parameters": zone}});
        let quit = json!({"type": "function", "function": {"name": "quit"}});
        let of_now = "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"zone\": 1}}\n</tool_call>";
        let of_quit = "<tool_call>\n{\"name\": \"quit\", \"arguments\": {}}\n</tool_call>";
        let two = format!("{of_now}\n{of_quit}");
        for (tools, one, schema, text, want) in [
            (vec![&now, &quit], false, false, of_now, true),
            (vec![&now, &quit], false, false, of_quit, true),
            (vec![&now, &quit], false, false, two.as_str(), true),
            (vec![&now, &quit], true, false, two.as_str(), false),
            (vec![&now], true, false, of_now, true),
            (vec![&now], true, false, of_quit, false),
            (vec![&now], true, false, "{}", false),
            (vec![&now], true, false, "Hello", false),
            (vec![&now], true, true, "{}", true),
            (vec![&now], true, true, of_now, true),
            (
                vec![&now],
                true,
                false,
                "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"zone\": \"x\"}}\n</tool_call>",
                false,
            ),
        ] {
            let calls = Calls { form: &form, tools, one };
            let object = json!({"type": "object"});
            let grammar = grammar(schema.then_some(&object), Some(&calls), Thought::Not);
            assert_eq!(fits_tiny(&grammars, &grammar, text), want, "{text}");
        }
        for other in [
            "no call",
            "<tool_call>\n<function=sample_name>\n<parameter=key>\nvalue\n</parameter>\n</function>\n</tool_call>",
            "<tool_call>\n{\"name\": \"sample_name\", \"parameters\": {\"key\": \"value\"}}\n</tool_call>",
            "<tool_call>{\"name\": \"sample_name\"",
        ] {
            assert_eq!(CallForm::in_text(other), None, "{other}");
        }
        assert_eq!(CallForm::of(&tokenizer()), None, "its template knows no tools");
    }

    #[test]
    fn schemas_that_cannot_be_kept_are_refused() {
        let grammars = Grammars::new(&tokenizer(), &[0]).expect("a vocabulary of bytes");
        for (schema, words) in [
            (json!({"not": {}}), "not"),
            (json!({"type": "array", "uniqueItems": true}), "uniqueItems"),
            (json!({"$ref": "https://example.com/x"}), "example.com"),
            (json!({"type": "string", "pattern": "(a"}), "regex"),
            (json!({"type": "objec"}), "objec"),
            (json!({"$ref": "#"}), ""),
            (json!({"oneOf": [{"$ref": "#"}, {"$ref": "#"}]}), ""),
        ] {
            let refused = grammars.read(&grammar(Some(&schema), None, Thought::Not)).map(drop);
            let error = refused.expect_err("it cannot be kept");
            assert!(error.contains(words) && !error.contains('\n') && error.len() < 1000, "{schema}: {error}");
        }
        assert!(Grammars::new(&tokenizer(), &[]).is_err_and(|error| error.contains("no token that ends")));
    }
}
