//! `[log] on_end`: the command that runs when a run has ended.

use crate::folder::{CRASH_RECIPE, Folder, metrics};
use crate::program::start;

/// A recipe whose command writes down what it was told.
fn folder() -> Folder {
    let command = "echo \\\"$FINETUNE_STATUS $FINETUNE_EXIT_CODE $FINETUNE_STEP $FINETUNE_LOSS $FINETUNE_RUN\\\" >> told; echo heard";
    Folder::with_recipe(&format!("{CRASH_RECIPE}[log]\non_end = \"{command}\"\n"))
}

fn told(folder: &Folder) -> Vec<String> {
    let text = std::fs::read_to_string(folder.path("told")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn every_end_is_told() {
    let folder = folder();
    let ended = folder.run("run", &[]).expect(0);
    assert!(ended.stderr.ends_with("heard\n") && !ended.stdout.contains("heard"), "{}", ended.stderr);
    let loss = metrics(&folder.path("run")).iter().rfind(|row| row["loss"].is_f64()).expect("a row")["loss"].clone();
    let run = folder.path("run");
    let run = std::path::absolute(&run).expect("a path");
    assert_eq!(told(&folder), [format!("done 0 10 {loss} {}", run.display())]);

    folder.run("wild", &["--set", "optimizer.learning_rate=1e30"]).expect(4);
    assert!(told(&folder)[1].starts_with("failed 4 "), "{:?}", told(&folder));

    let mut running = start(&mut folder.command("stopped", &["--set", "train.max_steps=10000000"]));
    let path = folder.path("stopped/metrics.jsonl");
    running.wait_until("a few steps", |_| std::fs::read_to_string(&path).is_ok_and(|text| text.lines().count() > 9));
    running.signal("TERM");
    running.wait().expect(143);
    assert!(told(&folder)[2].starts_with("stopped 143 "), "{:?}", told(&folder));
    // One rank tells it, however many there are.
    crate::program::run(&mut folder.launch(&["-n", "2"], "two", &[])).expect(0);
    assert_eq!(told(&folder).len(), 4, "{:?}", told(&folder));
    // What was refused has not begun.
    folder.run("run", &[]).expect(2);
    folder.run("bad", &["--set", "data.train=nowhere.jsonl"]).expect(2);
    assert_eq!(told(&folder).len(), 4, "{:?}", told(&folder));
}

#[test]
fn a_command_that_fails_changes_no_exit_code() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let ended = folder.run("run", &["--set", "log.on_end=exit 7"]).expect(0);
    assert!(ended.stderr.contains("log.on_end: the command ended with exit status: 7"), "{}", ended.stderr);
    // The lock is free by then.
    folder.run("again", &["--set", "log.on_end=test ! -s \"$FINETUNE_RUN/.lock\""]).expect(0);
}
