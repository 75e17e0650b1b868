//! `finetune launch -- generate` and `-- serve`: ranks that hold one model together, whole layers or a slice of every
//! layer on each, give the tokens of one process.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::commands::serve::ask;
use crate::folder::{Folder, repository};
use crate::program::{DEADLINE, Running, finetune, free_port, run, start};

pub(crate) const BASE: &str = "datasets/quickstart/base";

pub(crate) fn in_repository(arguments: &[&str]) -> Command {
    let mut command = finetune(arguments.iter().copied());
    command.current_dir(repository());
    command
}

#[test]
fn ranks_generate_what_one_process_does() {
    let asked = ["--raw", "--prompt", "Hello, Leon", "--temperature", "0.9", "--seed", "4", "--max-new-tokens", "24"];
    let generate = ["generate", BASE, "--device", "cpu", "--json"];
    let alone = run(&mut in_repository(&[&generate[..], &asked].concat())).expect(0).json();
    for ranks in ["1", "2", "4"] {
        let launch = ["launch", "-n", ranks, "--"];
        let together = run(&mut in_repository(&[&launch[..], &generate, &asked].concat())).expect(0).json();
        assert_eq!(together, alone, "{ranks} ranks");
    }
    // Rows of a file, several at once.
    let data = ["--data", "datasets/quickstart/valid.jsonl", "--max-new-tokens", "4"];
    let alone = run(&mut in_repository(&[&generate[..], &data].concat())).expect(0);
    let launch = ["launch", "-n", "3", "--"];
    let together = run(&mut in_repository(&[&launch[..], &generate, &data].concat())).expect(0);
    assert_eq!(together.stdout, alone.stdout);
}

/// Where a server says that it is, for the `nth` time.
pub(crate) fn address(running: &mut Running, nth: usize) -> String {
    running.wait_until("the address", |running| running.stdout().matches("Ctrl-C stops").count() >= nth);
    let said = running.stdout();
    said.split("http://").nth(nth).and_then(|rest| rest.split(' ').next()).expect("an address").to_owned()
}

