//! What a host reports before a launch: version, clock, free disk space, identity, the recipe's
//! files, addresses of rank 0, and the newest checkpoint on its disk.

use std::io::{BufRead, IsTerminal, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use finetune_dataset::{matched, resolve_files};
use finetune_launch::copy::BundleFile;
use finetune_launch::reach::Answer;
use finetune_recipe::Recipe;
use finetune_rendezvous::identity;
use finetune_store::{Holding, MANIFEST_NAME, RealDisk, numbered, recognize};
use finetune_trainer::numbers::counted;
use finetune_trainer::{CHECKPOINTS, COPIES, model_directory};
use rustix::net::{AddressFamily, SocketType, sockopt};
use serde::{Deserialize, Serialize};

use crate::cli::RunArguments;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::{given_recipe, hub_files, output, version};

/// Bytes free on the disk of rank 0 below which a checkpoint is in danger.
const LITTLE_SPACE: u64 = 1 << 30;

/// Seconds. Clocks further apart make logs hard to compare; the run does not depend on them.
const CLOCKS_APART: f64 = 5.0;

/// In place of the hash of a file that a host fetches from the hub when it starts.
const FETCHED: &str = "fetched";

/// Time between two signs of life of a host that reads its files. The asker gives up a host that is
/// silent.
const TELL_EVERY: Duration = Duration::from_secs(2);

/// The question: one line of standard input.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Question {
    /// The process ends when its input does: the asker is gone then.
    pub(crate) watched: bool,
    /// Leave out the files, which take long.
    pub(crate) brief: bool,
    /// A name or address of rank 0.
    pub(crate) resolve: Option<String>,
    /// Ports that the run may use.
    pub(crate) ports: Option<(u16, u16)>,
    /// There is no recipe: ranks only use a model, and compare what they are started with themselves.
    #[serde(default)]
    pub(crate) only_uses: bool,
}

/// The first line of an answer: the time, before anything else is done.
#[derive(Debug, Serialize, Deserialize)]
struct Clock {
    /// Seconds since 1970.
    clock: f64,
}

/// A line between the first and the last: a sign of life.
#[derive(Debug, Serialize)]
struct Working {
    bytes: u64,
}

/// One JSON object on standard output, the last line.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    version: String,
    /// Bytes free where the run would be written.
    free_bytes: Option<u64>,
    /// Name and digest of each file that all hosts must have alike; the digest is "" if it is
    /// missing.
    files: Vec<(String, String)>,
    /// Which machine it is; see [`identity::machine`].
    #[serde(default)]
    pub(crate) machine: Option<String>,
    /// The addresses of rank 0's name on that host; empty if the name is not known.
    #[serde(default)]
    pub(crate) resolved: Vec<String>,
    /// A port that is free on that host now.
    #[serde(default)]
    pub(crate) port: Option<u16>,
    /// The newest checkpoint on its disk.
    #[serde(default)]
    pub(crate) newest: Option<(u64, PathBuf)>,
    /// Seconds that its clock is ahead at least; negative: behind. The asker works it out.
    #[serde(skip)]
    ahead: f64,
}

impl Report {
    /// The report of a host of which nothing else is known.
    pub(crate) fn of_machine(machine: Option<String>) -> Report {
        Report { machine, ..Report::default() }
    }

    /// The report of this host for ranks that only use a model.
    pub(crate) fn without_recipe(question: &Question) -> Report {
        Report {
            version: version::build(),
            machine: identity::machine(),
            resolved: question.resolve.as_deref().map(addresses).unwrap_or_default(),
            port: free_port(question.ports),
            ..Report::default()
        }
    }

    /// The report of this host. `progress` gets the bytes read since its last call.
    pub(crate) fn here(recipe: &Recipe, question: &Question, progress: &mut dyn FnMut(u64)) -> Report {
        let mut report = Report {
            free_bytes: free_bytes(&recipe.output_dir),
            newest: newest(&recipe.output_dir),
            ..Report::without_recipe(question)
        };
        if !question.brief {
            report.files = files(recipe, progress);
        }
        report
    }

    pub(crate) fn parse(answer: &Answer) -> Result<Report, String> {
        let other = || "its program answers in another way: it must be of this version".to_owned();
        let (_, line) = answer.lines.last().ok_or_else(other)?;
        let mut report: Report = serde_json::from_str(line).map_err(|_| other())?;
        let clock = answer
            .lines
            .iter()
            .find_map(|(heard, line)| Some((*heard, serde_json::from_str::<Clock>(line).ok()?.clock)));
        // The host read its clock between our question and its answer, however long the login took.
        report.ahead = clock.map_or(0.0, |(heard, clock)| (clock - heard).max(0.0) + (clock - answer.asked).min(0.0));
        Ok(report)
    }

