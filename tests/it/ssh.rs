//! `finetune launch` over a real ssh: servers on this machine that play several hosts (`scripts/sshd-here.sh`). Skipped, with a word,
//! where there is no sshd; the tests that cut cables also need root and network namespaces.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::folder::{CRASH_RECIPE, Folder, repository};
use crate::program::{Running, run, start};

/// Hosts box-1, box-2, … that are up until this is dropped.
struct Boxes {
    folder: PathBuf,
}

fn script() -> Command {
    Command::new(repository().join("scripts/sshd-here.sh"))
}

impl Boxes {
    /// `None`, with a word why, where they cannot be had.
    fn start(options: &[&str]) -> Option<Boxes> {
        let check = script().args(options).arg("--check").output().expect("the script");
        if !check.status.success() {
            println!("SKIPPED: {}", String::from_utf8_lossy(&check.stderr).trim());
            return None;
        }
        let output = script().args(options).args(["-n", "3", "--start"]).output().expect("the script");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let folder = text.lines().next().map(PathBuf::from);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        Some(Boxes { folder: folder.expect("the folder comes first") })
    }

    fn file(&self, name: &str) -> String {
        self.folder.join(name).to_string_lossy().into_owned()
    }

    /// `launch` over these hosts.
    fn launch(&self, folder: &Folder, arguments: &[&str], output: &Path, words: &[&str]) -> Command {
        let (hosts, config) = (self.file("hosts.json"), self.file("ssh_config"));
        let arguments = [&["--hostfile", &hosts, "--ssh-config", &config], arguments].concat();
        folder.launch(&arguments, &output.to_string_lossy(), words)
    }

    fn cable(&self, what: &str, host: &str) {
        assert!(
            script().arg(what).arg(&self.folder).arg(host).status().expect("the script").success(),
            "{what} {host}"
        );
    }
}

impl Drop for Boxes {
    fn drop(&mut self) {
        let _ = script().arg("--stop").arg(&self.folder).status();
    }
}

/// Far more steps than a test will let it take.
const FOR_EVER: [&str; 8] = [
    "--set",
    "train.max_steps=10000000",
    "--set",
    "checkpoint.every=5",
    "--set",
    "eval.every=0",
    "--set",
    "distributed.timeout=\"2s\"",
];