fn answer(address: &str, n: usize) -> Value {
    let content = format!("Hello, my name is Leon, number {n}.");
    let asked =
        json!({"messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0.7, "seed": n});
    let (status, body) = ask(address, "POST", "/v1/chat/completions", "", &asked.to_string());
    assert_eq!(status, 200, "{body}");
    let answer: Value = serde_json::from_str(&body).expect("JSON");
    json!([answer["choices"][0]["message"], answer["usage"]])
}

#[test]
fn slices_generate_what_one_process_does() {
    let generate = ["generate", BASE, "--device", "cpu", "--json", "--raw", "--prompt", "Hello, Leon"];
    for asked in [
        &["--max-new-tokens", "24"][..],
        &["--temperature", "0.9", "--seed", "4", "--max-new-tokens", "24"],
        &["--quantization", "int8", "--max-new-tokens", "8"],
    ] {
        let alone = run(&mut in_repository(&[&generate[..], asked].concat())).expect(0).json();
        for ranks in ["2", "4"] {
            let launch = ["launch", "-n", ranks, "--parallel", "tensor", "--"];
            let together = run(&mut in_repository(&[&launch[..], &generate, asked].concat())).expect(0).json();
            assert_eq!(together, alone, "{ranks} ranks {asked:?}");
        }
    }
    // Rows of a file, several at once.
    let data =
        ["generate", BASE, "--device", "cpu", "--data", "datasets/quickstart/valid.jsonl", "--max-new-tokens", "4"];
    let alone = run(&mut in_repository(&data)).expect(0);
    let launch = ["launch", "-n", "2", "--parallel", "tensor", "--"];
    let together = run(&mut in_repository(&[&launch[..], &data].concat())).expect(0);
    assert_eq!(together.stdout, alone.stdout);
}

/// A firewall may let some ports through only. They are chosen without a recipe too, and two ranks need two of them.
#[test]
fn ranks_listen_at_the_ports_that_are_named() {
    let port = |listener: &TcpListener| listener.local_addr().expect("an address").port();
    let any = || TcpListener::bind("127.0.0.1:0").expect("a free port");
    let is_free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
    let taken = std::iter::repeat_with(any).find(|taken| is_free(port(taken) - 1)).expect("a free port beside it");
    let ports = format!("{}-{}", port(&taken) - 1, port(&taken));
    let launch = ["launch", "-n", "2", "--port", &ports, "--", "generate", BASE, "--device", "cpu", "--raw"];
    let ended = run(&mut in_repository(&[&launch[..], &["--prompt", "Hello"]].concat())).expect(2);
    ended.says(&format!("from {} to {} is free", port(&taken) - 1, port(&taken)));
}

/// A run of three steps: an adapter on all linear layers that changes what the base says.
pub(crate) fn train(directory: &Path) {
    let directory = directory.to_str().expect("a path of letters");
    let sets = [
        "train.max_steps=3",
        "schedule.warmup_steps=0",
        "optimizer.learning_rate=0.02",
        "eval.samples=0",
        "eval.exact_match=0",
        "model.device=cpu",
    ];
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let train = ["run", "recipes/quickstart.toml", "--output-dir", directory].into_iter().chain(sets);
    run(&mut in_repository(&train.collect::<Vec<_>>())).expect(0);
}

/// An adapter of this program on all linear layers, and a base that is packed while it is loaded.
#[test]
fn slices_have_their_part_of_an_adapter() {
    let folder = Folder::empty();
    train(&folder.path("run"));
    let run_directory = folder.path("run");
    let trained = run_directory.to_str().expect("a path of letters");
    let asked = ["--device", "cpu", "--json", "--raw", "--prompt", "Hello, Leon", "--max-new-tokens", "24"];
    let said = |launch: &[&str], model: &[&str]| {
        run(&mut in_repository(&[launch, &["generate"], model, &asked].concat())).expect(0).json()
    };
    let launch = |ranks| ["launch", "-n", ranks, "--parallel", "tensor", "--"];
    let alone = said(&[], &[trained]);
    assert_ne!(alone, said(&[], &[BASE]), "the adapter changes something");
    for ranks in ["2", "4"] {
        assert_eq!(said(&launch(ranks), &[trained]), alone, "{ranks} ranks");
    }
    let packed = [trained, "--quantization", "mlx4"];
    assert_eq!(said(&launch("2"), &packed), said(&[], &packed), "packed while it is loaded");
}

/// Either way may be taken, and both say the same.
#[test]
fn auto_says_what_it_takes_and_why() {
    let generate =
        ["generate", BASE, "--device", "cpu", "--json", "--raw", "--prompt", "Hello", "--max-new-tokens", "6"];
    let alone = run(&mut in_repository(&generate)).expect(0).json();
    let auto = |ranks| ["launch", "-n", ranks, "--parallel", "auto", "--"];
    let measured = run(&mut in_repository(&[&auto("2")[..], &generate].concat())).expect(0);
    assert_eq!(measured.json(), alone);
    measured.says("--parallel auto takes ").says("weights are read at ");
    let uneven = run(&mut in_repository(&[&auto("3")[..], &generate].concat())).expect(0);
    assert_eq!(uneven.json(), alone);
    uneven.says("--parallel auto takes stages: 4 query heads with 2 key/value heads do not split over 3 ranks");
}

#[test]
fn ranks_serve_what_one_process_does() {
    serves_as_one_process(&["launch", "-n", "3", "--max-restarts", "2", "--"]);
}

#[test]
fn slices_serve_what_one_process_does() {
    serves_as_one_process(&["launch", "-n", "2", "--parallel", "tensor", "--max-restarts", "2", "--"]);
}

/// Several clients at once, on one process and on several ranks. A rank is killed, and all start again.
fn serves_as_one_process(launch: &[&str]) {
    let serve = ["serve", BASE, "--port", "0", "--device", "cpu"];
    let mut alone = start(&mut in_repository(&serve));
    let alone_at = address(&mut alone, 1);
    let want: Vec<Value> = (0..6).map(|n| answer(&alone_at, n)).collect();
    let mut together = start(&mut in_repository(&[launch, &serve].concat()));
    let first_at = address(&mut together, 1);
    let all_at_once = |address: &str| -> Vec<Value> {
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..6).map(|n| scope.spawn(move || answer(address, n))).collect();
            clients.into_iter().map(|client| client.join().expect("no panic")).collect()
        })
    };
    assert_eq!(all_at_once(&first_at), want);
    kill_last_rank(&together);
    let again_at = address(&mut together, 2);
    assert_eq!(all_at_once(&again_at), want);
    together.signal("TERM");
    together.wait().expect(0).says("starting all ranks again (restart 1 of 2)");
}

