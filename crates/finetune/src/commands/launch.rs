//! `finetune launch`: one `finetune run` per rank, here or over ssh, watched over until all have
//! ended.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use finetune_allreduce::new_token;
use finetune_hub::Need;
use finetune_launch::complaint::{hint, shown};
use finetune_launch::restart::{NO_PROGRAM, NOT_RUNNABLE, PEER_LOST, SSH_FAILED, culprit, exit_code};
use finetune_launch::workers::{Event, WorkerCommand, WorkerExit, Workers};
use finetune_recipe::Recipe;
use finetune_rendezvous::{HostPort, Membership};
use finetune_store::RealDisk;
use finetune_trainer::CHECKPOINTS;
use finetune_trainer::numbers::counted;

use crate::cli::{Cli, Command, LaunchArguments, RunArguments};
use crate::commands::launch_model::{command_of, launch_model};
use crate::commands::preflight;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::given_recipe;
use crate::hosts::Hosts;
use crate::hub_files;
use crate::membership::Assignment;
use crate::output;
use crate::progress::{Progress, Verbosity};
use crate::rank_event::{self, RankEvent};
use crate::signals::{Heard, Signals};
use crate::source::recipe_path;

/// Between two attempts, while the system frees the ports and files of the last one.
pub(super) const PAUSE: Duration = Duration::from_millis(500);

/// How an attempt ended.
pub(super) struct Attempt {
    pub(super) exits: Vec<WorkerExit>,
    /// Per rank: the ranks whose failure it has only heard of.
    pub(super) heard_of: Vec<Vec<usize>>,
    /// The newest checkpoint that rank 0 told of.
    saved: Option<(u64, PathBuf)>,
}

/// A launch, over all its attempts.
struct Launch<'a> {
    arguments: &'a LaunchArguments,
    verbosity: Verbosity,
    signals: Arc<Signals>,
    run: RunArguments,
    recipe: Recipe,
    hosts: Hosts,
    /// The newest checkpoint that there was.
    saved: Option<(u64, PathBuf)>,
    /// The host that wrote it.
    holder: String,
}

pub(crate) fn launch(arguments: &LaunchArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    if let Some(command) = command_of(&arguments.run) {
        return launch_model(command, arguments, verbosity);
    }
    if arguments.parallel.is_some() {
        return Err(Failure::arguments(
            "--parallel is for `-- generate` and `-- serve`, and a recipe follows `--`",
            "`[parallel] stages = N` in the recipe spreads the layers over N ranks",
        ));
    }
    let signals = Signals::listen()?;
    let run = run_arguments(&arguments.run)?;
    if arguments.copy && run.recipe.recipe.is_none() {
        return Err(Failure::arguments(
            "--copy brings a recipe to the hosts, and --model and --data are no file",
            "`finetune init DIR --model M --data FILE` writes one",
        ));
    }
    let mut recipe = given_recipe::of_launch(&run)?;
    if arguments.copy {
        // What is copied has to be here.
        hub_files::localize(&mut recipe, &Need::Model)?;
    }
    // The first signal ends checks and copies, or is told to the ranks. A second one ends the
    // launcher, and the ranks with it.
    signals.finish_steps(|heard| match heard {
        Heard::First => {
            "stopping: ranks that train finish their step and save; a second signal ends all at once".to_owned()
        }
        Heard::Second => "ending all ranks at once".to_owned(),
    });
    let mut hosts = Hosts::choose(arguments)?;
    tell(verbosity, hosts.notices());
    hosts.limit(&recipe)?;
    let prepared = hosts.prepare(arguments, &run, &recipe, verbosity, &signals.stop);
    if let Some(exit) = stopped(&signals) {
        tell(verbosity, &["stopped before any rank was started".to_owned()]);
        return Ok(exit.into());
    }
    prepared?;
    let (saved, holder) = hosts.holder();
    let mut launch = Launch { arguments, verbosity, signals, run, recipe, hosts, saved, holder };
    let mut words = arguments.run.clone();
    for restarts in 0.. {
        let Attempt { exits, heard_of, saved } =
            start(&launch.hosts, arguments, "run", &words, verbosity, &launch.signals)?;
        launch.saved = saved.or(launch.saved.take());
        let stop = launch.signals.stop.load(Ordering::SeqCst);
        tell(verbosity, &left_over(&launch.hosts, &exits));
        let Some(culprit) = culprit(&exits, &heard_of, stop) else {
            return Ok(launch.finish(&exits, stop).into());
        };
        let code = exit_code(exits[culprit].code);
        let how =
            format!("{}{} after {}", launch.hosts.name(culprit), describe(&exits[culprit]), seconds(&exits[culprit]));
        if code != PEER_LOST || restarts >= arguments.max_restarts || stop > 0 {
            launch.give_up(how, code, stop);
            return Ok(ExitCode::from(code));
        }
        std::thread::sleep(PAUSE);
        words = resuming(&arguments.run, &launch.run);
        if let Some(exit) = launch.begin_again(&how, restarts + 1, &words)? {
            return Ok(exit.into());
        }
    }
    unreachable!("the loop ends by returning")
}

