//! Downloads from a hub on loopback: what is fetched, where it lies, and every way to go wrong.

#![allow(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]

mod loopback;

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use finetune_advice::Advice;
use finetune_hub::{DatasetName, Fault as Whose, Hub, HubError, Kind, Need, News, Patience, Snapshot};
use finetune_store::{Dtype, HubId, TensorSet, encode_tensors, missing_shards};
use loopback::{Access, Fault, Loopback, Store, What, sha256};

const PATIENT: Patience = Patience {
    silence: Duration::from_secs(60),
    pause: Duration::from_millis(2),
    tries: 3,
    longest_pause: Duration::from_secs(2),
    held: Duration::from_secs(60),
};

/// For a hub or another process that says nothing.
const HASTY: Patience = Patience { silence: Duration::from_secs(2), held: Duration::from_secs(2), ..PATIENT };

/// Weights that differ everywhere.
fn weights(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|n| (n * 31 + n / 251) as u8).collect()
}

/// A hub with one model, and an empty cache.
fn world() -> (Loopback, tempfile::TempDir) {
    let mut store = Store::default();
    let weights = weights(300_000);
    store.add(
        "models",
        "acme/tiny",
        &[
            ("config.json", b"{}"),
            ("tokenizer.json", b"{\"a\": 1}"),
            ("model.safetensors", &weights),
            ("README.md", b"# tiny"),
            ("pytorch_model.bin", b"pickle"),
            ("empty.txt", b""),
        ],
    );
    (Loopback::start(store), tempfile::tempdir().expect("a directory"))
}

fn hub(server: &Loopback, cache: &Path) -> Hub {
    Hub::new(cache.to_owned(), &server.endpoint(), None, PATIENT)
}

fn id(text: &str) -> HubId {
    HubId::parse(text).expect("an id")
}

fn fetch(hub: &Hub, text: &str) -> Result<Snapshot, HubError> {
    hub.download(Kind::Model, &id(text), &Need::Model, &|_| {})
}

#[track_caller]
fn read(snapshot: &Snapshot, name: &str) -> Vec<u8> {
    std::fs::read(snapshot.directory.join(name)).expect("a file of the snapshot")
}

#[test]
fn a_model_comes_once_and_lies_where_others_look_for_it() {
    let (server, cache) = world();
    let hub = hub(&server, cache.path());
    let snapshot = fetch(&hub, "acme/tiny").expect("a snapshot");
    assert_eq!(snapshot.files, ["config.json", "README.md", "tokenizer.json", "model.safetensors"]);
    assert_eq!(read(&snapshot, "model.safetensors"), weights(300_000));
    assert!(!snapshot.directory.join("pytorch_model.bin").exists(), "only what is needed");
    let root = cache.path().join("models--acme--tiny");
    assert_eq!(snapshot.directory, root.join("snapshots").join(&snapshot.commit));
    assert_eq!(std::fs::read_to_string(root.join("refs/main")).expect("a ref"), snapshot.commit);
    let target = std::fs::read_link(snapshot.directory.join("model.safetensors")).expect("a link");
    assert_eq!(target, Path::new("../../blobs").join(sha256(&weights(300_000))));
    assert_eq!(id("acme/tiny").snapshot_in(cache.path()), Some(snapshot.directory.clone()));

    server.forget();
    let again = fetch(&hub, "acme/tiny").expect("a snapshot");
    assert_eq!((again.fetched, &again.directory), (0, &snapshot.directory));
    assert_eq!(server.count("GET", "/resolve/") + server.count("GET", "/lfs/"), 0, "nothing is fetched twice");
    server.forget();
    let resolved = hub.resolve(&id("acme/tiny"), &Need::Model, None, &|_| {}).expect("a snapshot");
    assert_eq!(resolved.commit, snapshot.commit);
    assert_eq!(server.state().seen.len(), 0, "what is complete is used without asking");
    let everything = hub.download(Kind::Model, &id("acme/tiny"), &Need::All, &|_| {}).expect("all of it");
    assert_eq!(read(&everything, "empty.txt"), b"");
    let some = Need::Files(vec!["*.bin".to_owned()]);
    assert_eq!(
        hub.download(Kind::Model, &id("acme/tiny"), &some, &|_| {}).expect("a file").files,
        ["pytorch_model.bin"]
    );
}

