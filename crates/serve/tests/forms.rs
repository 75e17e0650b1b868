//! Answers of a form, several answers to a request, and tokens that are proposed, over HTTP.

#![allow(clippy::disallowed_methods, reason = "files of tests")]

mod client;

use client::{CHAT, ENGINE, Running, TEXT, calling_as, question, served, settings, tiny, with};
use finetune_dataset::ChatTokenizer;
use finetune_model::EngineSettings;
use finetune_serve::Served;
use serde_json::{Value, json};

/// A ticket, whose JSON is never long.
fn ticket() -> Value {
    json!({
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "green"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["colour", "count", "tags"],
        "additionalProperties": false,
    })
}

fn format_of(schema: &Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "ticket", "strict": true, "schema": schema}})
}

fn expect_ticket(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let keys: Vec<&String> = value.as_object().expect("an object").keys().collect();
    assert_eq!(keys, ["colour", "count", "tags"], "{text}");
    assert!(value["colour"] == "red" || value["colour"] == "green", "{text}");
    assert!(value["count"].as_u64().is_some_and(|count| count <= 99), "{text}");
    assert!(
        value["tags"].as_array().is_some_and(|tags| tags.len() <= 2 && tags.iter().all(Value::is_boolean)),
        "{text}"
    );
}

/// Of a model that never saw the like: each answer parses and fits, whatever is drawn.
#[test]
fn answers_have_the_schema_that_was_asked_for() {
    let server = Running::tiny(settings());
    let format = json!({"response_format": format_of(&ticket())});
    for seed in 0..6 {
        let asked = with(question(seed), format.clone());
        let whole = server.post(CHAT, &asked).json();
        let choice = &whole["choices"][0];
        assert_eq!(choice["finish_reason"], "stop", "{whole}");
        let content = choice["message"]["content"].as_str().expect("a text");
        expect_ticket(content);
        let objects = server.stream(CHAT, &with(asked, json!({"stream": true}))).objects();
        let streamed: String =
            objects.iter().filter_map(|object| object["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(streamed, content);
        let text = with(question(seed), with(format.clone(), json!({"prompt": "Hello", "messages": null, "n": 2})));
        let texts = server.post(TEXT, &text).json();
        let texts = texts["choices"].as_array().expect("a list");
        assert_eq!(texts.len(), 2);
        texts.iter().for_each(|choice| expect_ticket(choice["text"].as_str().expect("a text")));
    }
}

/// An object of any kind: what ends by itself parses, and what is cut off is said to be.
#[test]
fn json_mode_gives_objects() {
    let server = Running::tiny(settings());
    let mut stopped = 0;
    for seed in 0..20 {
        let more = json!({"response_format": {"type": "json_object"}, "temperature": 1.0, "max_tokens": 200});
        let answer = server.post(CHAT, &with(question(seed), more)).json();
        let choice = &answer["choices"][0];
        let content = choice["message"]["content"].as_str().expect("a text");
        assert!(content.starts_with('{'), "{content}");
        if choice["finish_reason"] == "stop" {
            stopped += 1;
            let value: Value = serde_json::from_str(content).unwrap_or_else(|error| panic!("{error}: {content}"));
            assert!(value.is_object(), "{content}");
        }
    }
    assert!(stopped > 0, "no answer came to its end");
}

/// The tiny model with a template that writes calls as Hermes and Qwen do.
fn calling() -> Served {
    calling_as(
        "{% for call in message.tool_calls %}\
        {{ '<tool_call>\\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' }}\
        {{ call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}",
    )
}

/// How the templates of families write calls: with marks around each argument, between marks, and with literals.
const CALLS: [(&str, &str); 8] = [
    (
        "Qwen3-Coder",
        "{% for call in message.tool_calls %}{{ '<tool_call>\\n<function=' + call.function.name + '>\\n' }}\
        {% for key, value in call.function.arguments | items %}{{ '<parameter=' + key + '>\\n' }}\
        {{ value if value is string else value | tojson }}{{ '\\n</parameter>\\n' }}{% endfor %}\
        {{ '</function>\\n</tool_call>' }}{% endfor %}",
    ),
    (
        "GLM",
        "{% for call in message.tool_calls %}{{ '\\n<tool_call>' + call.function.name + '\\n' }}\
        {% for key, value in call.function.arguments | items %}{{ '<arg_key>' + key + '</arg_key>\\n<arg_value>' }}\
        {{ value if value is string else value | tojson }}{{ '</arg_value>\\n' }}{% endfor %}\
        {{ '</tool_call>' }}{% endfor %}",
    ),
    (
        "DeepSeek",
        "{{ '<｜tool▁calls▁begin｜>' }}{% for call in message.tool_calls %}\
        {{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' }}\
        {{ call.function.arguments | tojson }}{{ '\\n```<｜tool▁call▁end｜>' }}{% endfor %}{{ '<｜tool▁calls▁end｜>' }}",
    ),
    (
        "Kimi",
        "{{ '<|tool_calls_section_begin|>' }}{% for call in message.tool_calls %}\
        {{ '<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' }}\
        {{ call.function.arguments | tojson }}{{ '<|tool_call_end|>' }}{% endfor %}{{ '<|tool_calls_section_end|>' }}",
    ),
    (
        "Gemma 4",
        "{% for call in message.tool_calls %}{{ '<|tool_call>call:' + call.function.name + '{' }}\
        {% for key, value in call.function.arguments | dictsort %}{{ key + ':' }}\
        {% if value is string %}{{ '<|\"|>' + value + '<|\"|>' }}{% else %}{{ value }}{% endif %}\
        {% if not loop.last %}{{ ',' }}{% endif %}{% endfor %}{{ '}<tool_call|>' }}{% endfor %}",
    ),
    (
        "LFM2",
        "{{ '<|tool_call_start|>[' }}{% for call in message.tool_calls %}{{ call.function.name + '(' }}\
        {% for key, value in call.function.arguments | items %}{{ key + '=' }}\
        {% if value is string %}{{ \"'\" + value + \"'\" }}{% else %}{{ value }}{% endif %}\
        {% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ')' }}{% if not loop.last %}{{ ', ' }}{% endif %}\
        {% endfor %}{{ ']<|tool_call_end|>' }}",
    ),
    (
        "Llama 3",
        "{% for call in message.tool_calls %}{{ '{\"name\": \"' + call.function.name + '\", \"parameters\": ' }}\
        {{ call.function.arguments | tojson }}{{ '}' }}{% endfor %}",
    ),
    (
        "Llama 3.2, in Python",
        "{{ '[' }}{% for call in message.tool_calls %}{{ call.function.name + '(' }}\
        {% for key, value in call.function.arguments | items %}{{ key + '=' }}{{ value }}\
        {% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ')' }}{% if not loop.last %}{{ ', ' }}{% endif %}\
        {% endfor %}{{ ']' }}",
    ),
];

/// Of a model that never saw a call, in the notation of each family: whole and as a stream.
#[test]
fn calls_of_every_family_can_be_forced() {
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 4},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "colour": {"enum": ["red", "green"]},
            "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["name", "colour"],
        "additionalProperties": false,
    });
    let tools = json!([
        {"type": "function", "function": {"name": "order", "parameters": schema}},
        {"type": "function", "function": {"name": "quit"}},
    ]);
    let named = json!({"type": "function", "function": {"name": "order"}});
    for (family, template) in CALLS {
        let server = Running::start(settings(), ENGINE, vec![calling_as(template)]);
        for seed in 0..4 {
            let more = json!({"tools": tools, "tool_choice": named});
            let asked = with(question(seed), more);
            let response = server.post(CHAT, &asked);
            assert_eq!(response.status, 200, "{family}: {}", response.body);
            let whole = response.json();
            assert_eq!(whole["choices"][0]["finish_reason"], "tool_calls", "{family}: {whole}");
            let calls = whole["choices"][0]["message"]["tool_calls"].as_array().expect("a list").clone();
            assert_eq!((calls.len(), &calls[0]["function"]["name"]), (1, &json!("order")), "{family}: {whole}");
            let text = calls[0]["function"]["arguments"].as_str().expect("a text");
            let arguments: Value =
                serde_json::from_str(text).unwrap_or_else(|error| panic!("{family}: {error}: {text}"));
            let name = arguments["name"].as_str().unwrap_or_else(|| panic!("{family}: {text}"));
            assert!((1..=4).contains(&name.chars().count()), "{family}: {text}");
            assert!(arguments["colour"] == "red" || arguments["colour"] == "green", "{family}: {text}");
            let count = &arguments["count"];
            assert!(count.is_null() || count.as_u64().is_some_and(|count| count <= 99), "{family}: {text}");
            let flags = &arguments["flags"];
            let are_flags = |flags: &Vec<Value>| flags.len() <= 2 && flags.iter().all(Value::is_boolean);
            assert!(flags.is_null() || flags.as_array().is_some_and(are_flags), "{family}: {text}");
            let objects = server.stream(CHAT, &with(asked, json!({"stream": true}))).objects();
            let streamed = objects.iter().find_map(|object| object["choices"][0]["delta"]["tool_calls"].as_array());
            assert_eq!(streamed.expect("calls")[0]["function"], calls[0]["function"], "{family}");
        }
        // What the notation cannot keep is named.
        let unkept = json!({"type": "object", "properties": {"a": {"not": {}}}});
        let tools = json!([{"type": "function", "function": {"name": "order", "parameters": unkept}}]);
        let refused = server.post(CHAT, &with(question(0), json!({"tools": tools, "tool_choice": "required"})));
        let error = refused.json()["error"].clone();
        assert_eq!((refused.status, &error["param"]), (400, &json!("tool_choice")), "{family}: {error}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains("not")), "{family}: {error}");
    }
}

