//! `finetune launch`: one `finetune run` per rank, here or over ssh, watched over until all have ended.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use finetune_allreduce::new_token;
use finetune_launch::complaint::{hint, shown};
use finetune_launch::workers::{Call, Ending, Place, Word, Workers};
use finetune_recipe::Recipe;
use finetune_store::RealDisk;
use finetune_trainer::CHECKPOINTS;

use crate::cli::{Cli, Command, LaunchArguments, RunArguments};
use crate::failure::Failure;
use crate::hosts::Hosts;
use crate::output;
use crate::progress::{Progress, Verbosity};
use crate::seat::Seat;
use crate::signals::{Heard, Signals};
use crate::told::{self, Told};

/// Exit code of a run that is worth another try.
const PEER_LOST: u8 = 3;

/// Between two attempts: what the last one held, ports and files, is let go.
const PAUSE: Duration = Duration::from_millis(500);

/// What an attempt came to.
struct Attempt {
    endings: Vec<Ending>,
    /// Of each rank: those whose failure it has only heard of.
    heard_of: Vec<Vec<usize>>,
    /// The newest checkpoint that rank 0 told of.
    saved: Option<(u64, PathBuf)>,
}

pub(crate) fn launch(arguments: &LaunchArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let signals = Signals::listen()?;
    // The first signal ends what is under way, checks and copies too, or is told to the ranks; a second one ends us, and with us
    // them.
    signals.finish_steps(|heard| match heard {
        Heard::First => {
            "stopping: ranks that train finish their step and save; a second signal ends all at once".to_owned()
        }
        Heard::Second => "ending all ranks at once".to_owned(),
    });
    let stopped = || match signals.stop.load(Ordering::SeqCst) {
        0 => None,
        signal => Some(ExitCode::from(128 + signal as u8)),
    };
    let run = run_arguments(&arguments.run)?;
    let recipe = Recipe::load(&run.recipe.recipe, &run.recipe.sets, run.output_dir.as_deref())?;
    let mut hosts = Hosts::choose(arguments)?;
    tell(Verbosity::Normal, verbosity, hosts.notices());
    hosts.limit(recipe.distributed.virtual_ranks, recipe.distributed.min_ranks)?;
    let prepared = hosts.prepare(arguments, &run, &recipe, verbosity, &signals.stop);
    if let Some(code) = stopped() {
        tell(Verbosity::Normal, verbosity, &["stopped before any rank was started".to_owned()]);
        return Ok(code);
    }
    prepared?;
    let (mut saved, mut holder) = hosts.holder();
    let mut words = arguments.run.clone();
    for attempt in 0.. {
        let Attempt { endings, heard_of, saved: newest } = start(&hosts, arguments, &words, verbosity, &signals)?;
        saved = newest.or(saved);
        let stop = signals.stop.load(Ordering::SeqCst);
        tell(Verbosity::Normal, verbosity, &left_over(&hosts, &endings));
        let Some(culprit) = culprit(&endings, &heard_of, stop) else {
            let stopped = stop > 0 && endings.iter().any(|ending| ending.code != 0);
            if stopped && let Some(place) = hosts.whereabouts().filter(|_| saved.is_some()) {
                tell(
                    Verbosity::Normal,
                    verbosity,
                    &[format!("the run is in {place}; the same command with --resume goes on there")],
                );
            } else if !stopped && let Some((lines, here)) = hosts.bring_home(true, verbosity) {
                tell(Verbosity::Normal, verbosity, &lines);
                if !here {
                    // It is done, and not where it was asked for: with --resume another try brings it.
                    return Ok(ExitCode::from(PEER_LOST));
                }
            }
            return Ok(ExitCode::from(if stopped { 128 + stop as u8 } else { 0 }));
        };
        let code = exit_code(endings[culprit].code);
        let how = hosts.name(culprit) + &describe(&endings[culprit]);
        if code != PEER_LOST || attempt >= arguments.max_restarts || stop > 0 {
            let mut lines = vec![format!("{how} after {}", seconds(&endings[culprit]))];
            if stop == 0
                && let Some((home, _)) = hosts.bring_home(false, verbosity)
            {
                lines.extend(home);
            }
            if code == PEER_LOST {
                lines.extend(safe(&recipe.output_dir, &hosts, saved.as_ref()));
            }
            tell(Verbosity::Normal, verbosity, &lines);
            return Ok(ExitCode::from(code));
        }
        std::thread::sleep(PAUSE);
        words = resuming(&arguments.run, &run);
        let lost = hosts.drop_unreachable(&words, verbosity, &signals.stop);
        if let Some(code) = stopped() {
            return Ok(code);
        }
        for name in &lost {
            tell(Verbosity::Normal, verbosity, &[format!("{name} is not reached any more")]);
        }
        let short = hosts.expect_progress(saved.clone(), &holder)?;
        tell(Verbosity::Normal, verbosity, short.as_slice());
        hosts.limit(recipe.distributed.virtual_ranks, recipe.distributed.min_ranks)?;
        holder = hosts.holder().1;
        let (next, of, ranks) = (attempt + 1, arguments.max_restarts, hosts.world());
        let from = if saved.is_some() || run.resume.is_some() {
            "from the newest checkpoint"
        } else {
            "from the beginning, since nothing was saved yet,"
        };
        tell(
            Verbosity::Normal,
            verbosity,
            &[format!(
                "{how} after {}: starting again {from} with {ranks} ranks (restart {next} of {of})",
                seconds(&endings[culprit])
            )],
        );
        hosts.resume();
    }
    unreachable!("the loop ends by returning")
}

