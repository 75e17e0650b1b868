//! `finetune cluster bench` as a user runs it.

use serde_json::Value;

use crate::program::{Ended, finetune, run};

/// The keys of a row, as the documentation promises them.
const KEYS: [&str; 10] = [
    "op",
    "ranks",
    "backend",
    "topology",
    "bytes",
    "latency_us_median",
    "latency_us_min",
    "algbw_gb_s",
    "busbw_gb_s",
    "wrong",
];

fn bench(arguments: &[&str]) -> Ended {
    run(finetune(["cluster", "bench"]).args(arguments))
}

fn rows(arguments: &[&str]) -> Vec<Value> {
    let ended = bench(&[&["--json"], arguments].concat()).expect(0);
    ended
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

#[test]
fn each_operation_is_measured_and_right() {
    for (op, ranks, topology, backend) in [
        ("all_reduce", 3, "auto", "auto"),
        ("all_reduce", 4, "ring", "tcp"),
        ("reduce_scatter", 2, "mesh", "tcp"),
        ("all_gather", 3, "ring", "tcp"),
        ("broadcast", 3, "auto", "tcp"),
        ("all_to_all", 2, "auto", "tcp"),
        ("send_recv", 2, "auto", "tcp"),
        ("barrier", 2, "auto", "tcp"),
        ("all_reduce", 1, "auto", "auto"),
    ] {
        let count = ranks.to_string();
        let rows = rows(&[
            "-n",
            &count,
            "--op",
            op,
            "--topology",
            topology,
            "--backend",
            backend,
            "--min-bytes",
            "1K",
            "--max-bytes",
            "16K",
        ]);
        assert_eq!(rows.len(), if op == "barrier" { 1 } else { 3 }, "{op}");
        for row in &rows {
            let keys: Vec<&str> = row.as_object().expect("an object").keys().map(String::as_str).collect();
            assert_eq!(keys, KEYS, "{op}");
            assert_eq!((&row["op"], &row["ranks"], &row["wrong"]), (&op.into(), &ranks.into(), &0.into()), "{row}");
            assert_eq!(row["backend"], if ranks == 1 { "in_process" } else { "tcp" }, "{row}");
            if topology != "auto" {
                assert_eq!(row["topology"], topology, "{row}");
            }
            assert!(row["latency_us_min"].as_f64() <= row["latency_us_median"].as_f64(), "{row}");
        }
        if op != "barrier" && op != "all_gather" {
            let sizes: Vec<u64> = rows.iter().filter_map(|row| row["bytes"].as_u64()).collect();
            assert_eq!(sizes, [1 << 10, 4 << 10, 16 << 10], "{op}");
        }
    }
}

#[test]
fn half_the_bytes_travel_in_bf16() {
    let rows = rows(&["-n", "2", "--dtype", "bf16", "--min-bytes", "64K", "--max-bytes", "64K"]);
    assert_eq!(rows[0]["wrong"], 0, "small whole numbers are exact in bf16");
}

#[test]
fn people_get_a_table() {
    let ended = bench(&["-n", "2", "--min-bytes", "1K", "--max-bytes", "1K"]).expect(0);
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!(lines.len(), 3, "{}", ended.stdout);
    assert!(lines[0].starts_with("all_reduce, 2 ranks over tcp"), "{}", lines[0]);
    assert!(lines[1].contains("alg (GB/s)"), "{}", lines[1]);
    assert!(ended.stderr.contains("2 ranks joined over tcp in"), "{}", ended.stderr);
}

#[test]
fn arguments_are_checked_before_anything_starts() {
    for (arguments, says) in [
        (&["-n", "0"][..], "from 1 to 64 ranks"),
        (&[][..], "how many ranks?"),
        (&["-n", "2", "--op", "all_sum"], "no such operation"),
        (&["-n", "2", "--min-bytes", "1X"], "not a size"),
        (&["-n", "2", "--min-bytes", "2M", "--max-bytes", "1M"], "--min-bytes is larger"),
        (&["-n", "2", "--topology", "chain"], "one of auto, star, direct, mesh, ring"),
        (&["-n", "2", "--backend", "nccl"], "one of auto, tcp, rdma"),
        (&["-n", "2", "--dtype", "f64"], "one of f32, bf16, f16"),
        (&["--hostfile", "nowhere.json"], "nowhere.json"),
    ] {
        bench(arguments).expect(2).says(says);
    }
}

#[test]
fn rdma_that_is_not_there_is_an_error_only_if_asked_for() {
    let devices = tempfile::NamedTempFile::new().expect("a file");
    std::fs::OpenOptions::new()
        .write(true)
        .open(devices.path())
        .and_then(|mut file| {
            std::io::Write::write_all(&mut file, br#"[[null,"no_such_device"],["no_such_device",null]]"#)
        })
        .expect("written");
    let path = devices.path().to_str().expect("a path");
    let sizes = ["--min-bytes", "1K", "--max-bytes", "1K"];
    let with = |backend: &str| bench(&[&["-n", "2", "--backend", backend, "--devices", path][..], &sizes].concat());
    with("rdma").expect(2).says("RDMA cannot be used");
    with("auto").expect(0).says("over TCP");
}

/// What `discover` writes is what `launch` and `bench` read.
#[test]
fn a_discovered_hostfile_can_be_used() {
    let folder = tempfile::tempdir().expect("a directory");
    let hostfile = folder.path().join("hosts.json").to_string_lossy().into_owned();
    let picture = folder.path().join("hosts.svg");
    let ended =
        run(finetune(["cluster", "discover", "localhost", "--output", &hostfile, "--svg"]).arg(&picture)).expect(0);
    assert!(ended.stderr.contains("One host: localhost."), "{}", ended.stderr);
    assert!(std::fs::read_to_string(&picture).expect("a picture").starts_with("<svg"));
    assert_eq!(ended.stdout, "", "the hostfile went into the file");
    bench(&["--hostfile", &hostfile, "--max-bytes", "1K"]).expect(0);
    let graph = run(&mut finetune(["cluster", "discover", "--dot"])).expect(0);
    assert!(graph.stdout.starts_with("graph cluster {"), "{}", graph.stdout);
}

#[test]
fn the_doctor_looks_at_this_machine_and_names_hosts_that_do_not_answer() {
    let ended = run(&mut finetune(["cluster", "doctor", "--json"]));
    let checks: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let version = checks.iter().find(|check| check["name"] == "finetune").expect("a check of the program");
    assert_eq!(version["verdict"], "ok", "{version}");
    let ended = run(&mut finetune(["cluster", "doctor", "localhost", "no-such-host.invalid"])).expect(2);
    assert!(ended.stderr.contains("no-such-host.invalid is not reachable"), "{}", ended.stderr);
    run(&mut finetune(["cluster", "setup", "no-such-host.invalid"])).expect(2).says("no host answered");
}
