//! A recipe for tests that read no file of it.

use std::path::Path;

use finetune_recipe::Recipe;

/// The fewest keys, and `keys` behind them, from the table `[data]` on.
pub(crate) fn test_recipe(keys: &str) -> Recipe {
    let text = format!("output_dir = \"run\"\n[model]\npath = \"m\"\n[data]\ntrain = \"rows.jsonl\"\n{keys}");
    Recipe::parse(&text, Path::new("r.toml"), &[], None).unwrap_or_else(|error| panic!("{error}"))
}