/// How a launch ends that a signal has stopped while no rank ran.
pub(super) fn stopped(signals: &Signals) -> Option<Exit> {
    match signals.stop.load(Ordering::SeqCst) {
        0 => None,
        signal => Some(Exit::Stopped(signal)),
    }
}

impl Launch<'_> {
    /// Brings the run home once all ranks have ended, none of them by a failure. `stop`: the signal
    /// that the ranks were told to stop by, or 0.
    fn finish(&self, exits: &[WorkerExit], stop: i32) -> Exit {
        if stop > 0 && exits.iter().any(|exit| exit.code != 0) {
            if let Some(place) = self.hosts.whereabouts().filter(|_| self.saved.is_some()) {
                let line = format!("the run is in {place}; the same command with --resume goes on there");
                tell(self.verbosity, &[line]);
            }
            return Exit::Stopped(stop);
        }
        if let Some((lines, here)) = self.hosts.bring_home(true, self.verbosity) {
            tell(self.verbosity, &lines);
            if !here {
                // The run is done but not here: another try with --resume brings it.
                return Exit::PeerLost;
            }
        }
        Exit::Done
    }

    /// Says why the launch ends, and what is safe.
    fn give_up(&self, how: String, code: u8, stop: i32) {
        let mut lines = vec![how];
        if stop == 0
            && let Some((home, _)) = self.hosts.bring_home(false, self.verbosity)
        {
            lines.extend(home);
        }
        if code == PEER_LOST {
            lines.extend(safe(&self.recipe.output_dir, &self.hosts, self.saved.as_ref()));
        }
        tell(self.verbosity, &lines);
    }

    /// Prepares the next attempt with the hosts that are left. If a signal stops this, returns how
    /// the launch ends. `how`: how the last attempt ended.
    fn begin_again(&mut self, how: &str, restart: u32, words: &[String]) -> Result<Option<Exit>, Failure> {
        let lost = self.hosts.drop_unreachable(words, self.verbosity, &self.signals.stop);
        if let Some(exit) = stopped(&self.signals) {
            return Ok(Some(exit));
        }
        for name in &lost {
            tell(self.verbosity, &[format!("{name} is not reached any more")]);
        }
        let older = self.hosts.expect_progress(self.saved.clone(), &self.holder)?;
        tell(self.verbosity, older.as_slice());
        self.hosts.limit(&self.recipe)?;
        self.holder = self.hosts.holder().1;
        let from = if self.saved.is_some() || self.run.resume.is_some() {
            "from the newest checkpoint"
        } else {
            "from the beginning, since nothing was saved yet,"
        };
        let (ranks, of) = (counted(self.hosts.world() as u64, "rank"), self.arguments.max_restarts);
        tell(self.verbosity, &[format!("{how}: starting again {from} with {ranks} (restart {restart} of {of})")]);
        self.hosts.resume();
        Ok(None)
    }
}

