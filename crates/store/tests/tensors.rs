//! safetensors files that others can read, shards, and models that cannot be opened.
#![expect(clippy::disallowed_methods, reason = "a test writes bad files")]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use finetune_advice::Advice as _;
use finetune_store::{
    Dtype, FileDigest, Header, RealDisk, Staging, StoreError, TensorFile, TensorSet, TensorSpec, content_hash,
    encode_tensors, has_header, hex, keep_header, missing_shards, verify_directory, write_shards,
};
use serde_json::json;

#[expect(clippy::type_complexity, reason = "as encode_tensors takes it")]
fn three_tensors() -> Vec<(String, Dtype, Vec<usize>, Cow<'static, [u8]>)> {
    vec![
        ("z.weight".to_string(), Dtype::F32, vec![2, 3], vec![1; 24].into()),
        ("a.weight".to_string(), Dtype::BF16, vec![5], vec![2; 10].into()),
        ("empty".to_string(), Dtype::I64, vec![0, 4], vec![].into()),
    ]
}

fn metadata() -> BTreeMap<String, String> {
    [("format", "pt"), ("by", "finetune"), ("a", "\"quoted\"\n")]
        .map(|(key, value)| (key.to_string(), value.to_string()))
        .into()
}

#[test]
fn what_we_write_is_deterministic_and_others_read_it() {
    let bytes = encode_tensors(&three_tensors(), &metadata()).unwrap();
    assert_eq!(bytes, encode_tensors(&three_tensors(), &metadata()).unwrap());
    let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(reference.tensor("a.weight").unwrap().data(), [2; 10]);
    let (header_length, read) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header_length % 8, 0);
    assert_eq!(read.metadata().clone().unwrap().into_iter().collect::<BTreeMap<_, _>>(), metadata());

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    fs::write(&path, &bytes).unwrap();
    let ours = TensorFile::open(&path).unwrap();
    assert_eq!(ours.names().collect::<Vec<_>>(), ["z.weight", "a.weight", "empty"]);
    assert_eq!(ours.metadata(), &metadata());
    let view = ours.get("z.weight").unwrap();
    assert_eq!((view.dtype, view.shape, view.bytes().unwrap()), (Dtype::F32, &[2, 3][..], vec![1; 24]));
    assert!(ours.get("b").is_none());
    assert_eq!(hex(&content_hash(&path).unwrap()), blake3::hash(&bytes).to_hex().as_str());
    let before = ours.header_hash();
    drop(ours);
    let mut other = bytes.clone();
    *other.last_mut().unwrap() ^= 1;
    fs::write(&path, &other).unwrap();
    assert_eq!(TensorFile::open(&path).unwrap().header_hash(), before);
}

#[test]
fn what_the_reference_writes_we_read() {
    let view = |dtype, shape: &[usize], data: &'static [u8]| {
        safetensors::tensor::TensorView::new(dtype, shape.to_vec(), data).unwrap()
    };
    use safetensors::Dtype::{BF16, F8_E4M3, F32, I64, U8};
    let tensors = [
        ("a", view(U8, &[3], &[1; 3])),
        ("b", view(F32, &[1, 2], &[2; 8])),
        ("c", view(BF16, &[2], &[3; 4])),
        ("d", view(I64, &[], &[4; 8])),
        ("e", view(F8_E4M3, &[2, 2], &[5; 4])),
    ];
    let bytes = safetensors::serialize(tensors.clone(), None).unwrap();
    let header = Header::parse(&bytes).unwrap();
    assert_eq!(header.tensors.len(), tensors.len());
    for (name, view) in tensors {
        let ours = header.get(name).unwrap();
        assert_eq!((ours.dtype.name(), &ours.shape[..]), (&*view.dtype().to_string(), view.shape()));
        let start = header.data_start;
        assert_eq!(&bytes[start + ours.begin..start + ours.end], view.data());
    }
}

#[test]
fn tensors_that_cannot_be_written_are_refused() {
    let tensor =
        |name: &str, shape: Vec<usize>, bytes: usize| (name.to_string(), Dtype::F32, shape, Cow::from(vec![0; bytes]));
    for tensors in [
        vec![tensor("a", vec![2], 7)],
        vec![tensor("a", vec![2], 8), tensor("a", vec![2], 8)],
        vec![tensor("__metadata__", vec![2], 8)],
        vec![tensor("a", vec![usize::MAX], 8)],
    ] {
        let error = encode_tensors(&tensors, &BTreeMap::new()).unwrap_err();
        assert!(matches!(error, StoreError::CannotWrite { .. }), "{error}");
    }
    assert_eq!(encode_tensors(&[], &BTreeMap::new()).unwrap(), b"\x08\0\0\0\0\0\0\0{}      ");
}

