//! What the user wrote for each key, and the problems with it. Each table reads its keys from here,
//! by the code that its declaration makes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::kind::{Kind, Written};
use crate::parse::{Given, GivenKeys};
use crate::path;
use crate::problem::{Location, Problem};

pub(crate) struct Reader<'a> {
    given: BTreeMap<&'static str, Given<'a>>,
    pub(crate) problems: Vec<Problem>,
    /// The text was not TOML: no key was given, and none is missed.
    pub(crate) stopped: bool,
    file: &'a Path,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(given: GivenKeys<'a>, problems: Vec<Problem>, file: &'a Path) -> Reader<'a> {
        let stopped = given.is_none();
        Reader { given: given.unwrap_or_default(), problems, stopped, file }
    }

    /// Whether the user wrote the key.
    pub(crate) fn has(&self, path: &str) -> bool {
        self.given.contains_key(path)
    }

    pub(crate) fn location(&self, path: &str) -> Location {
        self.given.get(path).map_or(Location::File, |given| given.location.clone())
    }

    /// What the user wrote for a key. A wrong value is noted and is `None`, so that reading goes on
    /// to the next problem.
    pub(crate) fn optional<K: Kind>(&mut self, path: &'static str, kind: &K) -> Option<K::Value> {
        let given = self.given.get(path)?;
        let written = Written { key: path, value: &given.value, location: &given.location, file: self.file };
        match kind.read(&written) {
            Ok(value) => Some(value),
            Err(problem) => {
                self.problems.push(problem);
                None
            }
        }
    }

    /// What the user wrote for a key, else the default.
    pub(crate) fn with_default<K: Kind>(&mut self, path: &'static str, kind: &K, default: K::Value) -> K::Value {
        self.optional(path, kind).unwrap_or(default)
    }

    /// What the user wrote for a key, else what the function makes of the reader.
    pub(crate) fn computed<K: Kind>(
        &mut self,
        path: &'static str,
        kind: &K,
        default: impl Fn(&Self) -> K::Value,
    ) -> K::Value {
        self.optional(path, kind).unwrap_or_else(|| default(self))
    }

    /// What the user wrote for a key that must be given. If it is missing, that is noted, with an
    /// example.
    pub(crate) fn required<K: Kind>(&mut self, path: &'static str, kind: &K, example: &str) -> K::Value
    where
        K::Value: Default,
    {
        if !self.has(path) && !self.stopped {
            let (table, name) = path.split_once('.').unwrap_or(("", path));
            let problem = Problem::new(Location::File, format!("`{name}` in [{table}] is missing"));
            self.problems.push(problem.hint(format!("for example, below [{table}]: {example}")));
        }
        self.optional(path, kind).unwrap_or_default()
    }

    /// The run directory of a recipe that names none: `runs/` and the recipe's file name without
    /// its extension.
    pub(crate) fn run_directory(&self) -> PathBuf {
        let stem = self.file.file_stem().map_or_else(|| "recipe".into(), |stem| stem.to_string_lossy());
        path::joined(self.file, &format!("runs/{stem}"))
    }
}
