//! Answers over HTTP: what they say, in which form, and that they do not depend on each other.

mod client;

use std::thread;

use client::{ENGINE, Running, Stream, ask, golden, served, settings, tiny, tokenizer};
use finetune_model::Sampling;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn question(text: &str) -> Value {
    json!({"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0.8, "seed": 7})
}

/// A request with more fields.
fn with(mut request: Value, more: Value) -> Value {
    if let (Some(request), Value::Object(more)) = (request.as_object_mut(), more) {
        request.extend(more);
    }
    request
}

/// The texts of a stream of a chat, put together.
fn text_of(objects: &[Value]) -> String {
    objects.iter().filter_map(|object| object["choices"][0]["delta"]["content"].as_str()).collect()
}

#[test]
fn the_models_and_how_they_are() {
    let [base, adapted] = golden("llama");
    let server =
        Running::start(settings(), ENGINE, vec![served("base", None, base), served("a/b", Some("base"), adapted)]);
    assert_eq!((server.get("/health").status, server.get("/health").json()), (200, json!({"status": "ok"})));
    let models = server.get("/v1/models").json();
    let ids: Vec<&str> =
        models["data"].as_array().expect("a list").iter().filter_map(|one| one["id"].as_str()).collect();
    assert_eq!(ids, ["base", "a/b"]);
    assert_eq!((&models["data"][0]["parent"], &models["data"][1]["parent"]), (&Value::Null, &json!("base")));
    assert_eq!(server.get("/v1/models/a/b").json()["id"], "a/b");
    assert_eq!(server.get("/v1/models/c").status, 404);
}

/// The text of a request is that of `finetune generate`.
#[test]
fn a_text_is_continued_as_generate_does() {
    let server = Running::tiny(settings());
    let (model, tokenizer) = (tiny(), tokenizer());
    let prompt = "Hello, Leon from Cairo here.";
    let tokens = tokenizer.encode(prompt, true).expect("tokens");
    for (temperature, top_p, seed) in [(0.0, 1.0, 0), (0.8, 1.0, 3), (1.2, 0.9, 4)] {
        let sampling = Sampling { temperature, top_p, seed };
        let ends = tokenizer.eos_ids();
        let alone = model.generate(&tokens, 24, sampling, ends, &mut |_| {}).expect("an answer");
        let text = tokenizer.decode(&alone.tokens, true).expect("a text");
        let asked = json!({
            "model": "tiny", "prompt": prompt, "max_tokens": 24,
            "temperature": temperature, "top_p": top_p, "seed": seed,
        });
        let answer = server.post(TEXT, &asked).json();
        assert_eq!(answer["choices"][0]["text"], text, "{asked}");
        assert_eq!(answer["usage"]["prompt_tokens"], tokens.len());
        let of_tokens = with(asked.clone(), json!({"prompt": tokens}));
        assert_eq!(server.post(TEXT, &of_tokens).json()["choices"], answer["choices"]);
        let streamed = server.stream(TEXT, &with(asked.clone(), json!({"stream": true}))).objects();
        let texts: String = streamed.iter().filter_map(|object| object["choices"][0]["text"].as_str()).collect();
        assert_eq!(texts, text, "{asked}");
        let last = streamed.last().expect("an object");
        assert_eq!(last["choices"][0]["finish_reason"], answer["choices"][0]["finish_reason"]);
    }
}

#[test]
fn a_stream_has_the_text_of_the_whole_answer() {
    let server = Running::tiny(settings());
    let asked = with(question("Hi"), json!({"max_tokens": 20}));
    let whole = server.post(CHAT, &asked).json();
    assert_eq!((&whole["object"], &whole["model"]), (&json!("chat.completion"), &json!("tiny")));
    let message = &whole["choices"][0]["message"];
    assert_eq!(message["role"], "assistant");

    let more = json!({"stream": true, "stream_options": {"include_usage": true}});
    let stream = server.stream(CHAT, &with(asked, more));
    assert!(stream.status == 200 && stream.head.contains("text/event-stream"), "{}", stream.head);
    let objects = stream.objects();
    assert_eq!(objects[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(text_of(&objects), message["content"].as_str().expect("a text"));
    assert!(
        objects.iter().all(|object| object["object"] == "chat.completion.chunk" && object["id"] == objects[0]["id"])
    );
    let (last, end) = (&objects[objects.len() - 1], &objects[objects.len() - 2]);
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
    assert_eq!(end["choices"][0]["finish_reason"], whole["choices"][0]["finish_reason"]);
    assert_eq!(end["usage"], Value::Null);
}

/// Several prompts are answered as each of them alone, one behind the other: whole and streamed.
#[test]
fn several_prompts_have_answers_of_their_own() {
    let server = Running::tiny(settings());
    let tokens = tokenizer().encode("How are you?", true).expect("tokens");
    let prompts = [json!("Hello"), json!(tokens), json!("Hi")];
    let more = json!({"max_tokens": 8, "temperature": 1, "seed": 3, "n": 2, "logprobs": 1});
    let ask = |prompt: &Value| server.post(TEXT, &with(json!({"prompt": prompt}), more.clone())).json();
    let alone: Vec<Value> = prompts.iter().map(ask).collect();
    let choices = alone.iter().flat_map(|answer| answer["choices"].as_array().expect("a list"));
    let numbered = choices.enumerate().map(|(n, choice)| with(choice.clone(), json!({"index": n})));
    let want: Vec<Value> = numbered.collect();
    let asked = with(json!({"prompt": prompts}), more.clone());
    let together = server.post(TEXT, &asked).json();
    assert_eq!(together["choices"], json!(want));
    for field in ["prompt_tokens", "completion_tokens"] {
        let count = |answer: &Value| answer["usage"][field].as_u64().expect("a number");
        assert_eq!(count(&together), alone.iter().map(count).sum::<u64>(), "{field}");
    }
    let objects = server.stream(TEXT, &with(asked, json!({"stream": true}))).objects();
    for (n, choice) in want.iter().enumerate() {
        let pieces = objects.iter().map(|object| &object["choices"][0]).filter(|piece| piece["index"] == n);
        let text: String = pieces.filter_map(|piece| piece["text"].as_str()).collect();
        assert_eq!(choice["text"], text, "choice {n}");
    }
    let many = server.post(TEXT, &json!({"prompt": vec!["Hi"; 30], "max_tokens": 1}));
    assert_eq!((many.status, &many.json()["error"]["param"]), (400, &json!("prompt")), "more than there is room for");
}

#[test]
fn answers_end_at_stop_texts_and_limits() {
    let server = Running::tiny(settings());
    let asked = json!({"prompt": "Hello, Leon from Cairo here.", "max_tokens": 30, "temperature": 0});
    let whole = server.post(TEXT, &asked).json();
    let text = whole["choices"][0]["text"].as_str().expect("a text").to_owned();
    let middle = text.char_indices().map(|(place, _)| place).nth(text.chars().count() / 2).expect("a letter");
    let stop: String = text[middle..].chars().take(2).collect();
    let before = &text[..text.find(&stop).expect("it is there")];
    for stop in [json!(stop), json!(["never there", stop])] {
        let ended = server.post(TEXT, &with(asked.clone(), json!({"stop": stop}))).json();
        assert_eq!(
            (&ended["choices"][0]["text"], &ended["choices"][0]["finish_reason"]),
            (&json!(before), &json!("stop"))
        );
    }
    let short = server.post(TEXT, &with(asked, json!({"max_tokens": 1}))).json();
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    assert_eq!(short["usage"]["completion_tokens"], 1);
}

#[test]
fn logarithms_of_probabilities() {
    let server = Running::tiny(settings());
    // The end token does not come.
    let no_end = json!({"0": -100});
    let more = json!({"max_tokens": 3, "logprobs": true, "top_logprobs": 2, "logit_bias": no_end});
    let chat = server.post(CHAT, &with(question("Hi"), more)).json();
    let content = chat["choices"][0]["logprobs"]["content"].as_array().expect("a list").clone();
    assert_eq!((content.len(), &chat["usage"]["completion_tokens"]), (3, &json!(3)));
    for token in content {
        let logprob = token["logprob"].as_f64().expect("a number");
        let top: Vec<f64> = token["top_logprobs"]
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(|one| one["logprob"].as_f64())
            .collect();
        assert!(token["token"].is_string() && token["bytes"].is_array());
        assert!(top.len() == 2 && top[0] >= top[1] && top[0] >= logprob && logprob <= 0.0, "{token}");
    }
    let asked = json!({"prompt": "Hi", "max_tokens": 2, "logprobs": 1, "temperature": 0, "logit_bias": no_end});
    let text = server.post(TEXT, &asked).json();
    let logprobs = &text["choices"][0]["logprobs"];
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[key].as_array().map(Vec::len), Some(2), "{key}: {text}");
    }
}

/// Penalties and biases reach the model.
#[test]
fn a_bias_forbids_a_token() {
    let server = Running::tiny(settings());
    let no_end = json!({"0": -100});
    let asked = json!({"prompt": "Hello", "max_tokens": 1, "temperature": 0, "logprobs": 0, "logit_bias": no_end});
    let tokens = |answer: Value| answer["choices"][0]["logprobs"]["tokens"][0].clone();
    let first = tokens(server.post(TEXT, &asked).json());
    let tokenizer = tokenizer();
    let text = first.as_str().expect("a text");
    let numbers: Vec<u32> = (0..tokenizer.vocab_size() as u32)
        .filter(|token| tokenizer.decode(&[*token], false).is_ok_and(|decoded| decoded == text))
        .collect();
    let bias: serde_json::Map<String, Value> = numbers.iter().map(|token| (token.to_string(), json!(-100))).collect();
    let other = tokens(server.post(TEXT, &with(asked, json!({"logit_bias": bias}))).json());
    assert_ne!(other, first);
}

/// Base and adapter, whole and streamed, long and short, all at once: each as alone.
#[test]
fn answers_do_not_depend_on_each_other() {
    let [base, adapted] = golden("qwen3");
    let server =
        Running::start(settings(), ENGINE, vec![served("base", None, base), served("ours", Some("base"), adapted)]);
    let asked = |n: usize| {
        let prompt: Vec<usize> = (0..5 + 40 * n).map(|place| (3 + n + 7 * place) % 96).collect();
        let model = if n.is_multiple_of(2) { "base" } else { "ours" };
        json!({"model": model, "prompt": prompt, "max_tokens": 40, "temperature": 1.1, "seed": n, "logprobs": 3})
    };
    let alone: Vec<Value> = (0..12).map(|n| server.post(TEXT, &asked(n)).json()["choices"].clone()).collect();
    let together: Vec<Value> = thread::scope(|scope| {
        let ask = |n| {
            let server = &server;
            scope.spawn(move || server.post(TEXT, &asked(n)).json()["choices"].clone())
        };
        let threads: Vec<_> = (0..12).map(ask).collect();
        threads.into_iter().map(|thread| thread.join().expect("an answer")).collect()
    });
    assert_eq!(together, alone);
}

#[test]
fn a_known_beginning_is_told_and_changes_nothing() {
    let server = Running::tiny(settings());
    let prompt: Vec<usize> = (0..1200).map(|place| 10 + (7 * place) % 900).collect();
    let asked = json!({"prompt": prompt, "max_tokens": 20, "temperature": 1, "seed": 5, "logprobs": 2});
    let [first, second] = [(), ()].map(|()| server.post(TEXT, &asked).json());
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].clone();
    assert_eq!((cached(&first), cached(&second)), (json!(0), json!(1088)));
    assert_eq!(first["choices"], second["choices"]);
    let metrics = server.get("/metrics").body;
    for line in ["finetune_prompt_tokens_total 2400", "finetune_cached_prompt_tokens_total 1088"] {
        assert!(metrics.lines().any(|other| other == line), "{line} is not in:\n{metrics}");
    }
}

/// Tools are taken, and text parts, and what the template does not know.
#[test]
fn conversations_in_their_forms_are_taken() {
    let server = Running::tiny(settings());
    let tool = json!({"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}});
    let parts = json!([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]);
    for more in [
        json!({"tools": [tool], "tool_choice": "none"}),
        json!({"messages": parts}),
        json!({"chat_template_kwargs": {"enable_thinking": false}}),
        json!({"documents": [{"title": "Tower", "text": "It has 7 floors."}]}),
        json!({"user": "somebody", "metadata": {"a": 1}, "n": 1, "response_format": {"type": "text"}}),
    ] {
        let answer = server.post(CHAT, &with(question("Hi"), with(json!({"max_tokens": 2}), more.clone())));
        assert_eq!(answer.status, 200, "{more}: {}", answer.body);
        assert!(answer.json()["choices"][0]["message"]["content"].is_string(), "{more}: {}", answer.body);
    }
    // As in a row of training nothing is put between parts.
    let halves = json!([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]);
    let [whole, halves] = [json!("Hi"), halves].map(|content| {
        let messages = json!([{"role": "user", "content": content}]);
        server.post(CHAT, &with(question("Hi"), json!({"messages": messages, "max_tokens": 4}))).json()
    });
    let prompt_of = |answer: &Value| answer["usage"]["prompt_tokens"].clone();
    assert_eq!((&halves["choices"], prompt_of(&halves)), (&whole["choices"], prompt_of(&whole)));
}

/// Tokens that end an answer come late, not at all, or are those that the request names.
#[test]
fn tokens_that_end_an_answer() {
    let server = Running::tiny(settings());
    let asked = json!({"prompt": "Hello, Leon", "max_tokens": 300, "temperature": 0, "logprobs": 0});
    let ask = |more: Value| {
        let answer = server.post(TEXT, &with(asked.clone(), more)).json();
        let choice = answer["choices"][0].clone();
        (answer["usage"]["completion_tokens"].as_u64().expect("a number"), choice)
    };
    let (own, usual) = ask(json!({"logit_bias": {"0": 100}, "min_tokens": 7}));
    assert_eq!((own, &usual["finish_reason"]), (7, &json!("stop")), "the end comes as soon as it may: {usual}");
    let (first, _) = ask(json!({"logit_bias": {"0": 100}}));
    assert_eq!(first, 0);
    let (all, longest) = ask(json!({"ignore_eos": true}));
    assert_eq!((all, &longest["finish_reason"]), (300, &json!("length")), "{longest}");
    // Token 42 comes always, and ends the answer.
    let always = json!({"logit_bias": {"42": 100}, "stop_token_ids": [42]});
    let (none, stopped) = ask(always.clone());
    assert_eq!((none, &stopped["finish_reason"], &stopped["text"]), (0, &json!("stop"), &json!("")), "{stopped}");
    let (three, _) = ask(with(always, json!({"min_tokens": 3})));
    assert_eq!(three, 3, "others come before");
    let unknown = server.post(TEXT, &with(asked.clone(), json!({"stop_token_ids": [4_000_000]})));
    assert_eq!((unknown.status, &unknown.json()["error"]["param"]), (400, &json!("stop_token_ids")));
}

/// As programs that measure models ask: the prompt comes back, with what the model thinks of it.
#[test]
fn an_echo_has_the_logarithms_of_the_prompt() {
    let server = Running::tiny(settings());
    let tokens = tokenizer().encode("Hello, Leon from Cairo", true).expect("tokens");
    let asked = json!({"max_tokens": 4, "temperature": 0, "logprobs": 2, "logit_bias": {"42": 100}, "n": 2});
    let ask = |more: Value| server.post(TEXT, &with(asked.clone(), more));
    let usual = ask(json!({"prompt": tokens})).json()["choices"][0].clone();
    let echo = ask(json!({"prompt": [tokens, "Hi"], "echo": true})).json();
    let text = tokenizer().decode(&tokens, false).expect("a text") + usual["text"].as_str().expect("a text");
    let logprobs = &echo["choices"][0]["logprobs"];
    assert_eq!(echo["choices"][0]["text"], text);
    assert!(echo["choices"][2]["text"].as_str().is_some_and(|text| text.starts_with("Hi")), "{echo}");
    let list = |logprobs: &Value, key: &str| logprobs[key].as_array().expect("a list").clone();
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(list(logprobs, key).len(), tokens.len() + 4, "{key}: {logprobs}");
    }
    for key in ["tokens", "token_logprobs", "top_logprobs"] {
        assert_eq!(list(logprobs, key)[tokens.len()..], list(&usual["logprobs"], key), "the answer's {key}");
    }
    assert_eq!((&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]), (&Value::Null, &Value::Null));
    assert!(list(logprobs, "token_logprobs")[1..].iter().all(|one| one.as_f64().is_some_and(|one| one <= 0.0)));
    // What is thought of a token is the same whether it is given or chosen: 42 is, by its bias.
    let given = [tokens.as_slice(), &[42; 4]].concat();
    let whole = ask(json!({"prompt": given, "echo": true, "max_tokens": 0})).json()["choices"][0].clone();
    assert_eq!((&whole["finish_reason"], list(&whole["logprobs"], "tokens").len()), (&json!("length"), given.len()));
    let numbers = |logprobs: &Value| list(logprobs, "token_logprobs");
    for (given, chosen) in numbers(&whole["logprobs"]).iter().zip(numbers(logprobs)).skip(1) {
        let [given, chosen] = [given, &chosen].map(|one| one.as_f64().expect("a number"));
        assert!((given - chosen).abs() < 1e-3, "{given} {chosen}");
    }
    // A stream has the same.
    let streamed = json!({"prompt": tokens, "echo": true, "stream": true, "n": 1});
    let objects = server.stream(TEXT, &with(asked.clone(), streamed)).objects();
    let pieces: Vec<&Value> = objects.iter().map(|object| &object["choices"][0]).collect();
    assert_eq!(text, pieces.iter().filter_map(|piece| piece["text"].as_str()).collect::<String>());
    for key in ["tokens", "token_logprobs", "text_offset"] {
        let all = pieces.iter().filter_map(|piece| piece["logprobs"][key].as_array()).flatten().cloned();
        assert_eq!(all.collect::<Vec<_>>(), list(logprobs, key), "{key}");
    }
    let without = ask(json!({"prompt": "Hi", "echo": true, "max_tokens": 0, "logprobs": null})).json();
    assert_eq!((&without["choices"][0]["text"], &without["choices"][0]["logprobs"]), (&json!("Hi"), &Value::Null));
    let chat = server.post(CHAT, &with(question("Hi"), json!({"echo": true})));
    assert_eq!((chat.status, &chat.json()["error"]["param"]), (400, &json!("echo")));
}

/// Whatever becomes of the request.
#[test]
fn an_answer_has_the_name_of_its_request() {
    let server = Running::tiny(settings());
    for (path, status) in [("/v1/models", 200), ("/v1/nothing", 404)] {
        let headers = [("X-Request-Id", "mine-7")];
        let answer = ask(server.address, "GET", path, &headers, "");
        assert_eq!(answer.status, status);
        assert!(answer.head.to_ascii_lowercase().contains("x-request-id: mine-7\r\n"), "{}", answer.head);
        assert!(!server.get(path).head.to_ascii_lowercase().contains("x-request-id"), "nobody has named this one");
    }
}

/// A model that nobody names is the first one.
#[test]
fn without_a_name_the_first_model_answers() {
    let server = Running::tiny(settings());
    let answer = server.post(TEXT, &json!({"prompt": "Hi", "max_tokens": 1})).json();
    assert_eq!(answer["model"], "tiny");
    let streamed: Stream = server.stream(TEXT, &json!({"prompt": "Hi", "max_tokens": 1, "stream": true}));
    assert!(streamed.objects().iter().all(|object| object["model"] == "tiny"));
}
