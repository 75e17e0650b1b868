//! Where a watched run lies, and how what is new comes from there.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use finetune_launch::complaint::Trouble;
use finetune_launch::follow::{Files, Follow, Seen};
use finetune_launch::{Remote, Unanswered};
use finetune_recipe::Recipe;
use finetune_rendezvous::name_fault;
use finetune_store::{Holding, RunLock, recognize};
use finetune_trainer::{CHECKPOINTS, LocalRun, RECORD_FILES, RunFacts, RunRecord, RunStatus};

use crate::failure::Failure;
use crate::source::run_of;

/// Times between tries to reach a host again.
const AGAIN: [u64; 5] = [1, 2, 5, 10, 30];

/// A signal that ends what listens to a host.
const END: i32 = 15;

/// A run that is watched.
pub(super) struct Watched {
    pub(super) name: String,
    /// As it was named by the user.
    argument: String,
    place: Place,
}

enum Place {
    Here(Box<LocalRun>),
    There(Box<RemoteRun>),
}

/// What the thread that listens to a host tells.
enum Told {
    Seen(Seen),
    /// The connection is lost, and will be tried again.
    Lost(Unanswered),
}

/// A run at another host.
struct RemoteRun {
    host: String,
    folder: PathBuf,
    record: RunRecord,
    /// Rows that are read again from the beginning, until all of them have come.
    coming: Option<RunRecord>,
    told: Receiver<Told>,
    /// What is wrong with the connection now.
    trouble: Option<String>,
    /// Whether all that there was has come once.
    is_complete: bool,
    stop: Arc<AtomicI32>,
    thread: Option<JoinHandle<()>>,
}

impl Watched {
    /// Finds a run. One at another host is asked for, and not waited for.
    pub(super) fn open(argument: &str, config: Option<&Path>) -> Result<Watched, Failure> {
        let (path, place) = match remote(argument) {
            Some((host, folder)) => {
                let run = RemoteRun::listen(host, folder, config)?;
                (folder.to_owned(), Place::There(Box::new(run)))
            }
            None => {
                let directory = local(Path::new(argument))?;
                // "." has no name of its own.
                let full = directory.canonicalize().unwrap_or(directory.clone());
                (full, Place::Here(Box::new(LocalRun::new(&directory))))
            }
        };
        let name = path.file_name().map_or(argument.to_owned(), |name| name.to_string_lossy().into_owned());
        let shown = finetune_launch::complaint::shown;
        Ok(Watched { name: shown(&name), argument: shown(argument), place })
    }

    pub(super) fn record(&self) -> &RunRecord {
        match &self.place {
            Place::Here(run) => &run.record,
            Place::There(run) => &run.record,
        }
    }

    /// As the user named it.
    pub(super) fn argument(&self) -> &str {
        &self.argument
    }

    /// What is wrong with the connection.
    pub(super) fn trouble(&self) -> Option<&str> {
        match &self.place {
            Place::Here(_) => None,
            Place::There(run) => run.trouble.as_deref(),
        }
    }

    /// Takes in what is new.
    pub(super) fn look(&mut self) -> Result<(), Failure> {
        match &mut self.place {
            Place::Here(run) => {
                let looked = run.look();
                looked.map_err(|error| {
                    let message = format!("{}: its metrics cannot be read: {error}", run.directory().display());
                    Failure::arguments(message, "watch needs the right to read metrics.jsonl there")
                })
            }
            Place::There(run) => {
                while let Ok(told) = run.told.try_recv() {
                    run.take(told)?;
                }
                Ok(())
            }
        }
    }

    /// Waits until all that is there has been read. A host that does not answer at the first try is
    /// an error.
    pub(super) fn wait_for_first_look(&mut self) -> Result<(), Failure> {
        let Place::There(run) = &mut self.place else { return self.look() };
        let (since, mut is_told) = (Instant::now(), false);
        while !run.is_complete {
            match run.told.recv_timeout(Duration::from_secs(3)) {
                Ok(Told::Lost(error)) => return Err(unreachable(&run.host, &error)),
                Ok(told) => run.take(told)?,
                Err(RecvTimeoutError::Disconnected) => return Err(Failure::no_threads()),
                // The listener has deadlines of its own.
                Err(RecvTimeoutError::Timeout) if is_told => {}
                Err(RecvTimeoutError::Timeout) => {
                    is_told = true;
                    let seconds = since.elapsed().as_secs();
                    crate::stderr::complain!("waiting for {} ({seconds} s)", run.host);
                }
            }
        }
        Ok(())
    }
}

