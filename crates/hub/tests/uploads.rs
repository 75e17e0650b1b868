//! Uploads to a hub on loopback.

#![allow(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]

mod loopback;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use finetune_hub::{Fault as Whose, Hub, HubError, News, Patience, Upload, Uploaded};
use loopback::{Access, Fault, Loopback, Store, What};

fn hub(server: &Loopback, token: Option<&str>) -> Hub {
    let patience = Patience { pause: Duration::from_millis(2), tries: 3, ..Patience::default() };
    Hub::new(PathBuf::from("/nowhere"), &server.endpoint(), token.map(str::to_owned), patience)
}

fn server() -> Loopback {
    let store =
        Store { token: Some("hf_tester".to_owned()), stranger: Some("hf_stranger".to_owned()), ..Store::default() };
    Loopback::start(store)
}

fn files(directory: &Path) -> Vec<(String, PathBuf)> {
    let all: [(&str, &[u8]); 3] = [
        ("adapter_config.json", &b"{\"r\": 4}"[..]),
        ("adapter_model.safetensors", &[7; 5000]),
        ("README.md", b"---\n---\n# x"),
    ];
    for (name, bytes) in all {
        std::fs::write(directory.join(name), bytes).expect("a file");
    }
    all.iter().map(|(name, _)| ((*name).to_owned(), directory.join(name))).collect()
}

fn send(hub: &Hub, repository: &str, branch: Option<&str>, directory: &Path) -> Result<Uploaded, HubError> {
    let upload = Upload {
        repository: repository.to_owned(),
        files: files(directory),
        card: None,
        private: true,
        branch: branch.map(str::to_owned),
        message: "an adapter".to_owned(),
    };
    hub.upload(&upload, &|_| {})
}

#[test]
fn an_adapter_arrives_as_it_is() {
    let (server, directory) = (server(), tempfile::tempdir().expect("a directory"));
    for (repository, branch) in [("tester/mine", None), ("mine", None), ("tester/mine", Some("v2"))] {
        let uploaded = send(&hub(&server, Some("hf_tester")), repository, branch, directory.path()).expect("an upload");
        assert_eq!(uploaded.page, format!("{}/tester/mine", server.endpoint()));
        let mut state = server.state();
        let there = state.store.repository("models", "tester/mine");
        assert_eq!(there.access, Access::Private);
        assert_eq!(there.resolve(branch.unwrap_or("main")), uploaded.commit.as_deref());
        let arrived = there.files(branch.unwrap_or("main"));
        for (name, path) in files(directory.path()) {
            assert_eq!(arrived[&name], std::fs::read(path).expect("a file"), "{name}");
        }
    }
}

#[test]
fn refusals_of_an_upload() {
    let (server, directory) = (server(), tempfile::tempdir().expect("a directory"));
    for (token, repository, message) in [
        (None, "tester/mine", "the hub wants to know who asks, and there is no token"),
        (Some("hf_stranger"), "tester/mine", "the hub forbids this for tester/mine (You don't have the rights"),
        (Some("hf_wrong"), "tester/mine", "the hub does not accept the token"),
        (Some("hf_tester"), "a/b/c", "\"a/b/c\" is no name of a repository on the hub"),
        (Some("hf_tester"), "tester/mine@v2", "\"tester/mine@v2\" is no name of a repository on the hub"),
    ] {
        let error = send(&hub(&server, token), repository, None, directory.path()).expect_err(message);
        assert!(error.to_string().starts_with(message), "{error}");
        assert_eq!(error.fault(), Whose::Input);
    }
    let offline = hub(&server, Some("hf_tester")).offline();
    let error = send(&offline, "tester/mine", None, directory.path()).expect_err("no network");
    assert_eq!(error.to_string(), "HF_HUB_OFFLINE forbids the network, and an upload needs it");
    server.plan(Fault::with("POST", "/commit/", What::Status(400, vec![], "Invalid metadata in README.md")));
    let error = send(&hub(&server, Some("hf_tester")), "tester/mine", None, directory.path()).expect_err("no commit");
    let message = "the hub refuses this for tester/mine (status 400: Invalid metadata in README.md)";
    assert_eq!(error.to_string(), message);
}

#[test]
fn passing_failures_are_tried_again() {
    let (server, directory) = (server(), tempfile::tempdir().expect("a directory"));
    server.plan(Fault::with("POST", "/api/repos/create", What::Status(503, vec![], "")).times(4));
    let news = RefCell::new(0);
    let upload = Upload {
        repository: "tester/mine".to_owned(),
        files: files(directory.path()),
        card: None,
        private: false,
        branch: None,
        message: "again".to_owned(),
    };
    let uploaded = hub(&server, Some("hf_tester")).upload(&upload, &|event| {
        *news.borrow_mut() += usize::from(matches!(event, News::Again { .. }));
    });
    uploaded.expect("an upload");
    assert_eq!(news.into_inner(), 1);
}
