//! Real RDMA verbs: mesh and ring, UC and RC, 2 to 4 processes, on soft-RoCE devices in a
//! throw-away kernel.
//!
//! `on_soft_roce_devices` boots the kernel with `scripts/rdma-vm.sh` and runs `inside` there, which
//! starts ranks: processes of this same test program that run `rank`. Results are compared, bit for
//! bit, with TCP and with threads of one process. So are messages that travel over lines beside them.
//! Without a kernel (`scripts/rdma-vm.sh --setup` fetches one) the test says so and is skipped.

mod lines;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use finetune_allreduce::{
    Algorithm, BackendChoice, Config, DeviceMatrix, Group, GroupError, Receiver as LineIn, Reduce, Reduction, Secret,
    Sender as LineOut, WireDtype,
};

/// Set inside the kernel: which devices there are.
const LAYOUT: &str = "FINETUNE_VERBS_LAYOUT";

/// What a rank is told, in one variable: see [`Task`].
const TASK: &str = "FINETUNE_VERBS_TASK";

fn say(text: &str) {
    // Straight to the file descriptor: the test harness would keep what `println!` says to itself.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Where kernels are kept, if there is one.
fn cache() -> Option<PathBuf> {
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    let caches = || std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    let cache =
        std::env::var_os("FINETUNE_RDMA_VM").map(PathBuf::from).or_else(|| Some(caches()?.join("finetune-rdma-vm")))?;
    std::fs::read_dir(&cache).is_ok_and(|mut entries| entries.next().is_some()).then_some(cache)
}

#[test]
fn on_soft_roce_devices() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/rdma-vm.sh");
    let check = Command::new(&script).arg("--check").output();
    if cache().is_none() || !check.as_ref().is_ok_and(|output| output.status.success()) {
        let why = check.map(|output| String::from_utf8_lossy(&output.stderr).trim().to_owned()).unwrap_or_default();
        say(&format!("SKIPPED: no test of real RDMA verbs; scripts/rdma-vm.sh --setup makes it possible. {why}"));
        return;
    }
    let program = std::env::current_exe().expect("this program");
    let folder = program.parent().expect("a folder");
    for layout in ["loop", "veth"] {
        let began = Instant::now();
        let output = Command::new(&script)
            .args(["-d", layout, "-t", "400", "-s"])
            .arg(folder)
            .args(["-e", &format!("{LAYOUT}={layout}"), "-e", "RUST_BACKTRACE=1", "--"])
            .arg(&program)
            .args(["inside", "--exact", "--nocapture"])
            // The guest must see the current folder, wherever the repository lies.
            .current_dir(folder)
            .output()
            .expect("the script starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{layout}: {:?}\n{text}", output.status);
        for line in text.lines().filter_map(|line| line.find("verbs:").map(|at| &line[at..])) {
            say(line);
        }
        assert!(text.contains(&format!("verbs: {layout}: all as it should be")), "{layout}:\n{text}");
        say(&format!("verbs: {layout}: {:.1} s", began.elapsed().as_secs_f64()));
    }
}

/// What one process does.
#[derive(Clone, Copy, Debug)]
struct Task<'a> {
    rank: usize,
    world: usize,
    port: u16,
    backend: &'a str,
    reliable: bool,
    topology: &'a str,
    devices: &'a str,
    /// "operations", "lines", or one of them "without end".
    work: &'a str,
}

impl Task<'_> {
    fn text(&self) -> String {
        let Task { rank, world, port, backend, reliable, topology, devices, work } = self;
        format!("{rank}|{world}|{port}|{backend}|{reliable}|{topology}|{devices}|{work}")
    }

    fn topology(&self) -> Option<Algorithm> {
        match self.topology {
            "ring" => Some(Algorithm::Ring),
            "mesh" => Some(Algorithm::Mesh),
            "direct" => Some(Algorithm::Direct),
            _ => None,
        }
    }
}

