//! Downloads of files that lie in Xet storage, as the hub says of most weights: they come by plain HTTP all the same.

mod loopback;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use finetune_advice::Advice;
use finetune_hub::{Fault as Whose, Hub, HubError, Kind, Need, Patience, Snapshot};
use finetune_store::{Dtype, HubId, encode_tensors, missing_shards};
use loopback::{Fault, Loopback, Store, What, Xet};

const SHARD: &str = "model-00001-of-00001.safetensors";

/// A file of weights that differ everywhere.
fn shard() -> Vec<u8> {
    let weights: Vec<u8> = (0..300_000).map(|n| (n * 31 + n / 251) as u8).collect();
    let tensor = ("model.layers.0.t0.weight".to_owned(), Dtype::U8, vec![weights.len()], Cow::from(weights));
    encode_tensors(&[tensor], &BTreeMap::new()).expect("a shard")
}

/// A hub with one model, whose weights lie in Xet storage, and an empty cache.
fn world(xet: Xet) -> (Loopback, tempfile::TempDir) {
    let mut store = Store::default();
    let index = br#"{"weight_map": {"model.layers.0.t0.weight": "model-00001-of-00001.safetensors"}}"#;
    let files: [(&str, &[u8]); 4] =
        [("config.json", b"{}"), ("tokenizer.json", b"{}"), ("model.safetensors.index.json", index), (SHARD, &shard())];
    store.add("models", "acme/tiny", &files);
    let server = Loopback::start(store);
    server.state().xet = xet;
    (server, tempfile::tempdir().expect("a directory"))
}

fn hub(server: &Loopback, cache: &Path) -> Hub {
    Hub::new(cache.to_owned(), &server.endpoint(), None, Patience::default())
}

fn resolve(hub: &Hub, need: &Need) -> Result<Snapshot, HubError> {
    hub.resolve(&HubId::parse("acme/tiny").expect("an id"), need, None, &|_| {})
}

/// A header alone, then the file: its beginning, and the rest behind a cut.
#[test]
fn a_file_of_xet_storage_comes_by_plain_http() {
    let (server, cache) = world(Xet::Redirect);
    let hub = hub(&server, cache.path());
    let headers = resolve(&hub, &Need::Headers).expect("headers");
    assert_eq!(missing_shards(&headers.directory), [SHARD]);
    server.plan(Fault::get("/lfs/", What::Cut(100_000)).times(1));
    let whole = resolve(&hub, &Need::Model).expect("a snapshot");
    assert_eq!(std::fs::read(whole.directory.join(SHARD)).expect("a file"), shard());
    let ranges: Vec<String> = server.state().seen.iter().filter_map(|seen| seen.range.clone()).collect();
    let rest = format!("bytes=100000-{}", shard().len() - 1);
    assert!(ranges.contains(&"bytes=0-262143".to_owned()) && ranges.contains(&rest), "{ranges:?}");
    assert_eq!(server.count("GET", "xet-read-token"), 0, "nothing is asked of Xet");
}

/// Where the answer with the file names its Xet hash, the client goes there. A mirror without Xet is told apart from a
/// model that does not exist.
#[test]
fn a_mirror_that_has_no_xet_storage_is_named() {
    let (server, cache) = world(Xet::File);
    let download = hub(&server, cache.path()).download(
        Kind::Model,
        &HubId::parse("acme/tiny").expect("an id"),
        &Need::Model,
        &|_| {},
    );
    let error = download.expect_err("no storage");
    let says = "a file lies in Xet storage, and the token to read it there is refused (status 404)";
    assert!(error.to_string().ends_with(says), "{error}");
    assert!(error.hints()[0].contains("HF_ENDPOINT"), "{:?}", error.hints());
    assert_eq!(error.fault(), Whose::Input);
}
