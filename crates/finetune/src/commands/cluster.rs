//! `finetune cluster bench`: how fast the ranks talk.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32};
use std::time::Duration;

use finetune_allreduce::bench::{self, Operation, Options, Row};
use finetune_allreduce::{
    Algorithm, Backend, BackendChoice, DeviceMatrix, Group, Notice, Notices, WireDtype, new_token,
};
use finetune_launch::complaint::{hint, shown};
use finetune_launch::restart::{SSH_FAILED, culprit, exit_code};
use finetune_launch::workers::{Event, WorkerCommand, Workers};
use finetune_launch::{Remote, WorkerHost, assignment};
use finetune_rendezvous::{HostPort, Hostfile, Membership, machine_name};
use finetune_trainer::numbers::counted;
use serde::{Deserialize, Serialize};

use crate::cli::{BenchArguments, ClusterCommand};
use crate::commands::{machines, preflight};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::hosts::unreachable_at;
use crate::memory;
use crate::output;
use crate::progress::Verbosity;
use crate::size::{BINARY, size};

pub(crate) fn cluster(command: ClusterCommand, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    match command {
        ClusterCommand::Bench(arguments) => bench(&arguments, verbosity),
        ClusterCommand::Discover(arguments) => machines::discover(&arguments),
        ClusterCommand::Setup(arguments) => machines::setup(&arguments),
        ClusterCommand::Doctor(arguments) => machines::doctor(&arguments),
    }
}

/// How a rank measures.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Settings {
    backend: String,
    reliable: bool,
    strict: bool,
    streams: usize,
    busy_poll: Option<Duration>,
    /// Rank 0 says at the end what an operation cost it.
    costs: bool,
    options: Options,
}

/// The first line of the standard input of a rank that the benchmark starts.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Assignment {
    #[serde(flatten)]
    membership: Membership,
    #[serde(flatten)]
    settings: Settings,
}

/// What a worker says, one JSON object per line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    Notice(String),
    Row(Row),
}

fn bench(arguments: &BenchArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    if arguments.worker {
        return worker();
    }
    let settings = Settings {
        backend: arguments.backend.clone(),
        reliable: arguments.reliable,
        strict: arguments.strict,
        streams: arguments.streams,
        busy_poll: arguments.busy_poll.map(Duration::from_micros),
        costs: verbosity == Verbosity::Verbose,
        options: options(arguments)?,
    };
    match (arguments.ranks, &arguments.hostfile) {
        (None, None) => match Membership::from_launcher(arguments.token_file.as_deref())? {
            Some((membership, notes)) => {
                let notes = notes.iter().filter(|_| membership.rank == 0 && verbosity != Verbosity::Quiet);
                notes.for_each(|note| crate::stderr::complain!("{note}"));
                under_a_launcher(arguments, Assignment { membership, settings }, verbosity)
            }
            None => Err(Failure::arguments(
                "how many ranks?",
                "-n 4 starts four here, --hostfile FILE one per host; or start this command with mpirun, srun or torchrun",
            )),
        },
        (ranks, hostfile) => start(arguments, &settings, ranks, hostfile.as_deref(), verbosity),
    }
}

