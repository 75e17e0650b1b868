//! `finetune launch`: several ranks are one run. It survives the loss of any rank, and none of its
//! processes outlives it.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::failpoints::{OF_EVERY_MEETING, OF_EVERY_RANK, OF_RANK_0};
use crate::folder::{CRASH_RECIPE, Folder, metrics};
use crate::program::{DEADLINE, free_port, run, start};
use crate::random::Random;

/// The number of running processes that have all of these words in their arguments.
pub(crate) fn processes_with(words: &[&str]) -> usize {
    let output = Command::new("ps").args(["-eo", "args"]).output().expect("the ps command");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
}

/// The number of running ranks that have the run's directory in their arguments.
pub(crate) fn ranks_left(directory: &Path) -> usize {
    processes_with(&[" run --assigned ", &directory.to_string_lossy()])
}

/// Waits until none is left, so long at most.
#[track_caller]
pub(crate) fn wait_until_none(longest: Duration, left: impl Fn() -> usize) {
    let began = Instant::now();
    while left() > 0 {
        assert!(began.elapsed() < longest, "something is left over");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The process of the nth rank that has the directory in its arguments.
pub(crate) fn pid_of(directory: &Path, nth: usize) -> Option<u32> {
    let output = Command::new("ps").args(["-eo", "pid,args"]).output().expect("the ps command");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let directory = directory.to_string_lossy().into_owned();
    let mut ranks = text.lines().filter(|line| line.contains("--assigned") && line.contains(&directory));
    ranks.nth(nth)?.split_whitespace().next()?.parse().ok()
}

#[test]
fn the_number_of_processes_changes_no_bit() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    run(&mut folder.launch(&["-n", "4"], "four", &[])).expect(0).says("4 ranks joined over tcp");
    let want = folder.result("four");
    for ranks in ["1", "2", "4"] {
        let output = format!("virtual-{ranks}");
        run(&mut folder.launch(&["-n", ranks], &output, &["--set", "distributed.virtual_ranks=4"])).expect(0);
        // The checkpoints hold the recipe, which now has virtual_ranks. So they are not compared.
        let got = folder.result(&output);
        assert_eq!(got.metrics, want.metrics, "{ranks} processes");
        let name = "adapter/adapter_model.safetensors";
        assert!(got.files[name] == want.files[name], "{ranks} processes: another adapter");
    }
    // A run stands for its recipe, as with `finetune run`.
    folder.finetune(&["launch", "-n", "4", "--", "four", "--resume"]).expect(0);
    folder.finetune(&["launch", "-n", "2", "--", "none.toml"]).expect(2).says("there is no recipe none.toml");
}

/// Every rank is killed at every point, in groups of two to six. The run goes on with `--resume`
/// and another number of ranks, to the same bits.
#[test]
fn a_lost_rank_changes_no_bit() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let words = ["--set", "distributed.virtual_ranks=12"];
    run(&mut folder.launch(&["-n", "3"], "undisturbed", &words)).expect(0);
    let want = folder.result("undisturbed");
    let cases: Vec<(usize, usize, &str, usize)> = [2, 3, 4, 6]
        .into_iter()
        .flat_map(|world| (0..world).map(move |rank| (world, rank)))
        .flat_map(|(world, rank)| {
            let of_rank_0 = if rank == 0 { OF_RANK_0 } else { &[] };
            let points = OF_EVERY_RANK.iter().chain(of_rank_0);
            points.flat_map(move |&point| [1, 2, 3, 5].map(|hit| (world, rank, point, hit)))
        })
        .collect();
    let (next, kills) = (std::sync::atomic::AtomicUsize::new(0), std::sync::atomic::AtomicUsize::new(0));
    let relaxed = std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((world, rank, point, hit)) = cases.get(next.fetch_add(1, relaxed)).copied() {
                    let failpoint = format!("{point}:{hit}@{rank}");
                    let (output, ranks) = (format!("{world} {failpoint}"), world.to_string());
                    let mut first = folder.launch(&["-n", &ranks], &output, &words);
                    let ended = run(first.env("FINETUNE_FAILPOINT", &failpoint));
                    match ended.code {
                        Some(3) => {
                            kills.fetch_add(1, relaxed);
                            ended.says(&format!("rank {rank} (")).says("was killed by signal 6").says("--resume");
                        }
                        // The rank did not pass the point so often.
                        code => assert_eq!(code, Some(0), "{output}: {}", ended.stderr),
                    }
                    let ranks = (12 / world).min(4).to_string();
                    run(&mut folder.launch(&["-n", &ranks], &output, &[&words[..], &["--resume"]].concat())).expect(0);
                    folder.result(&output).expect_same(&want, &output);
                }
            });
        }
    });
    println!("{} ranks killed, no bit differs", kills.into_inner());
}

