//! C2: any changed byte, cut or missing file is found, and named.
#![expect(clippy::disallowed_methods, reason = "a test damages files")]

use std::fs;
use std::path::{Path, PathBuf};

use finetune_advice::Advice as _;
use finetune_store::{
    MANIFEST_NAME, Manifest, RealDisk, Staging, StoreError, ensure_directory, newest_verified, numbered,
    remove_directory, sweep, verify_directory,
};
use serde_json::json;

mod filled;

use filled::filled;

fn committed(parent: &Path, number: u64) -> PathBuf {
    let payload: Vec<u8> = (0..4096_u32).map(|i| (i * 31 + i / 256) as u8).collect();
    let staging = Staging::begin(&RealDisk, parent, &format!("step-{number:06}")).unwrap();
    let staging = filled(staging, &[("adapter.safetensors", &payload), ("note.txt", b"a short note")]).unwrap();
    staging.publish(&json!({"kind": "checkpoint", "step": number, "loss": 0.1})).unwrap()
}

/// Puts a directory of this kind with one file into the place of what is at `path`.
fn replace(path: &Path, kind: &str, bytes: &[u8]) -> Result<PathBuf, StoreError> {
    let staging = Staging::begin_replacing(&RealDisk, path, kind)?;
    filled(staging, &[("adapter_model.safetensors", bytes)])?.publish_replacing(&json!({"kind": kind}))
}

fn verify_error(path: &Path) -> StoreError {
    verify_directory(&RealDisk, path).expect_err("damage was not found")
}

#[test]
fn every_flipped_bit_of_a_manifest_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = committed(directory.path(), 1);
    verify_directory(&RealDisk, &path).unwrap();
    let manifest = path.join(MANIFEST_NAME);
    let good = fs::read(&manifest).unwrap();
    serde_json::from_slice::<serde_json::Value>(&good).expect("a manifest is plain JSON");
    for byte in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[byte] ^= 1 << bit;
            let error = Manifest::parse(&manifest, &bad).expect_err("a flipped bit was not found");
            assert!(error.to_string().contains(MANIFEST_NAME), "byte {byte}, bit {bit}: {error}");
        }
    }
    for length in 0..good.len() {
        Manifest::parse(&manifest, &good[..length]).expect_err("a cut was not found");
    }
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    fs::write(&manifest, &bad).unwrap();
    assert!(verify_error(&path).to_string().contains(MANIFEST_NAME));
    fs::write(&manifest, [&good[..], b" "].concat()).unwrap();
    verify_error(&path);
    fs::write(&manifest, vec![b' '; (1 << 20) + 1]).unwrap();
    assert!(verify_error(&path).to_string().contains("too long"));
}

#[test]
fn flipped_bits_and_cuts_of_files_are_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = committed(directory.path(), 1);
    let file = path.join("adapter.safetensors");
    let good = fs::read(&file).unwrap();
    let mut random = 1_u64;
    for _ in 0..2000 {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let bit = (random >> 33) as usize % (good.len() * 8);
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        fs::write(&file, &bad).unwrap();
        let message = verify_error(&path).to_string();
        assert!(message.contains("adapter.safetensors"), "bit {bit}: {message}");
    }
    for length in (0..good.len()).step_by(512).chain([good.len() - 1]) {
        fs::write(&file, &good[..length]).unwrap();
        let message = verify_error(&path).to_string();
        assert!(message.contains("adapter.safetensors has"), "{length}: {message}");
    }
    fs::remove_file(&file).unwrap();
    let error = verify_error(&path);
    assert!(error.to_string().contains("adapter.safetensors is missing"), "{error}");
    assert!(!error.is_disk() && !error.hints().is_empty());
    // A link to the right bytes is not the file that was written.
    #[cfg(unix)]
    {
        fs::write(directory.path().join("elsewhere"), &good).unwrap();
        std::os::unix::fs::symlink(directory.path().join("elsewhere"), &file).unwrap();
        verify_error(&path);
        fs::remove_file(&file).unwrap();
    }
    fs::write(&file, &good).unwrap();
    fs::write(path.join("extra"), "ignored").unwrap();
    verify_directory(&RealDisk, &path).unwrap();
}

