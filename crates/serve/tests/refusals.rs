//! What is refused, who is not let in, and clients that leave, wait or do nothing.

mod client;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use client::{DEADLINE, ENGINE, Running, ask, connect, served, settings, tiny};
use finetune_model::EngineSettings;
use finetune_serve::{Bounds, ServeError, Server, Settings};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// An answer that nobody waits for to its end.
fn endless() -> Value {
    json!({"prompt": "Hello", "max_tokens": 1_000_000, "temperature": 1, "logit_bias": {"0": -100}, "stream": true})
}

/// Asks again until the answer has this status.
fn until(status: u16, mut ask: impl FnMut() -> client::Response) -> client::Response {
    let begun = Instant::now();
    loop {
        let response = ask();
        if response.status == status {
            return response;
        }
        assert!(begun.elapsed() < DEADLINE, "{status} does not come: {} {}", response.status, response.body);
    }
}

/// An engine whose memory is enough for an endless answer.
fn engine(slots: usize, queue: usize) -> EngineSettings {
    EngineSettings { slots, queue, cache_bytes: 16 << 30, ..ENGINE }
}

/// (path, body, status, field, code)
#[test]
fn what_is_wrong_is_named_in_openais_form() {
    let server = Running::tiny(settings());
    let user = json!([{"role": "user", "content": "Hi"}]);
    let long: Vec<u32> = vec![5; 3];
    for (path, body, status, param, code) in [
        (CHAT, json!([]), 400, json!("body"), Value::Null),
        (CHAT, json!({}), 400, json!("messages"), Value::Null),
        (CHAT, json!({"messages": user, "temperature": "x"}), 400, json!("temperature"), Value::Null),
        (CHAT, json!({"messages": user, "best_of": 2}), 400, json!("best_of"), json!("unsupported_value")),
        (CHAT, json!({"messages": user, "model": "other"}), 404, json!("model"), json!("model_not_found")),
        (CHAT, json!({"messages": user, "top_logprobs": 2}), 400, json!("top_logprobs"), Value::Null),
        (
            CHAT,
            json!({"messages": user, "max_tokens": 2_000_000}),
            400,
            json!("messages"),
            json!("context_length_exceeded"),
        ),
        (TEXT, json!({}), 400, json!("prompt"), Value::Null),
        (TEXT, json!({"prompt": ""}), 400, json!("prompt"), Value::Null),
        (TEXT, json!({"prompt": [99_999_999]}), 400, json!("prompt"), Value::Null),
        (
            TEXT,
            json!({"prompt": long, "max_tokens": 2_000_000}),
            400,
            json!("prompt"),
            json!("context_length_exceeded"),
        ),
        ("/v1/embeddings", json!({}), 404, Value::Null, Value::Null),
        ("/v1/models", json!({}), 405, Value::Null, Value::Null),
        ("/nowhere", json!({}), 404, Value::Null, Value::Null),
        ("/v1/load_lora_adapter", json!({}), 403, Value::Null, Value::Null),
    ] {
        let response = server.post(path, &body);
        let error = response.json()["error"].clone();
        assert_eq!(
            (response.status, &error["param"], &error["code"]),
            (status, &param, &code),
            "{path} {body}: {error}"
        );
        assert!(error["message"].is_string() && error["type"].is_string(), "{path} {body}: {error}");
    }
    let unknown = server.post(CHAT, &json!({"messages": user, "model": "other"}));
    assert!(unknown.body.contains("tiny"), "the models that there are: {}", unknown.body);
    let broken = ask(server.address, "POST", CHAT, &[], "{\"messages\": [");
    assert!(broken.status == 400 && broken.body.contains("not JSON"), "{}", broken.body);
    assert_eq!(server.get(CHAT).status, 405);
    let no_text = server.get("/v1/models/%ff");
    assert_eq!((no_text.status, &no_text.json()["error"]["type"]), (400, &json!("invalid_request_error")));
}