fn options(arguments: &BenchArguments) -> Result<Options, Failure> {
    let bytes = |option: &str, text: &str| size(option, text, BINARY).map(|bytes| bytes as usize);
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

/// The ranks that the benchmark starts.
struct Started {
    hosts: Vec<WorkerHost>,
    /// Per rank: the addresses of its host.
    addresses: Vec<Vec<String>>,
    rendezvous: HostPort,
    devices: Option<DeviceMatrix>,
    prefer_ring: bool,
}

impl Started {
    /// On this host.
    fn here(ranks: usize, port: u16) -> Result<Started, Failure> {
        if ranks == 0 || ranks > 64 {
            return Err(Failure::arguments(format!("-n {ranks}: from 1 to 64 ranks"), "-n 2 is a good start"));
        }
        let host = "127.0.0.1".to_owned();
        Ok(Started {
            hosts: vec![WorkerHost::Local; ranks],
            addresses: vec![vec![host.clone()]; ranks],
            rendezvous: HostPort { host, port },
            devices: None,
            prefer_ring: false,
        })
    }

    /// One on each host of a hostfile.
    fn of_hostfile(path: &Path, arguments: &BenchArguments, port: u16) -> Result<Started, Failure> {
        let file = Hostfile::load(path)?;
        file.notices.iter().for_each(|notice| crate::stderr::complain!("{notice}"));
        if let Some(address) = file.lost_coordinator() {
            return Err(unreachable_at(address));
        }
        let devices = file.devices()?;
        let program =
            arguments.program.clone().or_else(|| std::env::current_exe().ok()).unwrap_or_else(|| "finetune".into());
        let remote = Remote { program, ..Remote::default() };
        let coordinator = file.coordinator().unwrap_or_else(|| machine_name(&file.hosts[0].ssh));
        Ok(Started {
            hosts: file.hosts.iter().map(|host| WorkerHost::of(host, &remote)).collect(),
            addresses: file.hosts.iter().map(|host| host.ips.clone()).collect(),
            rendezvous: HostPort { host: coordinator.to_owned(), port },
            devices,
            prefer_ring: file.backend.as_deref() == Some("jaccl-ring"),
        })
    }

    /// The membership of each rank.
    fn memberships(&self, token: &str) -> Vec<Membership> {
        let membership = |rank: usize| {
            let same = |host: &&WorkerHost| **host == self.hosts[rank];
            Membership {
                rank,
                world: self.hosts.len(),
                local_rank: self.hosts[..rank].iter().filter(same).count(),
                local_world: self.hosts.iter().filter(same).count(),
                rendezvous: self.rendezvous.to_string(),
                addresses: self.addresses[rank].clone(),
                run: "bench".to_owned(),
                token: Some(token.to_owned()),
                devices: self.devices.clone(),
                prefer_ring: self.prefer_ring,
                launched: true,
                ..Membership::alone()
            }
        };
        (0..self.hosts.len()).map(membership).collect()
    }
}

/// Starts the ranks as workers and shows what rank 0 measures.
fn start(
    arguments: &BenchArguments,
    settings: &Settings,
    ranks: Option<usize>,
    hostfile: Option<&Path>,
    verbosity: Verbosity,
) -> Result<ExitCode, Failure> {
    let port = preflight::free_port(None)
        .ok_or_else(|| Failure::arguments("no TCP port can be had", "another run may have them all: end it"))?;
    // If the first host is another one, this holds nothing up.
    let _held = preflight::hold_port(port);
    let mut started = match hostfile {
        None => Started::here(ranks.unwrap_or(1), port)?,
        Some(path) => Started::of_hostfile(path, arguments, port)?,
    };
    if let Some(path) = &arguments.devices {
        started.devices = Some(read_devices(path)?);
    }
    let token =
        new_token().map_err(|error| Failure::arguments(error.to_string(), "the system's random generator failed"))?;
    let memberships = started.memberships(&token).into_iter();
    let assignments: Vec<Assignment> =
        memberships.map(|membership| Assignment { membership, settings: settings.clone() }).collect();
    let words = ["cluster", "bench", "--worker"].map(str::to_owned).to_vec();
    let command = WorkerCommand { arguments: words, ..WorkerCommand::default() };
    let workers = Workers::start(&started.hosts, &command, &assignments).map_err(|error| {
        Failure::arguments(error.to_string(), "is the program there, and does ssh reach the host without a password?")
    })?;
    let mut table = Table::new(arguments.json);
    let (mut outcome, mut hinted) = (Ok(()), None);
    let names: Vec<String> = started.hosts.iter().map(host_of).collect();
    let exits = workers.finish(&AtomicI32::new(0), &AtomicBool::new(false), &mut |rank, event| match event {
        Event::Line(line) if rank == 0 => match serde_json::from_str::<Message>(&line) {
            Ok(Message::Row(row)) => outcome = table.row(&row),
            Ok(Message::Notice(notice)) if verbosity != Verbosity::Quiet => crate::stderr::complain!("{notice}"),
            Ok(Message::Notice(_)) => {}
            Err(_) => crate::stderr::complain!("[rank {rank}] {}", shown(&line)),
        },
        Event::Line(_) | Event::Closed | Event::StillRunning(_) => {}
        Event::ErrorLine(line) => {
            hinted = hinted.take().or_else(|| hint(&names[rank], &line).map(|(_, hint)| (rank, hint)));
            crate::stderr::complain!("[rank {rank}] {}", shown(&line));
        }
    });
    outcome?;
    if let Some((rank, hint)) = hinted.filter(|(rank, _)| exits.get(*rank).is_some_and(|exit| exit.code == SSH_FAILED))
    {
        crate::stderr::complain!("{}: {hint}", names[rank]);
    }
    match culprit(&exits, &[], 0) {
        Some(rank) => Ok(ExitCode::from(exit_code(exits[rank].code))),
        None => Ok(exit_of(table.wrong)),
    }
}

fn host_of(host: &WorkerHost) -> String {
    host.remote().map_or_else(|| "localhost".to_owned(), |remote| remote.host.clone())
}

fn read_devices(path: &Path) -> Result<DeviceMatrix, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::arguments(format!("--devices {}: {error}", path.display()), "a JSON matrix of device names")
    })?;
    Ok(DeviceMatrix::parse(&text)?)
}

