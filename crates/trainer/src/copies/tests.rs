//! Copies between two ranks of this process, each with a run directory of its own.

use super::*;

fn identity(rows: &str) -> Identity {
    Identity {
        recipe: vec![("seed".to_owned(), "1".to_owned())],
        train_data: rows.to_owned(),
        eval_data: None,
        model: "model".to_owned(),
        layout: "layout".to_owned(),
        compute: None,
        new_tokens: Vec::new(),
    }
}

/// A checkpoint with some bytes that depend on the step.
fn save(run: &Path, folder: &str, step: u64, rows: &str) -> PathBuf {
    let state = serde_json::json!({
        "format": 1, "version": "0.0.0", "step": step, "updates": step, "best": null,
        "evaluations_without_improvement": 0, "stopped_early": false, "identity": identity(rows),
    });
    let mut staging = Staging::begin(&RealDisk, &run.join(folder), &name(step)).expect("a new directory");
    staging.write("weights", &vec![step as u8; PIECE + 7]).expect("written");
    staging.write("empty", &[]).expect("written");
    staging.write("trainer_state.json", state.to_string().as_bytes()).expect("written");
    staging.publish(&serde_json::json!({"kind": "checkpoint", "step": step})).expect("published")
}

fn steps(run: &Path, folder: &str) -> Vec<u64> {
    let all = numbered(&RealDisk, &run.join(folder), "step-").expect("a list");
    all.iter().for_each(|(_, path)| drop(verify_directory(&RealDisk, path).expect("whole")));
    all.into_iter().map(|(step, _)| step).collect()
}

fn metrics(run: &Path, text: &str) {
    replace_file(&RealDisk, &run.join(metrics::FILE), text.as_bytes()).expect("written");
}

/// Runs both sides. Returns what rank 0 is told by the other.
fn copy(from: &Path, to: &Path) -> String {
    let mut groups = Group::in_process(2, None);
    let (second, first) = (groups.remove(1), groups.remove(0));
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| receive(&second, to).expect("received"));
        let told = send(&first, 1, from).expect("sent");
        receiving.join().expect("no panic");
        told
    })
}

#[test]
fn a_copy_has_the_same_bytes_and_follows_what_rank_0_keeps() {
    let (from, to) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let (from, to) = (from.path(), to.path());
    save(from, CHECKPOINTS, 2, "rows");
    save(from, CHECKPOINTS, 4, "rows");
    metrics(from, "one\n");
    assert_eq!(copy(from, to), "");
    assert_eq!(steps(to, COPIES), [2, 4]);
    // Another step, one fewer, and a row more.
    save(from, CHECKPOINTS, 6, "rows");
    remove_directory(&RealDisk, &from.join(CHECKPOINTS).join(name(2))).expect("removed");
    metrics(from, "one\ntwo\n");
    assert_eq!(copy(from, to), "");
    assert_eq!(steps(to, COPIES), [4, 6]);
    for file in ["weights", "manifest.json", "trainer_state.json"] {
        let read = |run: &Path, folder: &str| std::fs::read(run.join(folder).join(name(6)).join(file)).expect("a file");
        assert!(read(from, CHECKPOINTS) == read(to, COPIES), "{file}");
    }
    assert_eq!(std::fs::read_to_string(to.join(COPIES).join(metrics::FILE)).expect("rows"), "one\ntwo\n");
    // Rows of another course do not stay.
    metrics(from, "uno\n");
    copy(from, to);
    assert_eq!(std::fs::read_to_string(to.join(COPIES).join(metrics::FILE)).expect("rows"), "uno\n");
}

#[test]
fn on_a_shared_disk_nothing_is_kept_twice() {
    let run = tempfile::tempdir().expect("a folder");
    save(run.path(), CHECKPOINTS, 2, "rows");
    metrics(run.path(), "one\n");
    assert_eq!(copy(run.path(), run.path()), "");
    assert!(!run.path().join(COPIES).exists());
}

#[test]
fn a_host_that_cannot_keep_a_copy_says_why() {
    let (from, to) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    save(from.path(), CHECKPOINTS, 2, "rows");
    // A file is in the place of the folder.
    replace_file(&RealDisk, &to.path().join(COPIES), b"").expect("written");
    let told = copy(from.path(), to.path());
    assert!(told.contains("copies"), "{told}");
}

#[test]
fn one_rank_of_each_other_host_keeps_them() {
    let of = |hosts: &[&str], copies| holders(hosts.iter().copied(), copies);
    assert_eq!(of(&["a", "a", "b", "b", "c"], 1), [2]);
    assert_eq!(of(&["a", "a", "b", "b", "c"], 9), [2, 4]);
    assert_eq!(of(&["a", "b"], 0), [0; 0]);
    assert_eq!(of(&["a", "a"], 1), [0; 0]);
}

/// Both ranks look for what to go on from. Returns the notices of rank 0.
fn look(first: &Path, second: &Path, resume: &Resume) -> Vec<String> {
    let mut groups = Group::in_process(2, None);
    let ranks = |group| Ranks::new(group, None).expect("ranks");
    let (two, one) = (ranks(groups.remove(1)), ranks(groups.remove(0)));
    let identity = identity("rows");
    std::thread::scope(|scope| {
        let looking = scope.spawn(|| bring_newest(second, resume, &two, &identity, &mut Vec::new()).expect("found"));
        let mut notices = Vec::new();
        bring_newest(first, resume, &one, &identity, &mut notices).expect("found");
        looking.join().expect("no panic");
        notices
    })
}

#[test]
fn the_newest_checkpoint_is_brought_from_wherever_it_lies() {
    for (folder, own) in [(COPIES, None), (CHECKPOINTS, None), (COPIES, Some(2)), (CHECKPOINTS, Some(2))] {
        let (first, second) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let (first, second) = (first.path(), second.path());
        own.iter().for_each(|step| drop(save(first, CHECKPOINTS, *step, "rows")));
        save(second, folder, 4, "rows");
        save(second, folder, 8, "of another run");
        replace_file(
            &RealDisk,
            &second.join(if folder == COPIES { COPIES } else { "" }).join(metrics::FILE),
            b"rows\n",
        )
        .expect("written");
        let notices = look(first, second, &Resume::Newest);
        assert!(notices[0].starts_with("step 4 is kept on "), "{notices:?}");
        assert_eq!(steps(first, CHECKPOINTS).last(), Some(&4));
        assert_eq!(std::fs::read_to_string(first.join(metrics::FILE)).expect("rows"), "rows\n");
        // Now rank 0 has it.
        assert_eq!(look(first, second, &Resume::Newest), [""; 0]);
    }
}

#[test]
fn a_host_that_kept_copies_goes_on_from_its_own() {
    let (first, second) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    save(first.path(), COPIES, 4, "rows");
    let damaged = save(first.path(), COPIES, 6, "rows").join("weights");
    OpenOptions::new().append(true).open(damaged).and_then(|mut file| file.write_all(b"x")).expect("damaged");
    assert_eq!(look(first.path(), second.path(), &Resume::Newest).len(), 1);
    assert_eq!(steps(first.path(), CHECKPOINTS), [4]);
}

#[test]
fn a_run_that_begins_leaves_no_older_copies_to_go_on_from() {
    let (first, second) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    save(second.path(), COPIES, 4, "rows");
    assert_eq!(look(first.path(), second.path(), &Resume::No), [""; 0]);
    assert!(!second.path().join(COPIES).exists() && second.path().join("aside-copies").is_dir());
}