fn steps(directory: &Path) -> usize {
    std::fs::read_to_string(directory.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

fn wait_for_steps(running: &mut Running, directory: &Path, more: usize) {
    let before = steps(directory);
    running.wait_until("more steps", |_| steps(directory) >= before + more);
}

fn ranks_left(directory: &Path) -> usize {
    let output = Command::new("ps").args(["-eo", "args"]).output().expect("the ps command");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let directory = directory.to_string_lossy();
    text.lines().filter(|line| line.contains(" run --assigned ") && line.contains(directory.as_ref())).count()
}

#[test]
fn ranks_on_other_hosts_make_the_same_adapter() {
    let Some(boxes) = Boxes::start(&[]) else { return };
    let folder = Folder::with_recipe(CRASH_RECIPE);
    run(&mut folder.launch(&["-n", "3"], "here", &[])).expect(0);
    let output = folder.path("there");
    let ended =
        run(&mut boxes.launch(&folder, &[], &output, &[])).expect(0).says("[rank 0 box-1] 3 ranks joined over tcp");
    folder.result("there").expect_same(&folder.result("here"), &ended.stderr);
}

#[test]
fn copies_are_brought_once() {
    let Some(boxes) = Boxes::start(&[]) else { return };
    let folder = Folder::with_recipe(CRASH_RECIPE);
    run(&mut folder.launch(&["-n", "3"], "here", &[])).expect(0);
    let output = folder.path("copied");
    let name = format!("run-{}", std::process::id());
    let ended = run(&mut boxes.launch(&folder, &["--copy"], Path::new(&name), &[])).expect(0).says("copied to box-1");
    // All boxes share one home directory: the first copy is everybody's.
    let (_, rest) = ended.stderr.split_once("unchanged on box-3: ").expect("where it lies");
    let home = std::env::var_os("HOME").map(PathBuf::from).expect("a home directory");
    let copy = home.join(rest.lines().next().expect("the folder"));
    std::fs::rename(copy.join("runs").join(&name), &output).expect("the run lies beside the copy");
    std::fs::remove_dir_all(&copy).expect("a copy");
    let name = "adapter/adapter_model.safetensors";
    assert!(folder.result("copied").files[name] == folder.result("here").files[name]);
}

#[test]
fn hosts_that_are_not_ready_are_all_named_before_anything_starts() {
    let Some(boxes) = Boxes::start(&[]) else { return };
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let output = folder.path("run");
    let elsewhere = folder.path("model").to_string_lossy().into_owned();
    for (arguments, says) in [
        (vec!["--program", "/nowhere/finetune"], "there is no such program"),
        (vec!["--directory", elsewhere.as_str()], "recipe.toml"),
        (vec!["--program", "/bin/true"], "must be of this version"),
    ] {
        let ended = run(&mut boxes.launch(&folder, &arguments, &output, &[])).expect(2).says("not every host is ready");
        for host in ["box-1", "box-2", "box-3"] {
            assert!(ended.stderr.contains(host), "{arguments:?}: {}", ended.stderr);
        }
        assert!(ended.stderr.contains(says), "{arguments:?}: {}", ended.stderr);
        assert!(!output.exists(), "nothing has started");
    }
    let hosts = folder.path("hosts.json");
    std::fs::write(&hosts, r#"[{"ssh": "no-such-host.invalid"}]"#).expect("written");
    let hosts = hosts.to_string_lossy().into_owned();
    run(&mut folder.launch(&["--hostfile", &hosts], "run", &[])).expect(2).says("no-such-host.invalid");
}

#[test]
fn no_rank_on_another_host_outlives_the_launcher() {
    let Some(boxes) = Boxes::start(&[]) else { return };
    let folder = Folder::with_recipe(CRASH_RECIPE);
    for signal in ["KILL", "INT"] {
        let output = folder.path(signal);
        let mut running = start(&mut boxes.launch(&folder, &[], &output, &FOR_EVER));
        wait_for_steps(&mut running, &output, 5);
        running.signal(signal);
        let began = Instant::now();
        while ranks_left(&output) > 0 {
            assert!(began.elapsed() < Duration::from_secs(10), "{signal}: ranks are left over");
            std::thread::sleep(Duration::from_millis(20));
        }
        if signal == "INT" {
            running.wait().expect(130).says("which is saved; go on with --resume");
        }
    }
}

/// A host that is cut off: all know it, and with `min_ranks` the launcher goes on with the others.
#[test]
fn a_host_that_is_cut_off_is_left_out() {
    let Some(boxes) = Boxes::start(&["--netns"]) else { return };
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let output = folder.path("run");
    let words = [&FOR_EVER[..], &["--set", "distributed.min_ranks=2"]].concat();
    let mut running = start(&mut boxes.launch(&folder, &["--max-restarts", "1"], &output, &words));
    wait_for_steps(&mut running, &output, 10);
    boxes.cable("--cut", "box-3");
    running.wait_until("a restart", |running| running.stderr().contains("with 2 ranks (restart 1 of 1)"));
    wait_for_steps(&mut running, &output, 5);
    let stderr = running.stderr();
    assert!(stderr.contains("rank 2 (box-3, process") && stderr.contains("it fell silent"), "{stderr}");
    assert!(stderr.contains("box-3 is not reached any more"), "{stderr}");
    // What the cut-off rank itself says gets through or not.
    let ends = ["rank 2 (box-3) did not answer any more", "lost another rank"];
    assert!(ends.iter().any(|end| stderr.contains(end)), "{stderr}");
    running.signal("TERM");
    running.wait().expect(143);
    boxes.cable("--heal", "box-3");
    assert_eq!(ranks_left(&output), 0);
}
