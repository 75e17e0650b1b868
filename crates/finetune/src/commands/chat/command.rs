//! What a line of the conversation means: a message, or a command.

use std::fmt::Write;
use std::path::PathBuf;

use super::input::{Entered, without_quotes};
use crate::failure::Failure;

#[derive(Debug, PartialEq)]
pub(super) enum Said {
    Nothing,
    Message(String),
    Command(Command),
}

#[derive(Debug, PartialEq)]
pub(super) enum Command {
    Help,
    /// The system prompt; `None` shows it, an empty one takes it away.
    System(Option<String>),
    Reset,
    Undo,
    Retry,
    /// `None` shows all.
    Set(Option<Setting>),
    Save(PathBuf),
    Load(PathBuf),
    Stats,
    Exit,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Setting {
    Temperature(f64),
    TopP(f64),
    MaxNewTokens(usize),
    Seed(u64),
}

/// A command as a person types it.
struct Entry {
    /// The first is the one that help shows.
    names: &'static [&'static str],
    /// What follows the name.
    argument: &'static str,
    about: &'static str,
}

const fn entry(names: &'static [&'static str], argument: &'static str, about: &'static str) -> Entry {
    Entry { names, argument, about }
}

const COMMANDS: [Entry; 10] = [
    entry(&["system"], "[TEXT]", "begins anew with this system prompt (\"\" for none); alone it shows it"),
    entry(&["reset", "clear", "new"], "", "begins anew, with the same system prompt"),
    entry(&["undo"], "", "takes the last question and its answer back"),
    entry(&["retry", "regenerate"], "", "answers the last question again, with the next seed"),
    entry(&["set"], "[NAME VALUE]", "temperature, top_p, max_new_tokens or seed; alone it shows them"),
    entry(&["save"], "FILE.jsonl", "adds the conversation to a file of training rows"),
    entry(&["load"], "FILE", "goes on with a conversation, of rows with the last one"),
    entry(&["stats", "info"], "", "speed, and how much of the context is used"),
    entry(&["help", "?"], "", "shows this"),
    entry(&["exit", "quit", "bye", "q"], "", "leaves, as Ctrl-D does"),
];

/// Names of settings with other programs' names for them. The first is ours.
const SETTINGS: [&[&str]; 4] = [
    &["temperature", "temp"],
    &["top_p", "topp"],
    &["max_new_tokens", "max_tokens", "num_predict", "n_predict"],
    &["seed"],
];

/// The most letters that a mistyped word may be away from a known one.
const SLIPS: usize = 2;

/// What was entered.
pub(super) fn read(entered: Entered) -> Result<Said, Failure> {
    let line = match entered {
        Entered::Block(text) => return Ok(if text.is_empty() { Said::Nothing } else { Said::Message(text) }),
        Entered::Line(line) => line,
    };
    if line.trim().is_empty() {
        return Ok(Said::Nothing);
    }
    let Some(rest) = line.strip_prefix('/') else { return Ok(Said::Message(line)) };
    if rest.starts_with('/') {
        return Ok(Said::Message(rest.to_owned()));
    }
    let (word, argument) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let lower = word.to_lowercase();
    match COMMANDS.iter().find(|entry| entry.names.contains(&lower.as_str())) {
        Some(entry) => command(entry, argument.trim()).map(Said::Command),
        // A path, or a pasted text of several lines, is no mistyped command.
        None if word.contains('/') || line.contains('\n') => Ok(Said::Message(line)),
        None => {
            let names = COMMANDS.iter().flat_map(|entry| entry.names);
            let list = "/help lists them; // sends a message that begins with a slash".to_owned();
            Err(unknown(format!("there is no command /{word}"), &lower, "/", names, list))
        }
    }
}

fn command(entry: &Entry, argument: &str) -> Result<Command, Failure> {
    let name = entry.names[0];
    let usage = || format!("write /{name} {}", entry.argument);
    match (entry.argument, argument.is_empty()) {
        ("", false) => return Err(Failure::arguments(format!("/{name} takes nothing"), format!("write /{name}"))),
        ("FILE.jsonl" | "FILE", true) => return Err(Failure::arguments(format!("/{name} needs a file"), usage())),
        _ => {}
    }
    Ok(match name {
        "system" => Command::System((!argument.is_empty()).then(|| match argument {
            "\"\"" | "''" => String::new(),
            text => without_quotes(text).to_owned(),
        })),
        "reset" => Command::Reset,
        "undo" => Command::Undo,
        "retry" => Command::Retry,
        "set" => Command::Set(if argument.is_empty() { None } else { Some(setting(argument)?) }),
        "save" => Command::Save(path(argument)),
        "load" => Command::Load(path(argument)),
        "stats" => Command::Stats,
        "exit" => Command::Exit,
        _ => Command::Help,
    })
}

