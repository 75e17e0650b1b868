//! `finetune launch -- generate …` and `-- serve …`: ranks that hold one model together.

use std::process::ExitCode;
use std::sync::atomic::Ordering;

use clap::Parser;
use finetune_launch::restart::{PEER_LOST, culprit, exit_code};

use super::launch::{Attempt, PAUSE, describe, seconds, start, stopped, tell};
use crate::cli::{Cli, Command, LaunchArguments};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::hosts::Hosts;
use crate::progress::Verbosity;
use crate::signals::{Heard, Signals};

/// The command that the words after `--` name, if it is one that uses a model.
pub(super) fn command_of(words: &[String]) -> Option<&'static str> {
    let first = words.first()?;
    ["generate", "serve"].into_iter().find(|command| first == command)
}

/// Starts a rank for each part of the model, and again if one was lost.
pub(super) fn launch_model(
    command: &'static str,
    arguments: &LaunchArguments,
    verbosity: Verbosity,
) -> Result<ExitCode, Failure> {
    check(arguments)?;
    let signals = Signals::listen()?;
    signals.finish_steps(|heard| match heard {
        Heard::First => "stopping all ranks; a second signal ends them at once".to_owned(),
        Heard::Second => "ending all ranks at once".to_owned(),
    });
    let mut hosts = Hosts::choose(arguments)?;
    tell(verbosity, hosts.notices());
    let prepared = hosts.prepare_to_use(command, verbosity, &signals.stop);
    if let Some(exit) = stopped(&signals) {
        return Ok(exit.into());
    }
    prepared?;
    // In front: behind a `--` of the command's own they would be no option.
    let how = ["--parallel", arguments.parallel.unwrap_or_default().word()].map(str::to_owned);
    let words = [&how[..], &arguments.run[1..]].concat();
    for restarts in 0.. {
        let Attempt { exits, heard_of, .. } = start(&hosts, arguments, command, &words, verbosity, &signals)?;
        let stop = signals.stop.load(Ordering::SeqCst);
        let Some(culprit) = culprit(&exits, &heard_of, stop) else {
            let failed = stop > 0 && exits.iter().any(|exit| exit.code != 0);
            return Ok(if failed { Exit::Stopped(stop) } else { Exit::Done }.into());
        };
        let code = exit_code(exits[culprit].code);
        let how = format!("{}{} after {}", hosts.name(culprit), describe(&exits[culprit]), seconds(&exits[culprit]));
        if code != PEER_LOST || restarts >= arguments.max_restarts || stop > 0 {
            tell(verbosity, &[how]);
            return Ok(ExitCode::from(code));
        }
        let of = arguments.max_restarts;
        tell(verbosity, &[format!("{how}: starting all ranks again (restart {} of {of})", restarts + 1)]);
        std::thread::sleep(PAUSE);
        if let Some(exit) = stopped(&signals) {
            return Ok(exit.into());
        }
    }
    unreachable!("the loop ends by returning")
}

/// Refuses what the ranks would refuse.
fn check(arguments: &LaunchArguments) -> Result<(), Failure> {
    if arguments.copy {
        return Err(Failure::arguments(
            "--copy brings a recipe to the hosts, and this command has none",
            "put the model on every host, at the same path",
        ));
    }
    let line = std::iter::once("finetune").chain(arguments.run.iter().map(String::as_str));
    match Cli::try_parse_from(line).map(|cli| cli.command) {
        Ok(Command::Generate(_) | Command::Serve(_)) => Ok(()),
        Ok(_) => Err(Failure::arguments("what follows `--` uses no model", "finetune launch -n 2 -- generate MODEL …")),
        Err(error) => Err(Failure::arguments(
            error.render().to_string().trim_start_matches("error: ").trim_end(),
            "after `--` stand `generate` or `serve` and their arguments",
        )),
    }
}