/// A new commit with the same weights fetches what is new.
#[test]
fn a_branch_that_moved_is_noticed() {
    let (server, cache) = world();
    let hub = hub(&server, cache.path());
    let first = fetch(&hub, "acme/tiny").expect("a snapshot");
    let weights = weights(300_000);
    let files: [(&str, &[u8]); 3] =
        [("config.json", &b"{\"new\": 1}"[..]), ("tokenizer.json", b"{}"), ("model.safetensors", &weights)];
    let second = server.state().store.add("models", "acme/tiny", &files);
    server.forget();
    // The branch is asked for only by a download; the first commit is still there.
    assert_eq!(hub.resolve(&id("acme/tiny"), &Need::Model, None, &|_| {}).expect("cached").commit, first.commit);
    let snapshot = fetch(&hub, "acme/tiny").expect("a snapshot");
    assert_eq!((&snapshot.commit, snapshot.moved_from.as_ref()), (&second, Some(&first.commit)));
    assert_eq!(server.count("GET", "/lfs/"), 0, "the weights are here already");
    assert_eq!(read(&snapshot, "config.json"), b"{\"new\": 1}");
    let old = hub.resolve(&id(&format!("acme/tiny@{}", first.commit)), &Need::Model, None, &|_| {}).expect("cached");
    assert_eq!(read(&old, "config.json"), b"{}");
    // Several ranks agree on a commit, and each host records what main is.
    let other = tempfile::tempdir().expect("a directory");
    let elsewhere = Hub::new(other.path().to_owned(), &server.endpoint(), None, PATIENT);
    let pinned = elsewhere.pin(&id("acme/tiny"), &Need::Model, &|_| {}).expect("a commit");
    let resolved = elsewhere.resolve(&id("acme/tiny"), &Need::Model, Some(&first.commit), &|_| {}).expect("a snapshot");
    assert_eq!((pinned, resolved.commit), (second, first.commit));
}

#[test]
fn a_cut_connection_goes_on_where_it_was() {
    for (what, name) in [
        (What::Cut(100_000), "cut"),
        (What::Stall(100_000, Duration::from_secs(30)), "silent"),
        (What::Status(503, vec![], "busy"), "503"),
        (What::Status(429, vec![("Retry-After", "0".to_owned())], "slow down"), "429"),
    ] {
        let (server, cache) = world();
        let hub = Hub::new(cache.path().to_owned(), &server.endpoint(), None, HASTY);
        server.plan(Fault::get("/lfs/", what).times(2));
        let news = RefCell::new(Vec::new());
        let snapshot = hub.download(Kind::Model, &id("acme/tiny"), &Need::Model, &|event| {
            if let News::Again { name, why, .. } = event {
                news.borrow_mut().push(format!("{name}: {why}"));
            }
        });
        assert_eq!(read(&snapshot.expect(name), "model.safetensors"), weights(300_000), "{name}");
        let ranges: Vec<_> = server.state().seen.iter().filter_map(|seen| seen.range.clone()).collect();
        if ["cut", "silent"].contains(&name) {
            assert!(ranges.contains(&"bytes=100000-299999".to_owned()), "{name}: {ranges:?}");
            assert_eq!(news.borrow().len(), 2, "{name}: {news:?}");
        }
    }
}

/// What one process has fetched, the next one does not fetch again.
#[test]
fn an_interrupted_download_is_resumed_by_the_next_process() {
    let (server, cache) = world();
    server.plan(Fault::get("/lfs/", What::Cut(60_000)).times(1));
    server.plan(Fault::get("/lfs/", What::Cut(0)));
    let error = fetch(&hub(&server, cache.path()), "acme/tiny").expect_err("no more bytes");
    assert_eq!(error.fault(), Whose::Network);
    let text = error.to_string();
    assert!(text.starts_with("model.safetensors came as far as 58.6 KiB of 293.0 KiB and no further"), "{text}");
    assert!(error.hints()[0].contains("goes on"), "{:?}", error.hints());
    assert!(!cache.path().join("models--acme--tiny/refs/main").exists(), "no branch stands for half a snapshot");
    assert_eq!(hub(&server, cache.path()).cached(&id("acme/tiny"), &Need::Model), None);
    server.forget();
    let begin = RefCell::new(None);
    let snapshot = hub(&server, cache.path()).download(Kind::Model, &id("acme/tiny"), &Need::Model, &|event| {
        if let News::Begin { bytes, present, .. } = event {
            *begin.borrow_mut() = Some((bytes, present));
        }
    });
    let snapshot = snapshot.expect("the rest");
    assert_eq!(read(&snapshot, "model.safetensors"), weights(300_000));
    assert_eq!(begin.into_inner(), Some((300_000, 60_000)));
    assert_eq!(snapshot.fetched, 240_000);
}