/// A rank is killed in the middle of an average of steps that ranks made alone. The run goes on from the average
/// before, with another number of ranks.
#[test]
fn a_rank_lost_where_shares_meet_changes_no_bit() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let words = ["--set", "distributed.virtual_ranks=4", "--set", "distributed.sync_every=2"];
    run(&mut folder.launch(&["-n", "2"], "undisturbed", &words)).expect(0);
    let want = folder.result("undisturbed");
    for (rank, meeting, then) in [(0, 1, "4"), (1, 3, "1"), (1, 5, "2")] {
        let failpoint = format!("{OF_EVERY_MEETING}:{meeting}@{rank}");
        let mut first = folder.launch(&["-n", "2"], &failpoint, &words);
        run(first.env("FINETUNE_FAILPOINT", &failpoint)).expect(3).says("was killed by signal 6");
        run(&mut folder.launch(&["-n", then], &failpoint, &[&words[..], &["--resume"]].concat())).expect(0);
        folder.result(&failpoint).expect_same(&want, &failpoint);
    }
}

/// Steps of a run in which a rank is lost before the 15th step of each attempt. The next attempt goes on after one of the
/// three steps before that, so the third one comes to the end.
pub(crate) const THREE_ATTEMPTS: [&str; 4] = ["--set", "train.max_steps=34", "--set", "eval.every=0"];

/// The point at which this rank is lost then.
pub(crate) fn lost_in_each_attempt(rank: usize) -> String {
    format!("train.step:15@{rank}")
}

/// The launcher starts the ranks again by itself, also without `--resume`.
#[test]
fn restarts_go_on_by_themselves() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    run(&mut folder.launch(&["-n", "3"], "undisturbed", &THREE_ATTEMPTS)).expect(0);
    let want = folder.result("undisturbed");
    for rank in 0..3 {
        let output = format!("run-{rank}");
        let mut launch = folder.launch(&["-n", "3", "--max-restarts", "9"], &output, &THREE_ATTEMPTS);
        let ended = run(launch.env("FINETUNE_FAILPOINT", lost_in_each_attempt(rank))).expect(0);
        assert_eq!(ended.stderr.matches("starting again from the newest checkpoint").count(), 2, "{}", ended.stderr);
        folder.result(&output).expect_same(&want, &output);
    }
}