/// A path as typed, of which no shell has replaced the beginning.
fn path(text: &str) -> PathBuf {
    match (text.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
        // Elsewhere `-` is standard input.
        _ if text == "-" => PathBuf::from("./-"),
        _ => PathBuf::from(text),
    }
}

/// `NAME VALUE` or `NAME=VALUE`.
fn setting(text: &str) -> Result<Setting, Failure> {
    // As ollama has it.
    let text = text.strip_prefix("parameter ").unwrap_or(text).trim();
    let (name, value) = text.split_once(|letter: char| letter.is_whitespace() || letter == '=').unwrap_or((text, ""));
    let value = value.trim_matches(|letter: char| letter.is_whitespace() || letter == '=');
    let lower = name.trim_start_matches('-').to_lowercase().replace('-', "_");
    let Some(known) = SETTINGS.iter().find(|names| names.contains(&lower.as_str())).map(|names| names[0]) else {
        let ours: Vec<&str> = SETTINGS.iter().map(|names| names[0]).collect();
        let list = format!("there are {}", ours.join(", "));
        let names = SETTINGS.iter().flat_map(|names| *names);
        return Err(unknown(format!("there is no setting {name}"), &lower, "", names, list));
    };
    let wrong = |wanted: &str| {
        Failure::arguments(
            format!("{known} must be {wanted}, not {value:?}"),
            format!("write /set {known} {}", example(known)),
        )
    };
    let number = || value.parse::<f64>().ok().filter(|number| number.is_finite());
    Ok(match known {
        "temperature" => {
            Setting::Temperature(number().filter(|t| *t >= 0.0).ok_or_else(|| wrong("a number, 0 or more"))?)
        }
        "top_p" => {
            let fits = |p: &f64| *p > 0.0 && *p <= 1.0;
            Setting::TopP(number().filter(fits).ok_or_else(|| wrong("a number above 0 and at most 1"))?)
        }
        "seed" => Setting::Seed(value.parse().map_err(|_| wrong("a whole number, 0 or more"))?),
        _ => {
            let count = value.parse().ok().filter(|count: &usize| *count > 0);
            Setting::MaxNewTokens(count.ok_or_else(|| wrong("a whole number, 1 or more"))?)
        }
    })
}

fn example(name: &str) -> &'static str {
    match name {
        "temperature" => "0.7",
        "top_p" => "0.9",
        "seed" => "1",
        _ => "1024",
    }
}

/// The error for a word that is none of `names`, with the nearest of them behind `sign`.
fn unknown<'a>(
    what: String,
    word: &str,
    sign: &str,
    names: impl Iterator<Item = &'a &'static str>,
    list: String,
) -> Failure {
    let near = names.map(|name| (strsim::damerau_levenshtein(word, name), *name)).min();
    let near = near.filter(|(slips, _)| *slips <= SLIPS && *slips < word.chars().count());
    let hint = near.map(|(_, name)| format!("did you mean {sign}{name}?"));
    Failure::bad_input(what, hint.into_iter().chain([list]).collect())
}

/// The names of commands that begin so, with their slash.
pub(super) fn completions(line: &str) -> Vec<String> {
    let Some(begun) = line.strip_prefix('/').filter(|begun| !begun.contains(char::is_whitespace)) else {
        return Vec::new();
    };
    let names = COMMANDS.iter().map(|entry| entry.names[0]).filter(|name| name.starts_with(begun));
    names.map(|name| format!("/{name}")).collect()
}

