//! `finetune launch` over a real ssh. Servers on this machine play several hosts
//! (`scripts/sshd-here.sh`). If there is no sshd, the tests are skipped and say so. The tests that
//! cut cables also need root and network namespaces.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::commands::serve::ask;
use crate::folder::{CRASH_RECIPE, Folder, repository};
use crate::launch::{metrics_so_far, ranks_left, wait_until_none};
use crate::memory_limit::{MemoryGroup, rows, write_model};
use crate::program::{DEADLINE, Running, finetune, run, start};

/// Hosts box-1, box-2, …, which run until this is dropped.
pub(crate) struct Boxes {
    folder: PathBuf,
}

fn script() -> Command {
    Command::new(repository().join("scripts/sshd-here.sh"))
}

impl Boxes {
    /// `None` if they cannot be had. The reason is printed.
    pub(crate) fn start(options: &[&str]) -> Option<Boxes> {
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

    pub(crate) fn file(&self, name: &str) -> String {
        self.folder.join(name).to_string_lossy().into_owned()
    }

    /// `finetune launch` over these hosts.
    pub(crate) fn launch(&self, folder: &Folder, arguments: &[&str], output: &Path, words: &[&str]) -> Command {
        let (hosts, config) = (self.file("hosts.json"), self.file("ssh_config"));
        let arguments = [&["--hostfile", &hosts, "--ssh-config", &config], arguments].concat();
        folder.launch(&arguments, &output.to_string_lossy(), words)
    }

    pub(crate) fn cable(&self, what: &str, host: &str) {
        assert!(
            script().arg(what).arg(&self.folder).arg(host).status().expect("the script").success(),
            "{what} {host}"
        );
    }

    /// From now on two hosts do not hear each other, while all others hear both.
    pub(crate) fn keep_apart(&self, hosts: [&str; 2]) {
        let cables = std::fs::read_to_string(self.folder.join("cables")).expect("the cables (--netns)");
        for host in hosts {
            let cable = cables.lines().find(|line| line.starts_with(&format!("{host} "))).expect("a host");
            let interface = cable.split(' ').next_back().expect("an interface");
            let set = ["link", "set", interface, "type", "bridge_slave", "isolated", "on"];
            assert!(Command::new("ip").args(set).status().expect("ip").success(), "{host}");
        }
    }
}

impl Drop for Boxes {
    fn drop(&mut self) {
        let _ = script().arg("--stop").arg(&self.folder).status();
    }
}

/// Far more steps than a test waits for.
pub(crate) const FOR_EVER: [&str; 8] = [
    "--set",
    "train.max_steps=10000000",
    "--set",
    "checkpoint.every=5",
    "--set",
    "eval.every=0",
    "--set",
    "distributed.timeout=\"2s\"",
];

pub(crate) fn wait_for_steps(running: &mut Running, directory: &Path, more: usize) {
    let before = metrics_so_far(directory);
    running.wait_until("more steps", |_| metrics_so_far(directory) >= before + more);
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

/// Ranks on other hosts hold a model together, and nobody has named a port.
#[test]
fn hosts_serve_a_model_together() {
    let Some(boxes) = Boxes::start(&[]) else { return };
    let (hosts, config) = (boxes.file("hosts.json"), boxes.file("ssh_config"));
    let launch = ["launch", "--hostfile", &hosts, "--ssh-config", &config, "--"];
    let serve = ["serve", "datasets/quickstart/base", "--port", "0", "--device", "cpu"];
    let mut running = start(finetune([&launch[..], &serve].concat()).current_dir(repository()));
    running.wait_until("the address", |running| running.stdout().contains("Ctrl-C stops"));
    let said = running.stdout();
    let address = said.split("http://").nth(1).and_then(|rest| rest.split(' ').next()).expect("an address");
    let asked = r#"{"prompt": "Hello, Leon", "max_tokens": 8, "temperature": 0}"#;
    let (status, body) = ask(address, "POST", "/v1/completions", "", asked);
    assert_eq!(status, 200, "{body}");
    running.signal("TERM");
    running.wait().expect(0);
    let elsewhere = [&launch[..5], &["--program", "/bin/true", "--"], &serve].concat();
    run(finetune(elsewhere).current_dir(repository())).expect(2).says("and the model at the same path");
}

/// The folder of a copy, as the launcher names it.
fn copy_of(stderr: &str) -> PathBuf {
    let (_, rest) =
        stderr.split_once(" copied to box-1 (").and_then(|(_, rest)| rest.split_once("): ")).expect("where it lies");
    let home = std::env::var_os("HOME").map(PathBuf::from).expect("a home directory");
    home.join(rest.lines().next().expect("the folder"))
}

#[test]
fn copies_are_brought_once_and_the_run_comes_home() {
    let Some(boxes) = Boxes::start(&[]) else { return };
    let folder = Folder::with_recipe(CRASH_RECIPE);
    run(&mut folder.launch(&["-n", "3"], "here", &[])).expect(0);
    let output = folder.path("copied");
    let words = ["--set", "train.max_steps=6"];
    let ended =
        run(&mut boxes.launch(&folder, &["--copy"], &output, &words)).expect(0).says("copied to box-1 (6 files): ");
    // All boxes share one home directory, so the first copy is everybody's.
    assert!(ended.stderr.contains("unchanged on box-3: "), "{}", ended.stderr);
    assert!(ended.stderr.contains("brought from box-1"), "{}", ended.stderr);
    assert!(!copy_of(&ended.stderr).exists(), "the copy of a run that is done is removed");
    assert!(folder.result("copied").checkpoints().contains(&"step-000006".to_owned()));
    // Without --resume the run is refused. With it, the run goes on, though a comment and the rows'
    // folder are others.
    run(&mut boxes.launch(&folder, &["--copy"], &output, &[])).expect(2).says("holds a run already");
    let recipe = std::fs::read_to_string(folder.path("recipe.toml")).expect("the recipe");
    folder.write("recipe.toml", format!("# a note\n{recipe}").as_bytes());
    let ended = run(&mut boxes.launch(&folder, &["--copy"], &output, &["--resume"])).expect(0).says("(step 6)");
    assert!(ended.stderr.contains("brought from box-1"), "{}", ended.stderr);
    let name = "adapter/adapter_model.safetensors";
    assert!(folder.result("copied").files[name] == folder.result("here").files[name]);
}

#[test]
fn a_copy_that_was_stopped_is_found_again_and_is_the_users_alone() {
    let Some(boxes) = Boxes::start(&[]) else { return };
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let output = folder.path("run");
    let mut running = start(&mut boxes.launch(&folder, &["--copy"], &output, &FOR_EVER));
    running.wait_until("a checkpoint", |running| running.stderr().contains(" saved "));
    let copy = copy_of(&running.stderr());
    let modes = Command::new("find").arg(&copy).args(["-perm", "/077"]).output().expect("the find command");
    assert_eq!(String::from_utf8_lossy(&modes.stdout), "", "others may read it");
    running.signal("TERM");
    let ended = running.wait().expect(143).says("goes on there");
    assert!(ended.stderr.contains("the run is in box-1:~/"), "{}", ended.stderr);
    let steps = ["--resume", "--set", "train.max_steps=1", "--set", "checkpoint.every=5", "--set", "eval.every=0"];
    // The run has come further than that, and says so: its copy was found.
    run(&mut boxes.launch(&folder, &["--copy"], &output, &steps)).expect(2).says("is past the last step");
    std::fs::remove_dir_all(copy).expect("a copy");
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
        wait_until_none(DEADLINE, || ranks_left(&output));
        if signal == "INT" {
            running.wait().expect(130).says("which is saved; go on with --resume");
        }
    }
}

/// If a host is cut off, all know it. With `min_ranks` the launcher goes on with the others.
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
    // The words of the cut-off rank may get through or not.
    let ends = ["rank 2 (box-3) did not answer any more", "lost another rank"];
    assert!(ends.iter().any(|end| stderr.contains(end)), "{stderr}");
    running.signal("TERM");
    running.wait().expect(143);
    boxes.cable("--heal", "box-3");
    assert_eq!(ranks_left(&output), 0);
}

