//! Errors as a person sees them: what happened, where, what to do next. And the exit code for
//! programs.
//!
//! Every error takes one road: it is [`Fatal`], becomes a [`Failure`] by `?`, and is printed at the
//! end of `main`.

use std::error::Error;
use std::fmt;

use annotate_snippets::renderer::DecorStyle;
use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};
use finetune_advice::Advice;
use finetune_allreduce::{DeviceMatrixError, GroupError, JoinError, Verdict};
use finetune_dataset::DatasetError;
use finetune_model::ModelError;
use finetune_recipe::{Location, Problems, RecipeError};
use finetune_rendezvous::{HostfileError, MembershipError};
use finetune_store::StoreError;
use finetune_thunderbolt::setup::{ApplyError, SetupError};
use finetune_trainer::{Fault, TrainError};

use crate::exit::Exit;
use crate::flight;
use crate::memory;
use crate::output::printable;
use crate::stderr::complain;

/// An error that can end the program.
pub(crate) trait Fatal: Error + Advice {
    /// The exit code.
    fn exit(&self) -> Exit {
        Exit::Input
    }

    /// The failure of the group of ranks that is behind it. Its last operations are kept in a file.
    fn group(&self) -> Option<&GroupError> {
        None
    }

    /// The ranks whose failure it is, if not this rank's own.
    fn blamed(&self) -> Vec<usize> {
        self.group().map(other_ranks).unwrap_or_default()
    }

    /// Whether the system refuses memory or threads.
    fn lacks_memory(&self) -> bool {
        false
    }

    /// Prints it to stderr.
    fn print(&self) {
        let limit = self.lacks_memory().then(memory::limit_hint).flatten();
        let record = self.group().map(flight::keep).unwrap_or_default();
        print_message(&self.to_string(), &[limit.into_iter().collect(), self.hints(), record].concat());
    }
}

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct Failure(Box<dyn Fatal>);

impl<E: Fatal + 'static> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure(Box::new(error))
    }
}

/// Results that could not be written.
impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        Failure::own(Exit::DiskOrMemory, format!("cannot write the result: {error}"), Vec::new())
    }
}

impl Failure {
    /// Arguments that clap could not refuse, with one hint.
    pub(crate) fn arguments(message: impl Into<String>, hint: impl Into<String>) -> Failure {
        Failure::bad_input(message, vec![hint.into()])
    }

    /// The same with any number of hints.
    pub(crate) fn bad_input(message: impl Into<String>, hints: Vec<String>) -> Failure {
        Failure::own(Exit::Input, message.into(), hints)
    }

    /// Hosts that a launch cannot do without.
    pub(crate) fn lost(message: impl Into<String>, hints: Vec<String>) -> Failure {
        Failure::own(Exit::PeerLost, message.into(), hints)
    }

    /// A disk that has too little room, known before anything is written.
    pub(crate) fn no_space(message: impl Into<String>, hints: Vec<String>) -> Failure {
        Failure::own(Exit::DiskOrMemory, message.into(), hints)
    }

    /// The system does not give this process what it needs.
    pub(crate) fn no_threads() -> Failure {
        let hints = [
            "raise the limit on processes (`ulimit -u`, docker's --pids-limit, pids.max of the cgroup)".to_owned(),
            "or set RAYON_NUM_THREADS to fewer threads".to_owned(),
        ];
        let hints = memory::limit_hint().into_iter().chain(hints).collect();
        let message = "the system gives this process no more threads; saved checkpoints are safe".to_owned();
        Failure::own(Exit::DiskOrMemory, message, hints)
    }