impl RemoteRun {
    fn listen(host: &str, folder: &Path, config: Option<&Path>) -> Result<RemoteRun, Failure> {
        if let Some(fault) = name_fault(host) {
            return Err(Failure::arguments(
                format!("{host:?} {fault} and cannot be the name of a host"),
                "a run at another host is named HOST:DIR",
            ));
        }
        let remote = Remote { host: host.to_owned(), config: config.map(Path::to_owned), ..Remote::default() };
        let (stop, (sender, told)) = (Arc::new(AtomicI32::new(0)), channel());
        let thread = std::thread::Builder::new().name("watch".to_owned()).spawn({
            let (stop, folder) = (Arc::clone(&stop), folder.to_owned());
            move || listen(&remote, &folder, &stop, &sender)
        });
        let thread = Some(thread.map_err(|_| Failure::no_threads())?);
        let (host, folder, record) = (host.to_owned(), folder.to_owned(), RunRecord::default());
        let coming = None;
        Ok(RemoteRun { host, folder, record, coming, told, trouble: None, is_complete: false, stop, thread })
    }

    fn take(&mut self, told: Told) -> Result<(), Failure> {
        let seen = match told {
            Told::Seen(seen) => seen,
            Told::Lost(error) => {
                self.trouble = Some(format!("{}: {error}; it is tried again", self.host));
                return Ok(());
            }
        };
        self.trouble = None;
        let record = &mut self.record;
        match seen {
            Seen::Missing => {
                return Err(Failure::arguments(
                    format!("there is no {} at {}", self.folder.display(), self.host),
                    "a relative directory is below the home directory there",
                ));
            }
            Seen::Grown { fresh, bytes } => {
                if fresh {
                    self.coming = Some(RunRecord::default());
                }
                self.coming.as_mut().unwrap_or(record).push(&bytes);
            }
            Seen::Whole { file, bytes } => match file {
                0 => record.facts = RunFacts::parse(&bytes).or(record.facts.take()),
                1 => {
                    let text = String::from_utf8_lossy(&bytes);
                    record.recipe = Recipe::parse(&text, Path::new("recipe.toml"), &[], Some(&self.folder)).ok();
                }
                _ => record.take_answers(&bytes),
            },
            Seen::State { held, newest, has_result, more } => {
                // A process of a third host cannot be asked for: what it said last counts.
                let says = || record.facts.as_ref().is_some_and(|facts| facts.status == RunStatus::Running);
                record.is_held = held.unwrap_or_else(says);
                (record.checkpoint, record.has_result) = (newest, has_result);
                if !more {
                    self.is_complete = true;
                    self.coming.take().into_iter().for_each(|rows| record.take_rows(rows));
                }
            }
        }
        Ok(())
    }
}

impl Drop for RemoteRun {
    fn drop(&mut self) {
        self.stop.store(END, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // It has nothing left to say.
            let _ = thread.join();
        }
    }
}