/// Fewer hosts are left than hold the layers of the model together. The launcher says what would let the run go on.
#[test]
fn a_lost_host_of_three_stages_names_auto() {
    let Some(boxes) = Boxes::start(&["--netns"]) else { return };
    let folder = crate::stages::folder();
    let output = folder.path("run");
    let words = [&FOR_EVER[..], &["--set", "distributed.min_ranks=2", "--set", "parallel.stages=3"]].concat();
    let mut running = start(&mut boxes.launch(&folder, &["--max-restarts", "1"], &output, &words));
    wait_for_steps(&mut running, &output, 10);
    boxes.cable("--cut", "box-3");
    let ended = running.wait().expect(3).says("hosts left: 2 of 3; the recipe needs 3 ranks");
    let ended = ended.says("hint: parallel.stages = \"auto\" lets 2 ranks hold all layers");
    assert!(!ended.stderr.contains("distributed.min_ranks in the recipe"), "{}", ended.stderr);
    boxes.cable("--heal", "box-3");
}

/// Three hosts hold a model together that has no room on one of them, nor on one of two. One is killed, and the launcher
/// goes on with the layers on the two that are left, since `"auto"` fits them.
#[test]
fn auto_goes_on_with_the_hosts_that_are_left() {
    // Such hosts share the machine's memory, evenly. In memory the model takes about 330 MiB whole, 170 on each of two
    // and 135 on each of three.
    let Some(group) = MemoryGroup::start("hosts", 540 << 20) else { return };
    let Some(boxes) = Boxes::start(&[]) else { return };
    (1..=3).for_each(|number| group.take(boxes.server(number)));
    let folder = Folder::empty();
    write_model(&folder.path("model"), 32);
    folder.write("rows.jsonl", rows().as_bytes());
    folder.write("recipe.toml", OVER_HOSTS.as_bytes());
    let output = folder.path("run");
    let mut running = start(&mut boxes.launch(&folder, &["--max-restarts", "1"], &output, &FOR_EVER));
    running.wait_until("three stages", |running| running.stderr().contains("the 32 layers are spread over 3 ranks"));
    running.wait_until("a checkpoint", |running| running.stderr().contains(" saved "));
    boxes.kill(3);
    running.wait_until("a restart", |running| running.stderr().contains("with 2 ranks (restart 1 of 1)"));
    let stderr = running.stderr();
    assert!(stderr.contains("box-3 is not reached any more"), "{stderr}");
    assert!(stderr.contains("starting again from the newest checkpoint"), "{stderr}");
    running.wait_until("two stages", |running| running.stderr().contains("the 32 layers are spread over 2 ranks"));
    wait_for_steps(&mut running, &output, 2);
    running.signal("TERM");
    running.wait().expect(143);
}

