//! `finetune serve`: requests of OpenAI's interface over HTTP.

use std::fs::Metadata;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use finetune_model::EngineSettings;
use finetune_serve::{Bounds, Others, Reply, ServeError, Served, Server, Settings, Stopper, Tell};
use finetune_trainer::{Replies, Together};

use self::base::Base;
use crate::cli::ServeArguments;
use crate::commands::conversation;
use crate::commands::opening;
use crate::commands::together::{self, OneOf};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::progress::Verbosity;
use crate::rank_event::{self, RankEvent};
use crate::signals::{Heard, Signals};
use crate::source::{Source, adapter_directory, run_of};
use crate::{memory, output};

mod base;

/// Without `--slots` there are bytes for the keys and values of so many answers.
const SLOTS_OF_BYTES: usize = 8;

/// Longest key, in bytes.
const LONGEST_KEY: usize = 4096;

pub(crate) fn serve(arguments: &ServeArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let signals = Signals::listen()?;
    if !arguments.assigned {
        return serve_as(arguments, verbosity, &signals, None);
    }
    let one = OneOf::assigned(&signals, format!("{arguments:?}"), verbosity)?;
    let work = || match one.is_first() {
        true => serve_as(arguments, verbosity, &signals, Some(&one)),
        false => follow_first(arguments, &signals, &one),
    };
    work().map_err(together::without_resume).inspect_err(|failure| {
        one.excuse(failure);
        together::tell_of(failure);
    })
}

/// A rank that holds a part of the model, and computes what the first one does.
fn follow_first(arguments: &ServeArguments, signals: &Signals, one: &OneOf) -> Result<ExitCode, Failure> {
    let say = |_: &str| {};
    let source = Source::open(&arguments.model())?;
    let adapters = adapters(arguments, &source, &say)?;
    let first = adapters.first().map(|(_, directory)| directory.as_path());
    let joined = one.join(&source.model, first, &arguments.model(), arguments.parallel, &say)?;
    let Some(together) = joined else { return Ok(ExitCode::SUCCESS) };
    let replies = Arc::new(together.replies()?);
    let (base, mut served) = Base::open(arguments, &source, &adapters, Some(&together), &say)?;
    for (name, directory) in &adapters {
        served.push(base.with_adapter(name, directory, &say)?);
    }
    // The first rank says when it is over.
    signals.finish_steps_silently();
    if let Some(exit) = all_are_ready(&together, signals)? {
        return Ok(exit.into());
    }
    let rest = || together.keep_alive();
    let telling = Arc::clone(&replies);
    // A first rank that is gone is noticed by what it no longer says.
    let tell: Tell = Arc::new(move |number: u64, refusal: Option<&str>| {
        let _ = telling.tell(number, refusal.unwrap_or_default());
    });
    let loader = base.loader(arguments, |_| {});
    let followed = finetune_serve::follow(served, together.hops.as_ref(), &rest, &tell, loader);
    followed.map_err(|what| lost(&together, what))?;
    together.leave()?;
    Ok(ExitCode::SUCCESS)
}

/// Why the ranks do not go on.
fn lost(together: &Together, what: String) -> Failure {
    together.check().err().map_or_else(|| Failure::lost(what, Vec::new()), Failure::from)
}