/// Bytes are those of the listing, or there is no file.
#[test]
fn other_bytes_than_the_listed_ones_get_no_name() {
    for (what, message) in [
        (What::Corrupt, "model.safetensors is not the file that the hub lists: its hash is another one"),
        (What::Longer(7), "model.safetensors is not the file that the hub lists: more than its 300000 bytes came"),
    ] {
        let (server, cache) = world();
        server.plan(Fault::get("/lfs/", what.clone()));
        let error = fetch(&hub(&server, cache.path()), "acme/tiny").expect_err("other bytes");
        assert_eq!((error.to_string().as_str(), error.fault()), (message, Whose::Network));
        assert!(!cache.path().join(format!("models--acme--tiny/blobs/{}", sha256(&weights(300_000)))).exists());
        // Once is forgiven.
        server.forget();
        server.plan(Fault::get("/lfs/", what).times(1));
        let snapshot = fetch(&hub(&server, cache.path()), "acme/tiny").expect("the second try");
        assert_eq!(read(&snapshot, "model.safetensors"), weights(300_000));
    }
    // A small file too, and a rest that another program has left.
    let (server, cache) = world();
    server.plan(Fault::get("config.json", What::Corrupt));
    let error = fetch(&hub(&server, cache.path()), "acme/tiny").expect_err("other bytes");
    assert!(error.to_string().starts_with("config.json is not the file that the hub lists"), "{error}");
    server.forget();
    let blobs = cache.path().join("models--acme--tiny/blobs");
    let mut rests = std::fs::read_dir(&blobs).expect("blobs").filter_map(Result::ok);
    let rest = rests.find(|entry| entry.file_name().to_string_lossy().ends_with(".incomplete")).expect("a rest");
    std::fs::write(rest.path(), b"x").expect("a file");
    assert!(fetch(&hub(&server, cache.path()), "acme/tiny").is_ok());
}

/// The files of a commit do not change under way, whatever becomes of the branch.
#[test]
fn a_branch_that_moves_under_way_changes_nothing() {
    let (server, cache) = world();
    let first = server.state().store.repository("models", "acme/tiny").refs["main"].clone();
    let hub = hub(&server, cache.path());
    let moved = Cell::new(false);
    let snapshot = hub.download(Kind::Model, &id("acme/tiny"), &Need::Model, &|event| {
        if matches!(event, News::Done { .. }) && !moved.replace(true) {
            server.state().store.add("models", "acme/tiny", &[("config.json", b"new"), ("model.safetensors", b"new")]);
        }
    });
    let snapshot = snapshot.expect("a snapshot");
    assert_eq!((snapshot.commit.clone(), read(&snapshot, "model.safetensors")), (first, weights(300_000)));
}

#[test]
fn a_server_without_ranges_sends_it_all_again() {
    let (server, cache) = world();
    server.plan(Fault::get("/lfs/", What::Cut(100_000)).times(1));
    server.plan(Fault::get("/lfs/", What::NoRange));
    let snapshot = fetch(&hub(&server, cache.path()), "acme/tiny").expect("a snapshot");
    assert_eq!(read(&snapshot, "model.safetensors"), weights(300_000));
}