fn shard(directory: &Path, max_shard_bytes: u64) -> Vec<String> {
    let tensors = three_tensors();
    let specs: Vec<_> = tensors
        .iter()
        .map(|(name, dtype, shape, _)| TensorSpec { name: name.clone(), dtype: *dtype, shape: shape.clone() })
        .collect();
    let mut asked = Vec::new();
    let names = write_shards(&RealDisk, directory, &specs, &metadata(), max_shard_bytes, |position| {
        asked.push(position);
        Ok::<_, StoreError>(tensors[position].3.to_vec())
    })
    .unwrap();
    assert_eq!(asked, [0, 1, 2]);
    names
}

#[test]
fn shards_and_their_index_are_read_again() {
    for (max_shard_bytes, files) in [(0, 3), (1, 3), (10, 2), (33, 2), (34, 1), (1 << 30, 1)] {
        let directory = tempfile::tempdir().unwrap();
        let names = shard(directory.path(), max_shard_bytes);
        let set = TensorSet::open_model(directory.path()).unwrap();
        assert_eq!(set.files().len(), files, "{max_shard_bytes}: {names:?}");
        assert_eq!(set.names().collect::<Vec<_>>(), ["z.weight", "a.weight", "empty"]);
        for (name, dtype, shape, bytes) in three_tensors() {
            let view = set.get(&name).unwrap();
            assert_eq!((view.dtype, view.shape, view.bytes().unwrap()), (dtype, &shape[..], bytes.to_vec()));
        }
        if files == 1 {
            assert_eq!(names, ["model.safetensors"]);
            let whole = encode_tensors(&three_tensors(), &metadata()).unwrap();
            assert_eq!(fs::read(&set.files()[0]).unwrap(), whole);
            continue;
        }
        let index = fs::read(directory.path().join("model.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        assert_eq!(index["metadata"]["total_size"], json!(34));
        let first = format!("model-00001-of-{files:05}.safetensors");
        assert_eq!(index["weight_map"]["z.weight"], json!(first));

        // The digest is of all bytes of all files.
        let digest = set.digest().unwrap();
        assert_eq!(digest, TensorSet::open_model(directory.path()).unwrap().digest().unwrap());
        drop(set);
        let path = directory.path().join(&first);
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_ne!(digest, TensorSet::open_model(directory.path()).unwrap().digest().unwrap());
    }
}

/// In the Hugging Face cache the header of a shard says what is in it. Hosts with different shards have the digest
/// of the whole together.
#[test]
fn a_shard_that_is_not_here_is_known_by_its_header() {
    const SECOND: &str = "model-00002-of-00002.safetensors";
    let cache = tempfile::tempdir().unwrap();
    let snapshot = cache.path().join("models--acme--tiny/snapshots/c0ffee");
    fs::create_dir_all(&snapshot).unwrap();
    shard(&snapshot, 24);
    let whole = TensorSet::open_model(&snapshot).unwrap();
    let (digest, files) = (whole.digest().unwrap(), whole.file_digests(&|_| true).unwrap());
    assert_eq!(FileDigest::of_all(&files), Some(digest));
    let one = whole.file_digests(&|name| name == SECOND).unwrap();
    assert_eq!((one[0].content.as_ref(), &one[1]), (None, &files[1]));
    let bytes = fs::read(snapshot.join(SECOND)).unwrap();
    let (header, length) = (TensorFile::open(&snapshot.join(SECOND)).unwrap().header_hash(), bytes.len() as u64);
    fs::remove_file(snapshot.join(SECOND)).unwrap();
    assert_eq!(missing_shards(&snapshot), [SECOND]);
    let error = TensorSet::open_model(&snapshot).unwrap_err();
    assert!(error.to_string().ends_with("00002.safetensors is not here; it holds a, empty"), "{error}");
    assert!(error.hints()[0].contains("finetune download acme/tiny@c0ffee"), "{:?}", error.hints());

    // (what came of the file, its length): all that is no header is refused.
    for (start, length) in [(&bytes[..9], length), (&bytes[..], length - 1), (&b"{}"[..], 2)] {
        assert!(keep_header(&snapshot, SECOND, start, length).is_err() && !has_header(&snapshot, SECOND), "{length}");
    }
    keep_header(&snapshot, SECOND, &bytes[..bytes.len() - 4], length).unwrap();
    assert!(has_header(&snapshot, SECOND) && missing_shards(&snapshot) == [SECOND]);
    let set = TensorSet::open_model(&snapshot).unwrap();
    assert_eq!(set.names().collect::<Vec<_>>(), ["z.weight", "a.weight", "empty"]);
    assert_eq!(set.get("z.weight").unwrap().bytes().unwrap(), [1; 24]);
    let absent = set.get("a.weight").unwrap();
    assert_eq!((absent.shape, absent.dtype, absent.is_here()), (&[5][..], Dtype::BF16, false));
    for error in [absent.bytes().unwrap_err(), set.digest().unwrap_err()] {
        assert!(matches!(error, StoreError::NoShard { .. }), "{error}");
    }
    let here = set.file_digests(&|_| true).unwrap();
    assert_eq!((&here[0], here[1].content.as_ref(), &here[1].header), (&files[0], None, &hex(&header)));
    assert_eq!((&here[1].name, here[1].length, FileDigest::of_all(&here)), (&files[1].name, length, None));
}

#[test]
fn a_staged_model_becomes_visible_as_a_whole() {
    let directory = tempfile::tempdir().unwrap();
    let mut staging = Staging::begin(&RealDisk, directory.path(), "merged").unwrap();
    for name in shard(staging.directory(), 10) {
        staging.record(&name).unwrap();
    }
    staging.write("config.json", b"{}").unwrap();
    assert!(!directory.path().join("merged").exists());
    let path = staging.publish(&json!({"kind": "model"})).unwrap();
    assert_eq!(verify_directory(&RealDisk, &path).unwrap().files.len(), 4);
    TensorSet::open_model(&path).unwrap();
    // A staging that is dropped leaves nothing.
    let mut staging = Staging::begin(&RealDisk, directory.path(), "other").unwrap();
    staging.write("config.json", b"{}").unwrap();
    drop(staging);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

/// Tensors that are handed over one by one make the bytes of the whole file, and the manifest knows their hash.
#[test]
fn tensors_written_one_by_one_make_the_same_file() {
    let directory = tempfile::tempdir().unwrap();
    let mut tensors = three_tensors();
    // Larger than what is written together.
    tensors.insert(1, ("large".to_string(), Dtype::F32, vec![3 << 20], vec![7; 12 << 20].into()));
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, dtype, shape, _)| TensorSpec { name: name.clone(), dtype: *dtype, shape: shape.clone() })
        .collect();
    let mut staging = Staging::begin(&RealDisk, directory.path(), "step-000001").unwrap();
    let produce = |n: usize| Ok::<_, StoreError>(tensors[n].3.to_vec());
    staging.write_tensors("adapter.safetensors", &specs, &metadata(), produce).unwrap();
    let short = |_: usize| Ok::<_, StoreError>(vec![0; 3]);
    let error = staging.write_tensors("other.safetensors", &specs, &metadata(), short).unwrap_err();
    assert!(error.to_string().contains("was given 3 bytes"), "{error}");
    let path = staging.publish(&json!({"kind": "checkpoint"})).unwrap();
    assert_eq!(verify_directory(&RealDisk, &path).unwrap().files.len(), 1);
    let whole = encode_tensors(&tensors, &metadata()).unwrap();
    assert!(fs::read(path.join("adapter.safetensors")).unwrap() == whole, "other bytes");
}

#[test]
fn bad_indexes_and_absent_models_are_explained() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let refused = || TensorSet::open_model(path).unwrap_err();
    assert!(refused().to_string().contains("it has nothing"), "{}", refused());
    fs::write(path.join("pytorch_model.bin"), "pickle").unwrap();
    assert!(refused().to_string().contains("pytorch_model.bin"));
    assert!(refused().hints()[0].contains("pickle"));
    fs::remove_file(path.join("pytorch_model.bin")).unwrap();

    shard(path, 24);
    let index = path.join("model.safetensors.index.json");
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let good = json!({"z.weight": first, "a.weight": second, "empty": second});
    let mut missing = good.clone();
    missing["more"] = json!(second);
    let mut outside = good.clone();
    outside["more"] = json!("../model.safetensors");
    let mut absent = good.clone();
    absent["more"] = json!("model-00003-of-00002.safetensors");
    fs::remove_file(&index).unwrap();
    assert!(refused().hints()[0].contains("fetch model.safetensors.index.json"), "{:?}", refused().hints());
    for (map, reason) in [
        (missing, "more"),
        (outside, "index.json is malformed: it names the file \"../model.safetensors\""),
        (absent, "model-00003"),
        (json!({}), "empty"),
        (json!([]), "malformed"),
    ] {
        fs::write(&index, json!({"weight_map": map}).to_string()).unwrap();
        assert!(refused().to_string().contains(reason), "{reason}: {}", refused());
    }
    fs::write(&index, r#"{"weight_map": {"a": "b", "a": "c"}}"#).unwrap();
    assert!(refused().to_string().contains("comes twice"));
    fs::write(&index, "\u{FEFF}{}").unwrap();
    assert!(refused().to_string().contains("byte order mark"));
    fs::write(&index, "{").unwrap();
    assert!(refused().to_string().contains("malformed"));
    fs::write(&index, json!({"weight_map": good}).to_string()).unwrap();
    TensorSet::open_model(path).unwrap();
}

/// (what the index says, tensors that it leaves out): as in transformers, the tensors of the shards
/// count.
#[test]
fn an_index_that_errs_about_its_shards_is_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    shard(path, 24);
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    for (map, unlisted) in [
        (json!({"z.weight": first, "a.weight": second, "empty": second}), vec![]),
        (json!({"z.weight": first, "a.weight": second}), vec!["empty"]),
        (json!({"z.weight": second, "a.weight": first, "empty": first}), vec![]),
        (json!({"z.weight": first, "empty": second}), vec!["a.weight"]),
    ] {
        let text = json!({"weight_map": map}).to_string();
        fs::write(path.join("model.safetensors.index.json"), &text).unwrap();
        let set = TensorSet::open_model(path).unwrap();
        assert_eq!(set.unlisted(), unlisted, "{text}");
        assert_eq!(set.names().collect::<Vec<_>>(), ["z.weight", "a.weight", "empty"], "{text}");
        assert_eq!(set.get("a.weight").unwrap().bytes().unwrap(), [2; 10], "{text}");
    }
}