const OVER_HOSTS: &str = r#"output_dir = "run"
[model]
path = "model"
device = "cpu"
residency = "memory"
[lora]
rank = 1
target_modules = ["q_proj"]
[data]
train = "rows.jsonl"
[train]
global_batch_size = 2
[parallel]
stages = "auto"
[distributed]
min_ranks = 2
"#;

impl Boxes {
    /// The process of a host's ssh server.
    fn server(&self, number: usize) -> u32 {
        let file = self.folder.join(format!("sshd-{number}.pid"));
        std::fs::read_to_string(file).expect("its process").trim().parse().expect("a number")
    }

    /// Kills a host: its server, and all that runs there.
    fn kill(&self, number: usize) {
        let output = Command::new("ps").args(["-eo", "pid,ppid"]).output().expect("the ps command");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let numbers =
            |line: &str| -> Vec<u32> { line.split_whitespace().filter_map(|word| word.parse().ok()).collect() };
        let processes: Vec<Vec<u32>> = text.lines().map(numbers).filter(|numbers| numbers.len() == 2).collect();
        let mut those = vec![self.server(number)];
        let mut next = 0;
        while next < those.len() {
            let children = processes.iter().filter(|process| process[1] == those[next]).map(|process| process[0]);
            let children: Vec<u32> = children.collect();
            those.extend(children);
            next += 1;
        }
        let those: Vec<String> = those.iter().map(u32::to_string).collect();
        let killed = Command::new("kill").arg("-KILL").args(&those).status().expect("kill");
        assert!(those.len() > 2 && killed.success(), "{those:?}");
    }

