//! `finetune launch -- generate` and `-- serve`: ranks that hold the layers of one model together give the tokens of
//! one process.

use std::process::Command;

use serde_json::{Value, json};

use crate::commands::serve::ask;
use crate::folder::repository;
use crate::program::{Running, finetune, run, start};

const BASE: &str = "datasets/quickstart/base";

fn in_repository(arguments: &[&str]) -> Command {
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
fn address(running: &mut Running, nth: usize) -> String {
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

/// Several clients at once, on one process and on three ranks. A rank is killed, and all start again.
#[test]
fn ranks_serve_what_one_process_does() {
    let serve = ["serve", BASE, "--port", "0", "--device", "cpu"];
    let mut alone = start(&mut in_repository(&serve));
    let alone_at = address(&mut alone, 1);
    let want: Vec<Value> = (0..6).map(|n| answer(&alone_at, n)).collect();
    let launch = ["launch", "-n", "3", "--max-restarts", "2", "--"];
    let mut together = start(&mut in_repository(&[&launch[..], &serve].concat()));
    let first_at = address(&mut together, 1);
    let all_at_once = |address: &str| -> Vec<Value> {
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..6).map(|n| scope.spawn(move || answer(address, n))).collect();
            clients.into_iter().map(|client| client.join().expect("no panic")).collect()
        })
    };
    assert_eq!(all_at_once(&first_at), want);
    let (status, body) = ask(&first_at, "POST", "/v1/load_lora_adapter", "", r#"{"lora_name": "a", "lora_path": "b"}"#);
    assert!(status >= 400, "{body}");
    let ranks = Command::new("pgrep").args(["-P", &together.pid().to_string()]).output().expect("pgrep");
    let ranks = String::from_utf8_lossy(&ranks.stdout).into_owned();
    let last = ranks.split_whitespace().last().expect("ranks");
    assert!(Command::new("kill").args(["-KILL", last]).status().expect("kill").success());
    let again_at = address(&mut together, 2);
    assert_eq!(all_at_once(&again_at), want);
    together.signal("TERM");
    together.wait().says("starting all ranks again (restart 1 of 2)");
}

/// (words, what the refusal says)
#[test]
fn what_ranks_cannot_do_together_is_refused() {
    for (words, says) in [
        (&["-n", "5", "--", "generate", BASE, "--prompt", "Hi"][..], "the model has 4 layers, fewer than 5 stages"),
        (&["-n", "2", "--", "generate", BASE], "--prompt"),
        (&["-n", "2", "--", "serve", BASE, "--slots", "0", "--port", "0"], "--slots must be 1 or more"),
    ] {
        run(&mut in_repository(&[&["launch"], words].concat())).expect(2).says(says);
    }
}
