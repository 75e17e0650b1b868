//! Names inside a run directory.

use std::path::{Path, PathBuf};

/// The folder of checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";
/// The folder of checkpoints of a run whose rank 0 is elsewhere.
pub const COPIES: &str = "copies";
/// The resolved recipe.
pub(crate) const RECIPE_FILE: &str = "recipe.toml";
/// Results, by method.
pub(crate) const RESULTS: [&str; 2] = ["adapter", "model"];

/// `stem.extension` in a directory, or with the first number that makes it a name that nothing has.
pub(crate) fn free_name(directory: &Path, stem: &str, extension: &str) -> PathBuf {
    let numbered = (2..).map(|number| format!("{stem}-{number}.{extension}"));
    let mut names = std::iter::once(format!("{stem}.{extension}")).chain(numbered).map(|name| directory.join(name));
    names.find(|path| path.symlink_metadata().is_err()).expect("an endless list")
}
