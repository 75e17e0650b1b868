//! A conversation and its tools as the chat template takes them.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::fields::{Fields, wrong};
use crate::forms::ToolChoice;

/// What the chat template gets.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Conversation {
    pub(crate) messages: Vec<Value>,
    /// `None`: the model is not to call any.
    pub(crate) tools: Option<Value>,
    /// Which of them it has to call.
    pub(crate) choice: ToolChoice,
    /// Whether the answer has one call at most.
    pub(crate) one_call: bool,
    /// More variables of the template.
    pub(crate) variables: Vec<(String, Value)>,
}

impl Conversation {
    pub(crate) fn read(fields: &Fields) -> Result<Conversation, ApiError> {
        let Some(messages) = fields.list("messages")?.filter(|messages| !messages.is_empty()) else {
            return Err(ApiError::field("messages", "`messages` must be a list of at least one message"));
        };
        let messages = messages.iter().enumerate();
        let messages = messages.map(|(n, message)| read_message(message, &format!("messages[{n}]")));
        let mut variables = fields.object("chat_template_kwargs")?.cloned().unwrap_or_default();
        if let Some(documents) = fields.list("documents")? {
            variables.entry("documents").or_insert_with(|| documents.to_vec().into());
        }
        // gpt-oss's template has a variable of OpenAI's name.
        if let Some(effort) = fields.text("reasoning_effort")? {
            variables.entry("reasoning_effort").or_insert_with(|| effort.into());
        }
        let choice = ToolChoice::read(fields)?;
        Ok(Conversation {
            messages: messages.collect::<Result<_, _>>()?,
            tools: tools(fields, &choice)?,
            choice,
            one_call: fields.flag("parallel_tool_calls")? == Some(false),
            variables: variables.into_iter().collect(),
        })
    }
}

/// A message without the fields that are null. The arguments of its calls become objects, since templates take them so.
/// Texts in parts stay so: whoever knows the template says whether it takes them.
fn read_message(message: &Value, path: &str) -> Result<Value, ApiError> {
    let Value::Object(message) = message else { return Err(wrong(path, message, "an object")) };
    let mut message: Map<String, Value> =
        message.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), value.clone())).collect();
    match message.get("role") {
        // OpenAI's newer name.
        Some(Value::String(role)) if role == "developer" => drop(message.insert("role".to_owned(), "system".into())),
        Some(Value::String(role)) if !role.is_empty() => {}
        Some(other) => return Err(wrong(&format!("{path}.role"), other, "a string")),
        None => return Err(ApiError::field(format!("{path}.role"), format!("`{path}` has no `role`"))),
    }
    match message.get("content") {
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            let parts = texts_of(parts, &format!("{path}.content"))?;
            message.insert("content".to_owned(), if parts.is_empty() { "".into() } else { parts.into() });
        }
        Some(other) => return Err(wrong(&format!("{path}.content"), other, "a string, or a list of text parts")),
        None if message.contains_key("tool_calls") => drop(message.insert("content".to_owned(), "".into())),
        // What a model of OpenAI's said instead of an answer.
        None if message.get("refusal").is_some_and(Value::is_string) => {
            let refusal = message.remove("refusal").unwrap_or_default();
            message.insert("content".to_owned(), refusal);
        }
        None => return Err(ApiError::field(format!("{path}.content"), format!("`{path}` has no `content`"))),
    }
    match message.get_mut("tool_calls") {
        None => {}
        // Templates look whether they are there, not whether there are any.
        Some(Value::Array(calls)) if calls.is_empty() => drop(message.remove("tool_calls")),
        Some(Value::Array(calls)) => {
            if let Some(n) = calls.iter().position(|call| !call.is_object()) {
                return Err(wrong(&format!("{path}.tool_calls[{n}]"), &calls[n], "an object"));
            }
            calls.iter_mut().for_each(read_arguments);
        }
        Some(other) => return Err(wrong(&format!("{path}.tool_calls"), other, "a list of calls")),
    }
    Ok(Value::Object(message))
}

/// The first message of a role of its own that a template has written nothing of, and that role.
pub(crate) fn left_out(messages: &[Value], prompt: &str) -> Option<(usize, String)> {
    const ROLES: [&str; 5] = ["system", "user", "assistant", "tool", "function"];
    let is_left_out = |message: &Value| {
        let text = message["content"].as_str().unwrap_or_default().trim();
        // Llama's templates write the content of `ipython`, which is a tool's, as JSON.
        let is_there = || prompt.contains(text) || prompt.contains(Value::from(text).to_string().trim_matches('"'));
        let role = message["role"].as_str().filter(|role| !ROLES.contains(role) && !is_there())?;
        Some(role.chars().take(40).collect())
    };
    messages.iter().enumerate().find_map(|(n, message)| Some((n, is_left_out(message)?)))
}