/// What follows `--`, understood as `finetune run` would.
fn run_arguments(words: &[String]) -> Result<RunArguments, Failure> {
    let line = ["finetune", "run"].into_iter().chain(words.iter().map(String::as_str));
    match Cli::try_parse_from(line).map(|cli| cli.command) {
        Ok(Command::Run(run)) => Ok(run),
        Ok(_) => Err(Failure::arguments("what follows `--` is not a recipe", "finetune launch -n 2 -- recipe.toml")),
        Err(error) => Err(Failure::arguments(
            error.render().to_string().trim_start_matches("error: ").trim_end(),
            "after `--` stand the recipe and the flags of `finetune run`",
        )),
    }
}

/// The same once there is something to go on from: the newest checkpoint, whatever the first attempt was told.
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

/// One attempt.
fn start(
    hosts: &Hosts,
    arguments: &LaunchArguments,
    words: &[String],
    verbosity: Verbosity,
    signals: &Signals,
) -> Result<Attempt, Failure> {
    let random =
        || new_token().map_err(|error| Failure::arguments(error.to_string(), "the system's random generator failed"));
    let (token, run) = (random()?, random()?);
    let rendezvous = hosts.rendezvous(arguments.port)?;
    let narrates = std::io::stderr().is_terminal();
    let seats: Vec<Seat> = (0..hosts.world())
        .map(|rank| {
            let (local_rank, local_world) = hosts.local(rank);
            let (rendezvous, run, token) = (rendezvous.clone(), run.clone(), Some(token.clone()));
            let (devices, prefer_ring) = (hosts.devices(), hosts.prefer_ring());
            let world = hosts.world();
            Seat {
                rank,
                world,
                local_rank,
                local_world,
                rendezvous,
                addresses: hosts.addresses(rank).to_vec(),
                run,
                token,
                devices,
                prefer_ring,
                started_by: String::new(),
                launched: true,
                narrates,
            }
        })
        .collect();
    let mut call = Call { arguments: vec!["run".to_owned()], words: words.to_vec(), environment: hosts.environment() };
    match verbosity {
        Verbosity::Quiet => call.arguments.push("--quiet".to_owned()),
        Verbosity::Normal => {}
        Verbosity::Verbose => call.arguments.push("--verbose".to_owned()),
    }
    call.arguments.push("--assigned".to_owned());
    let places: Vec<Place> = hosts.places();
    let workers = Workers::start(&places, &call, &seats)
        .map_err(|error| Failure::arguments(error.to_string(), "is ssh installed?"))?;
    let mut show = Progress::new(verbosity, 1);
    let mut outcome = Ok(());
    let (mut heard_of, mut saved) = (vec![Vec::new(); hosts.world()], None);
    let working = AtomicBool::new(false);
    let mut hinted = None;
    let endings = workers.finish(&signals.stop, &working, &mut |rank, word| match word {
        Word::Line(line) => match told::heard(&line) {
            Some(Told::Working) => working.store(true, Ordering::SeqCst),
            Some(Told::Saved { step, path }) => saved = Some((step, path)),
            Some(Told::EndedBy { ranks }) => heard_of[rank] = ranks,
            None if rank == 0 && show.show_narrated(&line) => {}
            // What is meant for programs stays as it is, but where a person reads it.
            None if rank == 0 => {
                show.finish();
                let plain = std::io::stdout().is_terminal();
                outcome = output::line(&if plain { shown(&line) } else { line });
            }
            None => show.repeat(&labelled(hosts, rank, &line)),
        },
        Word::Complaint(line) => {
            // What ssh says of a connection that is not, and what to do.
            hinted = hinted.take().or_else(|| hint(hosts.host(rank), &line).map(|(_, hint)| (rank, hint)));
            show.repeat(&labelled(hosts, rank, &line));
        }
        Word::Waited(time) => {
            let seconds = time.as_secs();
            show.say(&format!(
                "waiting for {} to stop, {seconds} s; a second signal ends it at once",
                hosts.name(rank)
            ));
        }
        Word::Silent => {}
    });
    show.finish();
    outcome?;
    if let Some((rank, hint)) = hinted.filter(|(rank, _)| endings.get(*rank).is_some_and(|ending| ending.code == 255)) {
        tell(Verbosity::Normal, verbosity, &[format!("{}: {hint}", hosts.host(rank))]);
    }
    Ok(Attempt { endings, heard_of, saved })
}