#[test]
fn a_damaged_newest_is_reported_and_passed_over() {
    let directory = tempfile::tempdir().unwrap();
    let parent = directory.path().join("checkpoints");
    assert!(newest_verified(&RealDisk, &parent, "step-").unwrap().0.is_none());
    for number in [1, 2, 10] {
        committed(&parent, number);
    }
    fs::create_dir(parent.join("step-000099.tmp-1-0123456789abcdef0000")).unwrap();
    fs::create_dir(parent.join(".trash-step-000098-0123456789abcdef0001")).unwrap();
    fs::create_dir(parent.join("step-+97")).unwrap();
    fs::create_dir(parent.join("step-")).unwrap();
    fs::write(parent.join("step-000010").join("note.txt"), "A short note").unwrap();
    let (found, rejected) = newest_verified(&RealDisk, &parent, "step-").unwrap();
    let (number, path, manifest) = found.unwrap();
    assert_eq!((number, path), (2, parent.join("step-000002")));
    assert_eq!(manifest.field("loss"), Some(&json!(0.1)));
    assert_eq!(rejected.len(), 1);
    assert_eq!(rejected[0].path, parent.join("step-000010"));
    assert!(rejected[0].why.to_string().contains("note.txt"));
    let numbers: Vec<u64> = numbered(&RealDisk, &parent, "step-").unwrap().into_iter().map(|found| found.0).collect();
    assert_eq!(numbers, [1, 2, 10]);
    remove_directory(&RealDisk, &parent.join("step-000001")).unwrap();
    sweep(&RealDisk, &parent).unwrap();
    let mut names: Vec<_> = fs::read_dir(&parent).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["step-", "step-+97", "step-000002", "step-000010"]);
}

/// (name, what lies in it, whether it is swept away)
#[test]
fn only_marked_leftovers_are_swept() {
    let nonce = "0123456789abcdef0000";
    let unfinished = ".finetune-unfinished";
    let cases: [(String, &[&str], bool); 10] = [
        (format!("step-000009.tmp-4242-{nonce}"), &["adapter_model.safetensors", unfinished], true),
        (format!("step-000009.tmp-4242-{nonce}"), &["adapter_model.safetensors", MANIFEST_NAME], true),
        (format!("step-000009.tmp-4242-{nonce}"), &["thesis.txt"], false),
        (format!(".trash-step-000009-{nonce}"), &["adapter_model.safetensors", unfinished], true),
        (format!(".trash-mine-{nonce}"), &["thesis.txt"], false),
        (format!(".replaced-adapter-{nonce}"), &["thesis.txt"], false),
        (".trash-mine".to_owned(), &["thesis.txt", MANIFEST_NAME], false),
        (".replaced-mine-1".to_owned(), &["thesis.txt", MANIFEST_NAME], false),
        ("thesis.tmp-2024-11".to_owned(), &["thesis.txt"], false),
        ("thesis.tmp-2024-abc".to_owned(), &["thesis.txt", MANIFEST_NAME], false),
    ];
    for (name, files, gone) in cases {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(&name);
        fs::create_dir(&path).unwrap();
        for file in files {
            fs::write(path.join(file), "text").unwrap();
        }
        sweep(&RealDisk, directory.path()).unwrap();
        assert_eq!(!path.exists(), gone, "{name} {files:?}");
    }
    // Files of this program have 20 digits that nobody types.
    let directory = tempfile::tempdir().unwrap();
    for name in ["notes.tmp-2024-1", ".trash-notes", &format!("recipe.toml.tmp-1-{nonce}")] {
        fs::write(directory.path().join(name), "text").unwrap();
    }
    sweep(&RealDisk, directory.path()).unwrap();
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
}