pub(crate) fn metrics_so_far(directory: &Path) -> usize {
    std::fs::read_to_string(directory.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

/// A rank is killed, frozen or asked to stop every second or two, for `FINETUNE_SOAK` seconds. The
/// result is that of an undisturbed run.
///
/// `FINETUNE_SOAK=600 cargo test --release --workspace --test it soak -- --ignored --nocapture`
#[test]
#[ignore = "takes as long as it is told to"]
fn soak() {
    let seconds = std::env::var("FINETUNE_SOAK").ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let directory = folder.path("run");
    let path = directory.to_string_lossy().into_owned();
    let words = ["--resume", "--set", "distributed.virtual_ranks=12", "--set", "distributed.timeout=\"1s\"", "--set"];
    let words = |steps: usize| -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).chain([format!("train.max_steps={steps}")]).collect()
    };
    let for_ever: Vec<String> = words(100_000_000);
    let for_ever: Vec<&str> = for_ever.iter().map(String::as_str).collect();
    let mut random = Random::new();
    let (began, mut done) = (Instant::now(), std::collections::BTreeMap::new());
    while began.elapsed() < Duration::from_secs(seconds) {
        let ranks: u64 = [1, 2, 3, 4, 6][random.below(5) as usize];
        let count = ranks.to_string();
        let running = start(&mut folder.launch(&["-n", &count, "--max-restarts", "1000000"], &path, &for_ever));
        // Every launch gets a few signals. The last one ends it.
        for _ in 0..1 + random.below(6) {
            std::thread::sleep(Duration::from_millis(500 + random.below(1500)));
            let signal = ["KILL", "KILL", "KILL", "STOP"][random.below(4) as usize];
            if let Some(pid) = pid_of(&directory, random.below(ranks) as usize) {
                let _ = Command::new("kill").args([format!("-{signal}"), pid.to_string()]).status();
                *done.entry(signal).or_insert(0) += 1;
            }
        }
        let signal = ["KILL", "TERM", "INT"][random.below(3) as usize];
        running.signal(signal);
        *done.entry(["a launcher", "a launcher's end"][usize::from(signal != "KILL")]).or_insert(0) += 1;
        let ended = running.wait();
        assert!(
            matches!((ended.code, ended.signal), (Some(3 | 130 | 143), _) | (_, Some(9))),
            "seed {}: {ended:?}",
            random.seed
        );
        wait_until_none(Duration::from_secs(10), || ranks_left(&directory));
    }
    let last = metrics(&directory).last().map_or(0, |row| row["step"].as_u64().expect("a number"));
    let steps = words(last as usize + 10);
    let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
    run(&mut folder.launch(&["-n", "2"], &path, &steps)).expect(0);
    let mut undisturbed = start(&mut folder.launch(&["-n", "1"], "undisturbed", &steps));
    let patience = Duration::from_secs(60 + 2 * seconds);
    assert!(undisturbed.ends_within(patience), "seed {}: {last} steps take longer than {patience:?}", random.seed);
    undisturbed.wait().expect(0);
    folder.result("run").expect_same(&folder.result("undisturbed"), &format!("seed {}", random.seed));
    println!("{done:?} in {seconds} s, {} steps, no bit differs (seed {})", last + 10, random.seed);
}

/// Far more steps than a test waits for.
const FOR_EVER: [&str; 6] =
    ["--set", "train.max_steps=10000000", "--set", "checkpoint.every=0", "--set", "eval.every=0"];

#[test]
fn a_signal_to_the_launcher_stops_all_ranks_after_the_same_step() {
    for (signal, code) in [("TERM", 143), ("INT", 130)] {
        let folder = Folder::with_recipe(CRASH_RECIPE);
        let directory = folder.path("run");
        let mut running = start(&mut folder.launch(&["-n", "3"], &directory.to_string_lossy(), &FOR_EVER));
        running.wait_until("a few steps", |_| metrics_so_far(&directory) > 5);
        running.signal(signal);
        let ended = running.wait().expect(code).says("which is saved; go on with --resume");
        assert_eq!(ranks_left(&directory), 0, "{}", ended.stderr);
        let step = metrics(&directory).last().expect("a row")["step"].as_u64().expect("a number");
        assert_eq!(folder.result("run").checkpoints().last(), Some(&format!("step-{step:06}")));
    }
}

/// The signals come in the middle of a step that has no end.
#[test]
fn a_second_signal_to_the_launcher_ends_all_ranks_at_once() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let directory = folder.path("run");
    let mut launch = folder.launch(&["-n", "2"], &directory.to_string_lossy(), &[]);
    let mut running = start(launch.env("FINETUNE_FAILPOINT", crate::signals::endless_step(&folder)));
    running.wait_until("the first step", |running| running.stderr().contains("training steps 1 to"));
    running.signal("INT");
    // Said a while after the ranks were told of the first signal.
    running.wait_until("the order", |running| running.stderr().contains(" to stop, "));
    running.signal("INT");
    running.wait().expect(130);
    // Sooner than ranks end that have only lost their launcher: those take 8 s.
    wait_until_none(Duration::from_secs(7), || ranks_left(&directory));
    assert!(folder.result("run").checkpoints().is_empty(), "nothing was saved");
}

