//! Runs as others see them: `watch` on this machine and over ssh, and the file that says how a run
//! ended.

use serde_json::Value;

use crate::folder::{CRASH_RECIPE, Folder};
use crate::program::{finetune, run, start};
use crate::ssh::Boxes;

/// Far more steps than a test waits for.
const FOR_EVER: [&str; 4] = ["--set", "train.max_steps=10000000", "--set", "checkpoint.every=5"];

/// What `watch --once --json` says of a run.
fn seen(folder: &Folder, name: &str) -> Value {
    folder.finetune(&["watch", name, "--once", "--json"]).expect(0).json()
}

fn facts(folder: &Folder, name: &str) -> Value {
    let text = std::fs::read_to_string(folder.path(name).join("run.json")).expect("run.json");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn a_run_that_goes_on_is_seen_to_its_end() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let mut running = start(&mut folder.command("run", &FOR_EVER));
    let path = folder.path("run/metrics.jsonl");
    running.wait_until("a few steps", |_| std::fs::read_to_string(&path).is_ok_and(|text| text.lines().count() > 20));
    let now = seen(&folder, "run");
    assert_eq!((&now["state"], &now["steps"]), (&"running".into(), &10_000_000.into()), "{now}");
    assert!(now["step"].as_u64() > Some(5) && now["loss"].is_f64() && now["seconds_left"].is_f64(), "{now}");
    assert!(now["checkpoint"].as_u64() >= Some(5), "{now}");
    let report = std::fs::read_to_string(folder.path("run/report.html")).expect("a report");
    assert!(report.contains("data-refresh=\"30\"") && report.contains("http-equiv=\"refresh\""), "it goes on");

    let watching = start(finetune(["watch", "run"]).current_dir(folder.path("")));
    running.signal("INT");
    running.wait().expect(130);
    // Without a terminal it ends when the run has ended.
    let ended = watching.wait().expect(0);
    let then = seen(&folder, "run");
    let step = then["step"].as_u64().expect("a step");
    let last = ended.stdout.lines().last().unwrap_or_default();
    assert_eq!(last, format!("stopped after step {}", finetune_trainer::numbers::thousands(step)), "{}", ended.stdout);
    assert!(ended.stdout.contains(&format!("\nstep {step}/10000000  loss ")), "{}", ended.stdout);
    assert!(ended.stdout.contains("  evaluation loss "), "{}", ended.stdout);
    assert_eq!((&then["state"], &facts(&folder, "run")["exit_code"]), (&"stopped".into(), &130.into()));
    let report = std::fs::read_to_string(folder.path("run/report.html")).expect("a report");
    assert!(report.contains("stopped by a signal") && !report.contains("data-refresh"), "it does not go on");
}

#[test]
fn every_end_of_a_run_has_a_name() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    assert!(folder.run_killed_at("run", &[], "checkpoint.done:2"));
    let broken = seen(&folder, "run");
    assert_eq!((&broken["state"], &broken["step"]), (&"broken off".into(), &4.into()), "{broken}");
    let begun = facts(&folder, "run")["started"].clone();
    folder.run("run", &["--resume"]).expect(0);
    let done = seen(&folder, "run");
    assert_eq!((&done["state"], &done["step"], &done["steps"]), (&"done".into(), &10.into(), &10.into()), "{done}");
    assert_eq!(facts(&folder, "run")["started"], begun, "a resume is the same run");
    assert!(facts(&folder, "run")["peak_memory"].as_u64() > Some(1 << 20));

    folder.run("wild", &["--set", "optimizer.learning_rate=1e30"]).expect(4);
    let failed = seen(&folder, "wild");
    assert_eq!((&failed["state"], &facts(&folder, "wild")["exit_code"]), (&"failed".into(), &4.into()), "{failed}");
    assert!(failed["error"].as_str().is_some_and(|error| error.contains("is not finite")), "{failed}");
    // A table of both, and an end without waiting.
    let table = folder.finetune(&["watch", "run", "wild", "--once"]).expect(0).stdout;
    assert!(table.contains("run   done    10/10") && table.contains("wild  failed  "), "{table}");
    assert!(table.contains("wild: the ") && table.contains("is not finite"), "{table}");
    let ended = folder.finetune(&["watch", "run", "wild"]).expect(0);
    assert!(ended.stdout.contains("run  done after step 10\n"), "{}", ended.stdout);
}

#[test]
fn what_cannot_be_watched_is_said() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    for (arguments, says) in [
        (&["watch", "nowhere"][..], "there is no nowhere"),
        (&["watch", "model"], "model is a model directory: a run is meant"),
        (&["watch", "-x:runs"], "`finetune watch` has no option -x"),
        (&["watch", "recipe.toml", "--json"], "--once"),
        (&["watch"], "RUN"),
    ] {
        folder.finetune(arguments).expect(2).says(says);
    }
    // The recipe of a run that is to begin.
    let waiting = folder.finetune(&["watch", "recipe.toml", "--once", "--json"]).expect(0).json();
    assert_eq!(waiting["state"], "waiting");
    // A host that is not there.
    let ended = folder.finetune(&["watch", "no-such-host.invalid:runs/a", "--once"]);
    assert!(ended.code == Some(2) || ended.code == Some(3), "{ended:?}");
    assert!(ended.stderr.contains("no-such-host.invalid: "), "{}", ended.stderr);
}

/// The host needs a shell and nothing of ours.
#[test]
fn a_run_at_another_host_is_watched_over_ssh() {
    let Some(boxes) = Boxes::start(&[]) else { return };
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let mut running = start(&mut folder.command("run", &FOR_EVER));
    let path = folder.path("run/metrics.jsonl");
    running.wait_until("a few steps", |_| std::fs::read_to_string(&path).is_ok_and(|text| text.lines().count() > 20));
    let (place, config) = (format!("box-1:{}", folder.path("run").display()), boxes.file("ssh_config"));
    let watch = |more: &[&str]| {
        let mut command = finetune(["watch", &place, "--ssh-config", &config]);
        command.args(more);
        command
    };
    let now = run(&mut watch(&["--once", "--json"])).expect(0).json();
    assert_eq!((&now["state"], &now["steps"]), (&"running".into(), &10_000_000.into()), "{now}");
    assert!(now["step"].as_u64() > Some(5) && now["checkpoint"].as_u64() >= Some(5), "{now}");
    let watching = start(&mut watch(&[]));
    running.signal("TERM");
    running.wait().expect(143);
    let ended = watching.wait().expect(0);
    let here = seen(&folder, "run");
    assert!(ended.stdout.contains(&format!("\nstep {}/10000000  loss ", here["step"])), "{}", ended.stdout);
    assert!(ended.stdout.contains("\nstopped after step "), "{}", ended.stdout);
    let there = run(&mut watch(&["--once", "--json"])).expect(0).json();
    for key in ["state", "step", "loss", "eval_loss", "seconds", "checkpoint"] {
        assert_eq!(there[key], here[key], "{key}");
    }
    let nowhere = format!("box-1:{}", folder.path("nowhere").display());
    run(&mut finetune(["watch", &nowhere, "--ssh-config", &config])).expect(2).says("at box-1");
}