#[test]
fn tools_that_have_to_be_called_are_called() {
    let server = Running::start(settings(), ENGINE, vec![calling()]);
    let zone = json!({
        "type": "object",
        "properties": {"zone": {"enum": ["utc", "cet"]}},
        "required": ["zone"],
        "additionalProperties": false,
    });
    let tools = json!([
        {"type": "function", "function": {"name": "now", "parameters": zone}},
        {"type": "function", "function": {"name": "today", "parameters": zone}},
    ]);
    let named = json!({"type": "function", "function": {"name": "today"}});
    for seed in 0..6 {
        for (choice, one) in [(json!("required"), true), (named.clone(), false)] {
            let more = json!({"tools": tools, "tool_choice": choice, "parallel_tool_calls": !one});
            let asked = with(question(seed), more);
            let whole = server.post(CHAT, &asked).json();
            assert_eq!(whole["choices"][0]["finish_reason"], "tool_calls", "{whole}");
            let calls = whole["choices"][0]["message"]["tool_calls"].as_array().expect("a list").clone();
            assert_eq!(calls.len(), 1, "{whole}");
            let function = &calls[0]["function"];
            let arguments: Value = serde_json::from_str(function["arguments"].as_str().expect("a text")).expect("JSON");
            assert!(arguments == json!({"zone": "utc"}) || arguments == json!({"zone": "cet"}), "{arguments}");
            let name = function["name"].as_str().expect("a name").to_owned();
            assert!(name == "today" || one && name == "now", "{name}");
            let objects = server.stream(CHAT, &with(asked, json!({"stream": true}))).objects();
            let streamed = objects.iter().find_map(|object| object["choices"][0]["delta"]["tool_calls"].as_array());
            assert_eq!(streamed.expect("calls")[0]["function"], *function);
        }
    }
    // JSON of a schema or calls, as the model likes.
    let more = json!({"tools": tools, "response_format": format_of(&ticket()), "parallel_tool_calls": false});
    let message = server.post(CHAT, &with(question(1), more)).json()["choices"][0]["message"].clone();
    match message["content"].as_str() {
        Some(content) => expect_ticket(content),
        None => assert!(message["tool_calls"].is_array(), "{message}"),
    }
}

