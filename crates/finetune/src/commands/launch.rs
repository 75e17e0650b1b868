//! `finetune launch`: one `finetune run` per rank, here or over ssh, watched over until all have ended.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use finetune_allreduce::new_token;
use finetune_cluster::workers::{Call, Ending, Place, Word, Workers};
use finetune_recipe::Recipe;
use finetune_store::RealDisk;
use finetune_trainer::CHECKPOINTS;

use crate::cli::{Cli, Command, LaunchArguments, RunArguments};
use crate::failure::Failure;
use crate::hosts::{Hosts, free_port};
use crate::output;
use crate::progress::{Progress, Verbosity};
use crate::seat::Seat;
use crate::signals::{Heard, Signals};

/// Exit code of a run that is worth another try.
const PEER_LOST: u8 = 3;

/// Between two attempts: what the last one held, ports and files, is let go.
const PAUSE: Duration = Duration::from_millis(500);

pub(crate) fn launch(arguments: &LaunchArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let signals = Signals::listen()?;
    // The ranks are told of the first signal; a second one ends us, and with us them.
    signals.finish_steps(|heard| match heard {
        Heard::First => "stopping: the ranks finish their step and save; a second signal ends them at once".to_owned(),
        Heard::Second => "ending all ranks at once".to_owned(),
    });
    let run = run_arguments(&arguments.run)?;
    let recipe = Recipe::load(&run.recipe.recipe, &run.recipe.sets, run.output_dir.as_deref())?;
    let mut hosts = Hosts::choose(arguments)?;
    hosts.limit(recipe.distributed.virtual_ranks, recipe.distributed.min_ranks)?;
    hosts.prepare(arguments, &run, &recipe, verbosity)?;
    let mut words = arguments.run.clone();
    for attempt in 0.. {
        let endings = start(&hosts, arguments, &words, verbosity, &signals)?;
        let stop = signals.stop.load(std::sync::atomic::Ordering::SeqCst);
        let Some(culprit) = culprit(&endings, stop) else {
            return Ok(ExitCode::from(if stop > 0 && endings.iter().any(|ending| ending.code != 0) {
                128 + stop as u8
            } else {
                0
            }));
        };
        let code = exit_code(endings[culprit].code);
        let how = hosts.name(culprit) + &describe(&endings[culprit]);
        if code != PEER_LOST || attempt >= arguments.max_restarts || stop > 0 {
            let safe = if code == PEER_LOST { safe(&recipe.output_dir) } else { Vec::new() };
            tell(
                Verbosity::Normal,
                verbosity,
                &[vec![format!("{how} after {}", seconds(&endings[culprit]))], safe].concat(),
            );
            return Ok(ExitCode::from(code));
        }
        std::thread::sleep(PAUSE);
        let lost = hosts.drop_unreachable();
        for name in &lost {
            tell(Verbosity::Normal, verbosity, &[format!("{name} is not reached any more")]);
        }
        hosts.limit(recipe.distributed.virtual_ranks, recipe.distributed.min_ranks)?;
        let (next, of, ranks) = (attempt + 1, arguments.max_restarts, hosts.world());
        tell(
            Verbosity::Normal,
            verbosity,
            &[format!(
                "{how} after {}: starting again from the newest checkpoint with {ranks} ranks (restart {next} of {of})",
                seconds(&endings[culprit])
            )],
        );
        words = resuming(&arguments.run, &run);
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

/// One attempt: how each rank ended.
fn start(
    hosts: &Hosts,
    arguments: &LaunchArguments,
    words: &[String],
    verbosity: Verbosity,
    signals: &Signals,
) -> Result<Vec<Ending>, Failure> {
    let random =
        || new_token().map_err(|error| Failure::arguments(error.to_string(), "the system's random generator failed"));
    let (token, run) = (random()?, random()?);
    let port = arguments.port.map_or_else(free_port, Ok)?;
    let rendezvous = hosts.rendezvous(port)?;
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
                run,
                token,
                devices,
                prefer_ring,
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
    let endings = workers.finish(&signals.stop, &mut |rank, word| match word {
        Word::Line(line) if rank == 0 && show.show_narrated(&line) => {}
        // What is meant for programs stays as it is.
        Word::Line(line) if rank == 0 => {
            show.finish();
            outcome = output::line(&line);
        }
        Word::Line(line) | Word::Complaint(line) => {
            show.repeat(&format!("\x1b[2m[{}]\x1b[0m {line}", hosts.label(rank)))
        }
        Word::Silent => {}
    });
    show.finish();
    outcome?;
    Ok(endings)
}

/// The rank that ended the run: one with an error of its own before those that lost it, the earliest first.
fn culprit(endings: &[Ending], stop: i32) -> Option<usize> {
    let failed = |ending: &Ending| ending.code != 0 && (stop == 0 || ending.code != 128 + stop);
    let failed = endings.iter().enumerate().filter(|(_, ending)| failed(ending));
    failed.min_by_key(|(_, ending)| (ending.code == i32::from(PEER_LOST), ending.after)).map(|(rank, _)| rank)
}

/// The launcher's own: a rank that was killed, or whose connection broke, is a lost one.
fn exit_code(code: i32) -> u8 {
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
        3 => " lost another rank".to_owned(),
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

/// What a lost run has kept, if its directory is on this machine.
fn safe(output_dir: &Path) -> Vec<String> {
    let newest = finetune_store::newest_verified(&RealDisk, &output_dir.join(CHECKPOINTS), "step-");
    let path: Option<PathBuf> = newest.ok().and_then(|(newest, _)| newest.map(|(_, path, _)| path));
    match path {
        Some(path) => vec![format!("{} is safe; the same command with --resume goes on from it", path.display())],
        None => vec!["no checkpoint was written yet; the same command with --resume starts afresh".to_owned()],
    }
}

fn tell(wanted: Verbosity, verbosity: Verbosity, lines: &[String]) {
    if verbosity >= wanted {
        lines.iter().for_each(|line| anstream::eprintln!("{line}"));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use finetune_cluster::workers::Ending;

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
            };
            let endings: Vec<Ending> = codes.iter().enumerate().map(ending).collect();
            let found = culprit(&endings, stop).map(|rank| (rank, exit_code(endings[rank].code)));
            assert_eq!(found, expected, "{codes:?}");
        }
    }
}
