//! The line editor on a terminal, with what was typed before.

use std::cell::{Cell, RefCell};
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{CompletionType, Config, Context, ExternalPrinter, Helper};

use super::command::completions;
use super::input::{Entered, Joined};
use crate::failure::Failure;

/// Entries of the history.
const REMEMBERED: usize = 1000;

const PROMPT: (&str, &str) = ("> ", "\x1b[1;32m>\x1b[0m ");

/// What came of waiting for a line.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    Entered(Entered),
    /// Ctrl-C. `empty`: nothing had been typed.
    Interrupted {
        empty: bool,
    },
    /// Ctrl-D, or the end of the input.
    End,
}

pub(super) struct Editor {
    inner: rustyline::Editor<Typing, FileHistory>,
    /// `None`: nothing is kept.
    history: Option<PathBuf>,
    /// While there is one, the editor waits for keys and signals at once. Otherwise a signal that
    /// another thread receives would not wake it.
    _printer: Option<Box<dyn ExternalPrinter>>,
}

impl Editor {
    /// `history`: where lines are kept. `say` hears if they cannot be.
    pub(super) fn open(history: Option<PathBuf>, say: &dyn Fn(&str)) -> Result<Editor, Failure> {
        let config = Config::builder()
            .max_history_size(REMEMBERED)
            .and_then(|config| config.history_ignore_dups(true))
            .map_err(unusable)?
            .completion_type(CompletionType::List)
            .build();
        let mut inner = rustyline::Editor::<Typing, FileHistory>::with_config(config).map_err(unusable)?;
        inner.set_helper(Some(Typing::default()));
        let history = history.filter(|path| match begin_history(&mut inner, path) {
            Ok(()) => true,
            Err(why) => {
                say(&format!("what you type is not kept: {}: {why}", path.display()));
                false
            }
        });
        let printer = inner.create_external_printer().ok();
        let printer = printer.map(|printer| Box::new(printer) as Box<dyn ExternalPrinter>);
        Ok(Editor { inner, history, _printer: printer })
    }

    /// Waits for a line, or for the lines of a text.
    pub(super) fn next(&mut self) -> Result<Next, Failure> {
        let line = self.inner.readline(&PROMPT);
        let typing = self.inner.helper();
        match line {
            Ok(line) => {
                let joined = typing.map(|typing| typing.joined.take());
                self.remember(&line);
                Ok(Next::Entered(joined.unwrap_or_default().take(line)))
            }
            Err(ReadlineError::Interrupted | ReadlineError::Signal(_)) => {
                let empty = typing.is_none_or(|typing| typing.empty.get());
                if let Some(typing) = typing {
                    typing.joined.take();
                }
                Ok(Next::Interrupted { empty })
            }
            Err(ReadlineError::Eof) => Ok(Next::End),
            // Bytes that are no UTF-8, such as a key of another keyboard's encoding.
            Err(ReadlineError::Io(error)) if error.kind() == std::io::ErrorKind::InvalidData => {
                Ok(Next::Interrupted { empty: false })
            }
            Err(error) => Err(unusable(error)),
        }
    }

    fn remember(&mut self, line: &str) {
        let is_new = self.inner.add_history_entry(line).unwrap_or(false);
        if let Some(path) = self.history.as_ref().filter(|_| is_new) {
            // Written at once: nothing is lost however the program ends. A disk that fails now is
            // no reason to stop the conversation.
            let _ = self.inner.append_history(path);
        }
    }
}

fn unusable(error: ReadlineError) -> Failure {
    Failure::arguments(
        format!("the terminal cannot be used: {error}"),
        "without a terminal each line of standard input is a message",
    )
}

/// Reads what was kept.
fn begin_history(editor: &mut rustyline::Editor<Typing, FileHistory>, path: &Path) -> Result<(), String> {
    if let Some(folder) = path.parent() {
        // Questions may be confidential, so other users may not look.
        let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(|error| error.to_string())?;
    }
    match editor.load_history(path) {
        Ok(()) => Ok(()),
        Err(ReadlineError::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// The file of the history, in the user's folder for the state of programs.
pub(super) fn history_file() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = variable("XDG_STATE_HOME").or_else(|| variable("HOME").map(|home| home.join(".local/state")))?;
    Some(state.join("finetune/chat_history"))
}

/// What the editor asks while a person types.
#[derive(Default)]
struct Typing {
    joined: RefCell<Joined>,
    empty: Cell<bool>,
}

impl Validator for Typing {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        let goes_on = self.joined.borrow_mut().goes_on(context.input());
        Ok(if goes_on { ValidationResult::Incomplete } else { ValidationResult::Valid(None) })
    }
}

impl Hinter for Typing {
    type Hint = String;

    /// Gives no hints, but sees every line: an interrupted one is not returned.
    fn hint(&self, line: &str, _: usize, _: &Context<'_>) -> Option<String> {
        self.empty.set(line.is_empty());
        None
    }
}

impl Completer for Typing {
    type Candidate = String;

    fn complete(&self, line: &str, position: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        Ok((0, completions(line.get(..position).unwrap_or_default())))
    }
}

impl Highlighter for Typing {}
impl Helper for Typing {}