    /// What keeps this host from taking part in a run with `other`.
    pub(crate) fn problems(&self, other: &Report) -> Vec<String> {
        let mut problems = Vec::new();
        if self.version != other.version {
            problems.push(format!("its program is version {}, this one {}", self.version, other.version));
        }
        for ((name, hash), (ours, expected)) in self.files.iter().zip(&other.files) {
            match (hash == expected, hash.is_empty()) {
                (true, false) => {}
                // What one of the two still has to fetch, the ranks compare when they have it.
                _ if hash == FETCHED || expected == FETCHED => {}
                (_, true) => problems.push(format!("{name} is missing there")),
                (false, false) => problems.push(format!("{name} is another file than {ours} here")),
            }
        }
        if self.files.len() != other.files.len() {
            problems.push(format!(
                "it has {} of the recipe, this host {}",
                counted(self.files.len() as u64, "file"),
                other.files.len()
            ));
        }
        problems
    }

    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let apart = self.ahead.abs();
        if apart > CLOCKS_APART {
            warnings
                .push(format!("its clock is {apart:.0} s apart from this one: times in logs will not fit together"));
        }
        if self.free_bytes.is_some_and(|free| free < LITTLE_SPACE) {
            warnings.push(format!(
                "only {} MiB of disk are free where the run would be written",
                self.free_bytes.unwrap_or(0) >> 20
            ));
        }
        warnings
    }
}

fn files(recipe: &Recipe, progress: &mut dyn FnMut(u64)) -> Vec<(String, String)> {
    let mut hash = |path: &Path| {
        finetune_store::content_hash_of(path, progress)
            .map_or_else(|_| String::new(), |hash| finetune_store::hex(&hash))
    };
    let mut files = Vec::new();
    match model_directory(recipe) {
        // The weights are compared by the ranks themselves, which have to read them anyway.
        Ok(model) if recognize(&model) == Holding::Gguf => {
            let bytes = gguf_bytes(&model).map_or_else(String::new, |bytes| format!("{bytes} bytes"));
            files.push(("GGUF file of model.path".to_owned(), bytes));
        }
        Ok(directory) => files.push(("config.json of model.path".to_owned(), hash(&directory.join("config.json")))),
        Err(_) if hub_files::names_model(recipe) => {
            files.push(("config.json of model.path".to_owned(), FETCHED.to_owned()));
        }
        Err(_) => files.push((format!("model.path ({})", recipe.model.path), String::new())),
    }
    let (train, eval) = (&recipe.data.train, &recipe.data.eval);
    if train.iter().chain(eval).any(|path| hub_files::is_rows(path)) {
        files.push(("data".to_owned(), FETCHED.to_owned()));
        return files;
    }
    match resolve_files(&recipe.data.train, &recipe.data.eval) {
        Ok((train, eval)) => {
            for path in train.iter().chain(&eval) {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                files.push((name, hash(path)));
            }
        }
        Err(error) => files.push((format!("data ({error})"), String::new())),
    }
    files
}

/// Bytes of a GGUF model: of a file, or of the files of a directory.
fn gguf_bytes(model: &Path) -> Option<u64> {
    if model.is_file() {
        return Some(model.metadata().ok()?.len());
    }
    let paths = std::fs::read_dir(model).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let files = paths.filter(|path| path.extension().is_some_and(|ending| ending == "gguf"));
    Some(files.filter_map(|path| path.metadata().ok()).map(|found| found.len()).sum())
}

/// Free bytes on the disk of the nearest folder above `path` that exists.
pub(crate) fn free_bytes(path: &Path) -> Option<u64> {
    let folder = path.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
    let status = rustix::fs::statvfs(folder).ok()?;
    Some(status.f_bavail.saturating_mul(status.f_frsize))
}

/// The addresses that this host resolves a name to.
fn addresses(name: &str) -> Vec<String> {
    let mut found: Vec<String> =
        (name, 0).to_socket_addrs().map(|all| all.map(|one| one.ip().to_string()).collect()).unwrap_or_default();
    found.dedup();
    found
}

/// A port that is free now, among those that may be used.
pub(crate) fn free_port(ports: Option<(u16, u16)>) -> Option<u16> {
    let free = |port: u16| {
        // If there is no IPv6, IPv4 counts.
        let listener = TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)));
        listener.and_then(|listener| listener.local_addr()).map(|address| address.port()).ok()
    };
    match ports {
        None => free(0),
        Some((first, last)) => (first..=last).find_map(free),
    }
}