/// The page of /help.
pub(super) fn help() -> String {
    let mut page = String::new();
    for Entry { names, argument, about } in &COMMANDS {
        let _ = writeln!(page, "  {:<22}{about}", format!("/{} {argument}", names[0]));
    }
    page + "\nEnter sends a message. A line that ends with \\ goes on in the next one; \"\"\" before and behind a\n\
            text lets it have any lines; a pasted text keeps its own. // sends a slash at the beginning.\n\
            Ctrl-C stops an answer, Ctrl-D leaves, the arrow keys bring earlier messages back."
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Result<Said, Failure> {
        read(Entered::Line(text.to_owned()))
    }

    #[test]
    fn lines_and_what_they_mean() {
        let message = |text: &str| Said::Message(text.to_owned());
        for (text, want) in [
            ("", Said::Nothing),
            ("  ", Said::Nothing),
            ("Hi / there", message("Hi / there")),
            (" /help", message(" /help")),
            ("//help", message("/help")),
            ("/etc/hosts is what?", message("/etc/hosts is what?")),
            ("/usr: error\nin line 2", message("/usr: error\nin line 2")),
            ("/help", Said::Command(Command::Help)),
            ("/?", Said::Command(Command::Help)),
            ("/HELP", Said::Command(Command::Help)),
            ("/system", Said::Command(Command::System(None))),
            ("/system You are  brief.", Said::Command(Command::System(Some("You are  brief.".to_owned())))),
            ("/system \"\"\"\na\nb\n\"\"\"", Said::Command(Command::System(Some("a\nb".to_owned())))),
            ("/system \"\"", Said::Command(Command::System(Some(String::new())))),
            ("/reset", Said::Command(Command::Reset)),
            ("/clear ", Said::Command(Command::Reset)),
            ("/undo", Said::Command(Command::Undo)),
            ("/retry", Said::Command(Command::Retry)),
            ("/save a b.jsonl", Said::Command(Command::Save(PathBuf::from("a b.jsonl")))),
            ("/load c.json", Said::Command(Command::Load(PathBuf::from("c.json")))),
            ("/stats", Said::Command(Command::Stats)),
            ("/quit", Said::Command(Command::Exit)),
            ("/set", Said::Command(Command::Set(None))),
            ("/set temperature 0.7", Said::Command(Command::Set(Some(Setting::Temperature(0.7))))),
            ("/set temp=0", Said::Command(Command::Set(Some(Setting::Temperature(0.0))))),
            ("/set parameter top-p = 0.9", Said::Command(Command::Set(Some(Setting::TopP(0.9))))),
            ("/set max_tokens 5", Said::Command(Command::Set(Some(Setting::MaxNewTokens(5))))),
            ("/set seed 18446744073709551615", Said::Command(Command::Set(Some(Setting::Seed(u64::MAX))))),
        ] {
            assert_eq!(line(text).unwrap_or_else(|failure| panic!("{text}: {}", failure.lines())), want, "{text}");
        }
        assert_eq!(read(Entered::Block("/help".to_owned())).expect("a message"), message("/help"));
    }

    #[test]
    fn what_is_wrong_is_said_with_what_to_write() {
        for (text, says) in [
            ("/rest", "did you mean /reset?"),
            ("/sytem x", "did you mean /system?"),
            ("/frobnicate", "/help lists them"),
            ("/", "// sends a message"),
            ("/undo 2", "/undo takes nothing"),
            ("/save", "write /save FILE.jsonl"),
            ("/load", "write /load FILE"),
            ("/set tempreature 1", "did you mean temperature?"),
            ("/set top_k 40", "there are temperature, top_p, max_new_tokens, seed"),
            ("/set temperature", "write /set temperature 0.7"),
            ("/set temperature hot", "not \"hot\""),
            ("/set temperature -1", "0 or more"),
            ("/set temperature nan", "0 or more"),
            ("/set top_p 0", "above 0"),
            ("/set max_new_tokens 0", "1 or more"),
            ("/set seed -1", "0 or more"),
        ] {
            match line(text) {
                Err(failure) => assert!(failure.lines().contains(says), "{text}: {}", failure.lines()),
                Ok(said) => panic!("{text}: {said:?}"),
            }
        }
    }

    #[test]
    fn help_has_every_command_and_tab_completes_them() {
        let page = help();
        for entry in &COMMANDS {
            assert!(page.contains(&format!("/{} ", entry.names[0])), "{}", entry.names[0]);
        }
        assert!(page.lines().all(|line| line.chars().count() <= 100), "{page}");
        assert_eq!(completions("/s"), ["/system", "/set", "/save", "/stats"]);
        assert_eq!(completions("/un"), ["/undo"]);
        for none in ["", "s", "/system x", "/x"] {
            assert!(completions(none).is_empty(), "{none}");
        }
    }

    /// No two commands have the same name.
    #[test]
    fn names_are_unique() {
        let mut names: Vec<&str> = COMMANDS.iter().flat_map(|entry| entry.names).copied().collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
