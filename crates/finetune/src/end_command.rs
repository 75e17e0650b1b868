//! The command of `[log] on_end`: it runs once the run has ended, well or not.
//!
//! It comes from the recipe alone, as the output directory does. Its output goes to stderr. It has a
//! deadline, and its end changes nothing of ours.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use finetune_recipe::Recipe;
use finetune_trainer::Event;
use rustix::process::{Pid, Signal, kill_process_group};

use crate::exit::Exit;
use crate::stderr::complain;

/// How long the command may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// Time between two looks at it.
const NAP: Duration = Duration::from_millis(20);

/// The command that waits for the end of a run. If it is dropped before it was told of the end, the
/// program panics: the run has failed.
pub(crate) struct EndCommand {
    command: String,
    run: PathBuf,
    step: u64,
    loss: Option<f64>,
    is_told: bool,
}

impl EndCommand {
    /// The command of a recipe; `None` if it has none.
    pub(crate) fn of(recipe: &Recipe) -> Option<EndCommand> {
        let command = recipe.log.on_end.clone()?;
        let run = std::path::absolute(&recipe.output_dir).unwrap_or_else(|_| recipe.output_dir.clone());
        Some(EndCommand { command, run, step: 0, loss: None, is_told: false })
    }

    /// Keeps what the command will be told.
    pub(crate) fn see(&mut self, event: &Event<'_>) {
        match event {
            Event::Begin { from, .. } => self.step = *from,
            Event::Step { row, .. } => (self.step, self.loss) = (row.step, Some(row.loss)),
            _ => {}
        }
    }

    /// Runs the command, after everything of the run has been written and its lock is free.
    pub(crate) fn tell(mut self, exit: Exit) {
        self.run(exit, DEADLINE);
    }

    fn run(&mut self, exit: Exit, deadline: Duration) {
        self.is_told = true;
        let status = match exit {
            Exit::Done => "done",
            Exit::Stopped(_) => "stopped",
            _ => "failed",
        };
        let mut shell = Command::new("sh");
        shell.args(["-c", &self.command]).env("FINETUNE_RUN", &self.run).env("FINETUNE_STATUS", status);
        shell.env("FINETUNE_EXIT_CODE", exit.number().to_string()).env("FINETUNE_STEP", self.step.to_string());
        shell.env("FINETUNE_LOSS", self.loss.map_or(String::new(), |loss| loss.to_string()));
        match run(&mut shell, deadline) {
            Ok(Some(status)) if status.success() => {}
            Ok(Some(status)) => complain!("log.on_end: the command ended with {status}"),
            Ok(None) => complain!("log.on_end: the command was ended after {} s", deadline.as_secs()),
            Err(error) => complain!("log.on_end: the command cannot be started: {error}"),
        }
    }
}

impl Drop for EndCommand {
    fn drop(&mut self) {
        if !self.is_told {
            self.run(Exit::Bug, DEADLINE);
        }
    }
}

/// Runs a command to its end, or ends it and its children at the deadline.
fn run(command: &mut Command, deadline: Duration) -> io::Result<Option<ExitStatus>> {
    // Results on stdout are the run's own.
    let output = io::stderr().as_fd().try_clone_to_owned()?;
    let mut child = command.process_group(0).stdin(Stdio::null()).stdout(output).spawn()?;
    let until = Instant::now() + deadline;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= until {
            end(&mut child);
            return Ok(None);
        }
        std::thread::sleep(NAP);
    }
}

fn end(child: &mut Child) {
    // Both fail only if it has ended already.
    let _ = kill_process_group(Pid::from_child(child), Signal::KILL);
    let _ = child.kill();
    let _ = child.wait();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(folder: &std::path::Path, text: &str) -> EndCommand {
        let (run, command) = (folder.to_owned(), text.replace("OUT", &folder.join("out").display().to_string()));
        EndCommand { command, run, step: 7, loss: Some(0.25), is_told: false }
    }

    #[test]
    fn the_command_is_told_how_the_run_ended() {
        let folder = tempfile::tempdir().expect("a directory");
        let script = "echo \"$FINETUNE_STATUS $FINETUNE_EXIT_CODE $FINETUNE_STEP $FINETUNE_LOSS $FINETUNE_RUN\" > OUT";
        for (exit, want) in [
            (Exit::Done, "done 0 7 0.25"),
            (Exit::Stopped(15), "stopped 143 7 0.25"),
            (Exit::Numbers, "failed 4 7 0.25"),
        ] {
            command(folder.path(), script).tell(exit);
            let said = std::fs::read_to_string(folder.path().join("out")).expect("written");
            assert_eq!(said, format!("{want} {}\n", folder.path().display()));
        }
        // A panic drops it.
        drop(command(folder.path(), script));
        let said = std::fs::read_to_string(folder.path().join("out")).expect("written");
        assert!(said.starts_with("failed 1 7"), "{said}");
    }

    #[test]
    fn one_that_does_not_end_is_ended_with_its_children() {
        let folder = tempfile::tempdir().expect("a directory");
        // No other process has this among its arguments.
        let child = format!("sleep {}", 70_000 + std::process::id());
        command(folder.path(), &format!("{child} & {child}")).run(Exit::Done, Duration::from_secs(1));
        let is_left = || {
            let list = Command::new("ps").args(["-eo", "args"]).output().expect("the ps command");
            String::from_utf8_lossy(&list.stdout).lines().any(|line| line.starts_with(&child))
        };
        let began = Instant::now();
        while is_left() {
            assert!(began.elapsed() < Duration::from_secs(60), "a child of the command goes on");
            std::thread::sleep(NAP);
        }
    }
}