#[test]
fn no_rank_outlives_the_launcher() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let directory = folder.path("run");
    let mut running = start(&mut folder.launch(&["-n", "3"], &directory.to_string_lossy(), &FOR_EVER));
    running.wait_until("a few steps", |_| metrics_so_far(&directory) > 5);
    assert_eq!(ranks_left(&directory), 3);
    running.signal("KILL");
    wait_until_none(DEADLINE, || ranks_left(&directory));
    // The ranks have saved their step.
    assert_eq!(folder.result("run").checkpoints().len(), 1);
}

#[test]
fn a_frozen_rank_is_named_and_ended() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let directory = folder.path("run");
    let mut running = start(&mut folder.launch(&["-n", "3"], &directory.to_string_lossy(), &FOR_EVER));
    running.wait_until("a few steps", |_| metrics_so_far(&directory) > 5);
    let pid = pid_of(&directory, 2).expect("a rank");
    assert!(Command::new("kill").args(["-STOP", &pid.to_string()]).status().expect("kill").success());
    running
        .wait()
        .expect(3)
        .says("was lost: it fell silent")
        .says("rank 2 (")
        .says("did not answer any more")
        .says("--resume");
    assert_eq!(ranks_left(&directory), 0);
}

/// A single rank has no peers that would notice it.
#[test]
fn a_frozen_single_rank_hears_the_launchers_signal() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let directory = folder.path("run");
    let mut running = start(&mut folder.launch(&["-n", "1"], &directory.to_string_lossy(), &FOR_EVER));
    running.wait_until("a few steps", |_| metrics_so_far(&directory) > 5);
    let pid = pid_of(&directory, 0).expect("a rank");
    assert!(Command::new("kill").args(["-STOP", &pid.to_string()]).status().expect("kill").success());
    running.signal("TERM");
    running.wait().expect(143).says("which is saved; go on with --resume");
    assert_eq!(ranks_left(&directory), 0);
}

#[test]
fn what_cannot_start_is_said_once_and_by_its_exit_code() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    for (arguments, words, code, says) in [
        (vec!["-n", "2"], vec!["--set", "train.nonsense=1"], 2, "unknown key"),
        (vec!["-n", "2"], vec!["--set", "model.path=\"nowhere\""], 2, "model.path"),
        (vec!["-n", "3"], vec!["--set", "distributed.virtual_ranks=4"], 2, "2 ranks would do"),
        (vec!["-n", "0"], vec![], 2, "from 1 to 256"),
        (vec!["-n", "2", "--port", "0"], vec![], 2, "a port from 1 to 65535 is expected"),
        (vec!["-n", "2", "--port", "29599-29500"], vec![], 2, "the first and the last such as 29500-29599"),
        (vec!["-n", "2"], vec!["--nonsense"], 2, "--nonsense"),
        (vec!["--hostfile", "none.json"], vec![], 2, "none.json"),
    ] {
        let ended = run(&mut folder.launch(&arguments, "run", &words)).expect(code);
        assert!(ended.stderr.contains(says), "{arguments:?} {words:?}: {}", ended.stderr);
    }
}

