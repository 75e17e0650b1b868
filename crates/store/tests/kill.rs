//! A process that is killed at any point of a save, on the real disk.

use std::path::Path;
use std::process::Command;

use finetune_store::{RealDisk, Staging, newest_verified, numbered, remove_directory, sweep};
use serde_json::json;

mod filled;

use filled::filled;

fn save(parent: &Path, number: u64) {
    let staging = Staging::begin(&RealDisk, parent, &format!("step-{number:06}")).unwrap();
    let staging = filled(staging, &[("one", &[1; 1000]), ("two", &[2; 1000])]).unwrap();
    staging.publish(&json!({"kind": "checkpoint"})).unwrap();
}

/// The work of the killed process, not a test of its own.
#[test]
#[ignore = "run by the other test, in a process of its own"]
fn child() {
    let Some(parent) = std::env::var_os("STORE_TEST_PARENT") else {
        return;
    };
    let parent = Path::new(&parent);
    save(parent, 2);
    remove_directory(&RealDisk, &parent.join("step-000001")).unwrap();
}

#[test]
fn a_kill_at_any_point_leaves_a_good_checkpoint() {
    for (failpoint, newest) in [
        ("checkpoint.begin", 1),
        ("checkpoint.file", 1),
        ("checkpoint.file:2", 1),
        ("checkpoint.written", 1),
        ("checkpoint.synced", 1),
        ("checkpoint.renamed", 2),
        ("checkpoint.done", 2),
        ("prune.trashed", 2),
        ("no.such.point", 2),
    ] {
        let directory = tempfile::tempdir().unwrap();
        save(directory.path(), 1);
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored"])
            .env("FINETUNE_FAILPOINT", failpoint)
            .env("STORE_TEST_PARENT", directory.path())
            .output()
            .unwrap();
        assert_eq!(output.status.success(), failpoint == "no.such.point", "{failpoint}");
        let (found, rejected) = newest_verified(&RealDisk, directory.path(), "step-").unwrap();
        assert_eq!(found.unwrap().0, newest, "{failpoint}");
        assert!(rejected.is_empty(), "{failpoint}: {rejected:?}");
        sweep(&RealDisk, directory.path()).unwrap();
        let left = std::fs::read_dir(directory.path()).unwrap().count();
        let counted = numbered(&RealDisk, directory.path(), "step-").unwrap().len();
        assert_eq!(left, counted, "{failpoint}: leftovers after the sweep");
        save(directory.path(), 3);
    }
}
