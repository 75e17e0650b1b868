//! What goes wrong where ranks hold a model together: a rank that is lost or frozen, a full disk, one that is slow or
//! hangs, a cut cable. It is said by name, no checkpoint is torn, and the run goes on to the bits of one process.

use std::process::Command;
use std::time::{Duration, Instant};

use finetune_store::{RealDisk, newest_verified, verify_directory};

use crate::failpoints::{OF_EVERY_CONNECTION, OF_EVERY_PART, OF_EVERY_STAGE};
use crate::folder::{Folder, RunResult};
use crate::launch::{metrics_so_far, pid_of};
use crate::program::{BINARY, run, start};
use crate::ssh::{Boxes, FOR_EVER, wait_for_steps};
use crate::stages::{expect_same, folder_of};

/// The model has four layers, of which three ranks have 2, 1 and 1.
const FAMILY: &str = "qwen3_5";

/// Each row is a micro-batch, all of a step go through a layer together, and nothing is evaluated. So each of three
/// ranks sends and receives once for each row on the way forward, and then once on the way back.
const ROWS: usize = 4;
const RECIPE: &str = r#"
output_dir = "run"
seed = 7
[model]
path = "model"
[lora]
rank = 4
[data]
train = "train.jsonl"
[train]
max_steps = 8
global_batch_size = 4
micro_batch_size = 1
[checkpoint]
every = 1
keep_last = 1
"#;

fn folder() -> Folder {
    let folder = folder_of(FAMILY);
    folder.write("recipe.toml", RECIPE.as_bytes());
    folder
}

fn launch(folder: &Folder, stages: &str, output: &str, more: &[&str]) -> Command {
    let set = format!("parallel.stages={stages}");
    folder.launch(&["-n", stages], output, &[&["--set", set.as_str()][..], more].concat())
}

/// The ranks that end with an error which names rank `lost`. Each rank's lines begin with its name.
fn naming(stderr: &str, lost: usize) -> Vec<usize> {
    let named = format!(" error: rank {lost} (");
    let mut ranks: Vec<usize> = stderr
        .lines()
        .filter(|line| line.contains(&named))
        .filter_map(|line| line.strip_prefix("[rank ")?.split(' ').next()?.parse().ok())
        .collect();
    ranks.sort_unstable();
    ranks.dedup();
    ranks
}

/// A rank is stopped in its way by a signal while it sends or receives, forward or back.
#[derive(Clone, Copy, Debug)]
struct Loss {
    signal: &'static str,
    rank: usize,
    point: &'static str,
    is_back: bool,
}

impl Loss {
    fn all(signal: &'static str) -> Vec<Loss> {
        let of_rank = |rank| {
            let points = OF_EVERY_STAGE.iter().flat_map(|&point| [(point, false), (point, true)]);
            points.map(move |(point, is_back)| Loss { signal, rank, point, is_back })
        };
        (0..3).flat_map(of_rank).collect()
    }

    /// The point in the fourth step, for ever.
    fn failpoint(&self, folder: &Folder) -> String {
        let hit = 2 * ROWS * 3 + if self.is_back { ROWS } else { 0 } + 2;
        format!("{}:{hit}@{}+{}", self.point, self.rank, folder.path("never").display())
    }

    /// Returns how long it took until all others have said which rank it is.
    fn happens(&self, folder: &Folder, undisturbed: &RunResult) -> Duration {
        let Loss { signal, rank, point, is_back } = self;
        let output = format!("{signal} {rank} {point} {}", if *is_back { "back" } else { "forward" });
        let directory = folder.path(&output);
        let mut command = launch(folder, "3", &directory.to_string_lossy(), &[]);
        let mut running = start(command.env("FINETUNE_FAILPOINT", self.failpoint(folder)));
        running.wait_until("the rank is there", |running| running.stderr().contains("held up at "));
        let pid = pid_of(&directory, self.rank).expect("a rank");
        let others: Vec<usize> = (0..3).filter(|rank| *rank != self.rank).collect();
        let began = Instant::now();
        strike(self.signal, pid);
        running.wait_until("all others name it", |running| naming(&running.stderr(), self.rank) == others);
        let took = began.elapsed();
        let how = if self.signal == "KILL" { "its connections closed" } else { "it fell silent" };
        running.wait().expect(3).says(how).says(&format!("rank {} (", self.rank)).says("--resume");
        assert!(metrics_so_far(&directory) >= 3, "{self:?}: in the fourth step");
        run(&mut launch(folder, "2", &output, &["--resume"])).expect(0).says("(step ");
        expect_same(&folder.result(&output), undisturbed, &output);
        took
    }
}