/// Keeps a free port of this host from all that ask the system for any, such as other ranks, until the rank that is told
/// of it listens there. `None` on a system where that rank could not have it either.
pub(crate) fn hold_port(port: u16) -> Option<OwnedFd> {
    if !cfg!(target_os = "linux") {
        return None;
    }
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).ok()?;
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC).ok()?;
    // As that rank's: such sockets may share a port as long as only one of them listens.
    sockopt::set_socket_reuseaddr(&socket, true).ok()?;
    rustix::net::bind(&socket, &SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).ok()?;
    Some(socket)
}

/// The newest checkpoint of a run directory, or of the copies that it keeps for another host. It is
/// not verified, which takes long.
pub(crate) fn newest(directory: &Path) -> Option<(u64, PathBuf)> {
    let of = |folder: &str| {
        let all = numbered(&RealDisk, &directory.join(folder), "step-").unwrap_or_default();
        all.into_iter().rev().find(|(_, path)| path.join(MANIFEST_NAME).is_file())
    };
    let newest = [of(COPIES), of(CHECKPOINTS)].into_iter().flatten().max_by_key(|(step, _)| *step)?;
    Some((newest.0, std::path::absolute(&newest.1).unwrap_or(newest.1)))
}

/// `finetune preflight`, a hidden command.
pub(crate) fn preflight(arguments: &RunArguments) -> Result<ExitCode, Failure> {
    let question = question();
    let recipe = (!question.only_uses).then(|| given_recipe::of_launch(arguments)).transpose()?;
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    output::line(&serde_json::to_string(&Clock { clock }).expect("plain data"))?;
    let (mut told, mut bytes) = (Instant::now(), 0);
    let mut progress = |more: u64| {
        bytes += more;
        if told.elapsed() > TELL_EVERY {
            told = Instant::now();
            let _ = output::line(&serde_json::to_string(&Working { bytes }).expect("plain data"));
        }
    };
    let report = match &recipe {
        Some(recipe) => Report::here(recipe, &question, &mut progress),
        None => Report::without_recipe(&question),
    };
    output::line(&serde_json::to_string(&report).expect("plain data"))?;
    Ok(ExitCode::SUCCESS)
}

/// Reads the question. If it says `watched`, this process ends when the input does.
fn question() -> Question {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Question::default();
    }
    let mut line = String::new();
    let _ = stdin.lock().take(64 << 10).read_line(&mut line);
    let question: Question = serde_json::from_str(&line).unwrap_or_default();
    if question.watched {
        std::thread::spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            Exit::PeerLost.end();
        });
    }
    question
}

/// The arguments of the hidden command for the arguments of a run.
pub(crate) fn words(run: &[String]) -> Vec<String> {
    ["preflight".to_owned()].into_iter().chain(run.iter().cloned()).collect()
}

/// All files that a run needs, and their names in the folder of the copy.
pub(crate) fn bundle_files(run: &RunArguments, recipe: &Recipe) -> Result<Vec<BundleFile>, Failure> {
    let program = std::env::current_exe()?;
    let mut bundle_files = vec![
        BundleFile { from: program, to: "finetune".to_owned() },
        BundleFile { from: run.recipe.recipe.clone().unwrap_or_default(), to: "recipe.toml".to_owned() },
    ];
    let model = model_directory(recipe)?;
    let to = name_of_model(&model).to_owned();
    bundle_files.push(BundleFile { from: model, to });
    bundle_files.extend(moved(recipe).into_iter().flat_map(|(_, files)| files));
    if let Some(Some(path)) = &run.resume {
        bundle_files.push(BundleFile { from: path.clone(), to: START.to_owned() });
    }
    Ok(bundle_files)
}

/// The name of the model in the folder of a copy: a directory, or one file.
fn name_of_model(model: &Path) -> &'static str {
    if model.is_file() { "model.gguf" } else { "model" }
}

/// The name of a checkpoint to resume from, in the folder of a copy.
const START: &str = "start";

/// The keys of the recipe that name files, and the names of these in the folder of a copy.
fn moved(recipe: &Recipe) -> Vec<(&'static str, Vec<BundleFile>)> {
    let bundle_files = |what: &str, paths: &[PathBuf]| -> Vec<BundleFile> {
        let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let bundle_file =
            |(n, path): (usize, &PathBuf)| BundleFile { from: path.clone(), to: format!("{what}/{n}/{}", name(path)) };
        paths.iter().enumerate().map(bundle_file).collect()
    };
    let one = |path: &Option<PathBuf>| path.iter().cloned().collect::<Vec<_>>();
    let rows = |paths: &[PathBuf]| paths.iter().flat_map(|path| files_of_entry(path)).collect::<Vec<_>>();
    let keys = [
        ("data.train", bundle_files("train", &rows(&recipe.data.train))),
        ("data.eval", bundle_files("eval", &rows(&recipe.data.eval))),
        ("data.chat_template", bundle_files("template", &one(&recipe.data.chat_template))),
        ("lora.init_from", bundle_files("adapter", &one(&recipe.lora.init_from))),
    ];
    keys.into_iter().filter(|(_, bundle_files)| !bundle_files.is_empty()).collect()
}

