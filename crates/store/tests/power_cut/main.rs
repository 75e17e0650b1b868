//! C1 and C3: whatever call the power goes at, or the disk is full at, the newest checkpoint that
//! verifies is the previous one or the new one, whole. And the test of the test: planted bugs.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use finetune_advice::Advice as _;
use finetune_store::fault::FaultDisk;
use finetune_store::{
    Disk, Dtype, Staging, StoreError, TensorSpec, newest_verified, numbered, remove_directory, replace_file, sweep,
    verify_directory,
};
use serde_json::json;

#[path = "../filled/mod.rs"]
mod filled;
mod lying_disk;

use filled::filled;
use lying_disk::{Lie, LyingDisk, Wrapped};

const PARENT: &str = "/run/checkpoints";
const SEEDS: u64 = 1000;

fn save(disk: &dyn Disk, number: u64) -> Result<(), StoreError> {
    let (weights, moments) = contents(number);
    let staging = Staging::begin(disk, Path::new(PARENT), &format!("step-{number:06}"))?;
    let staging = filled(staging, &[("adapter.safetensors", &weights), ("adam.safetensors", &moments)])?;
    staging.publish(&json!({"kind": "checkpoint", "step": number})).map(drop)
}

fn contents(number: u64) -> (Vec<u8>, Vec<u8>) {
    (vec![number as u8; 300], (0..200).map(|i| (i * number) as u8).collect())
}

fn first_saved() -> FaultDisk {
    let disk = FaultDisk::new();
    save(&disk, 1).unwrap();
    disk
}

/// The number of the newest checkpoint, after all its bytes were verified.
fn newest(disk: &FaultDisk) -> Result<u64, String> {
    let (found, rejected) = newest_verified(disk, Path::new(PARENT), "step-").map_err(|error| error.to_string())?;
    if let Some(torn) = rejected.first() {
        return Err(format!("a torn checkpoint is visible: {}", torn.why));
    }
    let (number, path, manifest) = found.ok_or("no checkpoint is left")?;
    let read = |name| disk.read(&path.join(name)).unwrap();
    if (read("adapter.safetensors"), read("adam.safetensors")) != contents(number) {
        return Err(format!("checkpoint {number} has other bytes than were saved"));
    }
    assert_eq!(manifest.kind, "checkpoint");
    assert_eq!(manifest.field("step"), Some(&json!(number)));
    Ok(number)
}

/// Cuts the power at every call of saving checkpoint 2, with every seed.
fn check_power_cuts(wrap: &dyn Fn(FaultDisk) -> Box<dyn Wrapped>) -> Result<u64, String> {
    for call in 1.. {
        let disk = wrap(first_saved());
        disk.inner().crash_at(call);
        let result = save(disk.as_disk(), 2);
        let fired = disk.inner().fired();
        assert_eq!(fired, result.is_err(), "call {call}: {result:?}");
        for seed in 0..SEEDS {
            let at = |what: String| format!("call {call}, seed {seed}: {what}");
            let reborn = disk.inner().after_crash(seed);
            let number = newest(&reborn).map_err(at)?;
            if !(number == 2 || (fired && number == 1)) {
                return Err(at(format!("checkpoint {number} is the newest")));
            }
            let first = Path::new(PARENT).join("step-000001");
            verify_directory(&reborn, &first).map_err(|error| at(error.to_string()))?;
            // The leftovers do not hinder the next save.
            sweep(&reborn, Path::new(PARENT)).map_err(|error| at(error.to_string()))?;
            save(&reborn, 3).map_err(|error| at(error.to_string()))?;
            assert_eq!(newest(&reborn), Ok(3), "call {call}, seed {seed}");
        }
        if !fired {
            return Ok(call - 1);
        }
    }
    unreachable!()
}

#[test]
fn a_power_cut_at_any_call_leaves_the_previous_or_the_new_checkpoint() {
    let calls = check_power_cuts(&|disk| Box::new(disk)).unwrap();
    // 1 directory, its mark written and synced, 3 files written and synced, the mark removed, the
    // directory synced, renamed, the parent synced.
    assert_eq!(calls, 13);
}