/// A tensor in two shards: the index decides. If it lists neither, the model is refused.
#[test]
fn a_tensor_in_two_shards_is_the_one_that_the_index_has() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    for (name, value) in [("one.safetensors", 1_u8), ("two.safetensors", 2)] {
        let own = (value.to_string(), Dtype::U8, vec![1], Cow::from(vec![value]));
        let shared = ("both".to_string(), Dtype::U8, vec![2], Cow::from(vec![value; 2]));
        fs::write(path.join(name), encode_tensors(&[own, shared], &BTreeMap::new()).unwrap()).unwrap();
    }
    let index = path.join("model.safetensors.index.json");
    let text = json!({"weight_map": {"1": "one.safetensors", "2": "two.safetensors", "both": "two.safetensors"}});
    fs::write(&index, text.to_string()).unwrap();
    let set = TensorSet::open_model(path).unwrap();
    assert_eq!(set.get("both").unwrap().bytes().unwrap(), [2, 2]);
    assert_eq!(set.names().filter(|name| *name == "both").count(), 1);
    fs::write(&index, r#"{"weight_map": {"1": "one.safetensors", "2": "two.safetensors"}}"#).unwrap();
    let error = TensorSet::open_model(path).unwrap_err();
    assert!(error.to_string().contains("\"both\" is in another shard too"), "{error}");
}

