//! Every `finetune …` that the pages and recipes show is parsed as the program would parse it.

use std::path::{Path, PathBuf};

use clap::Parser as _;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use finetune_recipe::keys::KEYS;

use super::{Cli, Command};

/// Folders whose pages and recipes are read, from the top of the repository.
const FOLDERS: [&str; 9] = [
    "",
    "datasets/examples",
    "docs",
    "fuzz",
    "packaging",
    "recipes",
    "recipes/engines",
    "recipes/models",
    "recipes/packed",
];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A command line of a page.
#[derive(Debug, PartialEq)]
struct Line {
    /// Counted from 1.
    number: usize,
    /// From the word `finetune` on.
    text: String,
    /// In a fence, to be pasted. Otherwise between words, where arguments may be left out.
    whole: bool,
}

/// The command lines of a page: those of its fences, and those between backticks.
fn lines_of_page(page: &str) -> Vec<Line> {
    let mut found = Vec::new();
    let mut fenced = false;
    let mut lines = page.lines().enumerate();
    while let Some((at, line)) = lines.next() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if fenced {
            let mut text = line.trim().to_owned();
            while text.ends_with('\\') {
                text.pop();
                text += lines.next().map_or("", |(_, next)| next.trim());
            }
            found.extend(command(&text).map(|text| Line { number: at + 1, text, whole: true }));
        } else {
            let spans = line.split('`').skip(1).step_by(2).filter(|span| span.starts_with("finetune "));
            found.extend(spans.map(|span| Line { number: at + 1, text: span.to_owned(), whole: false }));
        }
    }
    found
}

/// The command lines of a recipe's comments, each alone on its line.
fn lines_of_recipe(recipe: &str) -> Vec<Line> {
    let comments = recipe.lines().enumerate().filter_map(|(at, line)| Some((at + 1, line.strip_prefix('#')?.trim())));
    comments.filter_map(|(number, line)| Some(Line { number, text: command(line)?, whole: true })).collect()
}

/// What follows a prompt, variables and `cargo run`, from the word `finetune` on.
fn command(line: &str) -> Option<String> {
    let mut rest = line.strip_prefix("$ ").unwrap_or(line).trim_start();
    while let Some((word, after)) = rest.split_once(' ') {
        let is_variable = word.split_once('=').is_some_and(|(name, _)| {
            !name.is_empty() && name.chars().all(|letter| letter.is_ascii_uppercase() || letter == '_')
        });
        if !is_variable {
            break;
        }
        rest = after.trim_start();
    }
    if let Some(arguments) = rest.strip_prefix("cargo run --release -- ") {
        return Some(format!("finetune {arguments}"));
    }
    rest.starts_with("finetune ").then(|| rest.to_owned())
}

/// The words of a command line, as a shell splits them. A comment, a pipe, a redirection or another
/// command ends it.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        match letter {
            ' ' => words.extend(word.take()),
            '#' if word.is_none() => break,
            '|' | '<' | '>' | '&' | ';' => break,
            '\'' | '"' => word.get_or_insert_default().extend(letters.by_ref().take_while(|&next| next != letter)),
            '\\' => word.get_or_insert_default().extend(letters.next()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    words
}

/// Why the program would refuse these words, if it would.
fn refused(words: &[String], whole: bool) -> Option<String> {
    let error = match Cli::try_parse_from(words) {
        // The arguments of the ranks are not parsed with those of the launcher.
        Ok(Cli { command: Command::Launch(launch), .. }) => {
            let is_command = launch.run.first().is_some_and(|word| ["generate", "serve"].contains(&word.as_str()));
            let program = if is_command { &["finetune"][..] } else { &["finetune", "run"] };
            let ranks: Vec<String> = program.iter().map(|word| (*word).to_owned()).chain(launch.run).collect();
            return refused(&ranks, whole);
        }
        Ok(_) => return None,
        Err(error) => error,
    };
    let value = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.as_str(),
        _ => "",
    };
    let is_placeholder = |text: &str| !text.is_empty() && text.chars().all(|letter| letter.is_ascii_uppercase());
    let fine = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => true,
        ErrorKind::MissingRequiredArgument | ErrorKind::MissingSubcommand => !whole,
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => !whole,
        ErrorKind::ValueValidation | ErrorKind::InvalidValue => is_placeholder(value(ContextKind::InvalidValue)),
        _ => false,
    };
    (!fine).then(|| error.to_string().lines().next().unwrap_or_default().to_owned())
}

