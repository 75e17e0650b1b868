//! `finetune watch`: runs as they go on, in the terminal, from here or from other hosts.

mod draw;
mod once;
mod plain;
mod screen;
mod series;
mod source;

use std::io::IsTerminal;
use std::process::ExitCode;

use self::source::Watched;
use crate::cli::WatchArguments;
use crate::failure::Failure;

pub(crate) fn watch(arguments: &WatchArguments) -> Result<ExitCode, Failure> {
    let mut runs = Vec::new();
    for argument in &arguments.runs {
        runs.push(Watched::open(argument, arguments.ssh_config.as_deref())?);
    }
    // All hosts are asked before the first answer is waited for.
    for run in &mut runs {
        run.wait_for_first_look()?;
    }
    source::name_apart(&mut runs);
    if arguments.once {
        return once::print(&runs, arguments.json);
    }
    if std::io::stdout().is_terminal() { screen::show(&mut runs) } else { plain::follow(&mut runs) }
}
