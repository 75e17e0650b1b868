//! `finetune serve` as a process: it says where it is, answers, and stops when it is asked to.

use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::folder::repository;
use crate::program::{DEADLINE, Running, finetune, run, start};

/// A server of the quickstart's base on the CPU, and its address.
fn serve(arguments: &[&str]) -> (Running, String) {
    serve_on("cpu", arguments)
}

/// The same on a device.
pub(crate) fn serve_on(device: &str, arguments: &[&str]) -> (Running, String) {
    let mut command = finetune(["serve", "datasets/quickstart/base", "--device", device]);
    started(command.args(arguments).current_dir(repository()))
}

/// The same of a model in a folder, on the CPU.
pub(crate) fn serve_in(folder: &Path, model: &str) -> (Running, String) {
    started(finetune(["serve", model, "--device", "cpu", "--port", "0"]).current_dir(folder))
}

fn started(command: &mut Command) -> (Running, String) {
    let mut running = start(command);
    running.wait_until("the address", |running| running.stdout().contains("Ctrl-C stops"));
    let said = running.stdout();
    let address = said.split("http://").nth(1).and_then(|rest| rest.split(' ').next()).expect("an address");
    (running, address.to_owned())
}

/// (status, body)
pub(crate) fn ask(address: &str, method: &str, path: &str, headers: &str, body: &str) -> (u16, String) {
    let mut socket = TcpStream::connect(address).expect("somebody listens");
    socket.set_read_timeout(Some(DEADLINE)).expect("a deadline");
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}");
    write!(socket, "{head}\r\n{headers}\r\n{body}").expect("asked");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, body.to_owned())
}

#[test]
fn a_server_answers_and_stops_at_a_signal() {
    for signal in ["TERM", "INT"] {
        let (running, address) = serve(&["--port", "0"]);
        assert!(running.stdout().starts_with("serving base at http://127.0.0.1:"), "{}", running.stdout());
        assert_eq!(ask(&address, "GET", "/health", "", "").0, 200);
        let asked = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0});
        let (status, body) = ask(&address, "POST", "/v1/chat/completions", "", &asked.to_string());
        let answer: Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!((status, &answer["model"]), (200, &json!("base")), "{body}");
        running.signal(signal);
        running.wait().expect(0).says("stopping");
    }
}

/// What `generate` says, the server says.
#[test]
fn a_text_is_that_of_generate() {
    let arguments = ["generate", "datasets/quickstart/base", "--raw", "--prompt", "Hello, Leon", "--json"];
    let settings = ["--temperature", "0.9", "--seed", "4", "--max-new-tokens", "12", "--device", "cpu"];
    let said = run(finetune(arguments).args(settings).current_dir(repository())).expect(0).json();
    let (_running, address) = serve(&["--port", "0"]);
    let asked = json!({"prompt": "Hello, Leon", "temperature": 0.9, "seed": 4, "max_tokens": 12});
    let (_, body) = ask(&address, "POST", "/v1/completions", "", &asked.to_string());
    let answer: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(answer["choices"][0]["text"], said["text"]);
}

#[test]
fn a_key_is_asked_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("key");
    std::fs::write(&file, "secret\n").expect("a file");
    for (mode, is_said) in [(0o644, true), (0o600, false)] {
        std::fs::set_permissions(&file, Permissions::from_mode(mode)).expect("a file of ours");
        let (running, address) = serve(&["--port", "0", "--api-key-file", &file.to_string_lossy()]);
        assert_eq!(ask(&address, "GET", "/v1/models", "", "").0, 401);
        assert_eq!(ask(&address, "GET", "/v1/models", "Authorization: Bearer secret\r\n", "").0, 200);
        running.signal("TERM");
        let ended = running.wait().expect(0);
        assert_eq!(ended.stderr.contains("can be read by others"), is_said, "{mode:o}: {}", ended.stderr);
    }
}

#[test]
fn what_cannot_be_served_is_refused() {
    let (_running, address) = serve(&["--port", "0"]);
    let port = address.rsplit(':').next().expect("a port");
    let folder = tempfile::tempdir().expect("a folder");
    let empty = folder.path().join("empty");
    std::fs::write(&empty, "\n").expect("a file");
    let empty = empty.to_string_lossy();
    for (arguments, says) in [
        (&["--port", port][..], "another program listens there"),
        (&["--host", "203.0.113.7", "--port", "0"], "--host takes an address of this machine"),
        (&["--slots", "0"], "--slots must be 1 or more"),
        (&["--adapters-dir", "nowhere"], "there is no such directory"),
        (&["--api-key-file", &empty], "its first line is no key"),
        (&["--adapter", "base=tests/goldens/models/llama/adapter"], "two models would have the id `base`"),
        (&["--adapter", "other"], "NAME=DIR"),
    ] {
        let command = ["serve", "datasets/quickstart/base"];
        run(finetune(command).args(arguments).current_dir(repository())).expect(2).says(says);
    }
}