/// What is wrong with a command line: its arguments, a key that it sets, a file that is not there.
fn problem(line: &Line) -> Option<String> {
    let words = words(&line.text);
    let set = words.windows(2).filter(|pair| pair[0] == "--set").map(|pair| pair[1].split('=').next());
    let mut unknown = set.flatten().filter(|path| !KEYS.iter().any(|key| key.path == *path));
    let ours = |word: &&String| ["recipes/", "datasets/"].iter().any(|folder| word.starts_with(folder));
    let mut missing = words.iter().filter(ours).filter(|word| !repository().join(word).exists());
    refused(&words, line.whole)
        .or_else(|| unknown.next().map(|key| format!("no key {key}")))
        .or_else(|| missing.next().map(|file| format!("no file {file}")))
}

#[test]
fn every_command_of_pages_and_recipes_parses() {
    let (mut found, mut problems) = (0, Vec::new());
    for folder in FOLDERS {
        let Ok(entries) = std::fs::read_dir(repository().join(folder)) else { continue };
        for path in entries.map(|entry| entry.expect("an entry").path()) {
            let text = || std::fs::read_to_string(&path).expect("a text");
            let lines = match path.extension().and_then(|extension| extension.to_str()) {
                Some("md") => lines_of_page(&text()),
                Some("toml") => lines_of_recipe(&text()),
                _ => continue,
            };
            found += lines.len();
            let name = path.strip_prefix(repository()).expect("in the repository").display();
            problems.extend(lines.iter().filter_map(|line| {
                problem(line).map(|problem| format!("{name}:{}: {problem}\n    {}", line.number, line.text))
            }));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert!(found > 100, "only {found} command lines were found");
}

#[test]
fn command_lines_of_a_page() {
    let page = "Type `finetune run` or `cargo`.\n```\n$ finetune validate r.toml  # all\nHF_TOKEN=x finetune \\\n  schema\n\
                it ran finetune run\ncargo run --release -- devices\n```\n`finetune man`\n";
    let line = |number, text: &str, whole| Line { number, text: text.to_owned(), whole };
    assert_eq!(
        lines_of_page(page),
        [
            line(1, "finetune run", false),
            line(3, "finetune validate r.toml  # all", true),
            line(4, "finetune schema", true),
            line(7, "finetune devices", true),
            line(9, "finetune man", false),
        ]
    );
    assert_eq!(
        lines_of_recipe("#:schema x\n#  finetune devices\nseed = 1 # finetune x\n"),
        [line(2, "finetune devices", true)]
    );
}

/// (command line, whole, part of what is wrong with it)
#[test]
fn what_is_wrong_with_a_command_line() {
    for (text, whole, wrong) in [
        ("finetune run recipe.toml --resume", true, None),
        ("finetune generate RUN --prompt 'Hi there' --system \"Be brief.\" | less", true, None),
        ("finetune inspect recipe.toml --row N", true, None),
        ("finetune --version", true, None),
        ("finetune run", false, None),
        ("finetune run", true, Some("required")),
        ("finetune run recipe.toml --resmue", false, Some("unexpected argument")),
        ("finetune tarin recipe.toml", false, Some("unrecognized subcommand")),
        ("finetune inspect recipe.toml --row first", true, Some("invalid value")),
        ("finetune launch -n 2 -- recipe.toml --resume", true, None),
        ("finetune launch -n 2 recipe.toml two ranks", true, Some("unexpected argument")),
        ("finetune run recipe.toml --set lora.rank=8", true, None),
        ("finetune run recipe.toml --set lora.rnak=8", true, Some("no key lora.rnak")),
        ("finetune run recipes/quickstart.toml", true, None),
        ("finetune run recipes/slowstart.toml", true, Some("no file")),
    ] {
        let found = problem(&Line { number: 1, text: text.to_owned(), whole });
        assert_eq!(found.is_some(), wrong.is_some(), "{text}: {found:?}");
        assert!(wrong.is_none_or(|part| found.as_ref().is_some_and(|found| found.contains(part))), "{text}: {found:?}");
    }
}