/// Who may not: what is said, and what to do.
#[test]
fn refusals_say_what_to_do() {
    let (server, cache) = world();
    {
        let store = &mut server.state().store;
        store.token = Some("hf_secret".to_owned());
        store.stranger = Some("hf_stranger".to_owned());
        for (name, access) in [("acme/gated", Access::Gated), ("acme/private", Access::Private)] {
            store.add(
                "models",
                name,
                &[("config.json", b"{}"), ("tokenizer.json", b"{}"), ("model.safetensors", b"w")],
            );
            store.repository("models", name).access = access;
        }
        store.add("models", "acme/pickle", &[("config.json", b"{}"), ("pytorch_model.bin", b"p")]);
    }
    let with =
        |token: Option<&str>| Hub::new(cache.path().to_owned(), &server.endpoint(), token.map(str::to_owned), PATIENT);
    let page = format!("{}/acme/gated", server.endpoint());
    for (token, name, message, hint) in [
        (None, "acme/none", "the hub has no model acme/none, or does not show it to everyone", "hf auth login"),
        (
            Some("hf_secret"),
            "acme/none",
            "the hub has no model acme/none, or does not show it to this token",
            "spelling",
        ),
        (None, "acme/private", "the hub has no model acme/private, or does not show it to everyone", "hf auth login"),
        (None, "acme/gated", "acme/gated is gated: its owner wants people to agree to conditions first", page.as_str()),
        (Some("hf_stranger"), "acme/gated", "acme/gated is gated", page.as_str()),
        (Some("hf_wrong"), "acme/tiny", "the hub does not accept the token (Invalid credentials", "hf auth login"),
        (None, "acme/tiny@v9", "acme/tiny has no revision v9", "leave the revision out"),
        (None, "acme/pickle", "acme/pickle has its weights as pytorch_model.bin, and none as safetensors", "pickles"),
    ] {
        let error = fetch(&with(token), name).expect_err(name);
        let (text, hints) = (error.to_string(), error.hints().join("\n"));
        assert!(text.starts_with(message), "{name}: {text}");
        assert!(hints.contains(hint), "{name}: {hints}");
        assert_eq!(error.fault(), Whose::Input, "{name}");
        assert!(!format!("{text}{hints}{error:?}").contains("hf_"), "{name}: a token is shown: {error:?}");
    }
    for name in ["acme/gated", "acme/private"] {
        fetch(&with(Some("hf_secret")), name).expect("who is let in gets it");
    }
    let to_storage =
        server.state().seen.iter().filter(|seen| seen.target.starts_with("/lfs/") && seen.has_token).count();
    assert_eq!(to_storage, 0, "the token stays between us and the hub");
}

#[test]
fn a_hub_that_fails_or_is_not_there() {
    let (server, cache) = world();
    for (what, message) in [
        (What::Status(500, vec![], "oops"), "the hub answers with 500 (oops)"),
        (
            What::Status(429, vec![("Retry-After", "99".to_owned())], ""),
            "the hub limits how often it is asked and asks to wait 99 s",
        ),
        (What::Stall(0, Duration::from_secs(30)), "the hub at"),
    ] {
        server.forget();
        server.plan(Fault::get("/api/models", what));
        let start = Instant::now();
        let error =
            fetch(&Hub::new(cache.path().to_owned(), &server.endpoint(), None, HASTY), "acme/tiny").expect_err(message);
        assert!(error.to_string().starts_with(message), "{error}");
        assert_eq!(error.fault(), Whose::Network, "{error}");
        assert!(start.elapsed() < Duration::from_secs(60), "{message}: {:?}", start.elapsed());
    }
    // The page of a network that wants people to log in.
    server.forget();
    server.plan(Fault::get("/api/models", What::Status(200, vec![], "log in first")));
    let error = fetch(&hub(&server, cache.path()), "acme/tiny").expect_err("no answer of a hub");
    assert!(error.to_string().starts_with("the hub's answer about acme/tiny cannot be used: "), "{error}");
    assert_eq!(error.fault(), Whose::Input, "{error}");
    server.forget();
    let nobody = Hub::new(cache.path().to_owned(), "http://127.0.0.1:9", None, PATIENT);
    let error = fetch(&nobody, "acme/tiny").expect_err("nobody there");
    assert!(error.to_string().starts_with("the hub at http://127.0.0.1:9 cannot be reached: "), "{error}");
    assert_eq!(error.fault(), Whose::Network);
    let no_hub = Hub::new(cache.path().to_owned(), "nonsense", None, PATIENT);
    assert_eq!(fetch(&no_hub, "acme/tiny").expect_err("no address").fault(), Whose::Input);
}

/// A passing failure is not even noticed.
#[test]
fn what_passes_is_tried_again() {
    let (server, cache) = world();
    for on in ["/api/models/acme/tiny/revision", "/tree/", "config.json"] {
        server.plan(Fault::get(on, What::Status(502, vec![], "")).times(4));
    }
    fetch(&hub(&server, cache.path()), "acme/tiny").expect("a snapshot");
}

