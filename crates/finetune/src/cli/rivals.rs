//! What other programs call a command or an option, and what it is called here. For recipe keys,
//! the recipe has a table of its own.

use std::ffi::OsString;
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser};
use finetune_recipe::keys::{ELSEWHERE, KEYS, Key};
use finetune_store::{Holding, recognize};

use super::Cli;
use crate::exit::Exit;
use crate::failure::Failure;

/// Commands of other programs, of habit, and of versions to come: what does it here.
const VERBS: [(&str, &str); 47] = [
    ("train", "`finetune run RECIPE.toml` trains"),
    ("finetune", "`finetune run RECIPE.toml` trains"),
    ("fine-tune", "`finetune run RECIPE.toml` trains"),
    ("sft", "`finetune run RECIPE.toml` trains"),
    ("lora", "`finetune run RECIPE.toml` trains"),
    ("start", "`finetune run RECIPE.toml` trains"),
    ("tune", "`finetune run RECIPE.toml` trains"),
    ("resume", "`finetune run RECIPE.toml --resume` goes on"),
    ("continue", "`finetune run RECIPE.toml --resume` goes on"),
    ("fuse", "`finetune export RUN --format merged --output DIR` merges the adapter into its base"),
    ("merge", "`finetune export RUN --format merged --output DIR` merges the adapter into its base"),
    ("merge-lora", "`finetune export RUN --format merged --output DIR` merges the adapter into its base"),
    ("merge_lora", "`finetune export RUN --format merged --output DIR` merges the adapter into its base"),
    (
        "convert",
        "`finetune export RUN --format gguf --output DIR` writes a GGUF file, `--format mlx` an adapter of mlx-lm",
    ),
    ("save", "`finetune export RUN --format merged --output DIR` writes the result in another form"),
    ("talk", "`finetune chat RUN` is a conversation in the terminal"),
    ("infer", "`finetune generate RUN --prompt TEXT` answers"),
    ("inference", "`finetune generate RUN --prompt TEXT` answers"),
    ("predict", "`finetune generate RUN --data FILE` answers the rows of a file"),
    ("complete", "`finetune generate RUN --raw --prompt TEXT` continues a text"),
    (
        "completion",
        "`finetune completions SHELL` prints those of a shell; `finetune generate RUN --raw --prompt TEXT` continues a text",
    ),
    ("ask", "`finetune generate RUN --prompt TEXT` answers"),
    ("test", "`finetune eval RUN --data FILE` measures the loss on a file"),
    ("evaluate", "`finetune eval RUN --data FILE` measures the loss on a file"),
    ("perplexity", "`finetune eval RUN --data FILE` measures the loss and the perplexity on a file"),
    ("ppl", "`finetune eval RUN --data FILE` measures the loss and the perplexity on a file"),
    ("check", "`finetune validate RECIPE.toml` finds what can go wrong"),
    ("lint", "`finetune validate RECIPE.toml` finds what can go wrong"),
    ("preprocess", "`finetune validate RECIPE.toml` reads every row; nothing has to be prepared"),
    ("tokenize", "`finetune inspect RECIPE.toml --row N` shows the tokens of a row"),
    ("gpus", "`finetune devices` lists them"),
    ("device", "`finetune devices` lists them"),
    ("doctor", "`finetune cluster doctor` looks for what goes wrong between machines"),
    ("bench", "`finetune cluster bench -n N` measures the collectives"),
    ("discover", "`finetune cluster discover` finds hosts and cables"),
    ("setup", "`finetune cluster setup` gives cables their addresses"),
    ("version", "`finetune --version` prints it"),
    ("server", "`finetune serve RUN` answers requests of OpenAI's interface"),
    ("api", "`finetune serve RUN` answers requests of OpenAI's interface"),
    ("pull", "`finetune download OWNER/NAME` fetches a model or a dataset"),
    ("fetch", "`finetune download OWNER/NAME` fetches a model or a dataset"),
    ("push", "`finetune upload RUN OWNER/NAME` does it"),
    ("quant", "`finetune quantize MODEL_DIR --to SCHEME --output DIR` packs a model"),
    ("pack", "`finetune quantize MODEL_DIR --to SCHEME --output DIR` packs a model"),
    ("tensorboard", "`[log] tensorboard` writes its files; `finetune watch RUN` shows curves here"),
    ("status", "`finetune watch RUN --once` says how a run stands"),
    ("diff", "`finetune compare RUN RUN` shows settings that differ, scores and curves"),
];