/// What a killed export left goes at the next one to the same place; what one under way writes
/// stays.
#[test]
fn an_export_sweeps_beside_itself() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("merged");
    let nonce = "0123456789abcdef0000";
    let leftover = |name: &str| {
        let path = directory.path().join(format!("{name}.tmp-4242-{nonce}"));
        fs::create_dir(&path).unwrap();
        fs::write(path.join(".finetune-unfinished"), "").unwrap();
        fs::write(path.join("model.safetensors"), "half of it").unwrap();
        path
    };
    let (dead, of_another) = (leftover("merged"), leftover("other"));
    let mine = directory.path().join(format!("merged.tmp-1-{nonce}"));
    fs::create_dir(&mine).unwrap();
    fs::write(mine.join("thesis.txt"), "years of work").unwrap();
    let alive = Staging::begin_replacing(&RealDisk, &path, "merged").unwrap();
    assert!(!dead.exists() && of_another.exists() && mine.exists());
    let again = Staging::begin_replacing(&RealDisk, &path, "merged").unwrap();
    assert!(alive.directory().exists() && again.directory().exists());
    drop((alive, again));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
}

#[test]
fn only_an_earlier_one_of_the_same_kind_makes_way() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("step-000002");
    committed(directory.path(), 2);
    let error = replace(&path, "adapter", b"one").unwrap_err();
    assert!(matches!(error, StoreError::OtherKind { .. }), "{error}");
    assert!(error.to_string().contains("is a checkpoint of finetune"), "{error}");
    verify_directory(&RealDisk, &path).unwrap();
    replace(&path, "checkpoint", b"one").unwrap();
}

#[test]
fn what_cannot_be_committed_is_refused_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let parent = directory.path();
    let commit = |name: &str, files: &[&str], about: serde_json::Value| {
        let files: Vec<(&str, &[u8])> = files.iter().map(|name| (*name, b"x".as_slice())).collect();
        filled(Staging::begin(&RealDisk, parent, name)?, &files)?.publish(&about)
    };
    let about = || json!({"kind": "checkpoint"});
    for (name, files, about) in [
        ("../a", &["x"][..], about()),
        ("a", &["../x"], about()),
        ("a", &["x", "X"], about()),
        ("a", &["manifest.json"], about()),
        ("a", &["x"], json!([])),
        ("a", &["x"], json!({"step": 1})),
        ("a", &["x"], json!({"kind": "checkpoint", "long": "x".repeat(1 << 20)})),
    ] {
        assert!(commit(name, files, about.clone()).is_err(), "{name} {files:?}");
        assert_eq!(fs::read_dir(parent).unwrap().count(), 0, "{name} {files:?}");
    }
    commit("a", &["x"], about()).unwrap();
    let again = commit("a", &["x"], about()).unwrap_err();
    assert!(matches!(again, StoreError::AlreadyExists { .. }), "{again}");
}

#[test]
fn only_our_own_directories_are_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("My adapter");
    let replace = |bytes: &[u8]| replace(&path, "adapter", bytes);
    ensure_directory(&RealDisk, &path).unwrap();
    replace(b"one").unwrap();
    fs::write(path.join(".DS_Store"), "").unwrap();
    replace(b"two").unwrap();
    assert_eq!(fs::read(path.join("adapter_model.safetensors")).unwrap(), b"two");
    fs::write(path.join("thesis.txt"), "years of work").unwrap();
    let error = replace(b"three").unwrap_err();
    assert!(matches!(error, StoreError::NotOurs { .. }), "{error}");
    assert!(error.to_string().contains("thesis.txt"), "{error}");
    fs::remove_file(path.join(MANIFEST_NAME)).unwrap();
    assert!(matches!(replace(b"three").unwrap_err(), StoreError::NotOurs { .. }));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    assert!(path.join("thesis.txt").exists());
}
