//! Stopping a run: the first signal finishes the step and saves, a second one ends at once. A
//! directory has one process.

use std::time::Duration;

use crate::folder::{CRASH_RECIPE, Folder, metrics};
use crate::program::{Ended, run, start};

/// Far more steps than a test waits for.
const FOR_EVER: [&str; 4] = ["--set", "train.max_steps=10000000", "--set", "checkpoint.every=0"];

#[test]
fn a_signal_finishes_the_step_and_saves() {
    for (signal, code) in [("TERM", 143), ("INT", 130)] {
        let folder = Folder::with_recipe(CRASH_RECIPE);
        let mut running = start(&mut folder.command("run", &FOR_EVER));
        let path = folder.path("run");
        running.wait_until("a few steps", |_| {
            std::fs::read_to_string(path.join("metrics.jsonl")).is_ok_and(|text| text.lines().count() > 5)
        });
        running.signal(signal);
        let ended = running.wait().expect(code);
        let stopped_after = stopped_after(&ended);
        let result = folder.result("run");
        assert_eq!(result.checkpoints().last(), Some(&format!("step-{stopped_after:06}")), "SIG{signal}");
        assert_eq!(metrics(&path).last().expect("a row")["step"].as_u64(), Some(stopped_after), "SIG{signal}");
        assert!(!path.join("adapter").exists(), "a run that is not done has no result");

        // The schedule is constant, so a shorter run has the same numbers.
        let steps = format!("train.max_steps={}", stopped_after + 3);
        folder.run("run", &["--resume", "--set", &steps]).expect(0).says(&format!("(step {stopped_after})"));
        folder.run("undisturbed", &["--set", &steps]).expect(0);
        folder.result("run").expect_same(&folder.result("undisturbed"), signal);
    }
}

fn stopped_after(ended: &Ended) -> u64 {
    let (_, rest) = ended.stderr.split_once("stopped after step ").unwrap_or_else(|| panic!("{}", ended.stderr));
    rest.split_once(',').and_then(|(step, _)| step.parse().ok()).expect("a step")
}

/// The failpoint that holds all ranks up in the middle of their first step, for ever.
pub(crate) fn endless_step(folder: &Folder) -> String {
    format!("train.reduce+{}", folder.path("nothing").display())
}

#[test]
fn a_second_signal_ends_at_once() {
    for [first, second] in [["TERM", "INT"], ["INT", "TERM"]] {
        let folder = Folder::with_recipe(CRASH_RECIPE);
        let mut running = start(folder.command("run", &[]).env("FINETUNE_FAILPOINT", endless_step(&folder)));
        running.wait_until("the first step", |running| running.stderr().contains("training steps 1 to"));
        running.signal(first);
        running.signal(second);
        let ended = running.wait();
        // If both are pending at once, the system chooses which comes first.
        assert!(matches!(ended.code, Some(130 | 143)), "{first}, {second}: {ended:?}");
        assert!(!ended.stderr.contains("stopped after step"), "{first}, {second}: the step was finished: {ended:?}");
        assert!(metrics(&folder.path("run")).iter().all(|row| row["step"] == 0), "no step was done");
        assert_eq!(folder.result("run").checkpoints(), [""; 0]);
    }
}