fn serve_as(
    arguments: &ServeArguments,
    verbosity: Verbosity,
    signals: &Signals,
    one: Option<&OneOf>,
) -> Result<ExitCode, Failure> {
    let settings = settings(arguments)?;
    let say = move |line: &str| opening::say(verbosity, line);
    let source = Source::open(&arguments.model())?;
    let adapters = adapters(arguments, &source, &say)?;
    let is_open = settings.key.is_none();
    let server = Server::start(settings).map_err(not_started)?;
    let address = server.address();
    if is_open && !address.ip().is_loopback() {
        say(&format!(
            "anyone who reaches {address} can use this model: --api-key-file FILE asks for a key, --host 127.0.0.1 listens here only"
        ));
    }
    let note = arguments.api_key_file.as_deref().and_then(readable_by_others);
    note.iter().chain(&source.notices).for_each(|notice| say(notice));
    let first = adapters.first().map(|(_, directory)| directory.as_path());
    let join = |one: &OneOf| one.join(&source.model, first, &arguments.model(), arguments.parallel, &say);
    let together = one.map(join).transpose()?.flatten().map(Arc::new);
    let replies = together.as_ref().map(|together| together.replies()).transpose()?;
    let (base, mut served) = Base::open(arguments, &source, &adapters, together.as_deref(), &say)?;
    for (name, directory) in &adapters {
        served.push(base.with_adapter(name, directory, &say)?);
    }
    let others = together.as_ref().zip(replies).map(|(together, replies)| others(together, replies, &served));
    // A run's own adapter is what requests get that name no model.
    if source.adapter.is_some() && served.len() > 1 {
        served.swap(0, 1);
    }
    let engine = engine(arguments, &base, together.as_deref());
    let base_id = base.id.clone();
    let loader = base.loader(arguments, say);
    // Before anybody can ask: a signal that comes then is for answers, too.
    stop_at_signals(signals, server.stopper(), arguments.grace);
    if let Some(together) = &together {
        rank_event::send(&RankEvent::Working);
        if let Some(exit) = all_are_ready(together, signals)? {
            return Ok(exit.into());
        }
    }
    server.ready(served, engine, loader, others, Box::new(say)).map_err(not_started)?;
    output::line(&announcement(&base_id, &adapters, &arguments.host, address))?;
    let ended = server.wait();
    signals.said();
    match (ended, together) {
        (Ok(()), together) => {
            // No rank leaves while another needs it.
            together.map_or(Ok(()), |together| together.leave())?;
            Ok(ExitCode::SUCCESS)
        }
        (Err(ServeError::Lost { what }), Some(together)) => Err(lost(&together, what)),
        (Err(error), _) => {
            crate::stderr::complain!("error: {error}; this is a bug in finetune");
            Ok(Exit::Bug.into())
        }
    }
}

/// The first signal lets answers under way come to their end.
fn stop_at_signals(signals: &Signals, stopper: Stopper, grace: u64) {
    signals.finish_steps(move |heard| match heard {
        Heard::First => {
            stopper.stop();
            format!("stopping: answers under way have {grace} s to come to their end; once more ends at once")
        }
        Heard::Second => "ended at once".to_owned(),
    });
}

/// Waits until all ranks have their models: nobody is answered before. A rank that is told to stop meanwhile may be gone
/// already, and then this one ends as it is told, too.
fn all_are_ready(together: &Together, signals: &Signals) -> Result<Option<Exit>, Failure> {
    let Err(error) = together.barrier() else { return Ok(None) };
    match signals.stop.load(Ordering::SeqCst) {
        0 => Err(error.into()),
        signal => Ok(Some(Exit::Stopped(signal))),
    }
}

/// What the first rank needs to tell the others.
fn others(together: &Arc<Together>, replies: Replies, served: &[Served]) -> Others {
    let (looked_at, kept_alive) = (Arc::clone(together), Arc::clone(together));
    let reply = |reply: finetune_trainer::Reply| {
        let refusal = Some(reply.words).filter(|words| !words.is_empty());
        Reply { rank: reply.rank, number: reply.number, refusal }
    };
    let heard: finetune_serve::Heard = Arc::new(move || {
        let all = replies.heard().map_err(|error| error.to_string())?;
        Ok(all.into_iter().map(reply).collect())
    });
    Others {
        models: served.iter().map(Served::model).collect(),
        hops: Arc::clone(&together.hops),
        hosts: together.hosts(),
        check: Arc::new(move || looked_at.check().map_err(|error| error.to_string())),
        rest: Box::new(move || kept_alive.keep_alive()),
        heard,
    }
}

