//! Reading single variables: what counts as set, and numbers.

use super::Launcher;
use super::error::{EnvironmentError, shown};

pub(super) struct Variables<'a> {
    get: &'a dyn Fn(&str) -> Option<String>,
}

/// A variable that is set.
pub(super) struct Setting {
    pub(super) name: &'static str,
    /// Not empty, without white space around it.
    pub(super) value: String,
}

/// A variable that holds a whole number.
pub(super) struct Number {
    pub(super) name: &'static str,
    pub(super) value: usize,
}

impl<'a> Variables<'a> {
    pub(super) fn new(get: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { get }
    }

    /// True also for an empty value.
    pub(super) fn exists(&self, name: &str) -> bool {
        (self.get)(name).is_some()
    }

    /// The first of these variables that is set.
    pub(super) fn first(&self, names: &[&'static str]) -> Option<Setting> {
        names.iter().find_map(|name| {
            let value = (self.get)(name)?;
            let value = value.trim();
            (!value.is_empty()).then(|| Setting { name, value: value.to_owned() })
        })
    }

    /// The first of these variables that is set, which must hold a number.
    pub(super) fn number(&self, names: &[&'static str]) -> Result<Option<Number>, EnvironmentError> {
        self.first(names).map(|setting| setting.number()).transpose()
    }

    /// A rank and the number of ranks; an error if only one of them is set.
    pub(super) fn rank_and_world(
        &self,
        launcher: Launcher,
        ranks: &[&'static str],
        worlds: &[&'static str],
    ) -> Result<Option<(Number, Number)>, EnvironmentError> {
        Number::pair(self.number(ranks)?, self.number(worlds)?, launcher, ranks[0], worlds[0])
    }
}

impl Setting {
    pub(super) fn number(&self) -> Result<Number, EnvironmentError> {
        // Rust's parser takes "+1" too; no launcher writes that.
        let is_plain = self.value.bytes().all(|byte| byte.is_ascii_digit());
        match self.value.parse() {
            Ok(value) if is_plain => Ok(Number { name: self.name, value }),
            _ => Err(EnvironmentError::NotANumber { name: self.name, value: shown(&self.value) }),
        }
    }
}

impl Number {
    /// Both or none of what `launcher` calls `rank_name` and `world_name`.
    pub(super) fn pair(
        rank: Option<Self>,
        world: Option<Self>,
        launcher: Launcher,
        rank_name: &'static str,
        world_name: &'static str,
    ) -> Result<Option<(Self, Self)>, EnvironmentError> {
        match (rank, world) {
            (None, None) => Ok(None),
            (Some(rank), Some(world)) => Ok(Some((rank, world))),
            (Some(rank), None) => Err(rank.without(world_name, launcher)),
            (None, Some(world)) => Err(world.without(rank_name, launcher)),
        }
    }

    /// The error that `missing` should be set as well.
    pub(super) fn without(&self, missing: &'static str, launcher: Launcher) -> EnvironmentError {
        EnvironmentError::Missing { name: self.name, value: self.value.to_string(), missing, launcher }
    }
}