/// An evaluation takes seconds, and is made before the first step and after each second one. A
/// signal does not wait for it (`crates/trainer/tests/ranks.rs` counts the rows). The step before it
/// is saved, and a resume makes the evaluation first.
#[test]
fn a_signal_gives_an_evaluation_up() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let rows = std::fs::read_to_string(folder.path("eval.jsonl")).expect("rows");
    folder.write("eval.jsonl", rows.repeat(400).as_bytes());
    let steps = ["--verbose", "--set", "train.max_steps=4", "--set", "train.micro_batch_size=1"];
    folder.run("undisturbed", &steps).expect(0);
    for (signal, code, evaluations) in [("INT", 130, 1), ("TERM", 143, 2)] {
        let output = format!("run-{evaluations}");
        let path = folder.path(&output);
        let mut running = start(&mut folder.command(&output, &steps));
        // After these evaluations and the steps that follow them, the next evaluation begins.
        running.wait_until("an evaluation", |running| {
            running.stderr().matches("evaluating 4,800 held-back rows").count() > evaluations
        });
        running.signal(signal);
        let ended = running.wait().expect(code);
        assert_eq!(stopped_after(&ended), 2 * evaluations as u64);
        let last = format!("checkpoints/step-{:06}/trainer_state.json", 2 * evaluations);
        let state = std::fs::read_to_string(path.join(&last)).expect("a state");
        assert!(state.contains("\"evaluation_due\": true"), "{state}");

        folder.run(&output, &[&["--resume"], &steps[..]].concat()).expect(0);
        folder.result(&output).expect_same(&folder.result("undisturbed"), signal);
    }
}

/// Before the first step there is nothing to save, and nothing to wait for.
#[test]
fn a_signal_before_the_first_step_gives_the_evaluation_up() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let rows = std::fs::read_to_string(folder.path("eval.jsonl")).expect("rows");
    folder.write("eval.jsonl", rows.repeat(2000).as_bytes());
    let mut running = start(&mut folder.command("run", &["--verbose"]));
    running.wait_until("an evaluation", |running| running.stderr().contains("evaluating 24,000 held-back rows"));
    running.signal("TERM");
    let ended = running.wait().expect(143).says("stopped before the first step: there is nothing to save");
    assert!(!ended.stderr.contains("before training  evaluation loss"), "{}", ended.stderr);
    assert!(metrics(&folder.path("run")).is_empty());
}

#[test]
fn a_second_process_on_a_run_directory_is_refused() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    // No checkpoint is written. One would be a reason to refuse a start without --resume.
    let no_checkpoint = [&FOR_EVER[..], &["--set", "checkpoint.keep_best=false"]].concat();
    let mut first = start(&mut folder.command("run", &no_checkpoint));
    let path = folder.path("run/metrics.jsonl");
    first.wait_until("a step", |_| std::fs::read_to_string(&path).is_ok_and(|text| !text.is_empty()));
    for arguments in [["--resume"].as_slice(), &[]] {
        let ended = folder.run("run", arguments).expect(2).says("is in use by process");
        assert!(ended.stderr.contains(&format!("process {}", first.pid())), "{}", ended.stderr);
    }
    // The system releases the lock of a killed process, so nothing has to be cleaned up by hand.
    first.signal("KILL");
    assert_eq!(first.wait().signal, Some(9));
    folder.run("run", &["--resume"]).expect(0);
}

#[test]
fn of_processes_that_race_for_a_directory_one_wins() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    for round in 0..5 {
        let output = format!("run-{round}");
        let racers: Vec<_> = (0..3).map(|_| start(&mut folder.command(&output, &[]))).collect();
        let codes: Vec<_> = racers.into_iter().map(|racer| racer.wait().code).collect();
        let won = codes.iter().filter(|code| **code == Some(0)).count();
        let refused = codes.iter().filter(|code| **code == Some(2)).count();
        assert_eq!((won, refused), (1, 2), "round {round}: {codes:?}");
    }
}

/// Nothing is lost if the same command is run again after a stop.
#[test]
fn a_run_stopped_before_its_first_step_can_be_rerun() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let mut running = start(&mut folder.command("run", &["--resume"]));
    // The process may be anywhere by then: before its handlers are in place, in a step, or done.
    if !running.ends_within(Duration::from_millis(5)) {
        running.signal("TERM");
    }
    let ended = running.wait();
    assert!(matches!((ended.code, ended.signal), (Some(0 | 143), None) | (None, Some(15))), "{ended:?}");
    run(&mut folder.command("run", &["--resume"])).expect(0);
}