/// Options of other programs for commands that use a model.
const OF_A_MODEL: [(&str, &str); 30] = [
    ("m", "the model is the first argument"),
    ("model", "the model is the first argument"),
    ("model-path", "the model is the first argument"),
    ("model-name-or-path", "the model is the first argument"),
    ("base-model", "the model is the first argument; of an adapter or run, --base names another base"),
    ("run", "the run is the first argument"),
    ("lora", "ours is --adapter"),
    ("lora-path", "ours is --adapter"),
    ("lora-model-dir", "ours is --adapter"),
    ("adapter-path", "ours is --adapter"),
    ("adapter-name-or-path", "ours is --adapter"),
    ("peft", "ours is --adapter"),
    ("input", "ours is --prompt, or --data for a file of rows"),
    ("file", "ours is --prompt - for text from a file, or --data for a file of rows"),
    ("test-file", "ours is --data"),
    ("dataset", "ours is --data"),
    ("system-prompt", "ours is --system"),
    ("temp", "ours is --temperature"),
    ("t", "ours is --temperature"),
    ("n", "ours is --max-new-tokens"),
    ("max-tokens", "ours is --max-new-tokens"),
    ("n-predict", "ours is --max-new-tokens"),
    ("max-length", "ours is --max-new-tokens, which does not count the prompt"),
    ("top-k", "--top-p cuts unlikely tokens off"),
    ("stop-sequence", "ours is --stop"),
    ("extra-eos-token", "ours is --stop"),
    ("ignore-chat-template", "ours is --raw"),
    ("no-chat-template", "ours is --raw"),
    ("template", "ours is --chat-template"),
    ("template-file", "ours is --chat-template"),
];

/// Options of other programs for `export`.
const OF_EXPORT: [(&str, &str); 8] = [
    ("o", "ours is --output"),
    ("out", "ours is --output"),
    ("output-dir", "ours is --output"),
    ("save-path", "ours is --output"),
    ("export-dir", "ours is --output"),
    ("f", "ours is --format"),
    ("outtype", "ours is --dtype"),
    (
        "de-quantize",
        "leave it out: a packed base is decoded, and the merged weights have 16 bits, or the type of --dtype",
    ),
];

/// Options of other programs for `quantize`.
const OF_QUANTIZE: [(&str, &str); 15] = [
    ("o", "ours is --output"),
    ("out", "ours is --output"),
    ("output-dir", "ours is --output"),
    ("mlx-path", "ours is --output"),
    ("m", "the model is the first argument"),
    ("model", "the model is the first argument"),
    ("hf-path", "the model is the first argument"),
    ("scheme", "ours is --to"),
    ("quantize", "ours is --to mlx4"),
    ("q-bits", "ours is --to: mlx4 has 4 bits, mlx8 has 8"),
    ("bits", "ours is --to: mlx4 and nf4 have 4 bits, mlx8 and int8 have 8"),
    ("q-group-size", "the groups of each form are fixed: 64 columns (mlx4, mlx8), 32 (mxfp4)"),
    ("q-mode", "ours is --to: mlx4 and mlx8 are affine, mxfp4 is mxfp4"),
    ("load-in-4bit", "ours is --to nf4"),
    ("load-in-8bit", "ours is --to int8"),
];

/// Options of other commands and programs for `chat`.
const OF_CHAT: [(&str, &str); 3] = [
    ("p", "messages are typed, or piped in; `finetune generate --prompt TEXT` answers one"),
    ("prompt", "messages are typed, or piped in; `finetune generate --prompt TEXT` answers one"),
    ("data", "`finetune generate --data FILE` answers the rows of a file"),
];

/// Options of other servers for `serve`.
const OF_SERVE: [(&str, &str); 12] = [
    ("m", "the model is the first argument"),
    ("model", "the model is the first argument"),
    ("lora", "ours is --adapter NAME=DIR"),
    ("lora-modules", "ours is --adapter NAME=DIR, once for each"),
    ("enable-lora", "leave it out: --adapter NAME=DIR is enough"),
    ("adapter-path", "ours is --adapter NAME=DIR"),
    ("api-key", "ours is --api-key-file FILE: others can see arguments"),
    ("max-num-seqs", "ours is --slots"),
    ("parallel", "ours is --slots"),
    ("n-predict", "ours is --max-tokens"),
    ("max-new-tokens", "ours is --max-tokens"),
    ("listen", "ours are --host and --port"),
];