/// Row i, column j: rank i's device towards rank j. In `veth` ranks alternate between the two ends
/// of the wire.
fn matrix(world: usize, layout: &str, ring_only: bool) -> String {
    let cell = |from: usize, to: usize| {
        let neighbours = (from + 1) % world == to || (to + 1) % world == from;
        if from == to || (ring_only && !neighbours) {
            return "null".to_owned();
        }
        format!("\"rxe{}\"", if layout == "veth" { from % 2 } else { 0 })
    };
    let row = |from: usize| format!("[{}]", (0..world).map(|to| cell(from, to)).collect::<Vec<_>>().join(","));
    format!("[{}]", (0..world).map(row).collect::<Vec<_>>().join(","))
}

/// A process that runs one task; what it says comes out of `lines`.
struct Process {
    child: Child,
    lines: Receiver<String>,
}

impl Process {
    fn start(task: &Task<'_>) -> Process {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["rank", "--exact", "--nocapture", "--test-threads=1"])
            .env(TASK, task.text())
            .env_remove(LAYOUT)
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("a process");
        let stdout = child.stdout.take().expect("asked for");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // The harness writes "test rank ... " before what the test says.
                if let Some(at) = line.find("rank:") {
                    let _ = sender.send(line[at..].to_owned());
                }
            }
        });
        Process { child, lines }
    }

    fn hear(&self, within: Duration) -> String {
        self.lines.recv_timeout(within).unwrap_or_else(|_| "rank: said nothing".into())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    listener.expect("a port").port()
}

/// Every operation at sizes around the slots' edges; the digest of all results.
fn work(group: &Group, topology: Option<Algorithm>) -> Result<String, GroupError> {
    let (rank, world) = (group.rank(), group.world());
    let mut hasher = blake3::Hasher::new();
    for elements in [0, 1, world + 1, 1000, 1008, 1009, 16_368, 70_001] {
        // Full mantissas: sums of these round, so the order of summation shows in the bits.
        let value = |i: usize| ((i * 7919 + rank * 104_729 + 13) % 1_000_003) as f32 / 997.0 - 300.0;
        let fresh = || (0..elements).map(value).collect::<Vec<f32>>();
        for (reduction, wire) in
            [(Reduction::Sum, WireDtype::Exact), (Reduction::Max, WireDtype::Exact), (Reduction::Sum, WireDtype::Bf16)]
        {
            let mut data = fresh();
            group.all_reduce_with(&mut data, &Reduce { reduction, wire, tag: 5, algorithm: topology })?;
            hasher.update(bytemuck::cast_slice(&data));
        }
        let mut data = fresh();
        group.broadcast(&mut data, world - 1)?;
        hasher.update(bytemuck::cast_slice(&data));
        let mut all = vec![0f32; elements * world];
        group.all_gather(&fresh(), &mut all)?;
        hasher.update(bytemuck::cast_slice(&all));
        group.barrier()?;
    }
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}

/// One rank, in a process of its own.
#[test]
fn rank() {
    let Ok(text) = std::env::var(TASK) else { return };
    let fields: Vec<&str> = text.split('|').collect();
    let number = |index: usize| fields[index].parse::<usize>().expect("a number");
    let task = Task {
        rank: number(0),
        world: number(1),
        port: number(2) as u16,
        backend: fields[3],
        reliable: fields[4] == "true",
        topology: fields[5],
        devices: fields[6],
        work: fields[7],
    };
    let mut config = Config::new(task.rank, task.world, format!("127.0.0.1:{}", task.port), Secret::loopback());
    config.topology = task.topology();
    config.rdma.reliable = task.reliable;
    config.rdma.strict = !task.reliable;
    if task.backend == "rdma" {
        config.backend = BackendChoice::Rdma;
        config.rdma.devices = Some(DeviceMatrix::parse(task.devices).expect("a matrix"));
    }
    let group = match Group::join(&config) {
        Ok(group) => group,
        Err(error) => return println!("rank: error {error}"),
    };
    let done = match task.work {
        "operations" => work(&group, config.topology).map(|digest| format!("digest {digest} over {}", group.backend())),
        "lines" => work_on_lines(&group, &lines::around(&group, 4)),
        "lines without end" => {
            let lines = lines::around(&group, 4);
            println!("rank: ready");
            loop {
                if let Err(error) = work_on_lines(&group, &lines) {
                    break Err(error);
                }
            }
        }
        _ => {
            println!("rank: ready");
            let mut data = vec![1f32; 300_000];
            loop {
                data.fill(1.0);
                if let Err(error) = group.all_reduce(&mut data, Reduction::Sum) {
                    break Err(error);
                }
            }
        }
    };
    match done {
        Ok(done) => println!("rank: {done}"),
        Err(error) => println!("rank: error {error}"),
    }
}