/// What follows `--`, parsed as `finetune run` does. A run that is named stands for its recipe.
fn run_arguments(words: &[String]) -> Result<RunArguments, Failure> {
    let line = ["finetune", "run"].into_iter().chain(words.iter().map(String::as_str));
    match Cli::try_parse_from(line).map(|cli| cli.command) {
        Ok(Command::Run(mut run)) => {
            if let Some(file) = &mut run.recipe.recipe {
                *file = recipe_path(file)?;
            }
            Ok(run)
        }
        Ok(_) => Err(Failure::arguments("what follows `--` is not a recipe", "finetune launch -n 2 -- recipe.toml")),
        Err(error) => Err(Failure::arguments(
            error.render().to_string().trim_start_matches("error: ").trim_end(),
            "after `--` stand the recipe and the flags of `finetune run`",
        )),
    }
}

/// The same words for a later attempt, which goes on from the newest checkpoint whatever the first
/// one was told.
fn resuming(words: &[String], run: &RunArguments) -> Vec<String> {
    let given = run.resume.as_ref().and_then(|path| path.as_ref().map(|path| path.to_string_lossy().into_owned()));
    let mut kept: Vec<String> = words
        .iter()
        .filter(|word| *word != "--resume" && !word.starts_with("--resume=") && Some(*word) != given.as_ref())
        .cloned()
        .collect();
    kept.push("--resume".to_owned());
    kept
}

/// The first line of the standard input of each rank. `rendezvous`: where they meet.
fn assignments(hosts: &Hosts, rendezvous: &HostPort) -> Result<Vec<Assignment>, Failure> {
    let random =
        || new_token().map_err(|error| Failure::arguments(error.to_string(), "the system's random generator failed"));
    let (token, run) = (random()?, random()?);
    let narrates = std::io::stderr().is_terminal();
    let assignment = |rank| {
        let (local_rank, local_world) = hosts.local(rank);
        let membership = Membership {
            rank,
            world: hosts.world(),
            local_rank,
            local_world,
            rendezvous: rendezvous.to_string(),
            addresses: hosts.addresses(rank).to_vec(),
            run: run.clone(),
            token: Some(token.clone()),
            devices: hosts.devices(),
            prefer_ring: hosts.prefer_ring(),
            launched: true,
            ..Membership::alone()
        };
        Assignment { membership, ports: hosts.ports, narrates }
    };
    Ok((0..hosts.world()).map(assignment).collect())
}

/// One attempt. `command`: what each rank does.
pub(super) fn start(
    hosts: &Hosts,
    arguments: &LaunchArguments,
    command: &str,
    words: &[String],
    verbosity: Verbosity,
    signals: &Signals,
) -> Result<Attempt, Failure> {
    let rendezvous = hosts.rendezvous(arguments.port_of_rank_0())?;
    // If the first host is another one, this holds nothing up.
    let _held = preflight::hold_port(rendezvous.port);
    let assignments = assignments(hosts, &rendezvous)?;
    let mut command =
        WorkerCommand { arguments: vec![command.to_owned()], words: words.to_vec(), environment: hosts.environment() };
    match verbosity {
        Verbosity::Quiet => command.arguments.push("--quiet".to_owned()),
        Verbosity::Normal => {}
        Verbosity::Verbose => command.arguments.push("--verbose".to_owned()),
    }
    command.arguments.push("--assigned".to_owned());
    let workers = Workers::start(&hosts.workers(), &command, &assignments)
        .map_err(|error| Failure::arguments(error.to_string(), "is ssh installed?"))?;
    let mut show = Progress::new(verbosity, 1);
    let mut outcome = Ok(());
    let (mut heard_of, mut saved) = (vec![Vec::new(); hosts.world()], None);
    let working = AtomicBool::new(false);
    let mut hinted = None;
    let exits = workers.finish(&signals.stop, &working, &mut |rank, event| match event {
        Event::Line(line) => match rank_event::parse(&line) {
            Some(RankEvent::Working) => working.store(true, Ordering::SeqCst),
            Some(RankEvent::Saved { step, path }) => saved = Some((step, path)),
            Some(RankEvent::EndedBy { ranks }) => heard_of[rank] = ranks,
            None if rank == 0 && show.show_narrated(&line) => {}
            // Output for programs stays as it is; for a terminal it is made harmless.
            None if rank == 0 => {
                show.finish();
                let plain = std::io::stdout().is_terminal();
                outcome = output::line(&if plain { shown(&line) } else { line });
            }
            None => show.repeat(&labelled(hosts, rank, &line)),
        },
        Event::ErrorLine(line) => {
            // ssh's words about a connection that failed, and what to do.
            hinted = hinted.take().or_else(|| hint(hosts.host(rank), &line).map(|(_, hint)| (rank, hint)));
            show.repeat(&labelled(hosts, rank, &line));
        }
        Event::StillRunning(time) => {
            let seconds = time.as_secs();
            show.say(&format!(
                "waiting for {} to stop, {seconds} s; a second signal ends it at once",
                hosts.name(rank)
            ));
        }
        Event::Closed => {}
    });
    show.finish();
    outcome?;
    if let Some((rank, hint)) = hinted.filter(|(rank, _)| exits.get(*rank).is_some_and(|exit| exit.code == SSH_FAILED))
    {
        tell(verbosity, &[format!("{}: {hint}", hosts.host(rank))]);
    }
    Ok(Attempt { exits, heard_of, saved })
}