/// Options of other programs, and habits, for commands that take a recipe.
const OF_A_RECIPE: [(&str, &str); 16] = [
    ("c", "the recipe is the first argument"),
    ("config", "the recipe is the first argument"),
    ("config-file", "the recipe is the first argument"),
    ("recipe", "the recipe is the first argument"),
    ("o", "ours is --output-dir"),
    ("out", "ours is --output-dir"),
    ("output", "ours is --output-dir"),
    ("save-dir", "ours is --output-dir"),
    ("dry-run", "`finetune validate RECIPE.toml` finds what can go wrong, without training"),
    ("check", "`finetune validate RECIPE.toml` finds what can go wrong, without training"),
    ("debug", "ours is --verbose"),
    ("m", "ours is --model, without a recipe; of a recipe, --set model.path=MODEL_DIR names another model"),
    // `launch` alone does not know these: `run` does.
    ("model", "it is a flag of the run: finetune launch -n N -- --model M --data FILE"),
    ("data", "it is a flag of the run: finetune launch -n N -- --model M --data FILE"),
    ("n", "`finetune launch -n N RECIPE.toml` starts N ranks"),
    ("gpus", "`finetune launch -n N RECIPE.toml` starts N ranks, each takes a GPU"),
];

const TAKES_RECIPE: [&str; 5] = ["run", "validate", "inspect", "plan", "launch"];
const TAKES_MODEL: [&str; 3] = ["eval", "generate", "export"];

/// The arguments of this process. If they are wrong, the process ends with a message.
pub(crate) fn parse() -> Cli {
    let words: Vec<OsString> = std::env::args_os().collect();
    Cli::try_parse_from(&words).unwrap_or_else(|error| {
        let words: Vec<String> = words.iter().map(|word| word.to_string_lossy().into_owned()).collect();
        match answer(&words, &error) {
            Some(failure) => {
                failure.print();
                Exit::Input.end()
            }
            None => error.exit(),
        }
    })
}

/// The error for arguments that clap refused, if it can say more than clap does. `words` begin with
/// the program's name.
fn answer(words: &[String], error: &clap::Error) -> Option<Failure> {
    let text = |kind: ContextKind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        // The nearest is the last.
        Some(ContextValue::Strings(texts)) => texts.last().map(String::as_str),
        _ => None,
    };
    match error.kind() {
        ErrorKind::InvalidSubcommand => {
            let (word, nearest) = (text(ContextKind::InvalidSubcommand)?, text(ContextKind::SuggestedSubcommand));
            let of_cluster = words.iter().take_while(|it| *it != word).any(|it| it == "cluster");
            Some(if of_cluster { cluster_verb(word, nearest) } else { verb(word, nearest) })
        }
        ErrorKind::UnknownArgument => {
            Some(argument(words, text(ContextKind::InvalidArg)?, text(ContextKind::SuggestedArg)))
        }
        ErrorKind::MissingRequiredArgument => recipe_taken_for_a_checkpoint(words).or_else(|| no_recipe(words, error)),
        ErrorKind::MissingSubcommand => {
            Some(Failure::arguments("no command is named", "`finetune --help` lists the commands"))
        }
        ErrorKind::ArgumentConflict => flags_beside_a_recipe(words),
        _ => None,
    }
}

/// `run --resume recipe.toml`: the option takes the recipe.
fn recipe_taken_for_a_checkpoint(words: &[String]) -> Option<Failure> {
    let resume = words.iter().position(|word| word == "--resume")?;
    let recipe = words.get(resume + 1).filter(|word| recognize(Path::new(word)) == Holding::Recipe)?;
    Some(Failure::arguments(
        format!("--resume takes {recipe} for a checkpoint, and then the recipe is missing"),
        format!("write the recipe first: finetune run {recipe} --resume"),
    ))
}

/// `run` alone: a newcomer may have none yet.
fn no_recipe(words: &[String], error: &clap::Error) -> Option<Failure> {
    let command = words.iter().skip(1).find(|word| TAKES_RECIPE.contains(&word.as_str()))?;
    let Some(ContextValue::Strings(missing)) = error.get(ContextKind::InvalidArg) else { return None };
    missing.iter().any(|missing| missing == "<RECIPE>").then(|| {
        Failure::bad_input(
            format!("`finetune {command}` needs a recipe, a TOML file"),
            vec![
                "`finetune init DIR` writes one, with rows to begin with".to_owned(),
                "without one: --model MODEL --data FILE".to_owned(),
            ],
        )
    })
}