/// Messages around the edges of slots, more of them than a lane is deep, while the ranks reduce. What carries the
/// lines, and the digest of what came.
fn work_on_lines(group: &Group, (out, into): &(LineOut, LineIn)) -> Result<String, GroupError> {
    const BYTES: [usize; 9] = [0, 1, 4032, 4033, 16_129, 65_472, 65_473, 1_500_001, 8];
    let (rank, world) = (group.rank(), group.world());
    let message = |from: usize, round: usize, bytes: usize| -> Vec<u8> {
        (0..bytes).map(|at| (at * 31 + from * 7 + round * 3 + at / 4096) as u8).collect()
    };
    let mut hasher = blake3::Hasher::new();
    for round in 0..4 {
        std::thread::scope(|scope| -> Result<(), GroupError> {
            let sends = || BYTES.iter().try_for_each(|&bytes| out.send(message(rank, round, bytes)));
            let sending = scope.spawn(sends);
            let mut sum = vec![rank as f32; 20_000];
            group.all_reduce(&mut sum, Reduction::Sum)?;
            for bytes in BYTES {
                let received = into.receive(bytes)?;
                assert!(received == message((rank + world - 1) % world, round, bytes), "{bytes} bytes");
                hasher.update(&received);
            }
            sending.join().expect("no panic")
        })?;
    }
    Ok(format!("digest {} over {} and {}", &hasher.finalize().to_hex()[..16], out.backend(), into.backend()))
}

/// What all ranks of a world say at the end of a task.
fn all_say(task: Task<'_>) -> Vec<String> {
    let port = free_port();
    let ranks: Vec<Process> = (0..task.world).map(|rank| Process::start(&Task { rank, port, ..task })).collect();
    ranks.iter().map(|process| process.hear(Duration::from_secs(60))).collect()
}

/// The digests of threads of one process.
fn reference(world: usize, topology: Option<Algorithm>) -> Vec<String> {
    let work = move |group: Group| work(&group, topology).expect("threads of one process lose nothing");
    let threads: Vec<_> =
        Group::in_process(world, topology).into_iter().map(|group| std::thread::spawn(move || work(group))).collect();
    threads.into_iter().map(|thread| thread.join().expect("a digest")).collect()
}

#[test]
fn inside() {
    let Ok(layout) = std::env::var(LAYOUT) else { return };
    let task = |world, topology| Task {
        rank: 0,
        world,
        port: 0,
        backend: "rdma",
        reliable: false,
        topology,
        devices: "",
        work: "operations",
    };
    let mut runs = 0;
    for (world, topology) in [(2, "mesh"), (2, "ring"), (3, "direct"), (3, "ring"), (4, "mesh"), (4, "ring")] {
        let task = task(world, topology);
        let expected = reference(world, task.topology());
        let over = |backend: &str| -> Vec<String> {
            expected.iter().map(|digest| format!("rank: digest {digest} over {backend}")).collect()
        };
        assert_eq!(all_say(Task { backend: "tcp", ..task }), over("tcp"), "{world} ranks, {topology}");
        // A ring needs no more cables than it uses.
        let devices = matrix(world, &layout, topology == "ring");
        for reliable in [false, true] {
            let said = all_say(Task { reliable, devices: &devices, ..task });
            assert_eq!(said, over("rdma"), "{layout}: {world} ranks, {topology}, reliable: {reliable}");
            runs += 1;
        }
    }
    println!("verbs: {layout}: {runs} runs over verbs gave the bits of TCP and of threads");
    for (world, topology) in [(2, "mesh"), (3, "direct"), (3, "ring"), (4, "ring")] {
        let task = Task { work: "lines", ..task(world, topology) };
        let over_tcp = all_say(Task { backend: "tcp", ..task });
        assert!(over_tcp.iter().all(|said| said.ends_with(" over tcp and tcp")), "{over_tcp:?}");
        let over_rdma: Vec<String> = over_tcp.iter().map(|said| said.replace("tcp", "rdma")).collect();
        let devices = matrix(world, &layout, topology == "ring");
        for reliable in [false, true] {
            let said = all_say(Task { reliable, devices: &devices, ..task });
            assert_eq!(said, over_rdma, "{layout}: lines of {world} ranks, {topology}, reliable: {reliable}");
        }
    }
    println!("verbs: {layout}: messages over lines are the same over verbs and over TCP");
    ["operations without end", "lines without end"].iter().for_each(|work| killed(&layout, work));
    if layout == "veth" {
        lossy(task(2, "mesh"), &reference(2, Some(Algorithm::Mesh)));
    }
    println!("verbs: {layout}: all as it should be");
}

