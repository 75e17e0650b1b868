//! Errors as a person sees them: what happened, where, what to do next; and the exit code for programs.

use annotate_snippets::renderer::DecorStyle;
use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};
use finetune_advice::Advice;
use finetune_allreduce::{DeviceMatrixError, GroupError, JoinError};
use finetune_dataset::DatasetError;
use finetune_model::ModelError;
use finetune_recipe::{Location, Problems, RecipeError};
use finetune_rendezvous::HostfileError;
use finetune_store::StoreError;
use finetune_thunderbolt::setup::{ApplyError, SetupError};
use finetune_trainer::{Fault, TrainError};

use crate::exit::Exit;
use crate::flight;
use crate::stderr::complain;

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    Recipe(RecipeError),
    Train(TrainError),
    /// Arguments that clap could not refuse.
    Arguments {
        message: String,
        hints: Vec<String>,
    },
    Output(std::io::Error),
    /// What the system does not give this process.
    System {
        message: String,
        hints: Vec<String>,
    },
    /// Hosts that a launch cannot do without.
    Lost {
        message: String,
        hints: Vec<String>,
    },
    /// The other ranks, once they had joined.
    Group(GroupError),
    Join(JoinError),
}

impl Failure {
    pub(crate) fn arguments(message: impl Into<String>, hint: impl Into<String>) -> Failure {
        Failure::Arguments { message: message.into(), hints: vec![hint.into()] }
    }

    /// Bad input, as an error of a library says it.
    pub(crate) fn bad_input(error: impl std::error::Error + Advice) -> Failure {
        Failure::Arguments { message: error.to_string(), hints: error.hints() }
    }

    /// An error that a run can have too.
    fn of_run(error: impl Into<TrainError>) -> Failure {
        Failure::Train(error.into())
    }

    pub(crate) fn no_threads() -> Failure {
        Failure::System {
            message: "the system gives this process no more threads; saved checkpoints are safe".to_owned(),
            hints: vec![
                "raise the limit on processes (`ulimit -u`, docker's --pids-limit, pids.max of the cgroup)".to_owned(),
                "or set RAYON_NUM_THREADS to fewer threads".to_owned(),
            ],
        }
    }

    /// How the program ends with it.
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Failure::Train(error) => error.fault().into(),
            Failure::Group(error) | Failure::Join(JoinError::Group(error)) => Fault::from_group(error).into(),
            Failure::Join(JoinError::Failed { code, .. }) => Exit::of_other_rank(*code),
            Failure::Join(
                JoinError::Unreachable { .. }
                | JoinError::Unresolved { .. }
                | JoinError::Missing { .. }
                | JoinError::Pair { .. }
                | JoinError::Peer { .. },
            )
            | Failure::Lost { .. } => Exit::PeerLost,
            Failure::Output(_) | Failure::System { .. } => Exit::DiskOrMemory,
            Failure::Recipe(_) | Failure::Arguments { .. } | Failure::Join(_) => Exit::Input,
        }
    }

    /// What happened, without hints: for the other ranks.
    pub(crate) fn fact(&self) -> String {
        match self {
            Failure::Recipe(error) => error.to_string(),
            Failure::Train(error) => error.to_string(),
            Failure::Arguments { message, .. } | Failure::Lost { message, .. } | Failure::System { message, .. } => {
                message.clone()
            }
            Failure::Group(error) => error.to_string(),
            Failure::Join(error) => error.to_string(),
            Failure::Output(error) => error.to_string(),
        }
    }

    /// Writes the error to stderr: the fact, then hints after a blank line.
    pub(crate) fn print(&self) {
        let record = match self {
            Failure::Recipe(RecipeError::Problems(problems)) => return print_problems(problems),
            Failure::Train(TrainError::Group { error, .. }) | Failure::Group(error) => flight::keep(error),
            _ => Vec::new(),
        };
        let message = match self {
            Failure::Output(error) => format!("cannot write the result: {error}"),
            _ => self.fact(),
        };
        print_plain(&message, &[self.hints(), record].concat());
    }
}

impl Advice for Failure {
    /// Those of a recipe stand below each of its problems, and not here.
    fn hints(&self) -> Vec<String> {
        match self {
            Failure::Train(error) => error.hints(),
            Failure::Arguments { hints, .. } | Failure::Lost { hints, .. } | Failure::System { hints, .. } => {
                hints.clone()
            }
            Failure::Recipe(_) | Failure::Group(_) | Failure::Join(_) | Failure::Output(_) => Vec::new(),
        }
    }
}

fn print_plain(message: &str, hints: &[String]) {
    complain!("\x1b[1;31merror\x1b[0m: {message}");
    for (n, hint) in hints.iter().enumerate() {
        let blank = if n == 0 { "\n" } else { "" };
        complain!("{blank}\x1b[1;36mhint\x1b[0m: {hint}");
    }
}

/// Each problem with its line of the recipe underlined.
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
            Location::Set(text) => print_plain(&format!("--set {text}: {}", problem.message), &problem.hints),
            Location::File => print_plain(&format!("{path}: {}", problem.message), &problem.hints),
        }
    }
}

/// `From` for the errors of the libraries: what each becomes here.
macro_rules! failures {
    ($($error:ty => $failure:expr,)*) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Failure {
                $failure(error)
            }
        }
    )*};
}

failures! {
    RecipeError => Failure::Recipe,
    TrainError => Failure::Train,
    ModelError => Failure::of_run,
    DatasetError => Failure::of_run,
    StoreError => Failure::of_run,
    GroupError => Failure::Group,
    JoinError => Failure::Join,
    HostfileError => Failure::bad_input,
    DeviceMatrixError => Failure::bad_input,
    SetupError => Failure::bad_input,
    Box<ApplyError> => Failure::bad_input,
    std::io::Error => Failure::Output,
}
