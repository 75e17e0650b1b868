//! One file per command.

mod answering;
mod chat;
mod cluster;
mod compare;
mod conversation;
mod devices;
mod download;
mod eval;
mod export;
mod export_adapter;
mod export_gguf;
mod export_source;
mod generate;
mod import;
mod init;
mod inspect;
mod launch;
mod launch_model;
mod machines;
mod opening;
mod plan;
pub(crate) mod preflight;
mod quantize;
mod rows_of_files;
mod run;
mod schema;
mod serve;
mod shell;
mod together;
mod upload;
mod validate;
mod watch;

use std::process::ExitCode;

use crate::cli::{Cli, Command};
use crate::failure::Failure;
use crate::progress::Verbosity;

pub(crate) fn run(cli: Cli) -> Result<ExitCode, Failure> {
    let verbosity = match (cli.quiet, cli.verbose) {
        (true, _) => Verbosity::Quiet,
        (_, true) => Verbosity::Verbose,
        _ => Verbosity::Normal,
    };
    if verbosity == Verbosity::Quiet {
        crate::transfer::be_quiet();
    }
    match cli.command {
        Command::Run(arguments) => run::run(arguments, verbosity),
        Command::Validate(arguments) => validate::validate(arguments, verbosity),
        Command::Plan(arguments) => plan::plan(&arguments, verbosity),
        Command::Inspect(arguments) => inspect::inspect(arguments),
        Command::Init(arguments) => init::init(&arguments, verbosity),
        Command::Import(arguments) => import::import(&arguments, verbosity),
        Command::Launch(arguments) => launch::launch(&arguments, verbosity),
        Command::Preflight(arguments) => preflight::preflight(&arguments),
        Command::Cluster(command) => cluster::cluster(command, verbosity),
        Command::Devices(arguments) => devices::devices(&arguments),
        Command::Download(arguments) => download::download(&arguments, verbosity),
        Command::Upload(arguments) => upload::upload(&arguments, verbosity),
        Command::Schema => schema::schema(),
        Command::Completions(arguments) => shell::completions(&arguments),
        Command::Man(arguments) => shell::man(&arguments),
        Command::Eval(arguments) => eval::eval(arguments, verbosity),
        Command::Generate(arguments) => generate::generate(arguments, verbosity),
        Command::Chat(arguments) => chat::chat(arguments, verbosity),
        Command::Serve(arguments) => serve::serve(&arguments, verbosity),
        Command::Export(arguments) => export::export(arguments, verbosity),
        Command::Quantize(arguments) => quantize::quantize(&arguments, verbosity),
        Command::Watch(arguments) => watch::watch(&arguments),
        Command::Compare(arguments) => compare::compare(&arguments),
    }
}