fn strike(signal: &str, pid: u32) {
    let sent = Command::new("kill").args([format!("-{signal}"), pid.to_string()]).status();
    assert!(sent.expect("kill").success(), "kill -{signal} {pid}");
}

/// All others name it within a second if it is killed, and within `distributed.timeout` if it is frozen. A busy
/// machine gets ten times as long; `benches/losses.py --stages` measures.
#[test]
fn a_lost_stage_is_named_by_all_others_in_time() {
    let folder = folder();
    folder.run("undisturbed", &[]).expect(0);
    let undisturbed = folder.result("undisturbed");
    for (signal, promised) in [("KILL", 1), ("STOP", 5)] {
        // Those that are frozen are waited for: half of the cases.
        let is_wanted = |loss: &Loss| signal == "KILL" || loss.is_back == (loss.point == "hops.receive");
        let cases: Vec<Loss> = Loss::all(signal).into_iter().filter(is_wanted).collect();
        let took = std::sync::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for cases in cases.chunks(cases.len() / 3) {
                let (folder, undisturbed, took) = (&folder, &undisturbed, &took);
                scope.spawn(move || {
                    for loss in cases {
                        let time = loss.happens(folder, undisturbed);
                        took.lock().expect("no panic").push(time);
                        assert!(time < Duration::from_secs(10 * promised), "{loss:?}: named after {time:?}");
                    }
                });
            }
        });
        println!("{signal}: named by all after {:?}", took.into_inner().expect("no panic"));
    }
}

/// Also before the first step, while they connect. It is no fault of the input, so the launcher may start them again.
#[test]
fn a_stage_that_freezes_while_they_connect_is_named() {
    let folder = folder();
    std::thread::scope(|scope| {
        for rank in 0..3 {
            let folder = &folder;
            scope.spawn(move || {
                let directory = folder.path(&rank.to_string());
                let mut command = launch(folder, "3", &directory.to_string_lossy(), &[]);
                let held_up = format!("{OF_EVERY_CONNECTION}:3@{rank}+{}", folder.path("never").display());
                let mut running = start(command.env("FINETUNE_FAILPOINT", held_up));
                running.wait_until("they connect", |running| running.stderr().contains("held up at "));
                strike("STOP", pid_of(&directory, rank).expect("a rank"));
                let others: Vec<usize> = (0..3).filter(|other| *other != rank).collect();
                running.wait_until("all others name it", |running| naming(&running.stderr(), rank) == others);
                running.wait().expect(3).says("was lost: it fell silent").says("did not answer any more");
            });
        }
    });
}

/// A rank that computes for long does not wait for another one. It says all the same that one is lost.
#[test]
fn a_stage_that_computes_names_a_lost_one() {
    let folder = folder();
    let directory = folder.path("run");
    let computes = Loss { signal: "KILL", rank: 0, point: "hops.send", is_back: false };
    let mut command = launch(&folder, "2", &directory.to_string_lossy(), &[]);
    let mut running = start(command.env("FINETUNE_FAILPOINT", computes.failpoint(&folder)));
    running.wait_until("it computes", |running| running.stderr().contains("held up at "));
    strike(computes.signal, pid_of(&directory, 1).expect("a rank"));
    running.wait_until("its words", |running| running.stderr().contains("; rank 0 is still at work in step "));
    let ended = running.wait().expect(3).says("rank 1 (").says("was lost: its connections closed");
    ended.says("was killed by signal 9");
}

/// The cable of a host is cut, or the way between two hosts that the third one reaches: packets vanish without a word.
/// All that are left say between which ranks, and the checkpoints are whole.
#[test]
fn a_cut_cable_between_stages_is_named() {
    for (cut, said_by, words) in [
        (&["box-2"][..], &[0, 2][..], "was lost: it fell silent"),
        (&["box-2", "box-3"], &[0, 1, 2], "do not hear each other, though both are alive"),
    ] {
        let Some(boxes) = Boxes::start(&["--netns"]) else { return };
        let folder = folder();
        let output = folder.path("run");
        let more = [&FOR_EVER[..], &["--set", "parallel.stages=3"]].concat();
        let mut running = start(&mut boxes.launch(&folder, &[], &output, &more));
        wait_for_steps(&mut running, &output, 10);
        match cut {
            [a, b] => boxes.keep_apart([*a, *b]),
            hosts => hosts.iter().for_each(|host| boxes.cable("--cut", host)),
        }
        // The words of the one whose cable is cut may get through or not.
        let all_name_it = |stderr: &str| said_by.iter().all(|rank| naming(stderr, 1).contains(rank));
        running.wait_until("all name it", |running| all_name_it(&running.stderr()));
        let ended = running.wait().expect(3).says(words).says("rank 1 (box-2, process ");
        assert!(ended.stderr.contains("rank 2 (box-3, process ") == (cut.len() == 2), "{}", ended.stderr);
        let (newest, damaged) = newest_verified(&RealDisk, &output.join("checkpoints"), "step-").expect("checkpoints");
        assert!(newest.is_some() && damaged.is_empty(), "{cut:?}: {damaged:?}");
    }
}

