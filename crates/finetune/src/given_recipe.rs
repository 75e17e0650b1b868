//! The recipe that a command is given: a file, a run's, or one composed of `--model` and `--data`.

use std::path::{Path, PathBuf};

use finetune_recipe::{Recipe, RecipeError};
use finetune_trainer::home;

use crate::cli::{RecipeArguments, RunArguments};
use crate::failure::Failure;
use crate::source;

/// What names a composed recipe in errors. Its folder is the current one.
const COMMAND_LINE: &str = "(command line)";

/// Where a recipe is from.
#[derive(Debug)]
pub(crate) enum GivenRecipe {
    File(PathBuf),
    /// The text that stands for the flags.
    Flags(String),
}

impl GivenRecipe {
    /// What the arguments name. `eval`: the rows of `--eval`.
    pub(crate) fn of(arguments: &RecipeArguments, eval: Option<&Path>) -> Result<GivenRecipe, Failure> {
        match &arguments.recipe {
            Some(path) => Ok(GivenRecipe::File(source::recipe_path(path)?)),
            None => Ok(GivenRecipe::Flags(composed(arguments, eval))),
        }
    }

    /// The file, if there is one.
    pub(crate) fn file(&self) -> Option<&Path> {
        match self {
            GivenRecipe::File(file) => Some(file),
            GivenRecipe::Flags(_) => None,
        }
    }

    /// The checked recipe. A run that was copied goes on where it lies, unless `output_dir` says
    /// otherwise.
    pub(crate) fn load(&self, sets: &[String], output_dir: Option<&Path>) -> Result<Recipe, RecipeError> {
        match self {
            GivenRecipe::File(file) => {
                let home = home(file, sets).filter(|_| output_dir.is_none());
                Recipe::load(file, sets, output_dir.or(home.as_deref()))
            }
            GivenRecipe::Flags(text) => Recipe::parse(text, Path::new(COMMAND_LINE), sets, output_dir),
        }
    }
}

/// The recipe of a launch, and of what it asks other hosts.
pub(crate) fn of_launch(run: &RunArguments) -> Result<Recipe, Failure> {
    let given = GivenRecipe::of(&run.recipe, run.eval.as_deref())?;
    Ok(given.load(&run.recipe.sets, run.output_dir.as_deref())?)
}

/// Three epochs in small steps: with the default of one epoch, a few dozen rows would be a handful
/// of updates. The learning rate climbs for one step in ten.
const SMALL_DATA: &str = "[train]\nepochs = 3\nglobal_batch_size = 8\n\n[schedule]\nwarmup_ratio = 0.1\n";

/// The recipe of `--model`, `--data` and `--eval`.
fn composed(arguments: &RecipeArguments, eval: Option<&Path>) -> String {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let model = arguments.model.as_deref().unwrap_or_default();
    let rows: Vec<String> = arguments.data.iter().map(|path| quoted(&path.to_string_lossy())).collect();
    let eval = eval.map_or(String::new(), |path| format!("eval = {}\n", quoted(&path.to_string_lossy())));
    format!(
        "output_dir = {}\n\n[model]\npath = {}\n\n[data]\ntrain = [{}]\n{eval}\n{SMALL_DATA}",
        quoted(&format!("runs/{}", name(model, &arguments.data))),
        quoted(model),
        rows.join(", "),
    )
}

/// "Qwen3-0.6B-train" for Qwen/Qwen3-0.6B and data/train.jsonl.
fn name(model: &str, data: &[PathBuf]) -> String {
    let model = model.split('@').next().unwrap_or_default().trim_end_matches('/');
    let model = model.rsplit('/').next().unwrap_or_default().trim_end_matches(".gguf");
    let rows = data.first().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
    let rows = rows.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let rows = rows.split('.').next().unwrap_or_default();
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
    let name = format!("{model}-{rows}");
    let name: String = name.chars().map(|letter| if plain(letter) { letter } else { '-' }).collect();
    let name = name.trim_matches(['-', '.']);
    if name.is_empty() { "run".to_owned() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(model: &str, data: &[&str]) -> RecipeArguments {
        let data = data.iter().map(PathBuf::from).collect();
        RecipeArguments { recipe: None, model: Some(model.to_owned()), data, sets: Vec::new() }
    }

    /// (model, rows, the run directory)
    #[test]
    fn flags_make_a_recipe_that_is_read() {
        for (model, data, directory) in [
            ("Qwen/Qwen3-0.6B", &["data/train.jsonl"][..], "runs/Qwen3-0.6B-train"),
            ("acme/tiny@v2", &["rows"], "runs/tiny-rows"),
            ("/m/a \"b\"/", &["x/one.jsonl", "two.jsonl"], "runs/a--b--one"),
            ("models/tiny-Q4_K_M.gguf", &["rows"], "runs/tiny-Q4_K_M-rows"),
            ("..", &["."], "runs/run"),
        ] {
            let text = composed(&arguments(model, data), Some(Path::new("held.jsonl")));
            let recipe = Recipe::parse(&text, Path::new(COMMAND_LINE), &[], None);
            let recipe = recipe.unwrap_or_else(|error| panic!("{error}\n{text}"));
            assert_eq!(recipe.output_dir, Path::new(directory), "{text}");
            assert_eq!(recipe.data.train.len(), data.len());
            assert_eq!(recipe.data.eval, [PathBuf::from("held.jsonl")]);
        }
    }

    #[test]
    fn set_overrides_what_flags_say() {
        let text = composed(&arguments("m", &["r.jsonl"]), None);
        let sets = ["train.max_steps=2".to_owned(), "output_dir=elsewhere".to_owned()];
        let recipe = Recipe::parse(&text, Path::new(COMMAND_LINE), &sets, None).expect("a recipe");
        assert_eq!(recipe.train.length, finetune_recipe::Length::Steps(2));
        assert_eq!(recipe.output_dir, Path::new("elsewhere"));
    }
}
