//! `finetune cluster bench`: how fast the ranks talk.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32};
use std::time::Duration;

use finetune_allreduce::{
    Algorithm, Backend, BackendChoice, Config, DeviceMatrix, Environment, Group, Notice, WireDtype, new_token,
};
use finetune_cluster::bench::{self, Operation, Options, Row};
use finetune_cluster::complaint::{hint, shown};
use finetune_cluster::workers::{self, Call, Place, Remote, Word, Workers};
use finetune_cluster::{Hostfile, machine_name};
use serde::{Deserialize, Serialize};

use crate::cli::{BenchArguments, ClusterCommand};
use crate::commands::{launch, machines, preflight};
use crate::failure::Failure;
use crate::hosts::unreachable_at;
use crate::memory;
use crate::output;
use crate::progress::Verbosity;
use crate::seat::secret;

pub(crate) fn cluster(command: ClusterCommand, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    match command {
        ClusterCommand::Bench(arguments) => bench(&arguments, verbosity),
        ClusterCommand::Discover(arguments) => machines::discover(&arguments),
        ClusterCommand::Setup(arguments) => machines::setup(&arguments),
        ClusterCommand::Doctor(arguments) => machines::doctor(&arguments),
    }
}

/// What a rank of the benchmark has to know; a worker reads it from its standard input.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Assignment {
    rank: usize,
    world: usize,
    rendezvous: String,
    run: String,
    /// None: loopback only.
    token: Option<String>,
    backend: String,
    devices: Option<serde_json::Value>,
    reliable: bool,
    strict: bool,
    timeout: Duration,
    streams: usize,
    busy_poll: Option<Duration>,
    /// Rank 0 says at the end what an operation cost it.
    costs: bool,
    options: Options,
}

/// What a worker says, one JSON object per line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Said {
    Notice(String),
    Row(Row),
}

fn bench(arguments: &BenchArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    if arguments.worker {
        return worker();
    }
    let options = options(arguments)?;
    let environment = Environment::of_process()
        .map_err(|error| Failure::Arguments { message: error.to_string(), hints: error.hints() })?;
    match (arguments.ranks, &arguments.hostfile, environment) {
        (None, None, Some(environment)) => under_a_launcher(arguments, options, &environment, verbosity),
        (None, None, None) => Err(Failure::arguments(
            "how many ranks?",
            "-n 4 starts four here, --hostfile FILE one per host; or start this command with mpirun, srun or torchrun",
        )),
        (ranks, hostfile, _) => start(arguments, options, ranks, hostfile.as_deref(), verbosity),
    }
}

fn options(arguments: &BenchArguments) -> Result<Options, Failure> {
    let (min_bytes, max_bytes) =
        (bytes("--min-bytes", &arguments.min_bytes)?, bytes("--max-bytes", &arguments.max_bytes)?);
    if min_bytes > max_bytes {
        return Err(Failure::arguments("--min-bytes is larger than --max-bytes", "swap them"));
    }
    let names = || Operation::NAMES.map(|(name, _)| name).join(", ");
    let operation = Operation::NAMES.iter().find(|(name, _)| *name == arguments.op).map(|(_, operation)| *operation);
    let operation = operation.ok_or_else(|| {
        Failure::arguments(format!("--op {}: there is no such operation", arguments.op), format!("one of {}", names()))
    })?;
    let topology = match arguments.topology.as_str() {
        "auto" => None,
        "star" => Some(Algorithm::Star),
        "direct" => Some(Algorithm::Direct),
        "mesh" => Some(Algorithm::Mesh),
        "ring" => Some(Algorithm::Ring),
        other => {
            return Err(Failure::arguments(
                format!("--topology {other}: unknown"),
                "one of auto, star, direct, mesh, ring",
            ));
        }
    };
    let wire = match arguments.dtype.as_str() {
        "f32" => WireDtype::Exact,
        "bf16" => WireDtype::Bf16,
        "f16" => WireDtype::F16,
        other => {
            return Err(Failure::arguments(
                format!("--dtype {other}: unknown"),
                "one of f32, bf16, f16: what travels; the buffers and the sums are f32",
            ));
        }
    };
    if wire != WireDtype::Exact && operation != Operation::AllReduce {
        return Err(Failure::arguments("--dtype applies to all_reduce only", "leave it out for other operations"));
    }
    if !["auto", "tcp", "rdma"].contains(&arguments.backend.as_str()) {
        return Err(Failure::arguments(format!("--backend {}: unknown", arguments.backend), "one of auto, tcp, rdma"));
    }
    Ok(Options { operation, min_bytes, max_bytes, step: arguments.step_factor, wire, topology })
}