/// The tiny model with gpt-oss's marks in the place of its last words, and a template that writes them.
fn harmony() -> Served {
    let marks = ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|return|>", "<|call|>"];
    let base = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/quickstart/base");
    let read = |name: &str| -> Value {
        serde_json::from_str(&std::fs::read_to_string(base.join(name)).expect("a text")).expect("JSON")
    };
    let mut tokenizer = read("tokenizer.json");
    let words = tokenizer["model"]["vocab"].as_object_mut().expect("words");
    let first = words.len() as u64 - marks.len() as u64;
    words.retain(|_, id| id.as_u64() < Some(first));
    words.extend((first..).zip(marks).map(|(id, mark)| (mark.to_owned(), id.into())));
    // Each of the last words was made by one of the last merges.
    let merges = tokenizer["model"]["merges"].as_array_mut().expect("merges");
    merges.truncate(merges.len() - marks.len());
    let added = tokenizer["added_tokens"].as_array_mut().expect("tokens");
    for (id, mark) in (first..).zip(marks) {
        added.push(with(added[0].clone(), json!({"id": id, "content": mark})));
    }
    let config = with(read("tokenizer_config.json"), json!({"eos_token": "<|return|>"}));
    let generation = with(read("generation_config.json"), json!({"eos_token_id": first + 4}));
    let template = "{% for message in messages %}{{ '<|start|>' + message['role'] }}\
        {% if message['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}\
        {{ '<|message|>' + message['content'] + '<|end|>' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}";
    let folder = tempfile::tempdir().expect("a directory");
    for (name, text) in [
        ("tokenizer.json", tokenizer.to_string()),
        ("tokenizer_config.json", config.to_string()),
        ("generation_config.json", generation.to_string()),
        ("config.json", read("config.json").to_string()),
        ("harmony.jinja", template.to_owned()),
    ] {
        std::fs::write(folder.path().join(name), text).expect("written");
    }
    let file = folder.path().join("harmony.jinja");
    let tokenizer = ChatTokenizer::load(folder.path(), Some(&file)).expect("a tokenizer");
    Served::new("tiny".to_owned(), None, tiny(), tokenizer, (0.0, 1.0))
}

