//! Arguments of the commands that look at a recipe and its rows: `validate`, `inspect`.

use std::path::PathBuf;

use clap::Args;

use super::RecipeArguments;

#[derive(Debug, Args)]
pub(crate) struct ValidateArguments {
    #[command(flatten)]
    pub(crate) recipe: RecipeArguments,
    /// Without a recipe: held-back rows to evaluate on
    #[arg(long, value_name = "FILE", requires = "data", conflicts_with = "recipe")]
    pub(crate) eval: Option<PathBuf>,
    /// Print the findings as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArguments {
    #[command(flatten)]
    pub(crate) recipe: RecipeArguments,
    /// Which row of the data, counted from 1
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "longest")]
    pub(crate) row: usize,
    /// The row with the most tokens
    #[arg(long)]
    pub(crate) longest: bool,
    /// Rows of the evaluation data instead of the training data
    #[arg(long)]
    pub(crate) eval: bool,
    /// Print tokens and mask as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}