/// Listens to a host until `stop` is set, and connects again if the connection is lost.
fn listen(remote: &Remote, folder: &Path, stop: &AtomicI32, sender: &Sender<Told>) {
    let files = Files {
        folder,
        growing: RECORD_FILES[0],
        whole: &RECORD_FILES[1..],
        lock: ".lock",
        numbered: (CHECKPOINTS, "step-"),
        results: &["adapter", "model"],
    };
    let mut tries = 0;
    while stop.load(Ordering::SeqCst) == 0 {
        let Err(error) = listen_once(remote, &files, stop, sender, &mut tries) else { return };
        if stop.load(Ordering::SeqCst) != 0 || sender.send(Told::Lost(error)).is_err() {
            return;
        }
        let until = Instant::now() + Duration::from_secs(AGAIN[tries.min(AGAIN.len() - 1)]);
        tries += 1;
        while Instant::now() < until && stop.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Listens over one connection. Returns `Ok` if nobody wants to hear more. `tries` begins again
/// once something has come.
fn listen_once(
    remote: &Remote,
    files: &Files<'_>,
    stop: &AtomicI32,
    sender: &Sender<Told>,
    tries: &mut usize,
) -> Result<(), Unanswered> {
    let mut follow = Follow::open(remote, files, stop)?;
    loop {
        let seen = follow.next(stop)?;
        *tries = 0;
        if sender.send(Told::Seen(seen)).is_err() {
            return Ok(());
        }
    }
}

fn unreachable(host: &str, error: &Unanswered) -> Failure {
    let (message, hints) = (format!("{host}: {error}"), error.hint(host).into_iter().collect());
    match error.trouble() {
        Trouble::Absent => Failure::lost(message, hints),
        Trouble::Mistake => Failure::bad_input(message, hints),
    }
}

/// Host and folder of `HOST:DIR`, as scp takes it. A path that exists here is no such thing.
fn remote(argument: &str) -> Option<(&str, &Path)> {
    let (host, folder) = argument.split_once(':')?;
    let is_host = !host.is_empty() && !host.contains('/') && !Path::new(argument).exists();
    is_host.then_some((host, Path::new(if folder.is_empty() { "~" } else { folder })))
}

/// The directory of a run on this machine.
fn local(path: &Path) -> Result<PathBuf, Failure> {
    let shown = path.display();
    let holding = recognize(path);
    let parent = || path.parent().filter(|parent| recognize(parent) == Holding::Run).map(Path::to_owned);
    match holding {
        Holding::Run => Ok(path.to_owned()),
        // A run that is just reading its rows.
        Holding::Directory | Holding::EmptyDirectory if RunLock::holder(path).is_some() => Ok(path.to_owned()),
        Holding::Recipe => match parent() {
            Some(run) => Ok(run),
            None => Ok(Recipe::load(path, &[], None)?.output_dir),
        },
        Holding::Missing => Err(Failure::arguments(
            format!("there is no {shown}"),
            "name a run's directory, HOST:DIR at another host, or the recipe of a run that is to begin",
        )),
        _ => parent().or_else(|| run_of(path)).ok_or_else(|| {
            Failure::arguments(
                format!("{shown} is {}: a run is meant", holding.describe()),
                "name the recipe's output_dir, which has metrics.jsonl in it",
            )
        }),
    }
}

/// Gives runs whose directories have the same name the names that the user gave.
pub(super) fn name_apart(runs: &mut [Watched]) {
    let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
    for run in runs {
        if names.iter().filter(|name| **name == run.name).count() > 1 {
            run.name = run.argument.clone();
        }
    }
}

#[cfg(test)]
impl Watched {
    /// A run of which only the record is known.
    pub(super) fn of(name: &str, record: RunRecord) -> Watched {
        let mut run = LocalRun::new(Path::new("."));
        run.record = record;
        Watched { name: name.to_owned(), argument: name.to_owned(), place: Place::Here(Box::new(run)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_folders_as_scp_has_them() {
        for (argument, want) in [
            ("box:runs/a", Some(("box", "runs/a"))),
            ("me@box.local:/runs/a:b", Some(("me@box.local", "/runs/a:b"))),
            ("box:", Some(("box", "~"))),
            ("runs/a", None),
            ("./a:b", None),
            (":a", None),
        ] {
            assert_eq!(remote(argument), want.map(|(host, folder)| (host, Path::new(folder))), "{argument}");
        }
    }

    /// After a lost connection everything comes again, in pieces. What was there stays until then.
    #[test]
    fn rows_that_come_again_replace_the_others_at_once() {
        let (_, told) = channel();
        let (host, folder, record, coming) = ("box".to_owned(), PathBuf::new(), RunRecord::default(), None);
        let stop = Arc::new(AtomicI32::new(0));
        let mut run =
            RemoteRun { host, folder, record, coming, told, trouble: None, is_complete: false, stop, thread: None };
        let eval = |step: u64| format!("{{\"step\":{step},\"eval_loss\":2.0,\"eval_tokens\":1}}\n").into_bytes();
        let grown = |fresh, step| Told::Seen(Seen::Grown { fresh, bytes: eval(step) });
        let state = |more| Told::Seen(Seen::State { held: Some(true), newest: None, has_result: false, more });
        let lost = || Told::Lost(Unanswered::Ssh { words: "gone".to_owned() });
        for (told, rows, trouble) in [
            (grown(true, 1), 0, false),
            (state(true), 0, false),
            (grown(false, 2), 0, false),
            (state(false), 2, false),
            (grown(false, 3), 3, false),
            (lost(), 3, true),
            (grown(true, 1), 3, false),
            (state(true), 3, false),
            (grown(false, 2), 3, false),
            (state(false), 2, false),
        ] {
            run.take(told).unwrap_or_else(|failure| panic!("{}", failure.lines()));
            assert_eq!((run.record.evals().len(), run.trouble.is_some()), (rows, trouble));
        }
        assert!(run.is_complete && run.record.is_held);
    }

    #[test]
    fn what_is_no_run_is_named() {
        let folder = tempfile::tempdir().expect("a directory");
        let place = |name: &str| folder.path().join(name);
        let write = |name: &str, text: &str| {
            let path = place(name);
            finetune_store::replace_file(&finetune_store::RealDisk, &path, text.as_bytes()).expect("a file");
        };
        write("run/recipe.toml", "# The recipe as resolved, every default written out.\n");
        write("run/metrics.jsonl", "");
        write("r.toml", "output_dir = \"later\"\n[model]\npath = \"m\"\n[data]\ntrain = \"t.jsonl\"\n");
        write("rows/t.jsonl", "{\"text\": \"a\"}\n");
        for (name, want) in
            [("run", "run"), ("run/recipe.toml", "run"), ("run/metrics.jsonl", "run"), ("r.toml", "later")]
        {
            assert_eq!(
                local(&place(name)).unwrap_or_else(|failure| panic!("{}", failure.lines())),
                place(want),
                "{name}"
            );
        }
        for (name, says) in
            [("nowhere", "there is no "), ("rows", "a run is meant"), ("rows/t.jsonl", "a run is meant")]
        {
            let failure = local(&place(name)).expect_err("no run");
            assert!(failure.lines().contains(says), "{name}: {}", failure.lines());
        }
    }
}
