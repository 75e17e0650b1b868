//! Values of known keys to Rust types. Defaults and bounds come from `keys.rs`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::de::DeValue;

use crate::keys::{self, Absent, Bounds, Kind};
use crate::parse::{Given, GivenKeys};
use crate::problem::{Place, Problem};
use crate::{date, duration, hint, path};

mod tables;
mod value;

pub(crate) struct Reader<'a> {
    given: BTreeMap<&'static str, Given<'a>>,
    pub(crate) problems: Vec<Problem>,
    /// The text was not TOML: nothing was given, and nothing is missed.
    pub(crate) stopped: bool,
    file: &'a Path,
}

/// The place of a default, which is never shown: a default has no problems.
const NOWHERE: Place = Place::File;

impl<'a> Reader<'a> {
    pub(crate) fn new(given: GivenKeys<'a>, problems: Vec<Problem>, file: &'a Path) -> Reader<'a> {
        let stopped = given.is_none();
        Reader { given: given.unwrap_or_default(), problems, stopped, file }
    }

    /// Whether the user wrote the key.
    pub(crate) fn has(&self, path: &str) -> bool {
        self.given.contains_key(path)
    }

    pub(crate) fn place(&self, path: &str) -> Place {
        self.given.get(path).map_or(Place::File, |given| given.place.clone())
    }

    /// What the user wrote for a key, or else its default; `None` where there is neither. A wrong value is noted and
    /// the default taken, so that reading goes on to the next problem.
    fn read<T>(
        &mut self,
        path: &'static str,
        convert: impl Fn(Kind, &DeValue<'_>, &Place) -> Result<T, Problem>,
    ) -> Option<T> {
        let key = keys::at(path).unwrap_or_else(|| unreachable!("{path} is not in KEYS"));
        if let Some(given) = self.given.get(path) {
            match convert(key.kind, &given.value, &given.place) {
                Ok(value) => return Some(value),
                Err(problem) => self.problems.push(problem),
            }
        }
        match key.default {
            Absent::Is(text) => {
                let default = DeValue::parse(text).unwrap_or_else(|error| unreachable!("default of {path}: {error}"));
                let value = convert(key.kind, default.get_ref(), &NOWHERE);
                Some(value.unwrap_or_else(|problem| unreachable!("default of {path}: {}", problem.message)))
            }
            Absent::Required => {
                if !self.has(path) && !self.stopped {
                    let message = format!("`{}` in [{}] is missing", key.name(), key.table());
                    let example = if path == "model.path" {
                        r#"path = "Qwen/Qwen3-0.6B""#
                    } else {
                        r#"train = "data/train.jsonl""#
                    };
                    self.problems.push(
                        Problem::new(Place::File, message)
                            .hint(format!("for example, below [{}]: {example}", key.table())),
                    );
                }
                None
            }
            Absent::Unset(_) => None,
        }
    }

    fn text(&mut self, path: &'static str) -> Option<String> {
        self.read(path, |kind, value, place| {
            // A date needs no quotes in TOML.
            let date = match (kind, value) {
                (Kind::Date, DeValue::Datetime(date)) => Some(date.to_string()),
                _ => None,
            };
            let text = match &date {
                Some(date) => date,
                None => value::text(path, value, place)?,
            };
            match kind {
                Kind::Address if !is_address(text) => {
                    let message = format!("`{path}` must be a host and a port, found \"{}\"", hint::shown(text));
                    Err(Problem::new(place.clone(), message).hint("for example \"127.0.0.1:9400\""))
                }
                Kind::Date if !date::is_date(text) => {
                    let message = format!("`{path}` must be a date, found \"{}\"", hint::shown(text));
                    Err(Problem::new(place.clone(), message).hint("year, month and day: \"2026-11-27\""))
                }
                _ => Ok(text.to_owned()),
            }
        })
    }

    fn path(&mut self, path: &'static str) -> Option<PathBuf> {
        let file = self.file;
        self.read(path, |_, value, place| Ok(path::joined(file, value::path_text(path, value, place)?)))
    }

    /// A path or a list of paths; empty where the key was not given.
    fn paths(&mut self, path: &'static str) -> Vec<PathBuf> {
        let file = self.file;
        let convert = |_, value: &DeValue<'_>, place: &Place| match value {
            DeValue::Array(items) if items.is_empty() => {
                Err(Problem::new(place.clone(), format!("`{path}` must name a file")))
            }
            DeValue::Array(items) => items
                .iter()
                .map(|item| Ok(path::joined(file, value::path_text(path, item.get_ref(), &place.part(item.span()))?)))
                .collect(),
            DeValue::String(_) => Ok(vec![path::joined(file, value::path_text(path, value, place)?)]),
            other => Err(value::wrong_type("a path or a list of paths", other, place)),
        };
        self.read(path, convert).unwrap_or_default()
    }

    fn model_path(&mut self) -> String {
        let file = self.file;
        let path = "model.path";
        self.read(path, |_, value, place| Ok(path::model(file, value::path_text(path, value, place)?)))
            .unwrap_or_default()
    }

    fn optional_integer(&mut self, path: &'static str) -> Option<u64> {
        self.read(path, |kind, value, place| match kind {
            Kind::Integer { min } => value::integer(path, value, place, min),
            other => unreachable!("{path} is {other:?}"),
        })
    }

    fn integer(&mut self, path: &'static str) -> u64 {
        self.optional_integer(path).unwrap_or_else(|| unreachable!("{path} has no default"))
    }

    fn optional_count(&mut self, path: &'static str) -> Option<usize> {
        // Pointers have 64 bits wherever this trains.
        self.optional_integer(path).map(|count| usize::try_from(count).unwrap_or(usize::MAX))
    }

    fn count(&mut self, path: &'static str) -> usize {
        self.optional_count(path).unwrap_or_else(|| unreachable!("{path} has no default"))
    }

    fn optional_number(&mut self, path: &'static str) -> Option<f64> {
        self.read(path, |kind, value, place| match kind {
            Kind::Float(bounds) => value::number(path, value, place, bounds),
            other => unreachable!("{path} is {other:?}"),
        })
    }

    fn number(&mut self, path: &'static str) -> f64 {
        self.optional_number(path).unwrap_or_else(|| unreachable!("{path} has no default"))
    }

    fn boolean(&mut self, path: &'static str) -> bool {
        let read = self.read(path, |_, value, place| match value {
            DeValue::Boolean(boolean) => Ok(*boolean),
            other => Err(value::wrong_type("true or false", other, place)),
        });
        read.unwrap_or_else(|| unreachable!("{path} has no default"))
    }

    fn optional_choice<T>(&mut self, path: &'static str, from_text: impl Fn(&str) -> Option<T>) -> Option<T> {
        self.read(path, |kind, value, place| {
            let Kind::OneOf(allowed) = kind else { unreachable!("{path} is {kind:?}") };
            let list = allowed.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(", ");
            let DeValue::String(written) = value else {
                let expected = if allowed.len() == 1 { list } else { format!("one of {list}") };
                return Err(value::wrong_type(&expected, value, place));
            };
            from_text(written).ok_or_else(|| {
                let or = if allowed.len() == 1 { "" } else { "one of " };
                let message = format!("`{path}` must be {or}{list}, found \"{}\"", hint::shown(written));
                Problem { message, place: place.clone(), hints: hint::wrong_word(path, written, allowed) }
            })
        })
    }

    fn choice<T>(&mut self, path: &'static str, from_text: impl Fn(&str) -> Option<T>) -> T {
        self.optional_choice(path, from_text).unwrap_or_else(|| unreachable!("{path} has no default"))
    }

    fn number_pair(&mut self, path: &'static str, bounds: Bounds) -> [f64; 2] {
        let read = self.read(path, |_, value, place| match value {
            DeValue::Array(items) if items.len() == 2 => {
                let number = |index: usize| {
                    value::number(path, items[index].get_ref(), &place.part(items[index].span()), bounds)
                };
                Ok([number(0)?, number(1)?])
            }
            DeValue::Array(items) => {
                Err(Problem::new(place.clone(), format!("`{path}` must have two numbers, found {}", items.len())))
            }
            other => Err(value::wrong_type("a list of two numbers", other, place)),
        });
        read.unwrap_or_else(|| unreachable!("{path} has no default"))
    }

    fn duration(&mut self, path: &'static str) -> std::time::Duration {
        self.optional_duration(path).unwrap_or_else(|| unreachable!("{path} has no default"))
    }

    fn optional_duration(&mut self, path: &'static str) -> Option<std::time::Duration> {
        self.read(path, |_, value, place| {
            let DeValue::String(text) = value else {
                return Err(value::wrong_type("a duration such as \"5s\"", value, place));
            };
            match duration::parse(text) {
                None => {
                    let message = format!("`{path}` must be a duration, found \"{}\"", hint::shown(text));
                    Err(Problem::new(place.clone(), message)
                        .hint("a whole number and ms, s, m or h, such as \"5s\" or \"500ms\""))
                }
                Some(time) if time.is_zero() || time > duration::LONGEST => Err(Problem::new(
                    place.clone(),
                    format!("`{path}` must be above 0s and at most 1h, found \"{}\"", hint::shown(text)),
                )),
                Some(time) => Ok(time),
            }
        })
    }

    /// "29500" or "29500-29599": the first and the last.
    fn ports(&mut self, path: &'static str) -> Option<(u16, u16)> {
        self.read(path, |_, value, place| {
            let text = match value {
                DeValue::Integer(port) => port.to_string(),
                other => value::text(path, other, place)?.to_owned(),
            };
            let (first, last) = text.split_once('-').unwrap_or((&text, &text));
            let port = |text: &str| text.trim().parse::<u16>().ok().filter(|&port| port > 0);
            match (port(first), port(last)) {
                (Some(first), Some(last)) if first <= last => Ok((first, last)),
                _ => Err(Problem::new(
                    place.clone(),
                    format!("`{path}` must be a port or a range of ports, found \"{}\"", hint::shown(&text)),
                )
                .hint("for example \"29500-29599\"")),
            }
        })
    }
}

fn is_address(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}