/// What a client may send to take time or memory, or to leave a range: (body, status, field, words of the message).
#[test]
fn hostile_bodies_are_refused_by_name() {
    let server = Running::tiny(settings());
    let of = |field: &str| format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"Hi\"}}], {field}}}");
    let biases: Vec<String> = (0..2000).map(|token| format!("\"{token}\": 1")).collect();
    let unknown = "x".repeat(1 << 20);
    for (body, status, param, words) in [
        (format!("{{\"a\": {}", "[".repeat(100_000)), 400, "body", "recursion limit"),
        (of(&format!("\"tools\": {}1{}", "[".repeat(200), "]".repeat(200))), 400, "body", "recursion limit"),
        (of(&format!("\"x\": [{}1]", "1,".repeat(1 << 20))), 400, "body", "1048576 values"),
        (of("\"temperature\": 1e999"), 400, "body", "out of range"),
        (of("\"temperature\": NaN"), 400, "body", "not JSON"),
        (of("\"temperature\": \"NaN\""), 400, "temperature", "a number"),
        (of("\"temperature\": -0.1"), 400, "temperature", "from 0"),
        (of("\"temperature\": 1e300"), 400, "temperature", "1e+300"),
        (of("\"top_p\": -1"), 400, "top_p", "from 0"),
        (of("\"seed\": 1e300"), 400, "seed", "too large"),
        (of("\"n\": -1"), 400, "n", "128"),
        (of("\"n\": 1000000000"), 400, "n", "128"),
        (of("\"max_tokens\": 1000000000000000000"), 400, "messages", "positions"),
        (of("\"top_k\": -5"), 400, "top_k", "-1"),
        (of("\"stop\": [\"a\", \"b\", \"c\", \"d\", \"e\"]"), 400, "stop", "4 strings"),
        (of(&format!("\"logit_bias\": {{{}}}", biases.join(", "))), 400, "logit_bias", "1024 tokens"),
        (of("\"logit_bias\": {\"4000000000\": 1}"), 400, "logit_bias", "4000000000"),
        (of("\"logit_bias\": {\"-1\": 1}"), 400, "logit_bias", "-1"),
        (of("\"logprobs\": true, \"top_logprobs\": 21"), 400, "top_logprobs", "20"),
        (of("\"logprobs\": true, \"top_logprobs\": -1"), 400, "top_logprobs", "0"),
        (of(&format!("\"model\": \"{unknown}\"")), 404, "model", "..."),
        (of("\"tools\": [{\"type\": \"function\"}]"), 400, "tools[0]", "a tool is"),
        (of("\"tool_choice\": {\"function\": {\"name\": 7}}"), 400, "tool_choice", "names no function"),
        (of("\"chat_template_kwargs\": [1]"), 400, "chat_template_kwargs", "an object"),
    ] {
        let response = ask(server.address, "POST", CHAT, &[], &body);
        let shown: String = body.chars().take(120).collect();
        let error = response.json()["error"].clone();
        assert_eq!((response.status, &error["param"]), (status, &json!(param)), "{shown}: {error}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(words)), "{shown}: {error}");
        assert!(response.body.len() < 10_000, "{shown}: {} bytes", response.body.len());
    }
    // It is still there, and as many likely tokens as may be asked for are more than nothing.
    let asked = of("\"logprobs\": true, \"top_logprobs\": 20, \"max_tokens\": 1");
    assert_eq!(ask(server.address, "POST", CHAT, &[], &asked).status, 200);
}

/// Heads that are too long or too many, and a name of no letters.
#[test]
fn hostile_heads_are_refused() {
    let server = Running::tiny(settings());
    let many: String = (0..500).map(|n| format!("X-{n}: a\r\n")).collect();
    let long = format!("X: {}\r\n", "a".repeat(2 << 20));
    for (head, status) in [
        (format!("GET /health HTTP/1.1\r\nHost: localhost\r\n{many}\r\n"), "431"),
        (format!("GET /health HTTP/1.1\r\nHost: localhost\r\n{long}\r\n"), "431"),
        ("GET /health HTTP/1.1\r\nHost: \u{e4}vil\r\n\r\n".to_owned(), "403"),
        ("GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: http://\u{e4}vil\r\n\r\n".to_owned(), "403"),
        ("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n".to_owned(), "400"),
        ("GET /v1/models/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n".to_owned(), "404"),
    ] {
        let mut socket = connect(server.address);
        // A server that refuses a head may close before it has read all of it.
        let _ = socket.write_all(head.as_bytes());
        let mut answer = [0; 12];
        let shown: String = head.chars().take(80).collect();
        socket.read_exact(&mut answer).unwrap_or_else(|error| panic!("{shown}: {error}"));
        assert_eq!(String::from_utf8_lossy(&answer[9..]), status, "{shown}");
    }
    assert_eq!(server.get("/health").status, 200);
}

