//! `finetune completions` and `finetune man`: made from the arguments themselves.

use std::path::Path;
use std::process::ExitCode;

use clap::{Command, CommandFactory as _};
use clap_mangen::Man;
use finetune_store::{RealDisk, replace_file};
use finetune_trainer::numbers::counted;

use crate::cli::{Cli, CompletionsArguments, ManArguments};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::{output, version};

/// Prints the completions of a shell.
pub(crate) fn completions(arguments: &CompletionsArguments) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(
        arguments.shell,
        &mut offered(&Cli::command()).version(version::SHORT),
        "finetune",
        &mut script,
    );
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Done.into())
}

/// What a shell offers of a command: its arguments and commands without the hidden ones, which
/// `clap_complete` would offer too.
fn offered(command: &Command) -> Command {
    // clap keeps names for as long as the program runs. So does this, once for each command.
    let name: &'static str = command.get_name().to_owned().leak();
    Command::new(name)
        .about(command.get_about().cloned().unwrap_or_default())
        .args(command.get_arguments().filter(|argument| !argument.is_hide_set()).cloned())
        .subcommands(command.get_subcommands().filter(|inner| !inner.is_hide_set()).map(offered))
}

/// Prints one manual page, or writes all of them into a directory.
pub(crate) fn man(arguments: &ManArguments) -> Result<ExitCode, Failure> {
    // Pages have the version alone: they are the same for every build of it.
    let mut program = Cli::command().long_version(version::SHORT).disable_help_subcommand(true);
    program.build();
    let Some(directory) = &arguments.output else {
        output::print(&String::from_utf8_lossy(&render(find(&program, &arguments.command)?)?.1))?;
        return Ok(Exit::Done.into());
    };
    let mut pages = 0;
    write(&program, directory, &mut pages)?;
    output::line(&format!("{} in {}", counted(pages, "page"), directory.display()))?;
    Ok(Exit::Done.into())
}

/// The command of these words.
fn find<'a>(program: &'a Command, words: &[String]) -> Result<&'a Command, Failure> {
    let mut command = program;
    for word in words {
        command = command.find_subcommand(word).ok_or_else(|| {
            let hint = format!("`{} --help` lists the commands", command.get_bin_name().unwrap_or("finetune"));
            Failure::arguments(format!("there is no command `{}`", words.join(" ").escape_debug()), hint)
        })?;
    }
    Ok(command)
}

/// Writes the page of a command and those of its commands. Hidden ones have none.
fn write(command: &Command, directory: &Path, pages: &mut u64) -> Result<(), Failure> {
    for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set()) {
        write(inner, directory, pages)?;
    }
    let (name, page) = render(command)?;
    replace_file(&RealDisk, &directory.join(name), &page)?;
    *pages += 1;
    Ok(())
}

/// The file name and text of a command's page, such as `finetune-cluster-bench.1`.
fn render(command: &Command) -> std::io::Result<(String, Vec<u8>)> {
    // An empty date would let what follows take its place.
    let about = format!("finetune {}", version::SHORT);
    let page = Man::new(command.clone()).date(" ").source(about).manual("finetune");
    let mut text = Vec::new();
    page.render(&mut text)?;
    Ok((page.get_filename(), text))
}