/// Reasoning, JSON and calls each in their channel, of a model that never saw one: whole and as a stream.
#[test]
fn forms_of_gpt_oss_stand_in_its_channels() {
    let server = Running::start(settings(), ENGINE, vec![harmony()]);
    let zone = json!({"type": "object", "properties": {"zone": {"enum": ["utc", "cet"]}}, "required": ["zone"],
        "additionalProperties": false});
    let tools = json!([{"type": "function", "function": {"name": "now", "parameters": zone}}]);
    // The end of a message comes soon.
    let soon = json!({"logit_bias": {"0": 8}});
    let mut has_reasoning = false;
    for seed in 0..6 {
        for more in
            [json!({"response_format": format_of(&ticket())}), json!({"tools": tools, "tool_choice": "required"})]
        {
            let is_call = more.get("tools").is_some();
            let asked = with(with(question(seed), soon.clone()), more);
            let whole = server.post(CHAT, &asked).json();
            let message = &whole["choices"][0]["message"];
            has_reasoning |= message["reasoning_content"].is_string();
            let finish = if is_call { "tool_calls" } else { "stop" };
            assert_eq!(whole["choices"][0]["finish_reason"], finish, "{whole}");
            let objects = server.stream(CHAT, &with(asked, json!({"stream": true}))).objects();
            let streamed = |field: &str| -> String {
                objects.iter().filter_map(|object| object["choices"][0]["delta"][field].as_str()).collect()
            };
            assert_eq!(streamed("reasoning_content"), message["reasoning_content"].as_str().unwrap_or_default());
            if is_call {
                let function = &message["tool_calls"][0]["function"];
                assert_eq!(function["name"], "now", "{whole}");
                let text = function["arguments"].as_str().expect("a text");
                let arguments: Value = serde_json::from_str(text).expect("JSON");
                assert!(arguments == json!({"zone": "utc"}) || arguments == json!({"zone": "cet"}), "{arguments}");
                let calls = objects.iter().find_map(|object| object["choices"][0]["delta"]["tool_calls"].as_array());
                assert_eq!(calls.expect("calls")[0]["function"], *function);
            } else {
                expect_ticket(message["content"].as_str().expect("a text"));
                assert_eq!(streamed("content"), message["content"]);
            }
        }
    }
    assert!(has_reasoning, "no answer had any");
}