/// A rank's line with its name in front. Control characters are shown instead of sent to the
/// terminal.
fn labelled(hosts: &Hosts, rank: usize, line: &str) -> String {
    format!("\x1b[2m[{}]\x1b[0m {}", hosts.label(rank), shown(line))
}

/// Processes that were killed and may still be there.
fn left_over(hosts: &Hosts, exits: &[WorkerExit]) -> Vec<String> {
    let left = exits.iter().enumerate().filter_map(|(rank, exit)| Some((rank, exit.left?)));
    left.map(|(rank, process)| {
        format!(
            "{} cannot be reached: its process {process} there may still be running, or stopped with all its memory",
            hosts.name(rank)
        )
    })
    .collect()
}

pub(super) fn describe(exit: &WorkerExit) -> String {
    if exit.forced {
        return " did not answer any more and was ended".to_owned();
    }
    match exit.code {
        code if code == i32::from(PEER_LOST) => " lost another rank, or did not find it".to_owned(),
        NO_PROGRAM => {
            " has no such program: install it there, name its place with --program, or let --copy bring it".to_owned()
        }
        NOT_RUNNABLE => " cannot run the program: is it built for that machine?".to_owned(),
        SSH_FAILED => ": ssh failed or its connection broke".to_owned(),
        code if code > 128 => format!(" was killed by signal {}", code - 128),
        code => format!(" failed with exit code {code}"),
    }
}

pub(super) fn seconds(exit: &WorkerExit) -> String {
    format!("{:.1} s", exit.after.as_secs_f64())
}

/// What a lost run has kept.
fn safe(output_dir: &Path, hosts: &Hosts, saved: Option<&(u64, PathBuf)>) -> Vec<String> {
    if !hosts.writes_here() {
        return match (saved, hosts.whereabouts()) {
            (Some((step, _)), Some(place)) => {
                vec![format!("step {step} is safe in {place}; the same command with --resume goes on from it")]
            }
            (Some((_, path)), None) => vec![format!(
                "{} is safe at {}; the same command with --resume goes on from it",
                path.display(),
                hosts.host(0)
            )],
            (None, _) => vec!["no checkpoint was written yet; the same command with --resume starts afresh".to_owned()],
        };
    }
    let newest = finetune_store::newest_verified(&RealDisk, &output_dir.join(CHECKPOINTS), "step-");
    let path: Option<PathBuf> = newest.ok().and_then(|(newest, _)| newest.map(|(_, path, _)| path));
    match path {
        Some(path) => vec![format!("{} is safe; the same command with --resume goes on from it", path.display())],
        None => vec!["no checkpoint was written yet; the same command with --resume starts afresh".to_owned()],
    }
}

/// Prints lines to stderr, unless only errors and results are wanted.
pub(super) fn tell(verbosity: Verbosity, lines: &[String]) {
    if verbosity > Verbosity::Quiet {
        lines.iter().for_each(|line| crate::stderr::complain!("{line}"));
    }
}
