//! What can be wrong with a recipe, with the place to point at.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    #[error("{}: cannot read the recipe: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{}: {bytes} bytes are too long for a recipe (the limit is {limit})", path.display())]
    TooLong { path: PathBuf, bytes: u64, limit: u64 },
    #[error("{0}")]
    Problems(Problems),
}

/// Everything wrong with one recipe: by position in the file, then what concerns the file as a whole, then `--set`.
#[derive(Debug)]
pub struct Problems {
    pub file: PathBuf,
    /// The text that spans point into.
    pub source: String,
    pub problems: Vec<Problem>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub message: String,
    pub place: Place,
    /// What to write instead; may be empty.
    pub hints: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Bytes of the recipe's text.
    Span(Range<usize>),
    /// The text of a `--set`.
    Set(String),
    File,
}

impl Place {
    /// The place of a part of a value: its own span in a file; a `--set` is pointed at as a whole.
    pub(crate) fn part(&self, span: Range<usize>) -> Place {
        match self {
            Place::Span(_) => Place::Span(span),
            other => other.clone(),
        }
    }
}

impl Problem {
    pub(crate) fn new(place: Place, message: impl Into<String>) -> Problem {
        Problem { message: message.into(), place, hints: Vec::new() }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Problem {
        self.hints.push(hint.into());
        self
    }

    /// Line and column of the place in `source`, from 1, columns in characters. `None` if the place is not in the file.
    pub fn line_column(&self, source: &str) -> Option<(usize, usize)> {
        let Place::Span(span) = &self.place else {
            return None;
        };
        let mut start = span.start.min(source.len());
        while !source.is_char_boundary(start) {
            start -= 1;
        }
        let before = &source[..start];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Some((before.matches('\n').count() + 1, before[line_start..].chars().count() + 1))
    }
}

impl Problems {
    pub(crate) fn sorted(file: &Path, source: &str, mut problems: Vec<Problem>) -> Problems {
        problems.sort_by_key(|problem| match &problem.place {
            Place::Span(span) => (0, span.start),
            Place::File => (1, 0),
            Place::Set(_) => (2, 0),
        });
        Problems { file: file.to_path_buf(), source: source.to_owned(), problems }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                writeln!(formatter)?;
            }
            match (&problem.place, problem.line_column(&self.source)) {
                (Place::Set(text), _) => write!(formatter, "--set {text}: ")?,
                (_, Some((line, column))) => write!(formatter, "{}:{line}:{column}: ", self.file.display())?,
                (_, None) => write!(formatter, "{}: ", self.file.display())?,
            }
            formatter.write_str(&problem.message)?;
        }
        Ok(())
    }
}