/// Bodies of all requests together have a bound: who finds no room hears that it is too many.
#[test]
fn bodies_share_their_room() {
    let bounds = Bounds { bodies: 256 << 10, request: Duration::from_secs(2), ..Bounds::default() };
    let server = Running::tiny(Settings { bounds, ..settings() });
    let large = json!({"prompt": "Hi", "max_tokens": 1, "user": "x".repeat(400 << 10)});
    assert_eq!(server.post(TEXT, &large).status, 200, "one piece beside the free one");
    let too_large = json!({"prompt": "Hi", "max_tokens": 1, "user": "x".repeat(512 << 10)});
    let refused = server.post(TEXT, &too_large);
    assert!(refused.status == 429 && refused.head.contains("retry-after: "), "{} {}", refused.status, refused.body);
    // The room is free again.
    assert_eq!(server.post(TEXT, &large).status, 200);
}

/// The models continue text, and whoever asks for vectors hears so instead of getting some.
#[test]
fn embeddings_are_refused_by_name() {
    let server = Running::tiny(settings());
    for body in [json!({"model": "tiny", "input": "Hello"}), json!({"input": ["a", "b"], "dimensions": 8})] {
        let response = server.post("/v1/embeddings", &body);
        let error = response.json()["error"].clone();
        let message = error["message"].as_str().unwrap_or_default();
        assert_eq!(response.status, 404, "{error}");
        assert!(message.contains("`/v1/embeddings` is not supported"), "{error}");
    }
}

/// A text that cannot fit is refused before it is read, which would take long and much memory.
#[test]
fn a_text_that_is_far_too_long_is_refused() {
    let mut model = tiny();
    model.config.max_position_embeddings = 64;
    let server = Running::start(settings(), ENGINE, vec![served("tiny", None, model)]);
    let text = "x".repeat(1 << 20);
    for (path, body, param) in [
        (TEXT, json!({"prompt": text}), "prompt"),
        (CHAT, json!({"messages": [{"role": "user", "content": text}]}), "messages"),
    ] {
        let error = server.post(path, &body).json()["error"].clone();
        assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!("context_length_exceeded")), "{error}");
    }
}

#[test]
fn bodies_that_are_too_large_are_refused() {
    let bounds = Bounds { body: 1000, ..Bounds::default() };
    let server = Running::tiny(Settings { bounds, ..settings() });
    let response = server.post(TEXT, &json!({"prompt": "x".repeat(2000)}));
    assert_eq!((response.status, response.json()["error"]["type"].clone()), (413, json!("invalid_request_error")));
    let mut chunked = connect(server.address);
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n";
    write!(chunked, "{head}7d0\r\n{}\r\n0\r\n\r\n", "x".repeat(2000)).expect("sent");
    let mut status = [0; 12];
    chunked.read_exact(&mut status).expect("an answer");
    assert_eq!(&status, b"HTTP/1.1 413");
    // A client that writes all of its body before it reads hears of it, too.
    let mut writing = connect(server.address);
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n";
    let body = "x".repeat(8 << 20);
    write!(writing, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).expect("sent");
    writing.read_exact(&mut status).expect("an answer");
    assert_eq!(&status, b"HTTP/1.1 413");
    // One that asks first need not write it.
    let mut asking = connect(server.address);
    write!(asking, "{head}Expect: 100-continue\r\nContent-Length: 5000\r\n\r\n").expect("sent");
    asking.read_exact(&mut status).expect("an answer");
    assert_eq!(&status, b"HTTP/1.1 413");
}

#[test]
fn who_has_no_key_or_comes_from_elsewhere_is_not_let_in() {
    let server = Running::tiny(Settings { key: Some("secret".to_owned()), ..settings() });
    let get = |path: &str, headers: &[(&str, &str)]| ask(server.address, "GET", path, headers, "").status;
    assert_eq!(get("/v1/models", &[]), 401);
    assert_eq!(get("/v1/models", &[("Authorization", "Bearer other")]), 401);
    assert_eq!(get("/v1/models", &[("Authorization", "Bearer secret")]), 200);
    assert_eq!((get("/health", &[]), get("/", &[])), (200, 200));
    assert_eq!(get("/health", &[("Host", "evil.example")]), 403);
    assert_eq!(get("/health", &[("Origin", "https://evil.example")]), 403);
    let page = server.get("/");
    assert!(page.head.contains("content-security-policy: default-src 'none'"), "{}", page.head);
    let nonce = page.head.split("'nonce-").nth(1).and_then(|rest| rest.split('\'').next()).expect("a nonce");
    assert!(page.body.contains(&format!("<script nonce=\"{nonce}\">")) && !page.body.contains("NONCE"));
    assert!(!page.body.contains("http://") && !page.body.contains("https://"), "nothing is from elsewhere");
}

