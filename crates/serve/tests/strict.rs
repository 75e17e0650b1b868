//! Tools with `strict` that the model may call or not, over HTTP.

mod client;

use std::sync::{Arc, Mutex};

use client::{CHAT, ENGINE, Running, calling_as, question, settings, tokenizer, with};
use finetune_serve::Server;
use serde_json::{Value, json};

/// Calls as Llama 3 writes them: an answer that begins with an object of JSON is one.
const LLAMA: &str = "{% for call in message.tool_calls %}{{ '{\"name\": \"' + call.function.name + '\", \"parameters\": ' }}\
    {{ call.function.arguments | tojson }}{{ '}' }}{% endfor %}";

fn tool(name: &str, strict: bool, parameters: Value) -> Value {
    json!({"type": "function", "function": {"name": name, "strict": strict, "parameters": parameters}})
}

fn order(strict: bool) -> Value {
    let properties =
        json!({"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "maximum": 99, "minimum": 0}});
    let schema = json!({"type": "object", "properties": properties, "required": ["colour", "count"],
        "additionalProperties": false});
    tool("order", strict, schema)
}

/// A model that never saw a call is pushed to begin with `{`: with `strict` that is a call, and its arguments fit.
#[test]
fn a_call_that_nobody_forced_has_its_form() {
    let server = Running::start(settings(), ENGINE, vec![calling_as(LLAMA)]);
    let brace = tokenizer().encode("{", false).expect("tokens")[0];
    let pushed = json!({"logit_bias": {(brace.to_string()): 100}, "max_tokens": 600});
    for seed in 0..4 {
        let asked = |strict: bool| with(with(question(seed), pushed.clone()), json!({"tools": [order(strict)]}));
        // Else it would be pushed to one call behind the other.
        let one = with(asked(true), json!({"parallel_tool_calls": false}));
        let whole = server.post(CHAT, &one).json();
        let choice = &whole["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls", "{whole}");
        let function = &choice["message"]["tool_calls"][0]["function"];
        assert_eq!(function["name"], "order", "{whole}");
        let text = function["arguments"].as_str().expect("a text");
        let arguments: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(arguments["colour"] == "red" || arguments["colour"] == "green", "{text}");
        assert!(arguments["count"].as_u64().is_some_and(|count| count <= 99), "{text}");
        let objects = server.stream(CHAT, &with(one, json!({"stream": true}))).objects();
        let streamed = objects.iter().find_map(|object| object["choices"][0]["delta"]["tool_calls"].as_array());
        assert_eq!(streamed.expect("calls")[0]["function"], *function);

        let loose = server.post(CHAT, &with(asked(false), json!({"max_tokens": 9}))).json();
        let content = loose["choices"][0]["message"]["content"].as_str().expect("a text");
        assert!(content.starts_with("{{"), "without `strict` nothing holds it: {content}");
    }
}

/// What is no call is what the model says without `strict`.
#[test]
fn text_beside_strict_tools_is_free() {
    let server = Running::start(settings(), ENGINE, vec![calling_as(LLAMA)]);
    let greedy = json!({"temperature": 0, "max_tokens": 30});
    let content = |strict: bool| {
        let asked = with(with(question(0), greedy.clone()), json!({"tools": [order(strict)]}));
        let answer = server.post(CHAT, &asked).json();
        answer["choices"][0]["message"]["content"].as_str().expect("a text").to_owned()
    };
    assert!(!content(false).is_empty());
    assert_eq!(content(true), content(false));
}

/// (tools, the status, the field that is named)
#[test]
fn what_strict_cannot_keep_is_refused_by_name() {
    let unkept = json!({"type": "object", "properties": {"a": {"not": {}}}});
    let writing = Running::start(settings(), ENGINE, vec![calling_as(LLAMA)]);
    for (tools, status, param) in [
        (json!([tool("order", true, unkept.clone())]), 400, json!("tools")),
        (json!([tool("order", false, unkept.clone())]), 200, Value::Null),
        // Arguments of a tool without it may be any object, also beside one with it.
        (json!([order(true), tool("other", false, unkept)]), 200, Value::Null),
    ] {
        let answer = writing.post(CHAT, &with(question(0), json!({"tools": tools, "max_tokens": 3})));
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (status, &param), "{tools}: {}", answer.body);
    }
}

/// A template that knows tools and writes no calls: the promise of `strict` cannot be broken where no call is given, and
/// some clients always make it. Where the client waits for a call, it hears that none can come.
#[test]
fn strict_tools_that_are_never_called_are_taken() {
    let said = Arc::<Mutex<Vec<String>>>::default();
    let heard = Arc::clone(&said);
    let say = move |line: &str| heard.lock().expect("no panic").push(line.to_owned());
    let server = Server::start(settings()).expect("a server");
    let all = vec![calling_as("{{ '' if tools else '' }}")];
    server.ready(all, ENGINE, Box::new(|_, _| Err(String::new())), None, Box::new(say)).expect("a thread");
    let server = Running::of(server);
    let ask = |strict: bool, more: Value| {
        let asked = with(question(0), json!({"tools": [order(strict)], "temperature": 0, "max_tokens": 20}));
        server.post(CHAT, &with(asked, more))
    };
    let content = |strict: bool| {
        let answer = ask(strict, json!({}));
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["choices"][0]["message"]["content"].as_str().expect("a text").to_owned()
    };
    let loose = content(false);
    assert_eq!(*said.lock().expect("no panic"), Vec::<String>::new(), "nobody asked for it");
    assert!(!loose.is_empty());
    assert_eq!([content(true), content(true)], [loose.clone(), loose]);
    for choice in [json!("required"), json!({"type": "function", "function": {"name": "order"}})] {
        let refused = ask(true, json!({"tool_choice": choice}));
        assert_eq!(
            (refused.status, &refused.json()["error"]["param"]),
            (400, &json!("tool_choice")),
            "{}",
            refused.body
        );
    }
    let said = said.lock().expect("no panic");
    assert!(said.len() == 1 && said[0].starts_with("tiny: ") && said[0].contains("stay text"), "{said:?}");
}