/// The numbers of training and of every rank, as Prometheus fetches them.
#[test]
fn prometheus_is_served_by_rank_0() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let directory = folder.path("run");
    let free = ("127.0.0.1", free_port());
    let set = format!("log.prometheus=\"{}:{}\"", free.0, free.1);
    let words = [&FOR_EVER[..], &["--set", &set]].concat();
    let mut running = start(&mut folder.launch(&["-n", "2"], &directory.to_string_lossy(), &words));
    running.wait_until("a few steps", |_| metrics_so_far(&directory) > 5);
    let fetch = |path: &str| {
        let mut socket = std::net::TcpStream::connect(free).expect("somebody listens");
        write!(socket, "GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").expect("asked");
        let mut text = String::new();
        socket.read_to_string(&mut text).expect("an answer");
        text
    };
    let text = fetch("/metrics");
    for line in [
        "# HELP finetune_loss loss per trained token of the last step",
        "# TYPE finetune_loss gauge",
        "finetune_steps 10000000",
        "finetune_learning_rate 0.05",
        "finetune_rank_step_seconds{rank=\"1\",host=",
        "finetune_rank_sent_bytes_total{rank=\"0\",host=",
        "finetune_rank_waited_milliseconds_total{rank=\"1\",peer=\"0\",peer_host=",
    ] {
        assert!(text.contains(line), "no {line:?} in\n{text}");
    }
    assert!(fetch("/other").starts_with("HTTP/1.1 404"));
    // A second run cannot have the same address, and says so before it does anything.
    run(&mut folder.command("other", &["--set", &set])).expect(2).says("log.prometheus");
    assert!(!folder.path("other").join("metrics.jsonl").exists());
}

/// The token and the address of the group are neither in arguments nor in the environment.
#[test]
fn nothing_secret_can_be_seen_from_outside() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let directory = folder.path("run");
    let mut running = start(&mut folder.launch(&["-n", "2"], &directory.to_string_lossy(), &FOR_EVER));
    running.wait_until("a few steps", |_| metrics_so_far(&directory) > 5);
    let pid = pid_of(&directory, 1).expect("a rank");
    for file in ["cmdline", "environ"] {
        let text =
            std::fs::read(format!("/proc/{pid}/{file}")).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        // Only Linux has these files. cargo tells the tests which commit they are built from.
        let words = text.unwrap_or_default();
        let words: Vec<&str> = words.split('\0').filter(|word| !word.starts_with("FINETUNE_COMMIT=")).collect();
        let secret = |word: &&str| word.len() >= 32 && word.chars().all(|letter| letter.is_ascii_hexdigit());
        assert_eq!(words.iter().flat_map(|word| word.split('=')).find(secret), None, "{file}");
    }
}

/// Puts a program in the place of ssh. It does `before`, as a host's login would, and then runs the
/// command on this host.
fn with_ssh(folder: &Folder, command: &mut Command, before: &str) {
    std::fs::create_dir_all(folder.path("bin")).expect("a folder");
    let path = folder.path("bin/ssh");
    std::fs::write(&path, format!("#!/bin/sh\n{before}\nfor last; do :; done\nexec sh -c \"$last\"\n"))
        .expect("written");
    assert!(Command::new("chmod").arg("755").arg(&path).status().expect("chmod").success());
    let search = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{search}", folder.path("bin").display()));
}

/// Two hosts that are this machine.
fn two_hosts(folder: &Folder) -> String {
    folder.write("hosts.json", br#"[{"ssh": "h1", "ips": ["127.0.0.1"]}, {"ssh": "h2", "ips": ["127.0.0.1"]}]"#);
    folder.path("hosts.json").to_string_lossy().into_owned()
}

#[test]
fn whatever_a_host_prints_the_rest_is_shown_and_no_terminal_obeys_it() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let hosts = two_hosts(&folder);
    let before = r#"printf 'caf\351\033]0;title\007 welcome\n' >&2; head -c 300000 /dev/zero | tr '\0' x >&2; echo >&2; echo hello"#;
    let mut command = folder.launch(&["--hostfile", &hosts], "run", &[]);
    with_ssh(&folder, &mut command, before);
    let ended = run(&mut command).expect(0).says("2 ranks joined").says("caf\u{fffd}\\u{1b}]0;title\\u{7} welcome");
    assert!(!ended.stderr.contains('\u{1b}') && !ended.stdout.contains("hello"), "{}", ended.stderr);
    assert!(ended.stderr.contains("more bytes)"), "a long line is cut");
    assert!(ended.stderr.lines().all(|line| line.len() < 70_000));
    // Both hosts are one machine. The output says so, and they share its threads.
    assert!(ended.stderr.contains("h1 and h2 are one machine"), "{}", ended.stderr);
}