#[test]
fn offline_asks_nobody() {
    let (server, cache) = world();
    let offline = || hub(&server, cache.path()).offline();
    let error = offline().resolve(&id("acme/tiny"), &Need::Model, None, &|_| {}).expect_err("not here");
    assert!(error.to_string().ends_with("and HF_HUB_OFFLINE forbids to fetch it"), "{error}");
    assert!(error.hints()[0].contains("finetune download acme/tiny"), "{:?}", error.hints());
    assert_eq!((error.fault(), server.state().seen.len()), (Whose::Input, 0));
    let snapshot = fetch(&hub(&server, cache.path()), "acme/tiny").expect("a snapshot");
    server.forget();
    let cached = offline().resolve(&id("acme/tiny"), &Need::Model, None, &|_| {}).expect("it is here");
    assert_eq!((cached.directory, server.state().seen.len()), (snapshot.directory, 0));
}

#[test]
fn shards_long_listings_names_of_today_and_the_same_bytes_twice() {
    let (server, cache) = world();
    let index = br#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "odd.safetensors"}}"#;
    let [one, two] = [weights(5000), weights(7000)];
    {
        let mut state = server.state();
        state.page = 2;
        let files: &[(&str, &[u8])] = &[
            ("config.json", b"{}"),
            ("tokenizer.json", b"{}"),
            ("model.safetensors.index.json", index),
            ("model-00001-of-00002.safetensors", &one),
            ("odd.safetensors", &two),
            ("other.safetensors", b"x"),
            ("vocab.json", b"{}"),
        ];
        state.store.add("models", "acme/sharded", files);
        state.store.moved.insert("acme/old".to_owned(), "acme/sharded".to_owned());
    }
    let snapshot = fetch(&hub(&server, cache.path()), "acme/old").expect("a snapshot");
    assert_eq!(read(&snapshot, "odd.safetensors"), two);
    assert_eq!(read(&snapshot, "vocab.json"), b"{}");
    assert!(!snapshot.directory.join("other.safetensors").exists());
}

/// A file of weights with so many tensors of a layer, of so many bytes each.
fn shard(layer: usize, tensors: usize, bytes: usize) -> Vec<u8> {
    let tensor = |n| (format!("model.layers.{layer}.t{n}.weight"), Dtype::U8, vec![bytes], Cow::from(weights(bytes)));
    encode_tensors(&(0..tensors).map(tensor).collect::<Vec<_>>(), &BTreeMap::new()).expect("a shard")
}

/// The headers say what is in which file of weights. Then the files come one by one.
#[test]
fn headers_come_without_their_files() {
    const NAMES: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let (server, cache) = world();
    // The first one's header is larger than what is asked for at once.
    let shards = [shard(0, 4000, 100), shard(1, 1, 700_000)];
    let index = br#"{"weight_map": {"model.layers.0.t0.weight": "model-00001-of-00002.safetensors",
        "model.layers.1.t0.weight": "model-00002-of-00002.safetensors"}}"#;
    let files: [(&str, &[u8]); 5] = [
        ("config.json", b"{}"),
        ("tokenizer.json", b"{}"),
        ("model.safetensors.index.json", index),
        (NAMES[0], &shards[0]),
        (NAMES[1], &shards[1]),
    ];
    server.state().store.add("models", "acme/split", &files);
    server.plan(Fault::get("/lfs/", What::NoRange).times(1));
    let (online, id) = (hub(&server, cache.path()), id("acme/split"));
    let resolve = |hub: &Hub, need: &Need| hub.resolve(&id, need, None, &|_| {});
    let snapshot = resolve(&online, &Need::Headers).expect("headers");
    let directory = &snapshot.directory;
    assert_eq!(missing_shards(directory), NAMES, "only whole files lie in a snapshot");
    let ranges: Vec<bool> = server
        .state()
        .seen
        .iter()
        .filter(|seen| seen.method == "GET" && seen.target.starts_with("/lfs/"))
        .map(|seen| seen.range.is_some())
        .collect();
    assert_eq!(ranges, [true; 3]);
    let set = TensorSet::open_model(directory).expect("headers");
    assert_eq!(set.names().count(), 4001);
    let error = set.get("model.layers.1.t0.weight").expect("a tensor").bytes().expect_err("it is not here");
    assert!(error.to_string().ends_with("model-00002-of-00002.safetensors is not here; it holds layer 1"), "{error}");

    let second = Need::Shards(vec![NAMES[1].to_owned()]);
    let fetched = resolve(&online, &second).expect("a file");
    assert_eq!((fetched.fetched, missing_shards(directory)), (shards[1].len() as u64, vec![NAMES[0].to_owned()]));
    assert_eq!(read(&fetched, NAMES[1]), shards[1]);
    // What is here is used without a network, and what is not is named.
    let offline = hub(&server, cache.path()).offline();
    for need in [&Need::Headers, &second] {
        assert_eq!(resolve(&offline, need).expect("it is here").commit, snapshot.commit);
    }
    for need in [Need::Model, Need::Shards(NAMES.map(str::to_owned).to_vec())] {
        let error = resolve(&offline, &need).expect_err("one is missing");
        let says = "model-00001-of-00002.safetensors is not here; it holds layer 0";
        assert!(error.to_string().ends_with(says), "{error}");
        let hint = format!("`HF_HUB_OFFLINE=0 finetune download acme/split@{}`", snapshot.commit);
        assert!(error.hints()[0].contains(&hint), "{:?}", error.hints());
        assert_eq!(error.fault(), Whose::Input);
    }
    let whole = resolve(&online, &Need::Model).expect("the rest");
    assert_eq!((whole.fetched, read(&whole, NAMES[0])), (shards[0].len() as u64, shards[0].clone()));
}

