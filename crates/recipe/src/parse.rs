//! TOML text and `--set` become the known keys with their values and locations. The rest becomes
//! problems.

use std::collections::BTreeMap;
use std::ops::Range;

use toml::de::{DeTable, DeValue};

use crate::keys::{self, TABLES};
use crate::problem::{Location, Problem};
use crate::{hint, set};

/// How many problems are told. A file of a million wrong keys would take minutes to find hints for.
const MOST_PROBLEMS: usize = 100;

/// A value that the user wrote for a known key.
pub(crate) struct Given<'a> {
    pub(crate) value: DeValue<'a>,
    /// Of the value.
    pub(crate) location: Location,
}

/// By key path, "lora.rank". `None` if the text is not TOML.
pub(crate) type GivenKeys<'a> = Option<BTreeMap<&'static str, Given<'a>>>;

/// The known keys of `text`, overridden by `sets`, and what was wrong so far.
pub(crate) fn known_keys<'a>(text: &'a str, sets: &'a [String]) -> (GivenKeys<'a>, Vec<Problem>) {
    let (document, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        let mut problems: Vec<Problem> = errors.iter().take(MOST_PROBLEMS).map(syntax_problem).collect();
        // A pattern has many of them, and one hint is enough.
        if let Some(first) = problems.iter_mut().find(|problem| is_in_an_escape(problem, text)) {
            first.hints.push("in double quotes a backslash begins an escape: use single quotes".to_owned());
        }
        return (None, problems);
    }
    let mut given = BTreeMap::new();
    let mut problems = Vec::new();
    for (name, value) in document.get_ref() {
        let location = Location::Span(name.span());
        if keys::find("", name.get_ref()).is_none() && TABLES.contains(&name.get_ref().as_ref()) {
            match value.get_ref() {
                DeValue::Table(table) => take_table(name.get_ref(), table, &mut given, &mut problems),
                other => problems.push(not_a_table(name.get_ref(), other, value.span())),
            }
        } else if value.get_ref().is_table() && keys::find("", name.get_ref()).is_none() {
            problems.push(unknown_table(name.get_ref(), location));
        } else {
            take_key("", name.get_ref(), location, value.get_ref().clone(), value.span(), &mut given, &mut problems);
        }
        if problems.len() >= MOST_PROBLEMS {
            break;
        }
    }
    for text in sets {
        if let Err(problem) = set::apply(text, &mut given) {
            problems.push(problem);
        }
    }
    (Some(given), problems)
}

fn take_table<'a>(
    table: &str,
    entries: &DeTable<'a>,
    given: &mut BTreeMap<&'static str, Given<'a>>,
    problems: &mut Vec<Problem>,
) {
    for (name, value) in entries {
        let location = Location::Span(name.span());
        take_key(table, name.get_ref(), location, value.get_ref().clone(), value.span(), given, problems);
        if problems.len() >= MOST_PROBLEMS {
            break;
        }
    }
}

fn take_key<'a>(
    table: &str,
    name: &str,
    key_location: Location,
    value: DeValue<'a>,
    span: Range<usize>,
    given: &mut BTreeMap<&'static str, Given<'a>>,
    problems: &mut Vec<Problem>,
) {
    match keys::find(table, name) {
        Some(key) => {
            given.insert(key.path, Given { value, location: Location::Span(span) });
        }
        None => problems.push(unknown_key(table, name, key_location)),
    }
}

pub(crate) fn unknown_key(table: &str, name: &str, location: Location) -> Problem {
    let shown = hint::shown(name);
    let message = match table {
        "" => format!("unknown key `{shown}` at the top of the recipe"),
        _ => format!("unknown key `{shown}` in [{table}]"),
    };
    Problem { message, location, hints: hint::unknown_key(table, name) }
}

pub(crate) fn unknown_table(name: &str, location: Location) -> Problem {
    Problem { message: format!("unknown table [{}]", hint::shown(name)), location, hints: hint::unknown_table(name) }
}

fn not_a_table(table: &str, found: &DeValue<'_>, span: Range<usize>) -> Problem {
    let message = format!("expected a table [{table}], found {}", hint::type_of(found));
    let problem = Problem::new(Location::Span(span), message);
    match (table, found.is_str()) {
        ("model", true) => problem.hint("write it as `path` in [model]"),
        ("data", true) => problem.hint("write it as `train` in [data]"),
        _ => problem.hint(format!("start a line with [{table}] and write its keys below it")),
    }
}

fn syntax_problem(error: &toml::de::Error) -> Problem {
    let message = error.message().split('\n').collect::<Vec<_>>().join("; ");
    let location = error.span().map_or(Location::File, Location::Span);
    Problem::new(location, format!("not TOML: {message}"))
}

/// Whether the text stops to be TOML behind a backslash in double quotes: `"\."`, `"C:\Users"`.
fn is_in_an_escape(problem: &Problem, text: &str) -> bool {
    let Location::Span(span) = &problem.location else { return false };
    let before = text.get(..span.start).unwrap_or_default();
    before.trim_end_matches(|letter: char| letter.is_ascii_hexdigit() || "uUx".contains(letter)).ends_with('\\')
}