/// `run recipe.toml --model M`: the flags stand for a recipe.
fn flags_beside_a_recipe(words: &[String]) -> Option<Failure> {
    let recipe = words.iter().skip(2).find(|word| recognize(Path::new(word)) == Holding::Recipe)?;
    let given = |flag: &str| words.iter().any(|word| word == flag || word.starts_with(&format!("{flag}=")));
    let flags = [("--model", "model.path"), ("--data", "data.train"), ("--eval", "data.eval")];
    let (flag, key) = flags.into_iter().find(|(flag, _)| given(flag))?;
    let value = value(words, words.iter().find(|word| word.starts_with(flag))?);
    Some(Failure::arguments(
        format!("{flag} stands in the place of a recipe, and {} is one", shown(recipe)),
        format!("write --set {key}={value} to change the recipe's"),
    ))
}

/// What a habit's word with one typing slip is here; a command of ours with one slip goes before it.
fn habit(word: &str) -> Option<String> {
    let is_near = |name: &str| name.len() > 4 && strsim::damerau_levenshtein(&word.to_ascii_lowercase(), name) == 1;
    if Cli::command().get_subcommands().any(|command| is_near(command.get_name())) {
        return None;
    }
    VERBS.iter().find(|(theirs, _)| is_near(theirs)).map(|(_, ours)| (*ours).to_owned())
}

/// clap finds `list` like `cluster`.
fn is_alike(word: &str, nearest: &str) -> bool {
    nearest.starts_with(word) || 2 * strsim::damerau_levenshtein(word, nearest) <= nearest.len()
}

fn cluster_verb(word: &str, nearest: Option<&str>) -> Failure {
    let hint = nearest.map(|nearest| format!("did you mean `finetune cluster {nearest}`?"));
    Failure::arguments(
        format!("there is no command `cluster {}`", shown(word)),
        hint.unwrap_or_else(|| "`finetune cluster --help` lists the commands".to_owned()),
    )
}

fn verb(word: &str, nearest: Option<&str>) -> Failure {
    let known = VERBS.iter().find(|(theirs, _)| theirs.eq_ignore_ascii_case(word)).map(|(_, ours)| (*ours).to_owned());
    let hint = known.or_else(|| match recognize(Path::new(word)) {
        Holding::Recipe => Some(format!("`finetune run {word}` trains as this recipe says")),
        Holding::Run | Holding::ModelDirectory | Holding::Adapter | Holding::Checkpoint => {
            Some(format!("`finetune generate {word} --prompt TEXT` answers"))
        }
        _ => habit(word).or_else(|| {
            let nearest = nearest.filter(|nearest| is_alike(word, nearest))?;
            Some(format!("did you mean `finetune {nearest}`?"))
        }),
    });
    let hint = hint.unwrap_or_else(|| "`finetune --help` lists the commands".to_owned());
    Failure::arguments(format!("there is no command `{}`", shown(word)), hint)
}

fn argument(words: &[String], found: &str, nearest: Option<&str>) -> Failure {
    // Of `finetune --lr 3` the 3 is no command.
    let is_command = |word: &&String| Cli::command().find_subcommand(word).is_some();
    let mut plain = words.iter().skip(1).filter(|word| !word.starts_with('-')).skip_while(|word| !is_command(word));
    let first = plain.next().map_or("", String::as_str);
    let command = match (first, plain.next()) {
        ("cluster", Some(second)) => format!("finetune cluster {second}"),
        ("", _) => "finetune".to_owned(),
        (first, _) => format!("finetune {first}"),
    };
    if let Some(failure) = negative(&command, words, found) {
        return failure;
    }
    let hint = if found.starts_with('-') { option(first, words, found) } else { word(first, found) };
    let hint = hint.or_else(|| nearest.map(|nearest| format!("did you mean {nearest}?")));
    let hint = hint.unwrap_or_else(|| format!("`{command} --help` lists what there is"));
    let what = if found.starts_with('-') {
        format!("no option {}", shown(found))
    } else {
        format!("no place for `{}`", shown(found))
    };
    Failure::arguments(format!("`{command}` has {what}"), hint)
}