/// "1K", "64M", "2G" or a plain number; powers of 1024.
fn bytes(flag: &str, text: &str) -> Result<usize, Failure> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "" => Some(1usize),
        "K" => Some(1 << 10),
        "M" => Some(1 << 20),
        "G" => Some(1 << 30),
        _ => None,
    };
    let size = digits.parse::<usize>().ok().zip(unit).and_then(|(number, unit)| number.checked_mul(unit));
    size.ok_or_else(|| Failure::arguments(format!("{flag} {text}: not a size"), "such as 1K, 64M or 2G"))
}

/// Starts the ranks as workers and shows what rank 0 measures.
fn start(
    arguments: &BenchArguments,
    options: Options,
    ranks: Option<usize>,
    hostfile: Option<&std::path::Path>,
    verbosity: Verbosity,
) -> Result<ExitCode, Failure> {
    let port = preflight::free_port(None)
        .ok_or_else(|| Failure::arguments("no TCP port can be had", "another run may have them all: end it"))?;
    let (places, rendezvous, devices) = match hostfile {
        None => {
            let ranks = ranks.unwrap_or(1);
            if ranks == 0 || ranks > 64 {
                return Err(Failure::arguments(format!("-n {ranks}: from 1 to 64 ranks"), "-n 2 is a good start"));
            }
            (vec![Place::Here; ranks], format!("127.0.0.1:{port}"), None)
        }
        Some(path) => {
            let hosts = Hostfile::load(path)
                .map_err(|error| Failure::Arguments { message: error.to_string(), hints: error.hints() })?;
            hosts.notices.iter().for_each(|notice| crate::stderr::complain!("{notice}"));
            if let Some(address) = hosts.lost_coordinator() {
                return Err(unreachable_at(address));
            }
            let program =
                arguments.program.clone().or_else(|| std::env::current_exe().ok()).unwrap_or_else(|| "finetune".into());
            let places = hosts.hosts.iter().map(|host| match host.ssh.as_str() {
                "localhost" | "127.0.0.1" => Place::Here,
                _ => Place::Ssh(Remote { host: host.ssh.clone(), program: program.clone(), ..Remote::default() }),
            });
            let coordinator = hosts.coordinator().unwrap_or_else(|| machine_name(&hosts.hosts[0].ssh));
            let coordinator =
                if coordinator.contains(':') { format!("[{coordinator}]") } else { coordinator.to_owned() };
            let devices = hosts
                .devices()
                .map_err(|error| Failure::Arguments { message: error.to_string(), hints: error.hints() })?;
            (places.collect(), format!("{coordinator}:{port}"), devices)
        }
    };
    let token =
        new_token().map_err(|error| Failure::arguments(error.to_string(), "the system's random generator failed"))?;
    let world = places.len();
    let devices = match &arguments.devices {
        Some(path) => Some(read_devices(path)?),
        None => devices,
    };
    let assignment = |rank| Assignment {
        rank,
        world,
        rendezvous: rendezvous.clone(),
        run: "bench".into(),
        token: Some(token.clone()),
        backend: arguments.backend.clone(),
        devices: devices.as_ref().and_then(|devices| serde_json::from_str(&devices.to_json()).ok()),
        reliable: arguments.reliable,
        strict: arguments.strict,
        timeout: Duration::from_secs(5),
        streams: arguments.streams,
        busy_poll: arguments.busy_poll.map(Duration::from_micros),
        costs: verbosity == Verbosity::Verbose,
        options: options.clone(),
    };
    let assignments: Vec<Assignment> = (0..world).map(assignment).collect();
    let words = ["cluster", "bench", "--worker"].map(str::to_owned).to_vec();
    let call = Call { arguments: words, ..Call::default() };
    let workers = Workers::start(&places, &call, &assignments).map_err(|error| {
        Failure::arguments(error.to_string(), "is the program there, and does ssh reach the host without a password?")
    })?;
    let mut table = Table::new(arguments.json);
    let (mut outcome, mut hinted) = (Ok(()), None);
    let names: Vec<String> = places.iter().map(host_of).collect();
    let endings = workers.finish(&AtomicI32::new(0), &AtomicBool::new(false), &mut |rank, word| match word {
        Word::Line(line) if rank == 0 => match serde_json::from_str::<Said>(&line) {
            Ok(Said::Row(row)) => outcome = table.row(&row),
            Ok(Said::Notice(notice)) if verbosity != Verbosity::Quiet => crate::stderr::complain!("{notice}"),
            Ok(Said::Notice(_)) => {}
            Err(_) => crate::stderr::complain!("[rank {rank}] {}", shown(&line)),
        },
        Word::Line(_) | Word::Silent | Word::Waited(_) => {}
        Word::Complaint(line) => {
            hinted = hinted.take().or_else(|| hint(&names[rank], &line).map(|(_, hint)| (rank, hint)));
            crate::stderr::complain!("[rank {rank}] {}", shown(&line));
        }
    });
    outcome?;
    if let Some((rank, hint)) = hinted.filter(|(rank, _)| endings.get(*rank).is_some_and(|ending| ending.code == 255)) {
        crate::stderr::complain!("{}: {hint}", names[rank]);
    }
    match launch::culprit(&endings, &[], 0) {
        Some(rank) => Ok(ExitCode::from(launch::exit_code(endings[rank].code))),
        None => Ok(ExitCode::from(u8::from(table.wrong))),
    }
}

