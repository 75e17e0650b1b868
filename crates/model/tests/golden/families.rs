//! The golden models, as their folder has them.

use std::path::{Path, PathBuf};

/// The names of the folders in a folder that have a file of this name.
pub(crate) fn folders_with(path: &Path, file: &str) -> Vec<String> {
    let entries = std::fs::read_dir(path).expect("golden files").map(|entry| entry.expect("an entry"));
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().join(file).is_file())
        .map(|entry| entry.file_name().into_string().expect("a name"))
        .collect();
    names.sort();
    names
}

/// The folder of the golden models.
pub(crate) fn models() -> PathBuf {
    // The variable is read at run time, because the tests also travel to machines with a GPU.
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_owned());
    Path::new(&here).join("../../tests/goldens/models")
}

/// The names of all golden models.
pub(crate) fn names() -> Vec<String> {
    folders_with(&models(), "golden.json")
}