/// Refuses arguments before anything is read.
fn settings(arguments: &ServeArguments) -> Result<Settings, Failure> {
    for (name, count) in [("--max-tokens", Some(arguments.max_tokens)), ("--slots", arguments.slots)] {
        if count == Some(0) {
            return Err(Failure::arguments(format!("{name} must be 1 or more"), "leave it out for the default"));
        }
    }
    // A semaphore has no more places.
    let most = u32::MAX as usize >> 3;
    if arguments.slots.is_some_and(|slots| slots > most) || arguments.queue > most {
        return Err(Failure::arguments("--slots or --queue is too large", format!("at most {most} makes sense")));
    }
    let adapters_dir = arguments.adapters_dir.as_ref();
    if let Some(directory) = adapters_dir.filter(|directory| !directory.is_dir()) {
        return Err(Failure::arguments(
            format!("--adapters-dir {}: there is no such directory", directory.display()),
            "the path is relative to the current directory",
        ));
    }
    Ok(Settings {
        host: arguments.host.clone(),
        port: arguments.port,
        key: arguments.api_key_file.as_deref().map(key).transpose()?,
        max_tokens: arguments.max_tokens,
        grace: Duration::from_secs(arguments.grace),
        adapters_dir: arguments.adapters_dir.clone(),
        bounds: Bounds { turn: Duration::from_secs(arguments.max_wait), ..Bounds::default() },
    })
}

fn key(file: &Path) -> Result<String, Failure> {
    let text = conversation::read("--api-key-file", file)?;
    let key = text.lines().next().unwrap_or_default().trim();
    if key.is_empty() || key.len() > LONGEST_KEY || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Failure::arguments(
            format!("--api-key-file {}: its first line is no key", file.display()),
            "a key has printable ASCII letters without spaces; `openssl rand -hex 32` makes one",
        ));
    }
    Ok(key.to_owned())
}

/// A note about a key that others can read. It may come through a pipe, and Kubernetes makes its files readable by a group,
/// so it is no error.
fn readable_by_others(file: &Path) -> Option<String> {
    let found = file.metadata().ok().filter(Metadata::is_file)?;
    let mode = found.permissions().mode() & 0o777;
    let file = file.display();
    let note = format!("the key in {file} can be read by others (mode {mode:o}): chmod 600 {file}");
    (mode & 0o077 != 0).then_some(note)
}

/// The adapters with their ids: that of a run first.
fn adapters(
    arguments: &ServeArguments,
    source: &Source,
    say: &dyn Fn(&str),
) -> Result<Vec<(String, PathBuf)>, Failure> {
    let mut adapters: Vec<(String, PathBuf)> = Vec::new();
    if let Some(adapter) = &source.adapter {
        let named = run_of(adapter).unwrap_or_else(|| adapter.clone());
        adapters.push((name_of(&named), adapter.clone()));
    }
    let mut notices = Vec::new();
    for named in &arguments.adapters {
        adapters.push((named.name.clone(), adapter_directory(&named.path, &mut notices)?));
    }
    notices.iter().for_each(|notice| say(notice));
    let base = base_id(&source.model);
    for (n, (name, directory)) in adapters.iter().enumerate() {
        if *name == base || adapters[..n].iter().any(|(other, _)| other == name) {
            return Err(Failure::arguments(
                format!("two models would have the id `{name}`; one is {}", directory.display()),
                "--adapter NAME=DIR gives an adapter another name",
            ));
        }
    }
    Ok(adapters)
}

/// The id of a base: the run that trained all of its weights, its hub id if it is in the Hugging Face
/// cache, otherwise its directory's name.
fn base_id(model: &Path) -> String {
    if let Some(run) = run_of(model) {
        return name_of(&run);
    }
    let parts: Vec<String> = model.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
    let of_hub = parts.windows(2).rev().find(|pair| pair[1] == "snapshots");
    let of_hub = of_hub.and_then(|pair| pair[0].strip_prefix("models--"));
    of_hub.map_or_else(|| name_of(model), |name| name.replacen("--", "/", 1))
}