/// (more fields, the field that is named, a word of the message)
#[test]
fn forms_that_cannot_be_kept_are_refused_by_name() {
    let server = Running::tiny(settings());
    let tool = json!([{"type": "function", "function": {"name": "now"}}]);
    for (more, param, word) in [
        (json!({"tools": tool, "tool_choice": "required"}), "tool_choice", "template"),
        (json!({"tools": tool, "response_format": {"type": "json_object"}}), "tools", "template"),
        (json!({"tools": tool}), "tools", "template"),
        (json!({"tools": tool, "tool_choice": "auto"}), "tools", "template"),
        (json!({"response_format": {"type": "json_object"}, "ignore_eos": true}), "ignore_eos", "form"),
        (json!({"tool_choice": "required"}), "tool_choice", "no `tools`"),
        (json!({"response_format": format_of(&json!({"not": {}}))}), "response_format", "not"),
        (json!({"response_format": format_of(&json!({"$ref": "x.json"}))}), "response_format", "x.json"),
        (json!({"n": 1000}), "n", "128"),
        (json!({"n": 25}), "n", "24"),
    ] {
        let response = server.post(CHAT, &with(question(1), more.clone()));
        let error = response.json()["error"].clone();
        assert_eq!((response.status, &error["param"]), (400, &json!(param)), "{more}: {error}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(word)), "{more}: {error}");
    }
}

/// Schemas that would take long to read, or each token of their answers. (a schema, words of the refusal)
#[test]
fn hostile_schemas_are_refused_before_an_answer_begins() {
    let server = Running::tiny(settings());
    let texts = |count: usize, schema: Value| -> Value {
        (0..count).map(|n| (format!("p{n}"), schema.clone())).collect::<serde_json::Map<_, _>>().into()
    };
    let text = json!({"type": "string"});
    let deep = (0..70).fold(text.clone(), |within, _| json!({"type": "array", "items": within}));
    let alternatives = |count: usize, keys: usize| -> Vec<Value> {
        (0..count)
            .map(|n| json!({"type": "object", "properties": {"k": text, format!("m{}", n % keys): text}}))
            .collect()
    };
    let either = |n: usize| json!({"anyOf": [{"type": "object", "properties": {format!("a{n}"): text}}, {"type": "object", "properties": {format!("b{n}"): text}}]});
    let pattern = |n: usize| json!({"type": "string", "pattern": format!("^.*{n}.{{{}}}$", n + 10)});
    for (schema, words) in [
        (deep, "64 lists and objects"),
        (json!({"enum": (0..50_000).collect::<Vec<_>>()}), "20000 values"),
        (json!({"enum": ["x".repeat(300 << 10)]}), "262144 bytes"),
        (json!({"type": "object", "properties": texts(3000, text.clone())}), "3000 properties"),
        (json!({"anyOf": alternatives(2000, 2000)}), "2000 alternatives"),
        // 400 objects that an answer may all be.
        (json!({"anyOf": alternatives(400, 400)}), "max is 2000"),
        // Each of 65,536 combinations.
        (json!({"allOf": (0..16).map(either).collect::<Vec<_>>()}), "too large"),
        (json!({"type": "string", "pattern": format!("^({})$", "a|".repeat(3000))}), "`pattern` has"),
        (json!({"allOf": (0..8).map(pattern).collect::<Vec<_>>()}), "regex"),
    ] {
        let fields = json!({"response_format": format_of(&schema)});
        for (path, prompt) in [(CHAT, json!({})), (TEXT, json!({"prompt": "Hello", "messages": null}))] {
            let response = server.post(path, &with(with(question(1), prompt), fields.clone()));
            let error = response.json()["error"].clone();
            assert_eq!((response.status, &error["param"]), (400, &json!("response_format")), "{words}: {error}");
            assert!(error["message"].as_str().is_some_and(|message| message.contains(words)), "{words}: {error}");
        }
    }
    // Large numbers cost nothing.
    let long = json!({"type": "string", "minLength": 3, "maxLength": 1_000_000_000});
    let more = json!({"response_format": format_of(&long), "max_tokens": 20});
    assert_eq!(server.post(CHAT, &with(question(1), more)).status, 200);
    // No answer of the hostile ones was begun.
    let metrics = server.get("/metrics").body;
    let tokens = metrics.lines().find_map(|line| line.strip_prefix("finetune_answer_tokens_total "));
    assert!(tokens.is_some_and(|count| count.parse::<u64>().is_ok_and(|count| count <= 20)), "{metrics}");
}

/// Choices are the answers of the seeds one behind the other, whole and streamed; the prompt is counted once.
#[test]
fn several_answers_are_those_of_the_next_seeds() {
    let server = Running::tiny(settings());
    for (path, prompt) in [(CHAT, json!({})), (TEXT, json!({"prompt": "Hello", "messages": null}))] {
        let asked = |seed: u64, more: Value| with(with(question(seed), prompt.clone()), more);
        let short = json!({"max_tokens": 12, "logprobs": if path == CHAT { json!(true) } else { json!(1) }});
        let alone: Vec<Value> = (7..10).map(|seed| server.post(path, &asked(seed, short.clone())).json()).collect();
        let together = server.post(path, &with(asked(7, short.clone()), json!({"n": 3}))).json();
        let choices = together["choices"].as_array().expect("a list");
        assert_eq!(choices.len(), 3);
        for (n, (choice, alone)) in choices.iter().zip(&alone).enumerate() {
            let mut want = alone["choices"][0].clone();
            want["index"] = n.into();
            assert_eq!(*choice, want, "{path}: choice {n}");
        }
        let count = |answer: &Value, field: &str| answer["usage"][field].as_u64().expect("a number");
        let made: u64 = alone.iter().map(|answer| count(answer, "completion_tokens")).sum();
        assert_eq!(count(&together, "completion_tokens"), made);
        assert_eq!(count(&together, "prompt_tokens"), count(&alone[0], "prompt_tokens"));
        assert_ne!(alone[0]["choices"], alone[1]["choices"]);

        let more = json!({"n": 3, "stream": true, "stream_options": {"include_usage": true}});
        let objects = server.stream(path, &with(asked(7, short.clone()), more)).objects();
        for (n, choice) in choices.iter().enumerate() {
            let of_choice = || objects.iter().map(|object| &object["choices"][0]).filter(|one| one["index"] == n);
            let text: String = of_choice()
                .filter_map(|one| one["text"].as_str().or_else(|| one["delta"]["content"].as_str()))
                .collect();
            let whole = choice["text"].as_str().or_else(|| choice["message"]["content"].as_str());
            assert_eq!(Some(text.as_str()), whole, "{path}: choice {n}");
            let ends: Vec<&Value> = of_choice().map(|one| &one["finish_reason"]).filter(|end| !end.is_null()).collect();
            assert_eq!(ends, [&choice["finish_reason"]]);
        }
        let (last, pieces) = objects.split_last().expect("an object");
        assert_eq!((&last["choices"], count(last, "completion_tokens")), (&json!([]), made));
        assert!(pieces.iter().all(|piece| piece.get("usage") == Some(&Value::Null)), "{path}: as OpenAI has it");
    }
}

/// A server that looks ahead says what another says, and counts.
#[test]
fn tokens_ahead_change_no_answer() {
    let engine = EngineSettings { speculate: 7, ..ENGINE };
    let ahead = Running::start(settings(), engine, vec![served("tiny", None, tiny())]);
    let plain = Running::tiny(settings());
    let prompt = "Hello, Leon from Cairo here. The red kettle. ".repeat(4);
    for (temperature, seed) in [(0.0, 0), (0.3, 1), (0.8, 2)] {
        let asked = json!({
            "prompt": prompt, "max_tokens": 60, "temperature": temperature, "seed": seed, "logprobs": 2,
            "logit_bias": {"0": -100},
        });
        assert_eq!(ahead.post(TEXT, &asked).json()["choices"], plain.post(TEXT, &asked).json()["choices"]);
    }
    let number = |server: &Running, name: &str| -> u64 {
        let metrics = server.get("/metrics").body;
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)).expect("a line");
        line.trim().parse().expect("a number")
    };
    let [proposed, accepted] =
        ["finetune_proposed_tokens_total", "finetune_accepted_tokens_total"].map(|name| number(&ahead, name));
    assert!(proposed > 0 && accepted <= proposed, "{accepted} of {proposed}");
    assert_eq!(number(&plain, "finetune_proposed_tokens_total"), 0);
}
