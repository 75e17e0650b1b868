//! Names inside a run directory.

use std::path::{Path, PathBuf};

/// The folder of checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";
/// The folder of checkpoints that a host keeps for a run whose rank 0 is on another host.
pub const COPIES: &str = "copies";
/// The resolved recipe.
pub(crate) const RECIPE_FILE: &str = "recipe.toml";
/// The folders of results: of LoRA, and of full training.
pub(crate) const RESULTS: [&str; 2] = ["adapter", "model"];

/// `stem.extension` in a directory, or `stem-N.extension` with the first number whose name is free.
pub(crate) fn free_name(directory: &Path, stem: &str, extension: &str) -> PathBuf {
    let numbered = (2..).map(|number| format!("{stem}-{number}.{extension}"));
    let mut names = std::iter::once(format!("{stem}.{extension}")).chain(numbered).map(|name| directory.join(name));
    names.find(|path| path.symlink_metadata().is_err()).expect("an endless list")
}