/// A number below 0 behind an option, which clap takes for an option of its own.
fn negative(command: &str, words: &[String], found: &str) -> Option<Failure> {
    let is_number =
        |word: &String| word.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    let place = words.iter().position(|word| word.starts_with(found) && is_number(word))?;
    let option = words.get(place.checked_sub(1)?).filter(|word| word.starts_with('-'))?;
    Some(Failure::arguments(
        format!("{option} {}: it must not be below 0", shown(&words[place])),
        format!("`{command} --help` says what {option} takes"),
    ))
}

/// What an option of another program is here.
fn option(command: &str, words: &[String], found: &str) -> Option<String> {
    let name =
        found.trim_start_matches('-').split('=').next().unwrap_or_default().to_ascii_lowercase().replace('_', "-");
    let of =
        |table: &[(&str, &str)]| table.iter().find(|(theirs, _)| *theirs == name).map(|(_, ours)| (*ours).to_owned());
    if TAKES_RECIPE.contains(&command) {
        return of(&OF_A_RECIPE).or_else(|| key(&name.replace('-', "_"), &value(words, found)));
    }
    if command == "export" {
        return of(&OF_EXPORT).or_else(|| of(&OF_A_MODEL));
    }
    if command == "quantize" {
        return of(&OF_QUANTIZE);
    }
    if command == "serve" {
        return of(&OF_SERVE);
    }
    if command == "chat" {
        return of(&OF_CHAT).or_else(|| of(&OF_A_MODEL));
    }
    if TAKES_MODEL.contains(&command) { of(&OF_A_MODEL) } else { None }
}

/// `--set` for the recipe key of this name, ours or another program's.
fn key(name: &str, value: &str) -> Option<String> {
    let bare = |rival: &'static str| rival.split_once('.').map_or(rival, |(_, name)| name);
    let mut ours =
        KEYS.iter().filter(|key| key.name() == name || key.path.replace('.', "_") == name || key.path == name);
    // A name that stands in several tables says too little.
    if let (Some(key), None) = (ours.next(), ours.next()) {
        return Some(set(key, value, ""));
    }
    let rival = |key: &'static Key| {
        let (_, note) = key.rivals.iter().find(|(theirs, _)| bare(theirs) == name)?;
        Some((key, *note))
    };
    if let Some((key, note)) = KEYS.iter().find_map(rival) {
        return Some(set(key, value, note));
    }
    ELSEWHERE.iter().find(|(theirs, _)| *theirs == name).map(|(_, instead)| (*instead).to_owned())
}

fn set(key: &Key, value: &str, note: &str) -> String {
    let note = if note.is_empty() { String::new() } else { format!(" ({note})") };
    let place = if key.table().is_empty() { String::new() } else { format!(" in [{}]", key.table()) };
    format!("write --set {}={value}, or `{}`{place} of the recipe{note}", key.path, key.name())
}

/// The value that was given to an option, or a place for one.
fn value(words: &[String], found: &str) -> String {
    let name = found.split('=').next().unwrap_or(found);
    let at = words.iter().position(|word| word == name);
    let next = at.and_then(|at| words.get(at + 1)).filter(|word| !word.starts_with('-')).cloned();
    let joined = words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('=').map(str::to_owned));
    shown(&joined.or(next).unwrap_or_else(|| "VALUE".to_owned()))
}

/// What a word that stands alone should have been.
fn word(command: &str, found: &str) -> Option<String> {
    let holding = recognize(Path::new(found));
    match command {
        _ if TAKES_RECIPE.contains(&command) && found.contains('=') => Some(format!("write --set {}", shown(found))),
        "run" | "launch" if holding == Holding::Checkpoint => Some(format!("write --resume {}", shown(found))),
        "run" | "launch" if holding == Holding::Recipe => {
            Some("a run has one recipe; --set overrides its keys".to_owned())
        }
        "generate" if holding == Holding::Missing => Some("the prompt follows --prompt, in quotes".to_owned()),
        "chat" if holding == Holding::Missing => Some("messages are typed, or piped in".to_owned()),
        "generate" | "chat" | "eval" | "export"
            if matches!(holding, Holding::Adapter | Holding::Run | Holding::Checkpoint) =>
        {
            Some(format!("write --adapter {}", shown(found)))
        }
        "generate" | "eval" => Some(format!("write --data {}", shown(found))),
        "export" => Some(format!("write --output {}", shown(found))),
        _ => None,
    }
}