/// A rank is killed in the middle of its work: the others say who.
fn killed(layout: &str, work: &str) {
    for reliable in [false, true] {
        let (world, victim) = (3, 2);
        let (devices, port) = (matrix(world, layout, false), free_port());
        let task = Task { rank: 0, world, port, backend: "rdma", reliable, topology: "mesh", devices: &devices, work };
        let mut ranks: Vec<Process> = (0..world).map(|rank| Process::start(&Task { rank, ..task })).collect();
        for process in &ranks {
            assert_eq!(process.hear(Duration::from_secs(60)), "rank: ready");
        }
        std::thread::sleep(Duration::from_millis(300));
        let began = Instant::now();
        ranks[victim].child.kill().expect("a process");
        for process in &ranks[..victim] {
            let said = process.hear(Duration::from_secs(60));
            let named = said.starts_with(&format!("rank: error rank {victim} ("));
            assert!(named && said.contains("was lost: its connections closed"), "{layout}, {reliable}: {said}");
        }
        // The promise is one second; a kernel emulated on a busy machine gets more.
        let took = began.elapsed().as_millis();
        println!("verbs: {layout}: reliable {reliable}, {work}: a killed rank was known to all after {took} ms");
    }
}

/// One packet in a hundred is lost: RC repeats it; UC does not, and says so rather than give a
/// wrong sum.
fn lossy(task: Task<'_>, expected: &[String]) {
    let tc = |arguments: &[&str]| Command::new("tc").args(arguments).status().is_ok_and(|status| status.success());
    if !tc(&["qdisc", "add", "dev", "v0", "root", "netem", "loss", "1%"]) {
        println!("verbs: SKIPPED: tc cannot drop packets here");
        return;
    }
    let devices = matrix(2, "veth", false);
    let right: Vec<String> = expected.iter().map(|digest| format!("rank: digest {digest} over rdma")).collect();
    let said = all_say(Task { reliable: true, devices: &devices, ..task });
    assert_eq!(said, right, "RC with loss");
    let mut refused = 0;
    for _ in 0..3 {
        for (said, right) in all_say(Task { devices: &devices, ..task }).iter().zip(&right) {
            let error = said.starts_with("rank: error");
            assert!(error || said == right, "UC with loss: {said}");
            refused += usize::from(error);
        }
    }
    println!("verbs: veth: with 1 % loss RC gave the same bits; UC {refused} of 6 ranks an error, none a wrong sum");
    let lines = Task { work: "lines", devices: &devices, ..task };
    let said = all_say(Task { reliable: true, ..lines });
    assert!(said.iter().all(|said| said.ends_with(" over rdma and rdma")), "lines over RC with loss: {said:?}");
    let said = all_say(lines);
    let fine = said.iter().all(|said| said.starts_with("rank: error") || said.starts_with("rank: digest"));
    assert!(fine, "lines over UC with loss: {said:?}");
    tc(&["qdisc", "del", "dev", "v0", "root"]);
}
