//! `finetune import`: another tool's configuration as a recipe.

use std::io::{self, ErrorKind, Read};
use std::path::Path;
use std::process::ExitCode;

use finetune_import::{ImportError, LONGEST, import as imported};
use finetune_store::{Disk, Holding, Operation, RealDisk, StoreError, recognize};

use crate::cli::ImportArguments;
use crate::failure::{Failure, Fatal};
use crate::progress::Verbosity;
use crate::stderr::complain;
use crate::{closing, output};

impl Fatal for ImportError {}

pub(crate) fn import(arguments: &ImportArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let file = &arguments.file;
    if let Some(path) = &arguments.output {
        refuse_to_replace(path)?;
    }
    if recognize(file) == Holding::Recipe {
        return Err(Failure::arguments(
            format!("{} is a recipe already", file.display()),
            format!("`finetune validate {}` checks it", closing::path(file)),
        ));
    }
    let result = imported(&read(file)?, file, arguments.from.map(Into::into))?;
    if verbosity > Verbosity::Quiet {
        complain!("{} is a configuration of {}: {}", file.display(), result.tool, result.counts.words());
    }
    match &arguments.output {
        None => output::print(&result.recipe)?,
        Some(path) => {
            write_whole(path, &result.recipe)?;
            if verbosity > Verbosity::Quiet {
                complain!(
                    "the recipe is in {}; `finetune validate {}` says what is missing",
                    path.display(),
                    path.display()
                );
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn read(file: &Path) -> Result<String, Failure> {
    let unreadable = |error: io::Error| {
        Failure::arguments(
            format!("{}: cannot read it: {error}", file.display()),
            "name the YAML file that the other tool is started with",
        )
    };
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(file).map_err(unreadable)?;
    opened.take(LONGEST as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Failure::arguments(
            format!("{}: not UTF-8 text (at byte {at})", file.display()),
            "name the YAML file that the other tool is started with",
        )
    })
}

/// Nothing of the user's is written over.
pub(super) fn refuse_to_replace(path: &Path) -> Result<(), Failure> {
    if path.symlink_metadata().is_err() {
        return Ok(());
    }
    Err(Failure::arguments(
        format!("{} is there already, and nothing is written over", path.display()),
        "name another place, or remove it first",
    ))
}

/// Writes a file that was not there. Nothing is left of it if that fails.
pub(super) fn write_whole(path: &Path, text: &str) -> Result<(), Failure> {
    RealDisk.write_file(path, text.as_bytes()).map_err(|error| {
        // It may not be there at all, and the first failure is the one to tell.
        let _ = RealDisk.remove_file(path);
        unwritten(path, text, error)
    })
}

/// The error for a file that could not be written: a name that cannot be, or a disk that fails.
fn unwritten(path: &Path, text: &str, error: io::Error) -> Failure {
    if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::IsADirectory) {
        return StoreError::io(path, Operation::Write, text.len() as u64, error).into();
    }
    Failure::arguments(
        format!("{}: cannot write it: {error}", path.display()),
        "name a place that can be written, in a folder that exists",
    )
}