/// Checkpoint 2, with a file whose tensors are written one by one.
fn save_by_tensors(disk: &dyn Disk) -> Result<(), StoreError> {
    let specs: Vec<TensorSpec> =
        ["a", "b"].map(|name| TensorSpec { name: name.to_owned(), dtype: Dtype::F32, shape: vec![3 << 20] }).into();
    let mut staging = Staging::begin(disk, Path::new(PARENT), "step-000002")?;
    staging.write_tensors("adapter.safetensors", &specs, &BTreeMap::new(), |n| {
        Ok::<_, StoreError>(vec![n as u8 + 1; 12 << 20])
    })?;
    staging.publish(&json!({"kind": "checkpoint", "step": 2})).map(drop)
}

#[test]
fn a_power_cut_between_tensors_leaves_the_previous_or_the_new_checkpoint() {
    for call in 1.. {
        let disk = first_saved();
        disk.crash_at(call);
        let fired = save_by_tensors(&disk).is_err();
        assert_eq!(fired, disk.fired(), "call {call}");
        for seed in 0..10 {
            let reborn = disk.after_crash(seed);
            let (found, rejected) = newest_verified(&reborn, Path::new(PARENT), "step-").unwrap();
            assert!(rejected.is_empty(), "call {call}, seed {seed}: a torn checkpoint is visible");
            let (number, ..) = found.expect("a checkpoint");
            assert!(number == 2 || (fired && number == 1), "call {call}, seed {seed}: {number}");
        }
        if !fired {
            // 1 directory, its mark written and synced, the file made, its header and both tensors added, synced, the
            // manifest written and synced, the mark removed, the directory synced, renamed, the parent synced.
            assert_eq!(call - 1, 14);
            return;
        }
    }
}

#[test]
fn planted_bugs_are_found() {
    for lie in [Lie::ForgetFileSync, Lie::ForgetDirectorySync, Lie::RenameFirst] {
        let result = check_power_cuts(&|inner| Box::new(LyingDisk::new(inner, lie)));
        assert!(result.is_err(), "{lie:?} was not noticed");
    }
}

#[test]
fn a_full_disk_at_any_call_leaves_the_last_checkpoint_good() {
    for kind in [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::FileTooLarge] {
        for call in 1.. {
            let disk = first_saved();
            disk.fail_at(call, kind);
            let result = save(&disk, 2);
            if !disk.fired() {
                result.unwrap();
                break;
            }
            let error = result.unwrap_err();
            assert!(matches!(error, StoreError::NoSpace { .. }), "call {call}: {error}");
            assert!(error.is_disk() && error.to_string().contains(PARENT), "call {call}: {error}");
            let of_size = error.hints()[0].contains("ulimit -f");
            assert_eq!(of_size, kind == ErrorKind::FileTooLarge, "{:?}", error.hints());
            if call > 3 {
                assert!(error.to_string().contains("500 bytes"), "call {call}: {error}");
            }
            let number = newest(&disk).unwrap();
            assert!(number == 1 || call == 13, "call {call}: checkpoint {number} is the newest");
            verify_directory(&disk, &Path::new(PARENT).join("step-000001")).unwrap();
            let names = disk.list(Path::new(PARENT)).unwrap();
            assert!(!names.iter().any(|name| name.contains(".tmp-")), "call {call}: {names:?}");
            // Saving works once there is space again.
            save(&disk, 3).unwrap();
            assert_eq!(newest(&disk), Ok(3));
        }
    }
}

#[test]
fn other_write_errors_are_disk_errors_too() {
    let disk = first_saved();
    disk.fail_at(2, ErrorKind::PermissionDenied);
    let error = save(&disk, 2).unwrap_err();
    assert!(error.is_disk() && !error.hints().is_empty(), "{error}");
    assert!(matches!(error, StoreError::Io { .. }));
}