/// The files that a pattern in `data.train` or `data.eval` hits, or the entry itself.
fn files_of_entry(path: &Path) -> Vec<PathBuf> {
    matched(path).unwrap_or_else(|_| vec![path.to_owned()])
}

/// `data.weights` for the files that the entries of `data.train` become.
fn weights_of_files(recipe: &Recipe) -> Option<String> {
    let entries = recipe.data.train.iter().zip(&recipe.data.weights);
    let weights: Vec<String> =
        entries.flat_map(|(path, weight)| vec![format!("{weight:?}"); files_of_entry(path).len()]).collect();
    (!weights.is_empty()).then(|| format!("data.weights=[{}]", weights.join(", ")))
}

/// The run directory in the folder of a copy.
pub(crate) fn directory_of_copy(recipe: &Recipe) -> String {
    let name = recipe.output_dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    format!("runs/{}", if name.is_empty() { "run" } else { &name })
}

/// The arguments of the run in the folder of a copy: the same recipe with its files beside it.
pub(crate) fn words_of_copy(run: &RunArguments, recipe: &Recipe) -> Vec<String> {
    let mut words = vec!["recipe.toml".to_owned()];
    let mut set = |text: String| words.extend(["--set".to_owned(), text]);
    let is_moved = |text: &&String| {
        let key = text.split('=').next().unwrap_or_default().trim();
        key == "model.path" || moved(recipe).iter().any(|(name, _)| *name == key)
    };
    run.recipe.sets.iter().filter(|text| !is_moved(text)).for_each(|text| set(text.clone()));
    let model = model_directory(recipe).map_or("model", |model| name_of_model(&model));
    set(format!("model.path=\"{model}\""));
    for (key, bundle_files) in moved(recipe) {
        let names: Vec<String> = bundle_files
            .iter()
            .map(|bundle_file| serde_json::Value::from(bundle_file.to.as_str()).to_string())
            .collect();
        let list = matches!(key, "data.train" | "data.eval");
        set(if list { format!("{key}=[{}]", names.join(", ")) } else { format!("{key}={}", names.join("")) });
    }
    weights_of_files(recipe).into_iter().for_each(&mut set);
    words.extend(["--output-dir".to_owned(), directory_of_copy(recipe)]);
    match &run.resume {
        None => {}
        Some(None) => words.push("--resume".to_owned()),
        Some(Some(_)) => words.push(format!("--resume={START}")),
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The clock's line came at `heard`, asked for at 100.
    fn ahead(clock: f64, heard: f64) -> f64 {
        let report = serde_json::to_string(&Report::default()).expect("plain data");
        let lines = vec![
            (heard, format!("{{\"clock\":{clock}}}")),
            (heard + 9.0, "{\"bytes\":7}".to_owned()),
            (heard + 20.0, report),
        ];
        Report::parse(&Answer { asked: 100.0, lines }).expect("a report").ahead
    }

    #[test]
    fn a_slow_answer_is_no_wrong_clock() {
        assert_eq!(ahead(100.5, 101.0), 0.0);
        assert_eq!(ahead(107.0, 125.0), 0.0);
        assert_eq!(ahead(131.0, 101.0), 30.0);
        assert_eq!(ahead(60.0, 125.0), -40.0);
    }

    #[test]
    fn another_programs_answer_is_refused() {
        for lines in [vec![], vec![(1.0, "true".to_owned())], vec![(1.0, "{\"clock\":1}".to_owned())]] {
            let error = Report::parse(&Answer { asked: 0.0, lines }).expect_err("no report");
            assert!(error.contains("must be of this version"), "{error}");
        }
    }

    #[test]
    fn a_free_port_of_a_range_is_found() {
        let taken = TcpListener::bind("0.0.0.0:0").expect("a port");
        let port = taken.local_addr().expect("an address").port();
        assert_eq!(free_port(Some((port, port))), None);
        assert!(free_port(None).is_some());
    }

    /// There are some seven thousand that Linux gives to those who listen.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_port_that_is_held_is_given_to_nobody_and_can_be_listened_at() {
        let port = free_port(None).expect("a port");
        let _held = hold_port(port).expect("a socket");
        for _ in 0..20_000 {
            let other = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
            assert_ne!(other.port(), port);
        }
        TcpListener::bind(("127.0.0.1", port)).expect("the rank that knows it");
    }

    #[test]
    fn loopback_names_are_resolved() {
        assert!(addresses("localhost").iter().any(|address| address == "127.0.0.1" || address == "::1"));
        assert_eq!(addresses("no-such-host.invalid"), [""; 0]);
    }
}