/// What the last rank chooses tokens by, and what it says beside them. Three answers are of one prompt.
#[test]
fn rules_forms_and_logarithms_are_those_of_one_process() {
    let serve = ["serve", BASE, "--port", "0", "--device", "cpu"];
    let mut alone = start(&mut in_repository(&serve));
    let mut together = start(&mut in_repository(&[&["launch", "-n", "3", "--"][..], &serve].concat()));
    let servers = [address(&mut alone, 1), address(&mut together, 1)];
    for more in [
        json!({"logprobs": 3, "temperature": 0.8, "seed": 5}),
        json!({"logprobs": 1, "temperature": 0, "repetition_penalty": 1.3, "logit_bias": {"20": 5}}),
        json!({"response_format": {"type": "json_object"}, "temperature": 0.9, "seed": 2, "n": 3}),
        // The last rank tells what it thinks of the prompts, too, of which the second has three tokens.
        json!({"prompt": ["Hello, Leon", [5, 6, 7]], "echo": true, "logprobs": 2, "temperature": 0.7, "seed": 3, "n": 2}),
        json!({"echo": true, "logprobs": 0, "max_tokens": 0}),
    ] {
        let mut asked = json!({"prompt": "Hello, Leon", "max_tokens": 16});
        let fields = more.as_object().expect("an object").clone();
        asked.as_object_mut().expect("an object").extend(fields);
        let [want, got] = servers.each_ref().map(|at| {
            let (status, body) = ask(at, "POST", "/v1/completions", "", &asked.to_string());
            assert_eq!(status, 200, "{asked}: {body}");
            serde_json::from_str::<Value>(&body).expect("JSON")["choices"].clone()
        });
        assert_eq!(got, want, "{asked}");
    }
}

/// The last of several stages chooses tokens, and all slices do: a request begins once they have its form. One that is
/// refused, or that is asked for again, holds up nothing.
#[test]
fn all_ranks_keep_a_form() {
    let form = |schema: Value| json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    let sure = json!({
        "type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"], "additionalProperties": false,
    });
    for parallel in ["stages", "tensor"] {
        let launch = ["launch", "-n", "2", "--parallel", parallel, "--"];
        let serve = ["serve", BASE, "--port", "0", "--device", "cpu"];
        let mut together = start(&mut in_repository(&[&launch[..], &serve].concat()));
        let at = address(&mut together, 1);
        let ask = |form: Value, seed: u64| {
            let asked = json!({
                "prompt": "Hello", "max_tokens": 300, "temperature": 1, "seed": seed, "n": 2, "response_format": form,
            });
            ask(&at, "POST", "/v1/completions", "", &asked.to_string())
        };
        for seed in 0..3 {
            let (status, body) = ask(form(json!({"type": "string", "pattern": "(a"})), seed);
            assert_eq!(status, 400, "{parallel}: {body}");
            let (status, body) = ask(form(sure.clone()), seed);
            assert_eq!(status, 200, "{parallel}: {body}");
            let answer: Value = serde_json::from_str(&body).expect("JSON");
            for choice in answer["choices"].as_array().expect("a list") {
                let text = choice["text"].as_str().expect("a text");
                let value: Value =
                    serde_json::from_str(text).unwrap_or_else(|error| panic!("{parallel}: {error}: {text}"));
                assert!(value["sure"].is_boolean(), "{parallel}: {text}");
            }
        }
        together.signal("TERM");
        together.wait().expect(0);
    }
}

fn kill_last_rank(together: &Running) {
    signal("-KILL", &last_rank(together));
}

/// The number of the last rank's process.
fn last_rank(together: &Running) -> String {
    let ranks = Command::new("pgrep").args(["-P", &together.pid().to_string()]).output().expect("pgrep");
    let ranks = String::from_utf8_lossy(&ranks.stdout).into_owned();
    ranks.split_whitespace().last().expect("ranks").to_owned()
}

fn signal(name: &str, process: &str) {
    assert!(Command::new("kill").args([name, process]).status().expect("kill").success());
}

/// The status of an answer. `None`: nobody listens, or the connection ends without one.
pub(crate) fn status(address: &str, method: &str, path: &str, body: &str) -> Option<u16> {
    let mut socket = TcpStream::connect(address).ok()?;
    socket.set_read_timeout(Some(DEADLINE)).ok()?;
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}");
    write!(socket, "{head}\r\n\r\n{body}").ok()?;
    let mut answer = Vec::new();
    // What came before the connection was reset counts.
    let _ = socket.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).split(' ').nth(1)?.parse().ok()
}