    /// No thread can be had that listens for signals.
    pub(crate) fn deaf(error: &std::io::Error) -> Failure {
        match error.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::OutOfMemory => Failure::no_threads(),
            _ => Failure::own(Exit::DiskOrMemory, format!("cannot listen for signals: {error}"), Vec::new()),
        }
    }

    fn own(exit: Exit, message: String, hints: Vec<String>) -> Failure {
        OwnError { exit, message, hints }.into()
    }

    /// The same with other hints: what there is to do depends on the command.
    pub(crate) fn with_hints(self, hints: Vec<String>) -> Failure {
        Failure(Box::new(Advised { failure: self, hints }))
    }

    /// What the program ends with.
    pub(crate) fn exit(&self) -> Exit {
        self.0.exit()
    }

    /// What happened, without hints: for the other ranks.
    pub(crate) fn fact(&self) -> String {
        self.0.to_string()
    }

    /// What to do next.
    pub(crate) fn hints(&self) -> Vec<String> {
        self.0.hints()
    }

    /// The ranks whose failure it is, if not this rank's own.
    pub(crate) fn blamed(&self) -> Vec<usize> {
        self.0.blamed()
    }

    /// Prints the error to stderr: the fact, then hints after a blank line.
    pub(crate) fn print(&self) {
        self.0.print();
    }

    /// What happened and each hint, a line each.
    #[cfg(test)]
    pub(crate) fn lines(&self) -> String {
        [vec![self.fact()], self.0.hints()].concat().join("\n")
    }
}

/// An error that this program found by itself.
#[derive(Debug)]
struct OwnError {
    exit: Exit,
    message: String,
    hints: Vec<String>,
}

impl fmt::Display for OwnError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl Error for OwnError {}

impl Advice for OwnError {
    fn hints(&self) -> Vec<String> {
        self.hints.clone()
    }
}

impl Fatal for OwnError {
    fn exit(&self) -> Exit {
        self.exit
    }
}

/// An error with other hints than its own.
#[derive(Debug)]
struct Advised {
    failure: Failure,
    hints: Vec<String>,
}

impl fmt::Display for Advised {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.failure.fact())
    }
}

impl Error for Advised {}

impl Advice for Advised {
    fn hints(&self) -> Vec<String> {
        self.hints.clone()
    }
}

impl Fatal for Advised {
    fn exit(&self) -> Exit {
        self.failure.exit()
    }

    fn group(&self) -> Option<&GroupError> {
        self.failure.0.group()
    }

    fn blamed(&self) -> Vec<usize> {
        self.failure.blamed()
    }

    fn lacks_memory(&self) -> bool {
        self.failure.0.lacks_memory()
    }
}

impl Fatal for RecipeError {
    fn print(&self) {
        match self {
            RecipeError::Problems(problems) => print_problems(problems),
            error => print_message(&error.to_string(), &error.hints()),
        }
    }
}

impl Fatal for HostfileError {}
impl Fatal for DeviceMatrixError {}
impl Fatal for SetupError {}
impl Fatal for Box<ApplyError> {}

impl Fatal for TrainError {
    fn exit(&self) -> Exit {
        self.fault().into()
    }

    fn lacks_memory(&self) -> bool {
        match self {
            TrainError::Dataset(error) => error.lacks_memory(),
            TrainError::NoThread { .. } => true,
            _ => false,
        }
    }

    fn group(&self) -> Option<&GroupError> {
        match self {
            TrainError::Group { error, .. } => Some(error),
            _ => None,
        }
    }

    fn blamed(&self) -> Vec<usize> {
        match self {
            TrainError::Stages(error) => error.blamed(),
            error => error.group().map(other_ranks).unwrap_or_default(),
        }
    }
}

impl Fatal for ModelError {
    fn exit(&self) -> Exit {
        self.group().map_or_else(|| Fault::from_model(self).into(), Fatal::exit)
    }

    fn group(&self) -> Option<&GroupError> {
        match self {
            ModelError::Hop(error) | ModelError::Sum(error) => error.downcast_ref(),
            _ => None,
        }
    }
}

impl Fatal for DatasetError {
    fn exit(&self) -> Exit {
        Fault::from_dataset(self).into()
    }

