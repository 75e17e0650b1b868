//! The recipe as it comes about: its lines, each with its origin, and what has no line.

use std::fmt::Write;
use std::ops::Range;
use std::path::Path;

use finetune_recipe::keys::{self, KEYS};
use finetune_recipe::{Location, Recipe, RecipeError};

use crate::source::{Given, Source};
use crate::text::{comment, counted, number, quoted};
use crate::{ImportError, Tool};

/// Columns of the recipe.
const WIDTH: usize = 100;

/// A recipe that came out.
#[derive(Clone, Debug)]
pub struct Imported {
    /// Whose configuration it was.
    pub tool: Tool,
    /// The text of the recipe, which `finetune_recipe` reads.
    pub recipe: String,
    /// How many keys of which kind.
    pub counts: Counts,
}

/// What became of the keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Keys with the same value under our name.
    pub carried: usize,
    /// Keys whose value was converted.
    pub other: usize,
    /// Keys that are written because the tool's default differs from ours.
    pub defaults: usize,
    /// Keys that could not be carried over, or have to be filled in.
    pub left: usize,
    /// Keys that change nothing here.
    pub idle: usize,
}

/// Where the value of a line is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Carried,
    Other,
    Theirs,
    FillIn,
}

impl Origin {
    fn label(self) -> &'static str {
        match self {
            Origin::Carried => "carried over",
            Origin::Other => "other meaning",
            Origin::Theirs => "their default",
            Origin::FillIn => "fill in",
        }
    }
}

#[derive(Clone, Debug)]
struct Line {
    /// "lora.rank".
    key: &'static str,
    /// As TOML.
    value: String,
    origin: Origin,
    note: String,
}

/// A recipe that is not finished.
#[derive(Debug, Default)]
pub(crate) struct Draft {
    lines: Vec<Line>,
    left: Vec<String>,
    idle: Vec<String>,
    unset: Vec<String>,
}

impl Draft {
    fn set(&mut self, key: &'static str, value: String, origin: Origin, note: String) {
        self.lines.retain(|line| line.key != key);
        self.lines.push(Line { key, value, origin, note });
    }