/// Parts of text with nothing else in them.
fn texts_of(parts: &[Value], path: &str) -> Result<Vec<Value>, ApiError> {
    let text = |(n, part): (usize, &Value)| {
        let path = format!("{path}[{n}]");
        let kind = part.get("type").and_then(Value::as_str);
        // A refusal is the text of a part.
        match (kind, part.get(if kind == Some("refusal") { "refusal" } else { "text" })) {
            (Some("text" | "refusal"), Some(Value::String(text))) => Ok(json!({"type": "text", "text": text})),
            (Some("text"), other) => Err(wrong(&format!("{path}.text"), other.unwrap_or(&Value::Null), "a string")),
            (Some(other), _) => {
                let other: String = other.chars().take(40).collect();
                Err(ApiError::unsupported(
                    &path,
                    format!("`{path}` is of the type `{other}`; only `text` is supported"),
                ))
            }
            (None, _) => Err(ApiError::field(path.clone(), format!("`{path}` has no `type`"))),
        }
    };
    parts.iter().enumerate().map(text).collect()
}

fn read_arguments(call: &mut Value) {
    let Some(arguments) = call.get_mut("function").and_then(|function| function.get_mut("arguments")) else { return };
    // Some clients write none as an empty text.
    let text = arguments.as_str().map(|text| if text.trim().is_empty() { "{}" } else { text });
    let parsed = text.and_then(|text| serde_json::from_str::<Value>(text).ok());
    if let Some(parsed) = parsed.filter(Value::is_object) {
        *arguments = parsed;
    }
}

/// gpt-oss's template has another name for the reasoning in front of calls, and takes it without a text.
pub(crate) fn name_thinking(messages: &mut [Value]) {
    for message in messages.iter_mut().filter_map(Value::as_object_mut) {
        let calls = message.contains_key("tool_calls") && message.get("content").is_some_and(|text| text == "");
        let reasoning = message.get("reasoning_content").filter(|_| calls).cloned();
        if let Some(reasoning) = reasoning {
            message.entry("thinking").or_insert(reasoning);
        }
    }
}

/// gpt-oss's template writes the description of a tool whether it has one or not.
pub(crate) fn describe(tools: &mut Value) {
    let functions = tools.as_array_mut().into_iter().flatten().filter_map(|tool| tool["function"].as_object_mut());
    for function in functions {
        let description = function.entry("description").or_insert_with(|| "".into());
        if description.is_null() {
            *description = "".into();
        }
    }
}

/// The messages with the arguments of their calls as texts. `None`: there are no such calls.
pub(crate) fn with_texts_of_arguments(messages: &[Value]) -> Option<Vec<Value>> {
    let mut messages = messages.to_vec();
    let calls = messages.iter_mut().filter_map(|message| message.get_mut("tool_calls")?.as_array_mut()).flatten();
    let arguments = calls.filter_map(|call| call.get_mut("function")?.get_mut("arguments"));
    let objects = arguments.filter(|arguments| arguments.is_object());
    let count = objects.map(|arguments| *arguments = arguments.to_string().into()).count();
    (count > 0).then_some(messages)
}

/// The names of the tools that may be called, if the request has more.
fn allowed(fields: &Fields) -> Result<Option<BTreeSet<&str>>, ApiError> {
    let choice = fields.get("tool_choice").filter(|choice| choice["type"] == "allowed_tools");
    let Some(choice) = choice else { return Ok(None) };
    let tools = choice["allowed_tools"]["tools"].as_array().filter(|tools| !tools.is_empty());
    let names = tools.and_then(|tools| tools.iter().map(|tool| tool["function"]["name"].as_str()).collect());
    names.map(Some).ok_or_else(|| {
        let message = "the `tools` of `allowed_tools` are a list of {\"type\": \"function\", \"function\": {\"name\"}}";
        ApiError::field("tool_choice", message)
    })
}

