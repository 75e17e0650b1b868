//! What a user sees of a recipe's problems.

#![allow(dead_code, reason = "each test file uses a part")]

use std::path::Path;

use finetune_recipe::{Location, Problem, Recipe, RecipeError};

/// The full example, with its commented keys.
pub(crate) const CONTRACT: &str = include_str!("contract.toml");

pub(crate) const MINIMAL: &str = "[model]\npath = \"Qwen/Qwen3-0.6B\"\n[data]\ntrain = \"rows.jsonl\"\n";

/// The full example with a value for every key that it only mentions in a comment.
pub(crate) fn contract_with_optional_keys() -> String {
    let lines = [
        ("[model]\n", "[model]\nquantization = \"nf4\"\n"),
        (
            "[lora]\n",
            "[lora]\nexperts = true\nrank_pattern = { q_proj = 8, 'model\\.layers\\.0\\..*' = 4 }\nalpha_pattern = { q_proj = 8 }\n\
            layers_to_transform = [0, 1]\nmodules_to_save = [\"lm_head\"]\ninit_from = \"adapters/start\"\n",
        ),
        (
            "[data]\n",
            "[data]\nchat_template = \"template.jinja\"\nchat_template_kwargs = { enable_thinking = false }\nadd_tokens = [\"<tool>\"]\ndate = \"2026-11-27\"\n\
            weights = [0.5]\nmax_rows = 1000\ncolumns = { prompt = \"question\", role = \"from\" }\n",
        ),
        ("[train]\n", "[train]\nrouter_aux_loss_coef = 0.001\n"),
        ("[eval]\n", "[eval]\nearly_stopping_patience = 3\nsamples = 2\nexact_match = 50\nmax_new_tokens = 32\n"),
        ("[checkpoint]\n", "[checkpoint]\nresult = \"best\"\ncopies = 2\n"),
        (
            "[log]\n",
            "[log]\nprometheus = \"127.0.0.1:9400\"\ntensorboard = \"events\"\non_end = \"echo '$FINETUNE_STATUS' \\\"done\\\"\"\n",
        ),
        (
            "[distributed]\n",
            "[parallel]\nlayers = [24]\n[distributed]\nvirtual_ranks = 4\nmin_ranks = 1\njoin_timeout = \"90s\"\nports = \"29500-29599\"\nsync_every = 20\nouter_learning_rate = 0.7\nouter_momentum = 0.9\nwire = \"f32\"\n",
        ),
    ];
    lines.iter().fold(CONTRACT.to_owned(), |text, (from, to)| text.replacen(from, to, 1))
}

pub(crate) fn parse_with(text: &str, sets: &[&str]) -> Result<Recipe, RecipeError> {
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    Recipe::parse(text, Path::new("/home/ada/support-bot.toml"), &sets, None)
}

pub(crate) fn parse(text: &str) -> Recipe {
    parse_with(text, &[]).unwrap_or_else(|error| panic!("{error}\nin\n{text}"))
}

/// One line per problem: "line:column message | hint".
pub(crate) fn seen(result: Result<Recipe, RecipeError>) -> String {
    let problems = match result {
        Ok(_) => return "no problem".to_owned(),
        Err(RecipeError::Problems(problems)) => problems,
        Err(other) => return other.to_string(),
    };
    let line = |problem: &Problem| {
        let location = match (&problem.location, problem.line_column(&problems.source)) {
            (Location::Set(text), _) => format!("--set {text}"),
            (_, Some((line, column))) => format!("{line}:{column}"),
            _ => "file".to_owned(),
        };
        let mut text = format!("{location} {}", problem.message);
        for hint in &problem.hints {
            text += &format!(" | {hint}");
        }
        text
    };
    problems.problems.iter().map(line).collect::<Vec<_>>().join("\n")
}
