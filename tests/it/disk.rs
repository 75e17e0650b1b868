//! A disk that is full or that hangs: exit code 5, a message that says how much is needed or what does not come, and
//! nothing lost.

use std::path::Path;
use std::process::Command;

use finetune_store::{RealDisk, verify_directory};

use crate::failpoints::OF_EVERY_PART;
use crate::folder::{CRASH_RECIPE, Folder, RunResult, tree};
use crate::program::{BINARY, Ended, finetune, run, start};

/// Bytes of all files of a checkpoint but the manifest.
fn checkpoint_bytes(checkpoint: &Path) -> u64 {
    let files = std::fs::read_dir(checkpoint).expect("a checkpoint").map(|entry| entry.expect("a file"));
    files.filter(|file| file.file_name() != "manifest.json").map(|file| file.metadata().expect("a file").len()).sum()
}

/// Checks that the run ended in step 4 because the disk was full, with the checkpoint of step 2
/// intact.
fn expect_full(ended: Ended, run: &Path) {
    let ended = ended.expect(5).says("no space left at").says("nothing that was complete before has been touched");
    let checkpoint = run.join("checkpoints/step-000002");
    verify_directory(&RealDisk, &checkpoint).expect("the checkpoint is as it was");
    let (before, _) = ended.stderr.split_once(" KiB were to be written").unwrap_or_else(|| panic!("{}", ended.stderr));
    let needed = before.rsplit(' ').next().unwrap_or_default();
    let needed: f64 = needed.parse().expect("a number");
    // trainer_state.json and the card are a little longer from step to step.
    let had = checkpoint_bytes(&checkpoint) as f64 / 1024.0;
    assert!((needed - had).abs() < 0.5, "{needed} KiB are said to be needed; the last checkpoint has {had}");
}

#[test]
fn a_file_size_limit() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("undisturbed", &[]).expect(0);
    assert!(folder.run_killed_at("run", &[], "checkpoint.done:1"));
    // In units of 1024 bytes: enough for the adapter, not for the optimizer's 48 KiB. With SIGXFSZ
    // ignored, the write fails with an error.
    let limited = format!("trap '' XFSZ; ulimit -f 32; exec {BINARY} run recipe.toml --output-dir run --resume");
    let ended = run(Command::new("bash").args(["-c", &limited]).current_dir(folder.path("")).env("NO_COLOR", "1"));
    expect_full(ended.says("`ulimit -f`"), &folder.path("run"));
    folder.run("run", &["--resume"]).expect(0);
    folder.result("run").expect_same(&folder.result("undisturbed"), "after there was space again");
}

/// A second try, once there is room, finds nothing in its way.
#[test]
fn files_of_a_new_project_are_written_all_or_none() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let limited = format!("trap '' XFSZ; ulimit -f 4; exec {BINARY} init project");
    let ended = run(Command::new("bash").args(["-c", &limited]).current_dir(folder.path("")).env("NO_COLOR", "1"));
    ended.expect(5).says("no space left at").says("recipe.schema.json");
    assert!(!folder.path("project/recipe.toml").exists() && !folder.path("project/recipe.schema.json").exists());
    run(finetune(["init", "project"]).current_dir(folder.path(""))).expect(0);
}

/// The ranks that write nothing are told. The launcher's exit code is 5.
#[test]
fn a_full_disk_ends_all_ranks() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let limited = format!("trap '' XFSZ; ulimit -f 32; exec {BINARY} launch -n 3 -- recipe.toml --output-dir run");
    let ended = run(Command::new("bash").args(["-c", &limited]).current_dir(folder.path("")).env("NO_COLOR", "1"));
    let ended = ended.expect(5).says("] error: no space left at").says("rank 0 (").says("failed with exit code 5");
    assert!(ended.stderr.contains("stopped in step 2: no space left at"), "the others say so: {}", ended.stderr);
    folder.run("run", &["--resume"]).expect(0);
}