fn tools(fields: &Fields, choice: &ToolChoice) -> Result<Option<Value>, ApiError> {
    let Some(tools) = fields.list("tools")?.filter(|tools| !tools.is_empty()) else {
        return match choice.is_forced() {
            true => Err(ApiError::field("tool_choice", "`tool_choice` asks for a call, and there are no `tools`")),
            false => Ok(None),
        };
    };
    let mut by_name = BTreeMap::new();
    for (n, tool) in tools.iter().enumerate() {
        let name = name_of(tool, &format!("tools[{n}]"))?;
        // The same tool twice is one. Of two others nobody knows which one a call means, and so what arguments it has.
        if by_name.insert(name, tool).is_some_and(|other| other != tool) {
            let message = format!("`tools` has two tools of the name `{name}`: give each a name of its own");
            return Err(ApiError::field(format!("tools[{n}].function.name"), message));
        }
    }
    let allowed = allowed(fields)?;
    let of_choice = if let ToolChoice::Named(name) = choice { Some(name.as_str()) } else { None };
    for name in of_choice.iter().chain(allowed.iter().flatten()) {
        if !by_name.contains_key(name) {
            let message = format!("`tool_choice` names `{name}`, which is not among `tools`");
            return Err(ApiError::field("tool_choice", message));
        }
    }
    let is_allowed = |tool: &&Value| {
        let name = tool["function"]["name"].as_str().unwrap_or_default();
        allowed.as_ref().is_none_or(|allowed| allowed.contains(&name))
    };
    Ok((*choice != ToolChoice::Off).then(|| tools.iter().filter(is_allowed).cloned().collect()))
}

