//! What can be wrong with a recipe, with the location to point at.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use finetune_advice::Advice;

/// Why there is no recipe.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    #[error("{}: cannot read the recipe: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    /// `column`: in bytes.
    #[error("{}:{line}:{column}: this is no UTF-8 text", path.display())]
    NotText { path: PathBuf, line: usize, column: usize },
    #[error("{}: {bytes} bytes are too long for a recipe (the limit is {limit})", path.display())]
    TooLong { path: PathBuf, bytes: u64, limit: u64 },
    #[error("{0}")]
    Problems(Problems),
}

impl Advice for RecipeError {
    fn hints(&self) -> Vec<String> {
        match self {
            RecipeError::Problems(problems) => problems.problems.iter().flat_map(|it| it.hints.clone()).collect(),
            RecipeError::NotText { .. } => {
                vec!["if the file is in an older encoding: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW".to_owned()]
            }
            RecipeError::Unreadable { .. } | RecipeError::TooLong { .. } => Vec::new(),
        }
    }
}

/// Everything wrong with one recipe: problems by position in the file, then those of the file as a
/// whole, then those of `--set`.
#[derive(Debug)]
pub struct Problems {
    pub file: PathBuf,
    /// The text that spans point into.
    pub source: String,
    pub problems: Vec<Problem>,
}

/// One thing that is wrong with a recipe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub message: String,
    pub location: Location,
    /// What to write instead; may be empty.
    pub hints: Vec<String>,
}

/// What a problem is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// Bytes of the recipe's text.
    Span(Range<usize>),
    /// The text of a `--set`.
    Set(String),
    /// The recipe as a whole.
    File,
}

impl Location {
    /// The location of a part of a value. In a file it is the part's own span; a `--set` is pointed
    /// at as a whole.
    pub(crate) fn part(&self, span: Range<usize>) -> Location {
        match self {
            Location::Span(_) => Location::Span(span),
            other => other.clone(),
        }
    }
}

impl Problem {
    pub(crate) fn new(location: Location, message: impl Into<String>) -> Problem {
        Problem { message: message.into(), location, hints: Vec::new() }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Problem {
        self.hints.push(hint.into());
        self
    }

    /// Line and column of the location in `source`, counted from 1, columns in characters. `None`
    /// if the location is not in the file.
    pub fn line_column(&self, source: &str) -> Option<(usize, usize)> {
        let Location::Span(span) = &self.location else {
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
        problems.sort_by_key(|problem| match &problem.location {
            Location::Span(span) => (0, span.start),
            Location::File => (1, 0),
            Location::Set(_) => (2, 0),
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
            match (&problem.location, problem.line_column(&self.source)) {
                (Location::Set(text), _) => write!(formatter, "--set {text}: ")?,
                (_, Some((line, column))) => write!(formatter, "{}:{line}:{column}: ", self.file.display())?,
                (_, None) => write!(formatter, "{}: ", self.file.display())?,
            }
            formatter.write_str(&problem.message)?;
        }
        Ok(())
    }
}