/// Rank 0 has no room for a checkpoint that it makes of what all have: all end with its error and the disk's exit code,
/// the checkpoint before is whole, and the run goes on from it.
#[test]
fn a_full_disk_ends_all_stages() {
    let folder = folder();
    folder.run("undisturbed", &[]).expect(0);
    for stages in ["2", "3"] {
        let mut killed = launch(&folder, stages, stages, &[]);
        run(killed.env("FINETUNE_FAILPOINT", "checkpoint.done:3@0")).expect(3).says("was killed by signal 6");
        // In units of 1024 bytes: enough for the adapter, not for both moments. With SIGXFSZ ignored, the write fails
        // with an error.
        let limited = format!(
            "trap '' XFSZ; ulimit -f 64; exec {BINARY} launch -n {stages} -- recipe.toml --output-dir {stages} \
             --resume --set parallel.stages={stages}"
        );
        let ended = run(Command::new("bash").args(["-c", &limited]).current_dir(folder.path("")).env("NO_COLOR", "1"));
        let ended = ended.expect(5).says("] error: no space left at").says("failed with exit code 5");
        let told = ended.stderr.matches("stopped in step 4: no space left at").count();
        assert!(told >= stages.parse::<usize>().expect("a number") - 1, "the others say so: {}", ended.stderr);
        let checkpoint = folder.path(stages).join("checkpoints/step-000003");
        verify_directory(&RealDisk, &checkpoint).expect("the checkpoint is as it was");
        run(&mut launch(&folder, "3", stages, &["--resume"])).expect(0);
        expect_same(&folder.result(stages), &folder.result("undisturbed"), stages);
    }
}

/// (stages, rank, read): a rank with two layers, which it reads in each step, and a read after the first one. A rank with
/// a single layer keeps it.
const READS: [(&str, usize, usize); 3] = [("2", 0, 200), ("2", 1, 100), ("3", 0, 200)];

/// Ranks that hold a model together and read their layers from the disk. A read of one is held up until there is a file.
fn held_up(folder: &Folder, (stages, rank, read): (&str, usize, usize), file: &str, output: &str) -> Command {
    let mut command = launch(folder, stages, output, &["--set", "model.residency=disk"]);
    command.env("FINETUNE_FAILPOINT", format!("{OF_EVERY_PART}:{read}@{rank}+{}", folder.path(file).display()));
    command
}

/// The others wait for longer than the time after which a silent rank is lost.
#[test]
fn a_slow_disk_of_one_stage_is_named_and_waited_for() {
    let folder = folder();
    folder.run("undisturbed", &[]).expect(0);
    let undisturbed = folder.result("undisturbed");
    std::thread::scope(|scope| {
        for case @ (stages, rank, _) in READS {
            let (folder, undisturbed) = (&folder, &undisturbed);
            scope.spawn(move || {
                let output = format!("{rank} of {stages}");
                let go = format!("go on, {output}");
                let mut running = start(&mut held_up(folder, case, &go, &output));
                let named = format!("rank {rank} has waited 10 s for ");
                running.wait_until("a line", |running| running.stderr().contains(&named));
                folder.write(&go, b"");
                let ended = running.wait().expect(0);
                assert_eq!(ended.stderr.matches(": no byte of it comes").count(), 1, "{}", ended.stderr);
                expect_same(&folder.result(&output), undisturbed, &output);
            });
        }
    });
}

/// All ranks end, and say whose disk it is.
#[test]
fn a_disk_that_hangs_ends_all_stages() {
    let folder = folder();
    folder.run("undisturbed", &[]).expect(0);
    for case @ (stages, rank, _) in READS {
        let output = format!("{rank} of {stages}");
        let ended = run(held_up(&folder, case, "never", &output).env("FINETUNE_DISK_TIMEOUT", "2")).expect(5);
        let ended = ended.says(&format!("rank {rank} (")).says("failed with exit code 5").says("--resume");
        let said = ended.stderr.matches("model.safetensors has come for 2 s").count();
        assert!(said >= stages.parse().expect("a number"), "all ranks say it: {}", ended.stderr);
        run(&mut launch(&folder, "2", &output, &["--resume"])).expect(0);
        expect_same(&folder.result(&output), &folder.result("undisturbed"), &output);
    }
}