    /// Gives a host (of `--netns`) its own home directory, and the user another login shell there.
    fn log_in(&self, number: usize, shell: &str, home: &Path) {
        std::fs::create_dir_all(home).expect("a home");
        let passwd = std::fs::read_to_string("/etc/passwd").expect("users");
        let user = passwd.lines().filter(|line| !line.starts_with("root:"));
        let own = format!("root:x:0:0:root:{}:{shell}\n", home.display());
        let file = self.folder.join(format!("passwd-{number}"));
        let text = own + &user.map(|line| format!("{line}\n")).collect::<String>();
        std::fs::write(&file, text).expect("written");
        self.inside(number, &["mount", "--bind", &file.to_string_lossy(), "/etc/passwd"]);
    }

    fn inside(&self, number: usize, command: &[&str]) {
        let pid = std::fs::read_to_string(self.folder.join(format!("box-{number}.pid"))).expect("its holder");
        let status = Command::new("nsenter")
            .args(["--target", pid.trim(), "--net", "--uts", "--mount", "--"])
            .args(command)
            .status();
        assert!(status.expect("nsenter").success(), "{command:?}");
    }
}

fn there_is(program: &str) -> bool {
    Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .output()
        .is_ok_and(|output| output.status.success())
}

#[test]
fn any_login_shell_and_any_login_file_will_do() {
    let Some(boxes) = Boxes::start(&["--netns"]) else { return };
    let folder = Folder::with_recipe(CRASH_RECIPE);
    run(&mut folder.launch(&["-n", "3"], "here", &[])).expect(0);
    for (name, shell, file, text) in [
        ("fish", "fish", ".none", ""),
        ("zsh", "zsh", ".zshenv", "echo welcome; printf 'caf\\351\\n' >&2"),
        ("tcsh", "tcsh", ".tcshrc", "echo welcome"),
        ("prints", "bash", ".bashrc", "echo welcome; echo '{\"rank\": 7}'"),
        ("another", "bash", ".bashrc", "exec dash"),
        ("asks", "bash", ".bashrc", "read -r answer"),
    ] {
        if !there_is(shell) {
            println!("SKIPPED: no {shell}");
            continue;
        }
        let home = folder.path(&format!("home-{name}"));
        std::fs::create_dir_all(&home).expect("a home");
        std::fs::write(home.join(file), text).expect("a login file");
        boxes.log_in(2, &format!("/usr/bin/{shell}"), &home);
        let ended = run(&mut boxes.launch(&folder, &[], &folder.path(name), &[])).expect(0);
        assert!(!ended.stdout.contains("token") && !ended.stderr.contains("clock"), "{name}: {}", ended.stderr);
        folder.result(name).expect_same(&folder.result("here"), name);
    }
    let home = folder.path("home-keeps");
    std::fs::create_dir_all(&home).expect("a home");
    std::fs::write(home.join(".bashrc"), "cat > /dev/null").expect("a login file");
    boxes.log_in(2, "/usr/bin/bash", &home);
    run(&mut boxes.launch(&folder, &[], &folder.path("keeps"), &[])).expect(2).says("box-2: its login files keep");
}

/// No configuration of ssh makes a terminal echo a secret.
#[test]
fn no_terminal_shows_the_token() {
    let Some(boxes) = Boxes::start(&[]) else { return };
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let config = std::fs::read_to_string(boxes.file("ssh_config")).expect("the configuration");
    folder.write("terminal", format!("Host *\n  RequestTTY force\n  RemoteCommand uptime\n{config}").as_bytes());
    let (hosts, config) = (boxes.file("hosts.json"), folder.path("terminal").to_string_lossy().into_owned());
    let ended = run(&mut folder.launch(&["--hostfile", &hosts, "--ssh-config", &config], "run", &[])).expect(0);
    for text in [&ended.stdout, &ended.stderr] {
        assert!(!text.contains("token\":") && !text.contains("\"rank\":0"), "{text}");
    }
}