fn host_of(place: &Place) -> String {
    match place {
        Place::Here => "localhost".to_owned(),
        Place::Ssh(remote) => remote.host.clone(),
    }
}

fn read_devices(path: &std::path::Path) -> Result<DeviceMatrix, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::arguments(format!("--devices {}: {error}", path.display()), "a JSON matrix of device names")
    })?;
    DeviceMatrix::parse(&text).map_err(|error| Failure::Arguments { message: error.to_string(), hints: error.hints() })
}

/// A rank that a benchmark started.
fn worker() -> Result<ExitCode, Failure> {
    let assignment: Assignment = workers::assignment(|_| std::process::exit(3))
        .map_err(|error| Failure::arguments(error, "--worker is for the program itself"))?;
    let rank = assignment.rank;
    let say = move |said: &Said| {
        let _ = output::line(&serde_json::to_string(said).expect("plain data"));
    };
    let notices = move |notice: Notice| {
        if rank == 0 {
            say(&Said::Notice(notice.to_string()));
        }
    };
    let row = &mut |row: &Row| {
        if rank == 0 {
            say(&Said::Row(row.clone()));
        }
    };
    let last_words = &|words: String| say(&Said::Notice(words));
    take_part(&assignment, Arc::new(notices), row, last_words)
}

/// A rank that mpirun, srun or torchrun started.
fn under_a_launcher(
    arguments: &BenchArguments,
    options: Options,
    environment: &Environment,
    verbosity: Verbosity,
) -> Result<ExitCode, Failure> {
    let token = match &arguments.token_file {
        None => None,
        Some(path) => Some(std::fs::read_to_string(path).map_err(|error| {
            Failure::arguments(
                format!("--token-file {}: {error}", path.display()),
                "all ranks read the same token from a file",
            )
        })?),
    };
    let rendezvous = environment.rendezvous.as_ref().map_or_else(|| "127.0.0.1:0".to_owned(), ToString::to_string);
    let assignment = Assignment {
        rank: environment.rank,
        world: environment.world,
        rendezvous,
        run: "bench".into(),
        token,
        backend: arguments.backend.clone(),
        devices: environment.devices.as_ref().and_then(|devices| serde_json::from_str(&devices.to_json()).ok()),
        reliable: arguments.reliable,
        strict: arguments.strict,
        timeout: Duration::from_secs(5),
        streams: arguments.streams,
        busy_poll: arguments.busy_poll.map(Duration::from_micros),
        costs: verbosity == Verbosity::Verbose,
        options,
    };
    let first = environment.rank == 0;
    let mut table = Table::new(arguments.json);
    let mut outcome = Ok(());
    let notices = move |notice: Notice| {
        if first && verbosity != Verbosity::Quiet {
            crate::stderr::complain!("{notice}");
        }
    };
    let row = &mut |row: &Row| {
        if first && outcome.is_ok() {
            outcome = table.row(row);
        }
    };
    let code = take_part(&assignment, Arc::new(notices), row, &|words| crate::stderr::complain!("{words}"))?;
    outcome?;
    Ok(code)
}