/// From the loss of a rank on a client sees 503 or a closed port, and 200 again once all ranks are there.
#[test]
fn a_server_without_all_of_its_ranks_is_not_healthy() {
    let port = free_port().to_string();
    let launch = ["launch", "-n", "3", "--max-restarts", "1", "--"];
    let serve = ["serve", BASE, "--port", &port, "--device", "cpu"];
    let mut together = start(&mut in_repository(&[&launch[..], &serve].concat()));
    let at = address(&mut together, 1);
    let want = answer(&at, 1);
    let health = || status(&at, "GET", "/health", "");
    assert_eq!(health(), Some(200));
    kill_last_rank(&together);
    let killed = Instant::now();
    while health() == Some(200) {
        assert!(killed.elapsed() < DEADLINE, "the loss is not seen");
        std::thread::sleep(Duration::from_millis(5));
    }
    let question = json!({"prompt": "Hello", "max_tokens": 4}).to_string();
    loop {
        let is_announced = together.stdout().matches("Ctrl-C stops").count() >= 2;
        match health() {
            None | Some(503) => assert!(!is_announced, "the server says that it serves"),
            Some(200) => break,
            other => panic!("{other:?}"),
        }
        // Requests are refused as well. Between the two questions all may be there again.
        let asked = status(&at, "POST", "/v1/completions", &question);
        assert!(matches!(asked, None | Some(200 | 503)), "{asked:?}");
        assert!(asked != Some(200) || health() == Some(200), "an answer of a server that is not healthy");
        assert!(killed.elapsed() < DEADLINE, "nobody serves again");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(address(&mut together, 2), at, "all were started again");
    assert_eq!(answer(&at, 1), want);
    together.signal("TERM");
    together.wait().expect(0).says("starting all ranks again (restart 1 of 1)");
}

/// Four answers to one prompt are on three ranks at once. The last rank ends while it receives.
#[test]
fn a_lost_rank_ends_all_answers_under_way() {
    let serve = ["launch", "-n", "3", "--", "serve", BASE, "--port", "0", "--device", "cpu"];
    let mut together = start(in_repository(&serve).env("FINETUNE_FAILPOINT", "hops.receive:400@2"));
    let at = address(&mut together, 1);
    let ask_for = |tokens: usize| {
        // Without the end token.
        let asked =
            json!({"prompt": "Hello, Leon", "n": 4, "max_tokens": tokens, "seed": 3, "logit_bias": {"0": -100}});
        ask(&at, "POST", "/v1/completions", "", &asked.to_string())
    };
    let (status, body) = ask_for(8);
    assert_eq!(status, 200, "{body}");
    let (_, metrics) = ask(&at, "GET", "/metrics", "", "");
    assert!(metrics.lines().any(|line| line == "finetune_passes_at_once_max 3"), "{metrics}");
    let (status, body) = ask_for(400);
    assert!(status >= 500 && body.contains("error"), "{status} {body}");
    together.wait().expect(3);
}

/// A long answer: nearly all of the positions that the base has, without the end token.
fn long_answer() -> String {
    json!({"prompt": "Hello", "max_tokens": 480, "temperature": 1, "seed": 3, "logit_bias": {"0": -100}}).to_string()
}

/// Waits until an answer is under way.
pub(crate) fn wait_for_tokens(address: &str) {
    let began = Instant::now();
    let tokens = |metrics: &str| {
        let line = metrics.lines().find_map(|line| line.strip_prefix("finetune_answer_tokens_total "));
        line.and_then(|count| count.parse::<u64>().ok()).expect("a count")
    };
    while tokens(&ask(address, "GET", "/metrics", "", "").1) == 0 {
        assert!(began.elapsed() < DEADLINE, "no token comes");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A server that is told to stop answers what is under way, and all of its ranks end in good order.
#[test]
fn an_answer_under_way_comes_to_its_end() {
    for parallel in ["stages", "tensor"] {
        let ranks = if parallel == "tensor" { "2" } else { "3" };
        let launch = ["launch", "-n", ranks, "--parallel", parallel, "--"];
        let serve = ["serve", BASE, "--port", "0", "--device", "cpu", "--grace", "100"];
        let mut together = start(&mut in_repository(&[&launch[..], &serve].concat()));
        let at = address(&mut together, 1);
        std::thread::scope(|scope| {
            let client = scope.spawn(|| ask(&at, "POST", "/v1/completions", "", &long_answer()));
            wait_for_tokens(&at);
            together.signal("TERM");
            let (status, body) = client.join().expect("no panic");
            assert_eq!(status, 200, "{parallel}: {body}");
            let answer: Value = serde_json::from_str(&body).expect("JSON");
            assert_eq!(answer["usage"]["completion_tokens"], 480, "{parallel}: {body}");
        });
        let ended = together.wait().expect(0);
        assert!(!ended.stderr.contains("lost"), "{parallel}: {}", ended.stderr);
    }
}

/// A rank that is frozen says nothing any more, and its connections stay. The others notice the silence.
#[test]
fn a_frozen_rank_ends_all_answers() {
    std::thread::scope(|scope| {
        for parallel in ["stages", "tensor"] {
            scope.spawn(move || {
                let serve = [
                    "launch",
                    "-n",
                    "2",
                    "--parallel",
                    parallel,
                    "--",
                    "serve",
                    BASE,
                    "--port",
                    "0",
                    "--device",
                    "cpu",
                ];
                let mut together = start(&mut in_repository(&serve));
                let at = address(&mut together, 1);
                let last = last_rank(&together);
                std::thread::scope(|scope| {
                    let client = scope.spawn(|| ask(&at, "POST", "/v1/completions", "", &long_answer()));
                    wait_for_tokens(&at);
                    signal("-STOP", &last);
                    let (status, body) = client.join().expect("no panic");
                    assert!(status >= 500 && body.contains("error"), "{parallel}: {status} {body}");
                });
                let ended = together.wait().expect(3).says("did not answer any more and was ended");
                assert!(!ended.stderr.contains("--resume"), "a server resumes nothing: {}", ended.stderr);
            });
        }
    });
}

/// (how, where a rank ends in the middle of an answer, whether it is the one that has the client)
#[test]
fn whichever_rank_is_lost_the_answer_ends() {
    for (parallel, failpoint, has_client) in [
        ("tensor", "hops.receive:400@1", false),
        ("tensor", "hops.send:400@0", true),
        ("stages", "hops.send:400@0", true),
    ] {
        let serve =
            ["launch", "-n", "2", "--parallel", parallel, "--", "serve", BASE, "--port", "0", "--device", "cpu"];
        let mut together = start(in_repository(&serve).env("FINETUNE_FAILPOINT", failpoint));
        let at = address(&mut together, 1);
        let answered = status(&at, "POST", "/v1/completions", &long_answer());
        // The connections of a process end with it.
        let is_meant = if has_client { answered.is_none() } else { matches!(answered, Some(500 | 503)) };
        assert!(is_meant, "{parallel} {failpoint}: {answered:?}");
        together.wait().expect(3);
    }
}

/// (words, what the refusal says)
#[test]
fn what_ranks_cannot_do_together_is_refused() {
    for (words, says) in [
        (&["-n", "5", "--", "generate", BASE, "--prompt", "Hi"][..], "the model has 4 layers, fewer than 5 stages"),
        (&["-n", "5", "--", "generate", BASE, "--prompt", "Hi"], "take fewer ranks"),
        (&["-n", "2", "--", "generate", BASE], "--prompt"),
        (&["-n", "2", "--", "serve", BASE, "--slots", "0", "--port", "0"], "--slots must be 1 or more"),
        (
            &["-n", "3", "--parallel", "tensor", "--", "generate", BASE, "--prompt", "Hi"],
            "--parallel tensor: 4 query heads with 2 key/value heads do not split over 3 ranks; 2 or 4 do",
        ),
        (
            &[
                "-n",
                "4",
                "--parallel",
                "tensor",
                "--",
                "generate",
                BASE,
                "--device",
                "cpu",
                "--quantization",
                "mlx4",
                "--prompt",
                "Hi",
            ],
            "model.layers.0.self_attn.o_proj.weight cannot be split over ranks: columns 0 to 31 would cut groups of 64",
        ),
        (
            &["-n", "2", "--parallel", "tensor", "recipes/quickstart.toml"],
            "--parallel is for `-- generate` and `-- serve`",
        ),
    ] {
        run(&mut in_repository(&[&["launch"], words].concat())).expect(2).says(says);
    }
}