#[test]
fn requests_hear_that_the_model_is_loading() {
    let server = Server::start(settings()).expect("a server");
    let address = server.address();
    let health = ask(address, "GET", "/health", &[], "");
    assert!(health.status == 503 && health.head.contains("retry-after: "), "{}", health.head);
    assert_eq!(ask(address, "POST", TEXT, &[], "{\"prompt\": \"Hi\"}").status, 503);
    let taken = Server::start(Settings { port: address.port(), ..settings() });
    assert!(matches!(taken, Err(ServeError::Bind { .. })), "two servers at one address");
    server
        .ready(vec![served("tiny", None, tiny())], ENGINE, Box::new(|_, _| Err(String::new())), None, Box::new(|_| {}))
        .expect("a thread");
    assert_eq!(ask(address, "GET", "/health", &[], "").status, 200);
}

/// One slot and no queue: the second client hears that it is too many, until the first one leaves.
#[test]
fn a_full_queue_refuses_and_a_client_that_leaves_frees_its_slot() {
    let server = Running::start(settings(), engine(1, 0), vec![served("tiny", None, tiny())]);
    let mut first = server.stream(TEXT, &endless());
    assert!(first.event().is_some(), "it runs");
    let short = json!({"prompt": "Hi", "max_tokens": 2});
    let refused = server.post(TEXT, &short);
    assert!(refused.status == 429 && refused.head.contains("retry-after: "), "{} {}", refused.status, refused.body);
    assert_eq!(refused.json()["error"]["code"], "queue_full");
    drop(first);
    until(200, || server.post(TEXT, &short));
    let begun = Instant::now();
    while !server.get("/metrics").body.contains("finetune_requests_running 0") {
        assert!(begun.elapsed() < DEADLINE, "{}", server.get("/metrics").body);
    }
}

/// One slot, which is never free: who waits for it hears so after a while, and its place is free again.
#[test]
fn a_request_does_not_wait_for_ever() {
    let bounds = Bounds { turn: Duration::from_millis(300), ..Bounds::default() };
    let server = Running::start(Settings { bounds, ..settings() }, engine(1, 1), vec![served("tiny", None, tiny())]);
    let mut first = server.stream(TEXT, &endless());
    assert!(first.event().is_some(), "it runs");
    let short = json!({"prompt": "Hi", "max_tokens": 2});
    for _ in 0..3 {
        let late = until(503, || server.post(TEXT, &short));
        assert_eq!(late.json()["error"]["code"], "queue_timeout", "{}", late.body);
        assert!(late.head.contains("retry-after: "), "{}", late.head);
    }
    assert!(first.event().is_some_and(|event| !event.contains("error")), "it still runs");
    drop(first);
    until(200, || server.post(TEXT, &short));
}

/// Clients that read nothing of an endless answer, and clients that never end their request.
#[test]
fn nobody_keeps_others_waiting() {
    let bounds = Bounds { request: Duration::from_secs(2), ..Bounds::default() };
    let server = Running::start(Settings { bounds, ..settings() }, engine(8, 16), vec![served("tiny", None, tiny())]);
    let asked = json!({"prompt": "Hi", "max_tokens": 8, "temperature": 1, "seed": 3});
    let alone = server.post(TEXT, &asked).json()["choices"].clone();
    let unread: Vec<_> = (0..3).map(|_| server.stream(TEXT, &endless())).collect();
    let mut slow: Vec<_> =
        ["", "POST /v1/comp", "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"]
            .into_iter()
            .map(|beginning| {
                let mut socket = connect(server.address);
                socket.write_all(beginning.as_bytes()).expect("sent");
                socket
            })
            .collect();
    for _ in 0..5 {
        assert_eq!(server.post(TEXT, &asked).json()["choices"], alone);
    }
    for socket in &mut slow {
        // The server closes it, perhaps after words about the request.
        let mut rest = Vec::new();
        socket.read_to_end(&mut rest).expect("the end within the deadline");
        assert!(!rest.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&rest));
    }
    drop(unread);
}