/// The name of a directory, or of a file without its ending.
fn name_of(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = if path.is_file() { path.file_stem() } else { path.file_name() };
    name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// As many answers as go through the model together, unless `--slots` says it. Without it, their keys and values take
/// no more than those of [`SLOTS_OF_BYTES`] answers may: short ones need less than there is for each.
fn engine(arguments: &ServeArguments, base: &Base, together: Option<&Together>) -> EngineSettings {
    let model = &base.opened.model;
    let slots = arguments.slots.unwrap_or(model.most_rows());
    let wanted = model.rows_bytes().saturating_mul(arguments.slots.unwrap_or(SLOTS_OF_BYTES));
    let weights = if model.placement().is_cpu() { base.opened.weights } else { 0 };
    let ranks = together.map_or(1, |together| together.host.local_world.max(1) as u64);
    let most = memory::machine_bytes().map_or(u64::MAX, |bytes| room_beside(weights, bytes / ranks));
    let cache_bytes = wanted.min(usize::try_from(most).unwrap_or(usize::MAX));
    EngineSettings {
        slots,
        queue: arguments.queue,
        cache_bytes,
        prefix_bytes: cache_bytes / 2,
        speculate: arguments.speculate,
    }
}

/// Bytes of keys and values beside so many of weights: half of the memory at most. The allocator takes up to half as much
/// again, so there is that beside the weights, too.
fn room_beside(weights: u64, memory: u64) -> u64 {
    (memory / 2).min(memory.saturating_sub(weights) / 3 * 2)
}

/// The line that says where the server is. The host is the given one: it is what clients use.
fn announcement(base: &str, adapters: &[(String, PathBuf)], host: &str, address: SocketAddr) -> String {
    let names: Vec<&str> = adapters.iter().map(|(name, _)| name.as_str()).collect();
    let adapters = match names.as_slice() {
        [] => String::new(),
        [name] => format!(" and the adapter {name}"),
        names => format!(" and the adapters {}", names.join(", ")),
    };
    let host = match host.parse::<IpAddr>() {
        Ok(_) => address.ip().to_string(),
        Err(_) => host.to_owned(),
    };
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    format!("serving {base}{adapters} at http://{host}:{} (Ctrl-C stops)", address.port())
}

fn not_started(error: ServeError) -> Failure {
    let ServeError::Bind { host, port, source } = &error else {
        return Failure::bad_input(error.to_string(), Vec::new());
    };
    let hint = match source.kind() {
        ErrorKind::AddrInUse => {
            let next = port.checked_add(1).unwrap_or(8080);
            format!("another program listens there: --port {next} takes another port, --port 0 a free one")
        }
        ErrorKind::PermissionDenied => "ports below 1024 are for the system: take a higher one with --port".to_owned(),
        _ if (host.as_str(), *port).to_socket_addrs().is_err() => {
            "--host takes a name or an address of this machine, such as 127.0.0.1 or 0.0.0.0".to_owned()
        }
        _ => "--host takes an address of this machine, such as 127.0.0.1 or 0.0.0.0".to_owned(),
    };
    Failure::arguments(error.to_string(), hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_bases() {
        for (path, want) in [
            ("/cache/models--Qwen--Qwen3-0.6B/snapshots/abc", "Qwen/Qwen3-0.6B"),
            ("/cache/models--gpt2/snapshots/abc", "gpt2"),
            ("models/Qwen3-0.6B", "Qwen3-0.6B"),
            ("models/tiny/", "tiny"),
        ] {
            assert_eq!(base_id(Path::new(path)), want, "{path}");
        }
    }

    #[test]
    fn keys_and_values_have_room_beside_the_weights() {
        for (weights, memory, want) in [(0, 16, 8), (4, 16, 8), (10, 16, 4), (16, 16, 0), (20, 16, 0)] {
            assert_eq!(room_beside(weights << 30, memory << 30), want << 30, "{weights} of {memory} GiB");
        }
    }

    #[test]
    fn where_the_server_is() {
        let adapters = |names: &[&str]| -> Vec<(String, PathBuf)> {
            names.iter().map(|name| ((*name).to_owned(), PathBuf::new())).collect()
        };
        for (names, host, address, want) in [
            (&[][..], "127.0.0.1", "127.0.0.1:80", "serving m at http://127.0.0.1:80 (Ctrl-C stops)"),
            (&["a"], "localhost", "127.0.0.1:80", "serving m and the adapter a at http://localhost:80 (Ctrl-C stops)"),
            (&["a", "b"], "::1", "[::1]:80", "serving m and the adapters a, b at http://[::1]:80 (Ctrl-C stops)"),
        ] {
            let address = address.parse().expect("an address");
            assert_eq!(announcement("m", &adapters(names), host, address), want);
        }
    }
}