fn take_part(
    assignment: &Assignment,
    notices: finetune_allreduce::Notices,
    report: &mut dyn FnMut(&Row),
    last_words: &dyn Fn(String),
) -> Result<ExitCode, Failure> {
    let Assignment { rank, world, rendezvous, token, .. } = assignment;
    let secret = secret(token.as_deref(), *world)?;
    let mut config = Config::new(*rank, *world, rendezvous.clone(), secret);
    config.run.clone_from(&assignment.run);
    config.backend = match assignment.backend.as_str() {
        "tcp" => BackendChoice::Tcp,
        "rdma" => BackendChoice::Rdma,
        _ => BackendChoice::Auto,
    };
    config.topology = assignment.options.topology;
    config.timeout = assignment.timeout;
    config.tcp.streams = assignment.streams;
    config.tcp.busy_poll = assignment.busy_poll;
    config.rdma.devices =
        assignment.devices.as_ref().and_then(|devices| DeviceMatrix::parse(&devices.to_string()).ok());
    config.rdma.reliable = assignment.reliable;
    config.rdma.strict = assignment.strict;
    config.notices = notices;
    // What all ranks must agree on: another version could measure something else.
    config.claim("version of finetune", env!("CARGO_PKG_VERSION").as_bytes());
    let group = Group::join(&config)?;
    let rows = bench::run(&group, &assignment.options, report)?;
    if assignment.costs {
        let costs = costs(&group, &assignment.options)?;
        if *rank == 0 {
            last_words(costs);
        }
    }
    group.barrier()?;
    let wrong = rows.iter().any(|row| row.wrong > 0);
    Ok(if wrong { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

/// What an operation of the largest size costs this rank, in words.
fn costs(group: &Group, options: &Options) -> Result<String, Failure> {
    /// Enough of them for the system's clock of processor time.
    const OPERATIONS: u64 = 10;
    group.barrier()?;
    let before = memory::processor_seconds();
    let cost = bench::cost(group, options, OPERATIONS)?;
    let (seconds, rank) = (memory::processor_seconds() - before, group.rank());
    Ok(format!(
        "rank {rank}: {} operations of {} bytes, {} bytes sent, {seconds:.4} CPU s, peak memory {} KiB",
        cost.operations,
        cost.bytes,
        cost.sent,
        memory::peak_bytes() >> 10
    ))
}

/// Rows as they come.
struct Table {
    json: bool,
    begun: bool,
    wrong: bool,
}

impl Table {
    fn new(json: bool) -> Table {
        Table { json, begun: false, wrong: false }
    }

    fn row(&mut self, row: &Row) -> Result<(), Failure> {
        self.wrong |= row.wrong > 0;
        if self.json {
            output::line(&serde_json::to_string(row).expect("plain data"))?;
            return Ok(());
        }
        if !std::mem::replace(&mut self.begun, true) {
            let backend = match row.backend {
                Backend::InProcess => "one process".to_owned(),
                backend => backend.to_string(),
            };
            output::line(&format!(
                "{}, {} ranks over {backend}; times are per operation, best and median of 5 trials",
                row.op, row.ranks
            ))?;
            output::line(&format!(
                "{:>12} {:>9} {:>14} {:>12} {:>12} {:>12} {:>7}",
                "bytes", "algorithm", "median (µs)", "min (µs)", "alg (GB/s)", "bus (GB/s)", "wrong"
            ))?;
        }
        output::line(&format!(
            "{:>12} {:>9} {:>14.1} {:>12.1} {:>12.3} {:>12.3} {:>7}",
            row.bytes,
            row.topology,
            row.latency_us_median,
            row.latency_us_min,
            row.algbw_gb_s,
            row.busbw_gb_s,
            row.wrong
        ))?;
        Ok(())
    }
}