#[test]
fn a_signal_is_heard_before_any_rank_is_there() {
    for arguments in [&[][..], &["--copy"]] {
        let folder = Folder::with_recipe(CRASH_RECIPE);
        let hosts = two_hosts(&folder);
        let login = format!("sleep {}", 90_000 + std::process::id());
        let mut command = folder.launch(&[&["--hostfile", hosts.as_str()], arguments].concat(), "run", &[]);
        with_ssh(&folder, &mut command, &login);
        let mut running = start(&mut command);
        running.wait_until("a login", |_| processes_with(&[&login]) > 0);
        running.signal("TERM");
        // A login that is not given up ends the launch with another code, after 40 s.
        running.wait().expect(143).says("stopped before any rank was started");
        wait_until_none(DEADLINE, || processes_with(&[&login]));
    }
}

/// A rank that is late does not hold up the launcher's end, and is not left behind.
#[test]
fn a_signal_is_heard_while_a_rank_is_late() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let hosts = two_hosts(&folder);
    let sleep = format!("sleep {}", 80_000 + std::process::id());
    let late = format!(
        "#!/bin/sh\ncase \"$1 $*\" in \"run \"*) mkdir first 2>/dev/null || {sleep} ;; esac\nexec {} \"$@\"\n",
        crate::program::BINARY
    );
    folder.write("late.sh", late.as_bytes());
    let program = folder.path("late.sh").to_string_lossy().into_owned();
    assert!(Command::new("chmod").args(["755", &program]).status().expect("chmod").success());
    let mut command = folder.launch(&["--hostfile", &hosts, "--program", &program], "run", &[]);
    with_ssh(&folder, &mut command, "");
    let mut running = start(&mut command);
    running.wait_until("the late rank", |_| processes_with(&[&sleep]) > 0);
    running.signal("TERM");
    // Without the signal it would end after 60 s.
    assert!(running.ends_within(Duration::from_secs(45)), "{}", running.stderr());
    running.wait().expect(143);
    wait_until_none(DEADLINE, || processes_with(&[&sleep]));
}

#[test]
fn the_rank_that_failed_is_blamed_and_not_one_that_heard_of_it() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.run("run", &[]).expect(0);
    for _ in 0..5 {
        // Only rank 0 sees that there is a run already.
        let ended = run(&mut folder.launch(&["-n", "3"], "run", &[])).expect(2);
        let last = ended.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("rank 0 (") && last.contains("failed with exit code 2"), "{}", ended.stderr);
    }
}

#[test]
fn a_first_host_that_nobody_else_can_reach_is_refused_before_any_login() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    for first in [
        r#"{"ssh":"localhost","ips":["127.0.0.1"]}"#,
        r#"{"ssh":"localhost","ips":["localhost"]}"#,
        r#"{"ssh":"localhost"}"#,
        r#"{"ssh":"box-1","ips":["::1"]}"#,
    ] {
        folder.write("hosts.json", format!(r#"[{first},{{"ssh":"box-2","ips":["192.0.2.2"]}}]"#).as_bytes());
        let hosts = folder.path("hosts.json").to_string_lossy().into_owned();
        let mut bench = crate::program::finetune(["cluster", "bench", "--hostfile"]);
        bench.arg(&hosts);
        for mut command in [folder.launch(&["--hostfile", &hosts], "run", &[]), bench] {
            with_ssh(&folder, &mut command, &format!("touch {}", folder.path("asked").display()));
            run(&mut command).expect(2).says("cannot reach rank 0 at");
            assert!(!folder.path("asked").exists(), "{first}: it was logged in at a host");
        }
    }
}

#[test]
fn a_link_out_of_the_model_directory_is_not_copied() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let hosts = two_hosts(&folder);
    folder.write("secret", b"a key");
    let link = folder.path("model").join("chat_template.jinja");
    std::os::unix::fs::symlink(folder.path("secret"), link).expect("a link");
    let mut command = folder.launch(&["--hostfile", &hosts, "--copy"], "run", &[]);
    with_ssh(&folder, &mut command, "");
    run(&mut command).expect(2).says("is a link to");
}