#[test]
fn a_server_that_stops_lets_answers_come_to_their_end() {
    let mut server =
        Running::start(Settings { grace: DEADLINE, ..settings() }, engine(4, 4), vec![served("tiny", None, tiny())]);
    let mut first = server.stream(TEXT, &endless());
    assert!(first.event().is_some(), "it runs");
    server.stopper.stop();
    until(503, || server.get("/health"));
    assert_eq!(server.post(TEXT, &json!({"prompt": "Hi"})).status, 503);
    assert!(first.event().is_some_and(|event| !event.contains("error")), "it still runs");
    drop(first);
    assert_eq!(server.ended(), Ok(()));
}

#[test]
fn answers_that_take_too_long_end_with_an_error() {
    let mut server = Running::start(
        Settings { grace: Duration::ZERO, ..settings() },
        engine(4, 4),
        vec![served("tiny", None, tiny())],
    );
    let mut stream = server.stream(TEXT, &endless());
    assert!(stream.event().is_some(), "it runs");
    server.stopper.stop();
    let events: Vec<String> = std::iter::from_fn(|| stream.event()).collect();
    assert_eq!(server.ended(), Ok(()));
    let [.., error, last] = events.as_slice() else { panic!("{events:?}") };
    let error: Value = serde_json::from_str(error).expect("JSON");
    assert_eq!((error["error"]["type"].as_str(), last.as_str()), (Some("service_unavailable_error"), "[DONE]"));
}

#[test]
fn adapters_come_and_go() {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["good", "bad"] {
        std::fs::create_dir(folder.path().join(name)).expect("a directory");
    }
    let server = Running::tiny(Settings { adapters_dir: Some(folder.path().to_owned()), ..settings() });
    let load = |name: &str, path: &str| {
        server.post("/v1/load_lora_adapter", &json!({"lora_name": name, "lora_path": path})).status
    };
    let unload = |name: &str| server.post("/v1/unload_lora_adapter", &json!({"lora_name": name})).status;
    let answers = |name: &str| server.post(TEXT, &json!({"model": name, "prompt": "Hi", "max_tokens": 1})).status;
    assert_eq!((load("x", "bad"), load("x", "nowhere"), load("x", "/"), load("", "good")), (400, 400, 400, 400));
    for path in ["..", "../..", "good/../..", "/etc", "good/../../../etc", "\0", "good\0", "./.", "//", "~"] {
        assert_eq!(load("x", path), 400, "{path}");
    }
    assert_eq!((load("a\nb", "good"), load(&"x".repeat(201), "good")), (400, 400));
    assert_eq!((answers("x"), load("x", "good"), answers("x")), (404, 200, 200));
    assert_eq!(load("x", "good"), 400, "the name is taken");
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][1]["parent"], "tiny");
    assert_eq!((unload("x"), answers("x"), unload("x"), unload("tiny")), (200, 404, 404, 400));
    assert_eq!(answers("tiny"), 200);
    // Of many that unload one at once all but one hear that it is not there.
    assert_eq!(load("x", "good"), 200);
    let mut all = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| unload("x"))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<u16>>()
    });
    all.sort_unstable();
    assert_eq!(all, [200, 404, 404, 404, 404, 404, 404, 404]);
}

/// A run's own adapter and those of `--adapter` lie anywhere, and requests count on them.
#[test]
fn models_that_were_named_at_the_start_stay() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("good")).expect("a directory");
    let settings = Settings { adapters_dir: Some(folder.path().to_owned()), ..settings() };
    // The adapter of a run is the first one.
    let all = [("own", Some("tiny")), ("tiny", None), ("named", Some("tiny"))];
    let all = all.map(|(id, parent)| served(id, parent, tiny())).into();
    let server = Running::start(settings, ENGINE, all);
    let post = |path: &str, fields: Value| server.post(path, &fields);
    assert_eq!(post("/v1/load_lora_adapter", json!({"lora_name": "new", "lora_path": "good"})).status, 200);
    for name in ["own", "tiny", "named"] {
        let refused = post("/v1/unload_lora_adapter", json!({"lora_name": name}));
        assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("lora_name")), "{name}");
        assert!(refused.body.contains(&format!("`{name}` was named when the server was started")), "{}", refused.body);
    }
    assert_eq!(post("/v1/unload_lora_adapter", json!({"lora_name": "new"})).status, 200);
    let models = server.get("/v1/models").json();
    let ids: Vec<&Value> = models["data"].as_array().expect("a list").iter().map(|model| &model["id"]).collect();
    assert_eq!(ids, ["own", "tiny", "named"]);
    assert_eq!(post(TEXT, json!({"prompt": "Hi", "max_tokens": 1})).json()["model"], "own");
}