    /// Whether a line for this key of ours is there.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.lines.iter().any(|line| line.key == key)
    }

    /// The same value under our name.
    pub(crate) fn carry(&mut self, key: &'static str, value: impl Into<String>, given: &Given<'_>) {
        self.set(key, value.into(), Origin::Carried, given.place());
    }

    /// A value that had to be converted.
    pub(crate) fn other(&mut self, key: &'static str, value: impl Into<String>, given: &[&Given<'_>], why: &str) {
        let names: Vec<String> = given.iter().map(|given| given.named()).collect();
        self.set(key, value.into(), Origin::Other, format!("{}: {why}", names.join(", ")));
    }

    /// The other tool's default, which differs from ours.
    pub(crate) fn theirs(&mut self, key: &'static str, value: impl Into<String>, why: &str) {
        self.set(key, value.into(), Origin::Theirs, why.to_owned());
    }

    /// A value that only the user knows, with one that stands for it.
    pub(crate) fn fill_in(&mut self, key: &'static str, value: impl Into<String>, why: &str) {
        self.set(key, value.into(), Origin::FillIn, why.to_owned());
    }

    /// A key without a counterpart.
    pub(crate) fn left(&mut self, given: &Given<'_>, why: &str) {
        self.left.push(format!("{}: {why}", given.named()));
    }

    /// Something that a default of the other tool means, and that has no counterpart.
    pub(crate) fn left_out(&mut self, what: &str) {
        self.left.push(what.to_owned());
    }

    /// A key that changes nothing here.
    pub(crate) fn idle(&mut self, given: &Given<'_>, why: &str) {
        self.idle.push(format!("{}: {why}", given.named()));
    }

    /// A key that says nothing: it is empty or off.
    pub(crate) fn unset(&mut self, given: &Given<'_>) {
        self.unset.push(given.place());
    }

    /// Carries a number over. False if the key is not given.
    pub(crate) fn number(&mut self, source: &Source<'_>, theirs: &str, ours: &'static str) -> bool {
        let Some(given) = source.get(theirs) else { return false };
        match (given.node.number(), given.node.text()) {
            (Some(value), Some(written)) => self.carry(ours, number(value, written), &given),
            _ => self.left(&given, "not understood: a number is meant"),
        }
        true
    }

    /// Carries a whole number over. False if the key is not given.
    pub(crate) fn integer(&mut self, source: &Source<'_>, theirs: &str, ours: &'static str) -> bool {
        let Some(given) = source.get(theirs) else { return false };
        match given.node.integer() {
            Some(value) => self.carry(ours, value.to_string(), &given),
            None => self.left(&given, "not understood: a whole number is meant"),
        }
        true
    }

    /// Carries a yes or no over. False if the key is not given.
    pub(crate) fn switch(&mut self, source: &Source<'_>, theirs: &str, ours: &'static str) -> bool {
        let Some(given) = source.get(theirs) else { return false };
        match given.node.bool() {
            Some(value) => self.carry(ours, value.to_string(), &given),
            None => self.left(&given, "not understood: true or false is meant"),
        }
        true
    }

    /// The finished recipe. Lines that our own reader refuses become what could not be carried over.
    ///
    /// # Errors
    ///
    /// The recipe is refused for another reason, which is a fault of this crate.
    pub(crate) fn finish(mut self, tool: Tool, file: &Path) -> Result<Imported, ImportError> {
        self.require();
        let place = file.with_extension("toml");
        for _ in 0..=self.lines.len() {
            let (recipe, spans) = self.render(tool, file);
            let problems = match Recipe::parse(&recipe, &place, &[], None) {
                Ok(_) => return Ok(Imported { tool, counts: self.counts(), recipe }),
                Err(RecipeError::Problems(problems)) => problems.problems,
                Err(error) => return Err(refused(file, &error.to_string())),
            };
            let mut refusals = Vec::new();
            for problem in &problems {
                let Location::Span(span) = &problem.location else { continue };
                let found = spans.iter().find(|(_, lines)| lines.contains(&span.start));
                refusals.extend(found.map(|(key, _)| (*key, problem.message.clone())));
            }
            if refusals.is_empty() {
                let texts: Vec<String> = problems.iter().map(|problem| problem.message.clone()).collect();
                return Err(refused(file, &texts.join("; ")));
            }
            self.demote(&refusals);
        }
        Err(refused(file, "no end of problems"))
    }

    /// Every recipe needs these.
    fn require(&mut self) {
        if !self.has("model.path") {
            self.fill_in("model.path", quoted("Qwen/Qwen3-0.6B"), "the file names no model");
        }
        if !self.has("data.train") {
            self.fill_in("data.train", quoted("data/train.jsonl"), "the file names no rows");
        }
    }

    /// Takes lines away that our reader refuses, with its reason.
    fn demote(&mut self, refusals: &[(&'static str, String)]) {
        for (key, why) in refusals {
            let Some(at) = self.lines.iter().position(|line| line.key == *key) else { continue };
            let line = self.lines.remove(at);
            self.left.push(format!("{} = {} ({}): {why}", key, line.value, line.note));
        }
        self.require();
    }

    fn counts(&self) -> Counts {
        let of = |origin: Origin| self.lines.iter().filter(|line| line.origin == origin && is_known(line.key)).count();
        let later = self.lines.iter().filter(|line| !is_known(line.key)).count();
        Counts {
            carried: of(Origin::Carried),
            other: of(Origin::Other),
            defaults: of(Origin::Theirs),
            left: of(Origin::FillIn) + later + self.left.len(),
            idle: self.idle.len() + self.unset.len(),
        }
    }

    /// The text, and which of its bytes belong to which key.
    fn render(&self, tool: Tool, file: &Path) -> (String, Vec<(&'static str, Range<usize>)>) {
        let mut text = head(tool, file);
        let mut spans = Vec::new();
        for table in [""].iter().chain(keys::TABLES) {
            let mut lines: Vec<&Line> = self.lines.iter().filter(|line| table_of(line.key) == *table).collect();
            // In the order of the documentation; keys of versions to come last.
            lines.sort_by_key(|line| KEYS.iter().position(|key| key.path == line.key).unwrap_or(KEYS.len()));
            if lines.is_empty() {
                continue;
            }
            text += &if table.is_empty() { "\n".to_owned() } else { format!("\n[{table}]\n") };
            for line in lines {
                let start = text.len();
                text += &line.render();
                spans.push((line.key, start..text.len()));
            }
        }
        for (title, entries) in [("could not be carried over", &self.left), ("not needed here", &self.idle)] {
            if !entries.is_empty() {
                text.push('\n');
                entries.iter().for_each(|entry| text += &comment(&format!("{title}: {entry}"), WIDTH));
            }
        }
        if !self.unset.is_empty() {
            text += &format!("\n{}", comment(&format!("empty or off there: {}", self.unset.join(", ")), WIDTH));
        }
        (text, spans)
    }
}

impl Line {
    fn render(&self) -> String {
        let name = self.key.split_once('.').map_or(self.key, |(_, name)| name);
        let assignment = format!("{name} = {}", self.value);
        if !is_known(self.key) {
            return comment(&format!("not yet: {assignment}: {}", self.note), WIDTH);
        }
        let words = crate::text::line(&format!("{}: {}", self.origin.label(), self.note));
        let short = format!("{assignment}  # {words}");
        if short.chars().count() <= WIDTH {
            return format!("{short}\n");
        }
        format!("{}{assignment}\n", comment(&words, WIDTH))
    }
}

fn refused(file: &Path, problem: &str) -> ImportError {
    ImportError::Refused { file: file.to_owned(), problem: problem.to_owned() }
}

fn table_of(key: &str) -> &str {
    key.split_once('.').map_or("", |(table, _)| table)
}

/// Whether this version has the key. Others are written as comments.
pub(crate) fn is_known(key: &str) -> bool {
    KEYS.iter().any(|ours| ours.path == key)
}

fn head(tool: Tool, file: &Path) -> String {
    let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy();
    let name = crate::text::short(&name, 60);
    let title = format!("A recipe of finetune, made by `finetune import` from {name}, a configuration of {tool}.");
    let mut text = comment(&title, WIDTH);
    let _ = write!(
        text,
        "#\n\
         # What stands behind or above a key says where its value is from:\n\
         #   carried over    the same value, under our name\n\
         #   other meaning   converted, because the key counts something else here\n\
         #   their default   not in the file, and our default is another\n\
         #   fill in         only you know it: what stands there is a guess\n\
         # The end lists what could not be carried over. Paths are relative to this file.\n"
    );
    text
}

impl Counts {
    /// One line for people.
    pub fn words(&self) -> String {
        let left = match self.left {
            0 => "nothing left out".to_owned(),
            left => format!("{} left out or to fill in", counted(left, "key")),
        };
        format!(
            "{} carried over, {} with another meaning, {} written out, {left}, {} not needed",
            counted(self.carried, "key"),
            self.other,
            counted(self.defaults, "default"),
            self.idle
        )
    }
}