#[test]
fn a_power_cut_while_pruning_loses_nothing_else() {
    let saved = first_saved();
    save(&saved, 2).unwrap();
    let first = Path::new(PARENT).join("step-000001");
    for call in 1.. {
        let disk = saved.clone();
        disk.crash_at(call);
        let result = remove_directory(&disk, &first);
        assert_eq!(disk.fired(), result.is_err());
        for seed in 0..SEEDS {
            let reborn = disk.after_crash(seed);
            assert_eq!(newest(&reborn), Ok(2), "call {call}, seed {seed}");
            if reborn.exists(&first).unwrap() {
                verify_directory(&reborn, &first).unwrap_or_else(|error| panic!("call {call}, seed {seed}: {error}"));
            }
            sweep(&reborn, Path::new(PARENT)).unwrap();
            let left = reborn.list(Path::new(PARENT)).unwrap().len();
            let counted = numbered(&reborn, Path::new(PARENT), "step-").unwrap().len();
            assert_eq!(left, counted, "call {call}, seed {seed}: leftovers after the sweep");
        }
        if !disk.fired() {
            break;
        }
    }
}

#[test]
fn a_power_cut_while_replacing_a_file_leaves_the_old_or_the_new() {
    let path = Path::new("/run/metrics.jsonl");
    let saved = FaultDisk::new();
    replace_file(&saved, path, b"old").unwrap();
    for call in 1.. {
        let disk = saved.clone();
        disk.crash_at(call);
        let result = replace_file(&disk, path, b"new, and longer");
        for seed in 0..SEEDS {
            let bytes = disk.after_crash(seed).read(path).unwrap();
            let expected = bytes == b"new, and longer" || (result.is_err() && bytes == b"old");
            assert!(expected, "call {call}, seed {seed}: {bytes:?}");
        }
        if !disk.fired() {
            break;
        }
    }
    for call in 1..=4 {
        let disk = saved.clone();
        disk.fail_at(call, ErrorKind::StorageFull);
        let error = replace_file(&disk, path, b"new").unwrap_err();
        assert!(matches!(error, StoreError::NoSpace { needed_bytes: 3, .. }), "{error}");
        assert_eq!(disk.list(Path::new("/run")).unwrap(), ["metrics.jsonl"], "call {call}");
    }
}

/// On a disk that can exchange two names, and on one that cannot.
#[test]
fn a_power_cut_while_replacing_a_directory_leaves_the_old_or_the_new() {
    for empty in [FaultDisk::new(), FaultDisk::without_exchange()] {
        check_replacing(empty);
    }
}

fn check_replacing(empty: FaultDisk) {
    let path = Path::new("/exports/adapter");
    let replace = |disk: &FaultDisk, version: u64| {
        let staging = Staging::begin_replacing(disk, path, "adapter")?;
        let staging = filled(staging, &[("adapter_model.safetensors", &contents(version).0)])?;
        staging.publish_replacing(&json!({"kind": "adapter", "version": version})).map(drop)
    };
    let version = |disk: &FaultDisk| {
        let manifest = verify_directory(disk, path)?;
        Ok::<_, StoreError>(manifest.field("version").and_then(|value| value.as_u64()).unwrap())
    };
    let saved = empty;
    replace(&saved, 1).unwrap();
    for call in 1.. {
        let disk = saved.clone();
        disk.crash_at(call);
        let result = replace(&disk, 2);
        let fired = disk.fired();
        // The last call only removes the old directory.
        assert_eq!(result.is_err(), fired, "call {call}");
        for seed in 0..SEEDS {
            let reborn = disk.after_crash(seed);
            sweep(&reborn, Path::new("/exports")).unwrap();
            let found = version(&reborn).unwrap_or_else(|error| panic!("call {call}, seed {seed}: {error}"));
            assert!(found == 2 || (fired && found == 1), "call {call}, seed {seed}: {found}");
        }
        if !fired {
            break;
        }
    }
    for call in 1..=9 {
        let disk = saved.clone();
        disk.fail_at(call, ErrorKind::StorageFull);
        let error = replace(&disk, 2).unwrap_err();
        assert!(matches!(error, StoreError::NoSpace { .. }), "call {call}: {error}");
        version(&disk).unwrap_or_else(|error| panic!("call {call}: {error}"));
    }
}