/// A rank that a benchmark started.
fn worker() -> Result<ExitCode, Failure> {
    let assignment: Assignment = assignment(|_| Exit::PeerLost.end())
        .map_err(|error| Failure::arguments(error, "--worker is for the program itself"))?;
    let rank = assignment.membership.rank;
    let say = move |message: &Message| {
        let _ = output::line(&serde_json::to_string(message).expect("plain data"));
    };
    let notices = move |notice: Notice| {
        if rank == 0 {
            say(&Message::Notice(notice.to_string()));
        }
    };
    let row = &mut |row: &Row| {
        if rank == 0 {
            say(&Message::Row(row.clone()));
        }
    };
    let last_words = &|words: String| say(&Message::Notice(words));
    take_part(&assignment, Arc::new(notices), row, last_words)
}

/// A rank that mpirun, srun or torchrun started.
fn under_a_launcher(
    arguments: &BenchArguments,
    mut assignment: Assignment,
    verbosity: Verbosity,
) -> Result<ExitCode, Failure> {
    if let Some(path) = &arguments.devices {
        assignment.membership.devices = Some(read_devices(path)?);
    }
    let first = assignment.membership.rank == 0;
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
    notices: Notices,
    report: &mut dyn FnMut(&Row),
    last_words: &dyn Fn(String),
) -> Result<ExitCode, Failure> {
    let Assignment { membership, settings } = assignment;
    let group = membership.join(|config| {
        config.backend = match settings.backend.as_str() {
            "tcp" => BackendChoice::Tcp,
            "rdma" => BackendChoice::Rdma,
            _ => BackendChoice::Auto,
        };
        config.topology = settings.options.topology.or(config.topology);
        config.tcp.streams = settings.streams;
        config.tcp.busy_poll = settings.busy_poll;
        config.rdma.reliable = settings.reliable;
        config.rdma.strict = settings.strict;
        config.notices = notices;
    })?;
    let rows = bench::run(&group, &settings.options, report)?;
    if settings.costs {
        let costs = costs(&group, &settings.options)?;
        if membership.rank == 0 {
            last_words(costs);
        }
    }
    group.barrier()?;
    let wrong = rows.iter().any(|row| row.wrong > 0);
    Ok(exit_of(wrong))
}

/// The exit code of a benchmark, by whether a result had a wrong element.
fn exit_of(wrong: bool) -> ExitCode {
    if wrong { Exit::Bug.into() } else { Exit::Done.into() }
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
                "{}, {} over {backend}; times are per operation, best and median of 5 trials",
                row.op,
                counted(row.ranks as u64, "rank")
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