/// The name of a tool, which is checked.
fn name_of<'a>(tool: &'a Value, path: &str) -> Result<&'a str, ApiError> {
    let name = tool["function"]["name"].as_str().filter(|name| !name.is_empty() && tool["type"] == "function");
    let Some(name) = name else {
        let message = "a tool is {\"type\": \"function\", \"function\": {\"name\", ...}}";
        return Err(ApiError::field(path, message));
    };
    let function = |key: &str| tool["function"].get(key).filter(|value| !value.is_null());
    if let Some(other) = function("parameters").filter(|parameters| !parameters.is_object()) {
        return Err(wrong(&format!("{path}.function.parameters"), other, "an object"));
    }
    if let Some(other) = function("strict").filter(|strict| !strict.is_boolean()) {
        return Err(wrong(&format!("{path}.function.strict"), other, "true or false"));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: &Value) -> Result<Conversation, ApiError> {
        Conversation::read(&Fields::read(value.to_string().as_bytes())?)
    }

    #[test]
    fn conversations_as_templates_take_them() {
        let read_one =
            |message: Value| read(&json!({"messages": [message]})).expect("a conversation").messages.remove(0);
        for (message, want) in [
            (json!({"role": "user", "content": "Hi", "name": null}), json!({"role": "user", "content": "Hi"})),
            (json!({"role": "developer", "content": "x"}), json!({"role": "system", "content": "x"})),
            (
                json!({"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}),
                json!({"role": "user", "content": [{"type": "text", "text": "a"}]}),
            ),
            (
                json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{\"a\": 1}"}}]}),
                json!({
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
                    "content": "",
                }),
            ),
            // What clients send back of an answer.
            (
                json!({"role": "assistant", "content": "x", "tool_calls": [], "refusal": null}),
                json!({"role": "assistant", "content": "x"}),
            ),
            (json!({"role": "assistant", "refusal": "no"}), json!({"role": "assistant", "content": "no"})),
            (
                json!({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}),
                json!({"role": "assistant", "content": [{"type": "text", "text": "no"}]}),
            ),
            (json!({"role": "user", "content": []}), json!({"role": "user", "content": ""})),
            (
                json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}),
                json!({
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
                    "content": "",
                }),
            ),
        ] {
            assert_eq!(read_one(message.clone()), want, "{message}");
        }
        let called = json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]});
        let texts = with_texts_of_arguments(std::slice::from_ref(&called)).expect("a call");
        assert_eq!(texts[0]["tool_calls"][0]["function"]["arguments"], "{\"a\":1}");
        assert_eq!(with_texts_of_arguments(&texts), None);
        let reasoned = |text: &str| json!({"content": text, "tool_calls": [], "reasoning_content": "hm"});
        let mut messages = [reasoned(""), reasoned("So:"), json!({"content": "", "reasoning_content": "hm"})];
        name_thinking(&mut messages);
        assert_eq!(messages.map(|message| message["thinking"] == "hm"), [true, false, false]);
        let function = |description: Value| json!({"function": {"name": "now", "description": description}});
        let mut tools = json!([{"function": {"name": "now"}}, function(Value::Null), function("the time".into())]);
        describe(&mut tools);
        assert_eq!(tools, json!([function("".into()), function("".into()), function("the time".into())]));
    }

    #[test]
    fn roles_that_a_template_does_not_know() {
        let said = |role: &str, text: &str| json!({"role": role, "content": text});
        for (messages, want) in [
            (vec![said("user", "gone"), said("critic", " there ")], None),
            (vec![said("user", "there"), said("critic", "gone")], Some((1, "critic".to_owned()))),
            (vec![said("critic", "")], None),
            (vec![said("ipython", "\"5\"\n")], None),
        ] {
            let prompt = r#"<user>there</user><ipython>"\"5\"\n"</ipython>"#;
            assert_eq!(left_out(&messages, prompt), want, "{messages:?}");
        }
    }

    #[test]
    fn variables_of_templates() {
        let of = |more: Value| {
            let mut asked = json!({"messages": [{"role": "user", "content": "Hi"}]});
            asked.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap_or_default());
            read(&asked).map(|read| read.variables)
        };
        let low = vec![("reasoning_effort".to_owned(), json!("low"))];
        assert_eq!(of(json!({})), Ok(Vec::new()));
        assert_eq!(of(json!({"reasoning_effort": "low"})), Ok(low.clone()));
        let both = json!({"reasoning_effort": "high", "chat_template_kwargs": {"reasoning_effort": "low"}});
        assert_eq!(of(both), Ok(low));
        assert!(of(json!({"reasoning_effort": 3})).is_err());
    }

    #[test]
    fn choices_of_tools() {
        let tool = json!({"type": "function", "function": {"name": "now"}});
        let with = |choice: Value| {
            let user = json!({"role": "user", "content": "Hi"});
            read(&json!({"messages": [user], "tools": [tool], "tool_choice": choice})).map(|it| it.tools.is_some())
        };
        assert_eq!(with(Value::Null), Ok(true));
        assert_eq!(with("auto".into()), Ok(true));
        assert_eq!(with("none".into()), Ok(false));
        assert_eq!(with("required".into()), Ok(true));
        assert_eq!(with(json!({"type": "function", "function": {"name": "now"}})), Ok(true));
        let allowed = |mode: &str, name: &str| {
            let tools = json!([{"type": "function", "function": {"name": name}}]);
            json!({"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}})
        };
        for wrong in [
            json!("any"),
            json!(3),
            json!({"type": "function", "function": {"name": "later"}}),
            allowed("auto", "later"),
            allowed("any", "now"),
            json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}),
        ] {
            assert!(with(wrong.clone()).is_err(), "{wrong}");
        }
        let later = json!({"type": "function", "function": {"name": "later"}});
        for (mode, choice) in [("auto", ToolChoice::Auto), ("required", ToolChoice::Any { one: false })] {
            let user = json!({"role": "user", "content": "Hi"});
            let both = json!({"messages": [user], "tools": [later, tool], "tool_choice": allowed(mode, "now")});
            let both = read(&both).expect("a conversation");
            assert_eq!((both.tools, both.choice), (Some(json!([tool])), choice));
        }
        for (function, param) in [
            (json!({"name": "now", "strict": "yes"}), "tools[0].function.strict"),
            (json!({"name": "now", "parameters": true}), "tools[0].function.parameters"),
            (json!({"strict": true}), "tools[0]"),
            (json!({"name": ""}), "tools[0]"),
        ] {
            let user = json!({"role": "user", "content": "Hi"});
            let tools = json!([{"type": "function", "function": function}]);
            let error = read(&json!({"messages": [user], "tools": tools})).expect_err("refused").object();
            assert_eq!(error["error"]["param"], param, "{function}");
        }
        let user = json!({"role": "user", "content": "Hi"});
        let of = |tools: Value| read(&json!({"messages": [user], "tools": tools}));
        let other = json!({"type": "function", "function": {"name": "now", "description": "the time"}});
        let refused = of(json!([tool, later, other])).expect_err("two tools of one name").object();
        assert_eq!(refused["error"]["param"], "tools[2].function.name");
        assert!(of(json!([tool, later, tool])).is_ok(), "the same tool twice");
        let none = read(&json!({"messages": [user], "tool_choice": "required"})).expect_err("no tools").object();
        assert_eq!(none["error"]["param"], "tool_choice");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let image = json!([{"type": "image_url", "image_url": {"url": "x"}}]);
        for (messages, param) in [
            (json!(null), "messages"),
            (json!([]), "messages"),
            (json!("Hi"), "messages"),
            (json!(["Hi"]), "messages[0]"),
            (json!([{"content": "Hi"}]), "messages[0].role"),
            (json!([{"role": "user"}]), "messages[0].content"),
            (json!([{"role": "user", "content": 3}]), "messages[0].content"),
            (json!([{"role": "user", "content": image}]), "messages[0].content[0]"),
            (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
            (json!([{"role": "assistant", "content": "", "tool_calls": {}}]), "messages[0].tool_calls"),
            (json!([{"role": "assistant", "content": "", "tool_calls": [{}, 3]}]), "messages[0].tool_calls[1]"),
        ] {
            let error = read(&json!({"messages": messages})).expect_err("refused").object();
            assert_eq!(error["error"]["param"], param, "{messages}");
        }
    }
}
