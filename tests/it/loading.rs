//! `finetune launch -- serve` loads and unloads adapters while it runs: each rank its own part, and all of them or none.

use std::time::Instant;

use serde_json::{Value, json};

use crate::commands::serve::ask;
use crate::folder::Folder;
use crate::program::{DEADLINE, Running, start};
use crate::together::{BASE, address, in_repository, status, train, wait_for_tokens};

const LOAD: &str = "/v1/load_lora_adapter";
const UNLOAD: &str = "/v1/unload_lora_adapter";
const TEXT: &str = "/v1/completions";

/// How ranks hold the base.
const WAYS: [&[&str]; 2] = [&["launch", "-n", "3", "--"], &["launch", "-n", "2", "--parallel", "tensor", "--"]];

/// A directory with an adapter in `trained`.
fn adapters() -> Folder {
    let folder = Folder::empty();
    train(&folder.path("trained"));
    folder
}

/// A server that loads adapters from this directory, and where it is.
fn serve(launch: &[&str], adapters: &Folder, more: &[&str], failpoint: Option<&str>) -> (Running, String) {
    let directory = adapters.path("");
    let directory = directory.to_str().expect("a path of letters");
    let serve = ["serve", BASE, "--port", "0", "--device", "cpu", "--adapters-dir", directory];
    let mut command = in_repository(&[launch, &serve, more].concat());
    let mut running = start(command.envs(failpoint.map(|failpoint| ("FINETUNE_FAILPOINT", failpoint))));
    let at = address(&mut running, 1);
    (running, at)
}

fn stop(server: Running) {
    server.signal("TERM");
    server.wait().expect(0);
}

fn adapter(name: &str, path: &str) -> String {
    json!({"lora_name": name, "lora_path": path}).to_string()
}