/// A rank's line with its name, and with what it may do to a terminal shown instead.
fn labelled(hosts: &Hosts, rank: usize, line: &str) -> String {
    format!("\x1b[2m[{}]\x1b[0m {}", hosts.label(rank), shown(line))
}

/// Processes that were ended, and of which nobody knows whether they are gone.
fn left_over(hosts: &Hosts, endings: &[Ending]) -> Vec<String> {
    let left = endings.iter().enumerate().filter_map(|(rank, ending)| Some((rank, ending.left?)));
    left.map(|(rank, process)| {
        format!(
            "{} cannot be reached: its process {process} there may still be running, or stopped with all its memory",
            hosts.name(rank)
        )
    })
    .collect()
}

/// The rank that ended the run: one with an error of its own before those that lost it or only heard of it, the earliest first.
pub(crate) fn culprit(endings: &[Ending], heard_of: &[Vec<usize>], stop: i32) -> Option<usize> {
    let failed = |ending: &Ending| ending.code != 0 && (stop == 0 || ending.code != 128 + stop);
    let failed = endings.iter().enumerate().filter(|(_, ending)| failed(ending));
    failed
        .min_by_key(|(rank, ending)| {
            let heard = heard_of.get(*rank).is_some_and(|ranks| !ranks.is_empty());
            (heard, ending.code == i32::from(PEER_LOST), ending.after)
        })
        .map(|(rank, _)| rank)
}

/// The launcher's own: a rank that was killed, or whose connection broke, is a lost one.
pub(crate) fn exit_code(code: i32) -> u8 {
    match code {
        // The shell's answers where there is no such program, or none that can be run.
        126 | 127 => 2,
        1..=5 => code as u8,
        _ => PEER_LOST,
    }
}

fn describe(ending: &Ending) -> String {
    if ending.forced {
        return " did not answer any more and was ended".to_owned();
    }
    match ending.code {
        3 => " lost another rank, or did not find it".to_owned(),
        127 => {
            " has no such program: install it there, name its place with --program, or let --copy bring it".to_owned()
        }
        126 => " cannot run the program: is it built for that machine?".to_owned(),
        255 => ": ssh failed or its connection broke".to_owned(),
        code if code > 128 => format!(" was killed by signal {}", code - 128),
        code => format!(" failed with exit code {code}"),
    }
}

fn seconds(ending: &Ending) -> String {
    format!("{:.1} s", ending.after.as_secs_f64())
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

fn tell(wanted: Verbosity, verbosity: Verbosity, lines: &[String]) {
    if verbosity >= wanted {
        lines.iter().for_each(|line| crate::stderr::complain!("{line}"));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use finetune_launch::workers::Ending;

    use super::{culprit, exit_code};

    #[test]
    fn the_rank_that_failed_first_is_named_and_gives_the_exit_code() {
        /// The ranks' codes, a signal that was passed on, and who is named with which exit code.
        type Case = (&'static [i32], i32, Option<(usize, u8)>);
        let cases: [Case; 9] = [
            (&[0, 0], 0, None),
            (&[3, 137, 3], 0, Some((1, 3))),
            (&[3, 3, 2], 0, Some((2, 2))),
            (&[3, 4], 0, Some((1, 4))),
            (&[5, 3], 0, Some((0, 5))),
            (&[130, 130], 2, None),
            (&[130, 137], 2, Some((1, 3))),
            (&[3, 255], 0, Some((1, 3))),
            (&[127, 3], 0, Some((0, 2))),
        ];
        for (codes, stop, expected) in cases {
            let ending = |(rank, &code): (usize, &i32)| Ending {
                code,
                after: Duration::from_millis(rank as u64),
                forced: false,
                left: None,
            };
            let endings: Vec<Ending> = codes.iter().enumerate().map(ending).collect();
            let found = culprit(&endings, &[], stop).map(|rank| (rank, exit_code(endings[rank].code)));
            assert_eq!(found, expected, "{codes:?}");
        }
    }

    /// Those that heard of a failure end with its exit code, and often before the rank that failed.
    #[test]
    fn a_rank_that_only_heard_of_the_failure_is_not_blamed() {
        let ending = |code, after| Ending { code, after: Duration::from_millis(after), forced: false, left: None };
        for (endings, heard_of, expected) in [
            (vec![ending(2, 30), ending(2, 10), ending(2, 20)], vec![vec![], vec![0], vec![0]], 0),
            (vec![ending(5, 10), ending(5, 40)], vec![vec![1], vec![]], 1),
            (vec![ending(3, 10), ending(137, 40), ending(3, 5)], vec![vec![1], vec![], vec![1]], 1),
            // Nobody of those that are left failed by itself.
            (vec![ending(3, 30), ending(3, 10)], vec![vec![2], vec![2]], 1),
        ] {
            assert_eq!(culprit(&endings, &heard_of, 0), Some(expected), "{heard_of:?}");
        }
    }
}