#[test]
fn what_ssh_says_gets_its_own_hint() {
    let Some(boxes) = Boxes::start(&[]) else { return };
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let config = std::fs::read_to_string(boxes.file("ssh_config")).expect("the configuration");
    let (key, hosts) = (boxes.file("key"), boxes.file("known_hosts"));
    for (from, to, says, code) in [
        (key.as_str(), "/nowhere/key", "ssh-copy-id box-1", 2),
        (hosts.as_str(), "/nowhere/hosts", "accept its key: `ssh box-1`", 2),
        ("    Port ", "    Port 1\n    Port ", "start sshd there", 3),
    ] {
        folder.write("other", config.replace(from, to).as_bytes());
        let (hosts, other) = (boxes.file("hosts.json"), folder.path("other").to_string_lossy().into_owned());
        let ended = run(&mut folder.launch(&["--hostfile", &hosts, "--ssh-config", &other], "run", &[])).expect(code);
        assert!(ended.stderr.contains(says) && !ended.stderr.contains("--copy"), "{says}: {}", ended.stderr);
    }
    let ended = run(&mut boxes.launch(&folder, &["--program", "~/bin/finetune"], &folder.path("run"), &[])).expect(2);
    assert!(ended.stderr.contains("~/bin/finetune (~ is not expanded"), "{}", ended.stderr);
}

/// A stopped rank on another host reads no order. It is ended all the same.
#[test]
fn a_stopped_rank_on_another_host_is_ended() {
    let Some(boxes) = Boxes::start(&[]) else { return };
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let output = folder.path("run");
    let mut running = start(&mut boxes.launch(&folder, &[], &output, &FOR_EVER));
    wait_for_steps(&mut running, &output, 5);
    let list = Command::new("ps").args(["-eo", "pid,args"]).output().expect("the ps command");
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    let path = output.to_string_lossy().into_owned();
    let mut ranks = list.lines().filter(|line| line.contains(" run --assigned ") && line.contains(&path));
    let last = ranks.next_back().and_then(|line| line.split_whitespace().next()).expect("a rank");
    assert!(Command::new("kill").args(["-STOP", last]).status().expect("kill").success());
    let ended = running.wait().expect(3).says("did not answer any more");
    assert!(!ended.stderr.contains("may still be running"), "{}", ended.stderr);
    assert_eq!(ranks_left(&output), 0, "{}", ended.stderr);
}

/// Rank 0's host is lost, and no disk is shared. The run goes on from the copy that another host
/// keeps.
#[test]
fn the_host_that_holds_the_run_may_be_lost() {
    for copies in ["1", "0"] {
        let Some(boxes) = Boxes::start(&["--netns"]) else { return };
        let folder = Folder::with_recipe(CRASH_RECIPE);
        let output = folder.path("runs/run");
        std::fs::create_dir_all(folder.path("runs")).expect("a folder");
        let runs = folder.path("runs").to_string_lossy().into_owned();
        [2, 3].iter().for_each(|number| boxes.inside(*number, &["mount", "-t", "tmpfs", "none", &runs]));
        let copies = format!("checkpoint.copies={copies}");
        let words = [&FOR_EVER[..], &["--set", "distributed.min_ranks=1", "--set", &copies]].concat();
        let mut running = start(&mut boxes.launch(&folder, &["--max-restarts", "1"], &output, &words));
        wait_for_steps(&mut running, &output, 12);
        boxes.cable("--cut", "box-1");
        if copies.ends_with('1') {
            running.wait_until("a restart", |running| running.stderr().contains("(restart 1 of 1)"));
            running.wait_until("steps from the copy", |running| {
                let stderr = running.stderr();
                stderr.contains("is kept on box-") && stderr.matches("training steps ").count() == 2
            });
            assert!(!running.stderr().contains("starting from the beginning"), "{}", running.stderr());
            assert!(!running.stderr().contains("from the beginning, since"), "{}", running.stderr());
            running.signal("TERM");
            running.wait().expect(143);
        } else {
            let ended = running.wait().expect(3).says("box-1 holds the run and is not reached any more");
            assert!(ended.stderr.contains("checkpoints/step-"), "{}", ended.stderr);
        }
        boxes.cable("--heal", "box-1");
    }
}
