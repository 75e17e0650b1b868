//! The forms that a request may ask of its answer: JSON, JSON of a schema, calls of tools. Each becomes the text of a
//! grammar (`grammar.rs`).

use finetune_dataset::{ChatTokenizer, REASONING_TAGS};
use serde_json::{Value, json};

use crate::call_form::CallForm;
use crate::call_grammar::{self, Rules};
use crate::error::ApiError;
use crate::fields::{Fields, wrong};
use crate::text_grammar::escaped;

/// White space between the parts of JSON: a few spaces, or a line break and what the next line is set in by. Without a
/// bound some models write nothing else, and with one of forty letters they write forty line breaks.
const SPACE: &str = r"[\x20\x09]{1,8}|\r?\n[\x20\x09]{0,40}";

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
            Some(choice) if choice["type"] == "allowed_tools" => match choice["allowed_tools"]["mode"].as_str() {
                Some("auto") => Ok(ToolChoice::Auto),
                Some("required") => Ok(ToolChoice::Any { one }),
                _ => {
                    let message = "the `mode` of `allowed_tools` may be \"auto\" or \"required\"";
                    Err(ApiError::unsupported(PARAM, message))
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
///
/// # Errors
/// A sentence that says what of the tools cannot be kept in the form of this model's calls.
pub(crate) fn grammar(schema: Option<&Value>, calls: Option<&Calls<'_>>, thought: Thought) -> Result<String, String> {
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
        let Rules { text, grammars } = call_grammar::calls(form, tools, *one, "")?;
        rules += &text;
        others.extend(grammars);
    }
    Ok(with_main(rules, others))
}

/// A grammar of these rules, and those that they refer to.
pub(crate) fn with_main(rules: String, mut others: Vec<Value>) -> String {
    others.insert(0, json!({"name": "main", "lark_grammar": rules}));
    json!({"grammars": others}).to_string()
}

/// The text of a grammar that a form is tried with: JSON of a schema, or arguments of tools, and nothing around them.
/// `form`: how the model writes arguments; `None`: as JSON.
///
/// # Errors
/// As [`grammar`].
pub(crate) fn trial(schema: Option<&Value>, form: Option<&CallForm>, tools: &[&Value]) -> Result<String, String> {
    let Rules { mut text, mut grammars } = match form {
        Some(form) => call_grammar::arguments_of(form, tools)?,
        None => {
            let mut rules = Rules::default();
            for (n, tool) in tools.iter().enumerate() {
                let body = rules.add_json(&format!("tool{n}"), arguments(tool));
                rules.add(&format!("arguments{n}"), &body);
            }
            rules
        }
    };
    let answer = schema.map(|schema| {
        grammars.push(json!({"name": "answer", "json_schema": with_space(schema)}));
        "@answer".to_owned()
    });
    let all: Vec<String> = answer.into_iter().chain((0..tools.len()).map(|n| format!("arguments{n}"))).collect();
    text += &format!("start: {}\n", all.join(" | "));
    Ok(with_main(text, grammars))
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

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use finetune_model::Form;

    use super::*;
    use crate::grammar::Grammars;

    pub(crate) fn tokenizer() -> ChatTokenizer {
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
        let grammars = Grammars::of(&tokenizer(), &[0], &[]).expect("a vocabulary of bytes");
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
            (&object, "{\r\n\t\"a\" : {\r\n\t\t\"b\":  1\r\n\t}\r\n}", true),
            (&object, "{\n\n\"a\": 1}", false),
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
            let grammar = grammar(Some(schema), None, Thought::Not).expect("a grammar");
            assert_eq!(fits_tiny(&grammars, &grammar, text), want, "{schema}: {text}");
        }
        let space = format!("{{{}\"a\": 1}}", " ".repeat(60));
        assert!(
            !fits_tiny(&grammars, &grammar(Some(&object), None, Thought::Not).expect("a grammar"), &space),
            "white space has a bound"
        );
    }

    #[test]
    fn reasoning_stands_before_an_answer() {
        let grammars = Grammars::of(&tokenizer(), &[0], &[]).expect("a vocabulary of bytes");
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
            let grammar = grammar(Some(&object), None, thought).expect("a grammar");
            assert_eq!(fits_tiny(&grammars, &grammar, text), want, "{thought:?}: {text}");
        }
    }

    #[test]
    fn schemas_that_cannot_be_kept_are_refused() {
        let grammars = Grammars::of(&tokenizer(), &[0], &[]).expect("a vocabulary of bytes");
        for (schema, words) in [
            (json!({"not": {}}), "not"),
            (json!({"type": "array", "uniqueItems": true}), "uniqueItems"),
            (json!({"$ref": "https://example.com/x"}), "example.com"),
            (json!({"type": "string", "pattern": "(a"}), "regex"),
            (json!({"type": "objec"}), "objec"),
            (json!({"$ref": "#"}), ""),
            (json!({"oneOf": [{"$ref": "#"}, {"$ref": "#"}]}), ""),
        ] {
            let refused = grammars.read(&grammar(Some(&schema), None, Thought::Not).expect("a grammar")).map(drop);
            let error = refused.expect_err("it cannot be kept");
            assert!(error.contains(words) && !error.contains('\n') && error.len() < 1000, "{schema}: {error}");
        }
        assert!(Grammars::of(&tokenizer(), &[], &[]).is_err_and(|error| error.contains("no token that ends")));
    }
}