/// Two at a time: one fetches, the other waits and has it.
#[test]
fn two_processes_fetch_once() {
    let (server, cache) = world();
    server.plan(Fault::get("/lfs/", What::Slow(100_000, Duration::from_secs(1))).times(1));
    let endpoint = server.endpoint();
    let one = || {
        let hub = Hub::new(cache.path().to_owned(), &endpoint, None, PATIENT);
        let waited = RefCell::new(false);
        let snapshot = hub.download(Kind::Model, &id("acme/tiny"), &Need::Model, &|event| {
            if let News::Waiting { .. } = event {
                *waited.borrow_mut() = true;
            }
        });
        (snapshot.expect("a snapshot").fetched, waited.into_inner())
    };
    let (a, b) = std::thread::scope(|scope| {
        let a = scope.spawn(one);
        let b = scope.spawn(one);
        (a.join().expect("no panic"), b.join().expect("no panic"))
    });
    let mut both = [a, b];
    both.sort();
    assert_eq!((both[0].0, both[0].1), (0, true), "{both:?}");
    assert_eq!(server.count("GET", "/lfs/"), 1);
    // Someone who holds it and does nothing is not waited for without end.
    let lock = std::fs::File::open(cache.path().join(".locks/models--acme--tiny/finetune.lock")).expect("the lock");
    lock.lock().expect("the lock");
    std::fs::remove_dir_all(cache.path().join("models--acme--tiny")).expect("it is there");
    let error = fetch(&Hub::new(cache.path().to_owned(), &server.endpoint(), None, HASTY), "acme/tiny")
        .expect_err("it is held");
    assert!(error.to_string().starts_with("another process fetches acme/tiny"), "{error}");
}

#[test]
fn rows_of_a_dataset() {
    let (server, cache) = world();
    {
        let store = &mut server.state().store;
        store.add(
            "datasets",
            "acme/rows",
            &[("README.md", b"#"), ("data/train.jsonl", b"{}\n"), ("data/test.csv", b"a\n1\n")],
        );
        store.add("datasets", "acme/big", &[("train.csv", b"a\n1\n")]);
        let parquet = [("default/train/0000.parquet".to_owned(), b"PAR1".to_vec())];
        store.repository("datasets", "acme/big").commit("refs/convert/parquet", parquet.into());
    }
    let online = hub(&server, cache.path());
    let names = |hub: &Hub, text: &str| -> Vec<String> {
        let files = hub.dataset_files(&DatasetName::parse(text).expect("a name"), &|_| {}).expect(text);
        files.paths.iter().map(|path| std::fs::read_to_string(path).expect("a file")).collect()
    };
    assert_eq!(names(&online, "hf://acme/rows/train"), ["{}\n"]);
    assert_eq!(names(&online, "hf://acme/rows/test"), ["a\n1\n"]);
    assert_eq!(names(&online, "hf://acme/big/train"), ["PAR1"]);
    assert_eq!(names(&online, "hf://acme/big@main/train"), ["a\n1\n"]);
    server.forget();
    let offline = hub(&server, cache.path()).offline();
    assert_eq!(names(&offline, "hf://acme/big/train"), ["PAR1"]);
    assert_eq!(server.state().seen.len(), 0);
    let error = online.dataset_files(&DatasetName::parse("hf://acme/rows/dev").expect("a name"), &|_| {});
    let text = error.expect_err("no such split").to_string();
    assert!(text.contains("it has README.md, data/test.csv, data/train.jsonl"), "{text}");
}