/// The status, and what a model says, with the tokens of the prompt that were known, or what is wrong.
fn said(at: &str, model: &str) -> (u16, Value) {
    let prompt = "Hello, my name is Leon. ".repeat(20);
    let asked = json!({"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0});
    let (status, body) = ask(at, "POST", TEXT, "", &asked.to_string());
    let answer: Value = serde_json::from_str(&body).expect("JSON");
    (status, json!([answer["choices"], answer["usage"], answer["error"]]))
}

/// One process and several ranks are asked for the same. What is known of earlier prompts shows in the answers.
#[test]
fn ranks_load_and_unload_as_one_process_does() {
    let folder = adapters();
    let (alone, alone_at) = serve(&[], &folder, &[], None);
    let steps: [(&str, &str, u16); 16] = [
        ("say", "x", 404),
        ("load", "x", 200),
        ("say", "base", 200),
        ("say", "x", 200),
        ("say", "base", 200),
        ("say", "x", 200),
        // It is there already.
        ("load", "x", 400),
        ("unload", "x", 200),
        ("say", "x", 404),
        ("unload", "x", 404),
        ("say", "base", 200),
        ("load", "x", 200),
        ("say", "x", 200),
        ("load", "y", 200),
        ("say", "y", 200),
        ("unload", "base", 400),
    ];
    let work = |at: &str| -> Vec<(u16, Value)> {
        let post = |path: &str, body: &str| (ask(at, "POST", path, "", body).0, Value::Null);
        let done = steps.map(|(what, name, _)| match what {
            "load" => post(LOAD, &adapter(name, "trained")),
            "unload" => post(UNLOAD, &adapter(name, "")),
            _ => said(at, name),
        });
        done.into()
    };
    let want = work(&alone_at);
    stop(alone);
    assert_eq!(want.iter().map(|(status, _)| *status).collect::<Vec<_>>(), steps.map(|(.., status)| status));
    let (of_base, of_adapter) = (&want[2].1, &want[3].1);
    assert_ne!(of_base[0], of_adapter[0], "the adapter changes something");
    assert_ne!(want[5].1[1], of_adapter[1], "the second time its prompt is known");
    assert_eq!(&want[12].1, of_adapter, "loaded again it says the same, and knows nothing of the prompt");
    for launch in WAYS {
        let (together, at) = serve(launch, &folder, &[], None);
        let got = work(&at);
        for ((step, got), want) in steps.iter().zip(got).zip(&want) {
            assert_eq!(&got, want, "{launch:?} {step:?}");
        }
        stop(together);
    }
}

/// A request that has named an adapter before is answered by it.
#[test]
fn an_answer_goes_on_when_its_adapter_is_unloaded() {
    let folder = adapters();
    for launch in WAYS {
        let (together, at) = serve(launch, &folder, &[], None);
        let post = |path: &str, body: &str| ask(&at, "POST", path, "", body).0;
        assert_eq!(post(LOAD, &adapter("x", "trained")), 200);
        std::thread::scope(|scope| {
            let client = scope.spawn(|| {
                // Without the end token.
                let asked = json!({"model": "x", "prompt": "Hello", "max_tokens": 480, "logit_bias": {"0": -100}});
                ask(&at, "POST", TEXT, "", &asked.to_string())
            });
            wait_for_tokens(&at);
            assert_eq!(post(UNLOAD, &adapter("x", "")), 200);
            assert!(!client.is_finished(), "the answer is under way");
            assert_eq!(said(&at, "x").0, 404, "{launch:?}");
            // Another one of this name, beside it.
            assert_eq!(post(LOAD, &adapter("x", "trained")), 200);
            assert_eq!(said(&at, "x").0, 200, "{launch:?}");
            let (status, body) = client.join().expect("no panic");
            let answer: Value = serde_json::from_str(&body).expect("JSON");
            assert_eq!((status, &answer["usage"]["completion_tokens"]), (200, &json!(480)), "{launch:?}: {body}");
        });
        assert_eq!((said(&at, "base").0, said(&at, "x").0), (200, 200), "{launch:?}");
        stop(together);
    }
}

fn names_a_rank(body: &str) -> bool {
    body.contains("rank 1 (") || body.contains("rank 2 (")
}

/// Holds these ranks up when they come to their first adapter, until [`go_on`].
fn hold_up(ranks: &str, folder: &Folder) -> String {
    format!("adapter.load@{ranks}+{}", folder.path("go").display())
}

fn go_on(folder: &Folder) {
    folder.write("go", b"");
}

/// Asks for the adapter `x`, and changes the directory once the first rank has read it, before the others may.
fn changed_meanwhile(together: &mut Running, at: &str, folder: &Folder, change: impl Fn()) -> (u16, String) {
    std::thread::scope(|scope| {
        let client = scope.spawn(|| ask(at, "POST", LOAD, "", &adapter("x", "trained")));
        together.wait_until("the first rank's", |running| running.stderr().contains("the adapter x is loaded from"));
        change();
        go_on(folder);
        client.join().expect("no panic")
    })
}

/// The first rank has an adapter that is gone when the others, held up, come to it. The client hears which rank lacks it,
/// no rank keeps it, and the server goes on.
#[test]
fn an_adapter_that_one_rank_lacks_is_loaded_by_none() {
    for launch in WAYS {
        let folder = adapters();
        let (mut together, at) = serve(launch, &folder, &[], Some(&hold_up("1,2", &folder)));
        let before = said(&at, "base");
        let missing = ask(&at, "POST", LOAD, "", &adapter("x", "nowhere"));
        assert_eq!(missing.0, 400, "{}", missing.1);
        let (status, body) = changed_meanwhile(&mut together, &at, &folder, || {
            std::fs::rename(folder.path("trained"), folder.path("away")).expect("a directory of ours");
        });
        assert_eq!(status, 400, "{launch:?}: {body}");
        assert!(names_a_rank(&body) && body.contains("there is no such directory"), "{launch:?}: {body}");
        assert_eq!((said(&at, "x").0, said(&at, "base").1[0] == before.1[0]), (404, true), "{launch:?}");
        std::fs::rename(folder.path("away"), folder.path("trained")).expect("a directory of ours");
        assert_eq!(ask(&at, "POST", LOAD, "", &adapter("x", "trained")).0, 200, "{launch:?}");
        assert_eq!(said(&at, "x").0, 200, "{launch:?}");
        stop(together);
    }
}

/// On one host another adapter lies at the same path. Here it changes before the others read it.
#[test]
fn an_adapter_that_is_another_one_on_a_rank_is_loaded_by_none() {
    let folder = adapters();
    let (mut together, at) = serve(WAYS[0], &folder, &[], Some(&hold_up("1,2", &folder)));
    let (status, body) = changed_meanwhile(&mut together, &at, &folder, || {
        let file = folder.path("trained/adapter/adapter_config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&file).expect("a file")).expect("JSON");
        config["lora_alpha"] = json!(7);
        std::fs::write(&file, config.to_string()).expect("a file of ours");
    });
    assert_eq!(status, 400, "{body}");
    assert!(names_a_rank(&body) && body.contains("not that of the first rank"), "{body}");
    assert_eq!(said(&at, "x").0, 404);
    assert_eq!(ask(&at, "POST", LOAD, "", &adapter("x", "trained")).0, 200);
    assert_eq!(said(&at, "x").0, 200);
    stop(together);
}

/// A rank whose disk does not answer: the client hears of it within `--max-wait`, and answers go on meanwhile.
#[test]
fn nobody_waits_for_ever_for_a_rank_that_loads() {
    let folder = adapters();
    // Time enough for the other ranks, also on a busy machine.
    let (together, at) = serve(WAYS[0], &folder, &["--max-wait", "8"], Some(&hold_up("1", &folder)));
    let load = || ask(&at, "POST", LOAD, "", &adapter("x", "trained"));
    let (status, body) = load();
    assert_eq!(status, 503, "{body}");
    assert!(body.contains("not loaded within 8 s by rank 1 (") && !body.contains("rank 2"), "{body}");
    assert_eq!((said(&at, "base").0, said(&at, "x").0), (200, 404));
    go_on(&folder);
    let began = Instant::now();
    while load().0 != 200 {
        assert!(began.elapsed() < DEADLINE, "it is never loaded");
    }
    assert_eq!(said(&at, "x").0, 200);
    stop(together);
}

#[test]
fn a_rank_that_is_lost_while_it_loads_ends_the_server() {
    let folder = adapters();
    for launch in WAYS {
        let (together, at) = serve(launch, &folder, &[], Some("adapter.load@1"));
        let answered = status(&at, "POST", LOAD, &adapter("x", "trained"));
        assert!(matches!(answered, None | Some(500 | 503)), "{launch:?}: {answered:?}");
        together.wait().expect(3);
    }
}