/// On one line, and not longer than one.
fn shown(text: &str) -> String {
    text.chars().take(80).collect::<String>().escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (command line, part of the answer)
    #[test]
    fn other_programs_words_are_answered_with_ours() {
        for (line, says) in [
            ("train recipe.toml", "finetune run RECIPE.toml"),
            ("fuse --model x", "finetune export RUN --format merged"),
            ("talk run", "finetune chat RUN"),
            ("chat run --prompt x", "finetune generate --prompt"),
            ("chat run --temp 1", "--temperature"),
            ("chat run Hello", "messages are typed"),
            ("valdate recipe.toml", "finetune validate"),
            ("trian recipe.toml", "finetune run RECIPE.toml"),
            ("mrege run", "--format merged"),
            ("list", "`finetune --help` lists the commands"),
            ("status run", "finetune watch RUN --once"),
            ("--lr 3", "`finetune` has no option --lr"),
            ("-v", "no command is named"),
            ("run", "finetune init DIR"),
            ("validate --model m", "--model MODEL --data FILE"),
            ("plan recipe.toml --lr 1e-4", "--set optimizer.learning_rate=1e-4"),
            ("cluster bnch", "did you mean `finetune cluster bench`?"),
            ("cluster frobnicate", "finetune cluster --help"),
            ("generate run --prompt x --seed -1", "--seed -1: it must not be below 0"),
            ("plan recipe.toml --memory -2G", "--memory -2G: it must not be below 0"),
            ("launch -n -1 recipe.toml", "-n -1: it must not be below 0"),
            ("run recipe.toml --lr 1e-4", "--set optimizer.learning_rate=1e-4"),
            ("run recipe.toml --lr=1e-4", "--set optimizer.learning_rate=1e-4"),
            ("run recipe.toml --epochs 3", "--set train.epochs=3"),
            ("run recipe.toml --lora-rank 8", "--set lora.rank=8"),
            ("run recipe.toml --train.epochs 3", "--set train.epochs=3"),
            ("run recipe.toml train.epochs=3", "--set train.epochs=3"),
            ("run recipe.toml -o out", "--output-dir"),
            ("run recipe.toml --dry-run", "finetune validate"),
            ("run --config recipe.toml", "first argument"),
            ("run recipe.toml --num-gpus 2", "finetune launch"),
            ("validate recipe.toml --frobnicate", "finetune validate --help"),
            ("generate model --temp 1 --prompt x", "--temperature"),
            ("generate --model m --prompt x", "first argument"),
            ("generate model --adapter-path a --prompt x", "--adapter"),
            ("generate model Hello", "--prompt"),
            ("export run -o out --format merged", "--output"),
            ("quantize model -o out --to mlx4", "--output"),
            ("quantize --hf-path model --to mlx4", "first argument"),
            ("quantize model --load-in-4bit", "--to nf4"),
            ("pack model", "finetune quantize MODEL_DIR"),
            ("serve model --lora-modules a=b", "--adapter NAME=DIR"),
            ("server model", "finetune serve RUN"),
            ("cluster bench --frobnicate", "finetune cluster bench --help"),
        ] {
            let words: Vec<String> = ["finetune"].into_iter().chain(line.split(' ')).map(str::to_owned).collect();
            let error = Cli::try_parse_from(&words).expect_err(line);
            match answer(&words, &error) {
                Some(failure) => assert!(failure.lines().contains(says), "{line}: {}", failure.lines()),
                None => panic!("{line}: {error}"),
            }
        }
    }

    /// A `--` before the recipe is allowed and not needed.
    #[test]
    fn a_launch_takes_its_recipe_with_and_without_dashes() {
        for line in ["launch -n 2 -- recipe.toml --resume", "launch -n 2 recipe.toml --resume"] {
            let cli = Cli::try_parse_from(["finetune"].into_iter().chain(line.split(' '))).expect(line);
            let super::super::Command::Launch(launch) = cli.command else { panic!("{line}") };
            assert_eq!(launch.run, ["recipe.toml", "--resume"], "{line}");
        }
        assert!(Cli::try_parse_from(["finetune", "launch", "recipe.toml"]).is_err(), "how many is not said");
    }
}