/// Two ranks that read their layers from the disk. A read of rank 1 is held up until there is a file `go`.
fn held_up(folder: &Folder) -> Command {
    let mut command = folder.launch(&["-n", "2"], "run", &["--set", "model.residency=disk"]);
    command.env("FINETUNE_FAILPOINT", format!("{OF_EVERY_PART}:100@1+{}", folder.path("go").display()));
    command
}

#[test]
fn a_disk_that_brings_nothing_for_a_while_is_named_and_waited_for() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let mut running = start(&mut held_up(&folder));
    running.wait_until("a line", |running| running.stderr().contains("rank 1 has waited 10 s for "));
    folder.write("go", b"");
    let ended = running.wait().expect(0);
    assert_eq!(ended.stderr.matches("model.safetensors: no byte of it comes").count(), 1, "{}", ended.stderr);
}

/// All ranks end, and say whose disk it is.
#[test]
fn a_disk_that_hangs_ends_all_ranks() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    // For ever: neither the error nor the end of the process waits for the read.
    let ended = run(held_up(&folder).env("FINETUNE_DISK_TIMEOUT", "2")).expect(5);
    let ended = ended.says("rank 1 (").says("failed with exit code 5").says("--resume");
    let said = ended.stderr.matches("model.safetensors has come for 2 s").count();
    assert!(said >= 2, "rank 1 and rank 0 say it: {}", ended.stderr);
    folder.run("run", &["--resume"]).expect(0);
}

#[test]
fn a_time_for_the_disk_that_is_no_number_is_refused() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let mut command = folder.command("run", &["--set", "model.residency=disk"]);
    let ended = run(command.env("FINETUNE_DISK_TIMEOUT", "5m")).expect(2);
    ended.says("FINETUNE_DISK_TIMEOUT = \"5m\" is no number of seconds");
}

/// A file system of one mebibyte. Only root may mount one. For other users the test says that it
/// was skipped.
#[test]
fn a_full_file_system() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("undisturbed", &[]).expect(0);
    std::fs::create_dir(folder.path("small")).expect("a new directory");
    let Some(_mounted) = Mounted::tmpfs(&folder.path("small")) else {
        eprintln!("SKIPPED a_full_file_system: mounting a tmpfs needs root on Linux");
        return;
    };
    let output = folder.path("small/run");
    assert!(folder.run_killed_at("small/run", &[], "checkpoint.done:1"));
    // Leaves room for the small files that a start writes, and for the adapter.
    folder.write("small/ballast", &vec![1; 1 << 20 >> 1]);
    let free = || {
        let df = Command::new("df").args(["--output=avail", "-B1"]).arg(folder.path("small")).output().expect("df");
        String::from_utf8_lossy(&df.stdout).lines().last().and_then(|line| line.trim().parse().ok()).unwrap_or(0u64)
    };
    const ROOM: u64 = 56 << 10;
    assert!(free() > ROOM);
    folder.write("small/more-ballast", &vec![1; (free() - ROOM) as usize]);
    // The run's need of disk space is known: it is refused before its first step, the same way each
    // time.
    let before = tree(&output);
    for _ in 0..2 {
        let ended = folder.run("small/run", &["--resume"]).expect(5).says("on disk at ").says(" are free");
        assert!(ended.stderr.contains("KiB") && !ended.stderr.contains("training steps"), "{}", ended.stderr);
        assert!(before == tree(&output), "the refusal has changed the run directory");
    }
    let validated =
        run(finetune(["validate", "recipe.toml", "--set", "output_dir=small/run"]).current_dir(folder.path("")));
    let validated = validated.expect(5).says("on disk at ");
    assert!(validated.stdout.contains("\ndisk        about "), "{}", validated.stdout);
    for ballast in ["small/ballast", "small/more-ballast"] {
        std::fs::remove_file(folder.path(ballast)).expect("ballast");
    }
    folder.run("small/run", &["--resume"]).expect(0);
    RunResult::of(&output).expect_same(&folder.result("undisturbed"), "after there was space again");
}

struct Mounted(std::path::PathBuf);

impl Mounted {
    fn tmpfs(path: &Path) -> Option<Mounted> {
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", "size=1M", "finetune-test"]).arg(path).output();
        mounted.is_ok_and(|output| output.status.success()).then(|| Mounted(path.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}