    fn lacks_memory(&self) -> bool {
        matches!(self, DatasetError::NoThreads { .. })
    }
}

impl Fatal for StoreError {
    fn exit(&self) -> Exit {
        Fault::from_store(self).into()
    }
}

impl Fatal for GroupError {
    fn exit(&self) -> Exit {
        Fault::from_group(self).into()
    }

    fn group(&self) -> Option<&GroupError> {
        Some(self)
    }
}

impl Fatal for JoinError {
    fn exit(&self) -> Exit {
        match self {
            JoinError::Failed { code, .. } => Exit::of_other_rank(*code),
            error => Fault::from_join(error).into(),
        }
    }

    fn group(&self) -> Option<&GroupError> {
        match self {
            JoinError::Group(error) => Some(error),
            _ => None,
        }
    }

    fn blamed(&self) -> Vec<usize> {
        match self {
            JoinError::Peer { peer, .. } => vec![*peer],
            error => error.group().map(other_ranks).unwrap_or_default(),
        }
    }
}

impl Fatal for MembershipError {
    fn exit(&self) -> Exit {
        match self {
            MembershipError::Join(error) => error.exit(),
            _ => Exit::Input,
        }
    }

    fn group(&self) -> Option<&GroupError> {
        match self {
            MembershipError::Join(error) => error.group(),
            _ => None,
        }
    }

    fn blamed(&self) -> Vec<usize> {
        match self {
            MembershipError::Join(error) => error.blamed(),
            _ => Vec::new(),
        }
    }
}

/// The ranks whose failure ended the group, without this rank.
fn other_ranks(error: &GroupError) -> Vec<usize> {
    match &error.verdict {
        Verdict::Reported { by, .. } if *by != error.rank => vec![*by],
        _ => error.lost_ranks().into_iter().filter(|rank| *rank != error.rank).collect(),
    }
}

/// Prints the sentence, then the hints after a blank line. They quote files, which may be foreign.
fn print_message(message: &str, hints: &[String]) {
    complain!("\x1b[1;31merror\x1b[0m: {}", printable(message));
    for (n, hint) in hints.iter().enumerate() {
        let blank = if n == 0 { "\n" } else { "" };
        complain!("{blank}\x1b[1;36mhint\x1b[0m: {}", printable(hint));
    }
}

/// Prints each problem with its line of the recipe underlined.
fn print_problems(problems: &Problems) {
    let renderer = Renderer::styled().decor_style(DecorStyle::Ascii);
    let path = problems.file.to_string_lossy();
    for (n, problem) in problems.problems.iter().enumerate() {
        if n > 0 {
            complain!();
        }
        match &problem.location {
            Location::Span(span) => {
                let end = span.end.min(problems.source.len());
                let span = span.start.min(end)..end;
                let snippet = Snippet::source(problems.source.as_str())
                    .path(path.as_ref())
                    .annotation(AnnotationKind::Primary.span(span));
                let mut group = Level::ERROR.primary_title(problem.message.as_str()).element(snippet);
                for hint in &problem.hints {
                    group = group.element(Level::HELP.with_name("hint").message(hint.as_str()));
                }
                complain!("{}", renderer.render(&[group]));
            }
            Location::Set(text) => print_message(&format!("--set {text}: {}", problem.message), &problem.hints),
            Location::File => print_message(&format!("{path}: {}", problem.message), &problem.hints),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (what the system says, its number, part of what a person reads)
    #[test]
    fn why_signals_cannot_be_heard() {
        for (number, expected) in [(libc::EAGAIN, "no more threads"), (libc::EMFILE, "cannot listen for signals: ")] {
            let failure = Failure::deaf(&std::io::Error::from_raw_os_error(number));
            assert!(failure.fact().contains(expected), "{}", failure.lines());
            assert_eq!(failure.exit(), Exit::DiskOrMemory);
        }
    }
}