#[test]
fn what_is_no_safetensors_file_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 9\n", "0".repeat(64));
    for (bytes, what, hint) in [
        (pointer.as_bytes(), "a git-lfs pointer", "git lfs pull"),
        (b"<!doctype html><html><body>Sign in</body></html>".as_slice(), "a web page", "hf auth login"),
        (b"\x80\x02}q\0.".as_slice(), "a pickle", "safetensors"),
        (b"Entry not found".as_slice(), "an answer of the hub", "fetch the file again"),
    ] {
        fs::write(&path, bytes).unwrap();
        let error = TensorSet::open_model(directory.path()).unwrap_err();
        assert!(matches!(error, StoreError::InItsPlace { .. }) && error.to_string().contains(what), "{error}");
        assert!(error.to_string().contains("model.safetensors") && error.hints()[0].contains(hint), "{error}");
    }
}

/// A file that is cut after it was opened: an error that names it, where a map would have ended the
/// process.
#[test]
fn a_file_that_gets_shorter_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    fs::write(&path, encode_tensors(&three_tensors(), &metadata()).unwrap()).unwrap();
    let set = TensorSet::open_model(directory.path()).unwrap();
    let view = set.get("z.weight").unwrap();
    assert_eq!(view.bytes().unwrap(), [1; 24]);
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(280).unwrap();
    let pieces = view.pieces(|_| Ok::<_, StoreError>(()));
    for error in [view.bytes().unwrap_err(), pieces.unwrap_err(), set.digest().unwrap_err()] {
        assert!(error.to_string().contains("model.safetensors was changed while it was in use"), "{error}");
        assert!(error.to_string().contains("and has 280 now"), "{error}");
        assert!(error.hints()[0].contains("--resume") && !error.is_disk());
    }
}
