//! How an answer is shown while it comes.

use std::io::{self, IsTerminal, Write};

use finetune_dataset::Reasoning;
use finetune_trainer::numbers::thousands;

use crate::output::{self, printable};

/// Where answers go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Screen {
    /// A person reads it: reasoning is dim, and no control character gets through.
    Terminal,
    /// A program reads it: the text as it is, and a line break.
    Plain,
    /// Nothing is shown as it comes.
    Silent,
}

impl Screen {
    pub(super) fn of(json: bool) -> Screen {
        match (json, io::stdout().is_terminal()) {
            (true, _) => Screen::Silent,
            (false, true) => Screen::Terminal,
            (false, false) => Screen::Plain,
        }
    }
}

/// An answer on its way to the screen.
pub(super) struct Shown {
    screen: Screen,
    reasoning: Reasoning,
    /// The line that says how far the prompt is read is there.
    reading: bool,
    ends_with_line: bool,
}

impl Shown {
    /// `opened`: what the template has put in front of the answer, if it opens reasoning.
    pub(super) fn new(screen: Screen, opened: Option<&str>) -> Shown {
        Shown { screen, reasoning: Reasoning::new(opened), reading: false, ends_with_line: false }
    }

    /// So many tokens of a long prompt are read. Shown on terminals only, in a line that goes away.
    pub(super) fn reading(&mut self, done: usize, of: usize) {
        if self.screen != Screen::Terminal || !io::stderr().is_terminal() {
            return;
        }
        let line = if done < of {
            format!("\r\x1b[2mreading {} of {} tokens\x1b[22m", thousands(done as u64), thousands(of as u64))
        } else if self.reading {
            "\r\x1b[K".to_owned()
        } else {
            return;
        };
        self.reading = done < of;
        // Like any line on stderr: if it cannot be written, it is lost.
        let _ = write!(anstream::stderr().lock(), "{line}");
    }

    /// Shows the next piece.
    pub(super) fn text(&mut self, piece: &str) -> io::Result<()> {
        match self.screen {
            Screen::Silent => Ok(()),
            Screen::Plain => output::print(piece),
            Screen::Terminal => {
                for (text, dim) in self.reasoning.push(piece) {
                    self.on_terminal(&text, dim)?;
                }
                Ok(())
            }
        }
    }

    fn on_terminal(&mut self, text: &str, dim: bool) -> io::Result<()> {
        let text = printable(text);
        self.ends_with_line = text.ends_with('\n');
        // A dim part ends with its color: what comes between the parts has its own.
        if dim { output::colored(&format!("\x1b[2m{text}\x1b[22m")) } else { output::print(&text) }
    }

    /// Ends the answer: a line break for programs, an empty line more on a terminal.
    pub(super) fn end(mut self) -> io::Result<()> {
        match self.screen {
            Screen::Silent => Ok(()),
            Screen::Plain => output::print("\n"),
            Screen::Terminal => {
                self.reading(1, 1);
                if let Some((text, dim)) = self.reasoning.finish() {
                    self.on_terminal(&text, dim)?;
                }
                output::print(if self.ends_with_line { "\n" } else { "\n\n" })
            }
        }
    }
}
