//! The house keeps its plan: which crate may use which, how long a file is, where `unsafe` is.

use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, MetadataCommand};

use crate::folder::repository;

/// The table of ARCHITECTURE.md: a crate and those of ours that it may use.
const MAY_USE: &[(&str, &[&str])] = &[
    ("kernels", &[]),
    ("recipe", &[]),
    ("store", &[]),
    ("allreduce", &[]),
    ("dataset", &["recipe", "store"]),
    ("model", &["recipe", "store", "kernels"]),
    ("trainer", &["recipe", "store", "dataset", "model", "allreduce"]),
    ("cluster", &["allreduce"]),
    ("finetune", &["recipe", "store", "dataset", "kernels", "model", "allreduce", "trainer", "cluster"]),
    ("testkit", &["recipe", "store", "dataset", "kernels", "model", "allreduce", "trainer", "cluster"]),
];

/// Crates for development only: any crate may have them as a dev-dependency, none otherwise.
const FOR_DEVELOPMENT: [&str; 2] = ["testkit", "xtask"];

/// One file per foreign thing.
const UNSAFE: &[(&str, &str)] = &[
    ("crates/finetune/src/memory.rs", "getrusage and an option of the allocator"),
    ("crates/finetune/src/signals.rs", "a signal handler"),
    ("crates/kernels/src/buffer.rs", "uninitialized memory"),
    ("crates/kernels/src/matmul.rs", "gemm's pointers"),
    ("crates/kernels/src/simd.rs", "vector instructions"),
    ("crates/store/src/tensors.rs", "a mapped file"),
];

const LONGEST_FILE: usize = 500;

#[test]
fn crates_use_only_what_the_plan_allows() {
    let metadata = MetadataCommand::new()
        .manifest_path(repository().join("Cargo.toml"))
        .no_deps()
        .other_options(["--offline".to_owned()])
        .exec()
        .expect("cargo metadata");
    let crates = repository().join("crates");
    let mut arrows = 0;
    for package in metadata.packages.iter().filter(|package| package.manifest_path.starts_with(&crates)) {
        let name = short(&package.name);
        let known = MAY_USE.iter().find(|(known, _)| *known == name);
        let (_, allowed) = known.unwrap_or_else(|| panic!("{name} is not in the table of ARCHITECTURE.md"));
        for dependency in package.dependencies.iter().filter(|dependency| dependency.path.is_some()) {
            let used = short(&dependency.name);
            let development = dependency.kind == DependencyKind::Development && FOR_DEVELOPMENT.contains(&used);
            assert!(development || allowed.contains(&used), "{name} must not use {used} ({:?})", dependency.kind);
            arrows += 1;
        }
    }
    assert!(arrows >= 10, "only {arrows} arrows were found: has the layout changed?");
}

fn short(package: &str) -> &str {
    package.strip_prefix("finetune-").unwrap_or(package)
}

#[test]
fn files_are_short() {
    for path in sources() {
        let lines = std::fs::read_to_string(&path).expect("a source file").lines().count();
        assert!(lines <= LONGEST_FILE, "{} has {lines} lines; a file is one idea", path.display());
    }
}

#[test]
fn unsafe_code_is_where_it_is_known_to_be() {
    for path in sources() {
        let text = std::fs::read_to_string(&path).expect("a source file");
        let code = |line: &str| line.split("//").next().unwrap_or_default().to_owned();
        let is_unsafe = text.lines().map(code).any(|line| {
            let words: Vec<&str> = line.split(|letter: char| !letter.is_alphanumeric() && letter != '_').collect();
            words.contains(&"unsafe")
        });
        let name = path.strip_prefix(repository()).expect("in the repository").to_string_lossy().into_owned();
        let known = UNSAFE.iter().any(|(file, _)| *file == name);
        assert!(known || !is_unsafe, "{name} has unsafe code; give it a file of its own and name it here");
        assert!(is_unsafe || !known, "{name} has no unsafe code any more: take it off the list");
        assert!(!known || text.contains("SAFETY:"), "{name}: unsafe code says why it is sound");
    }
}

#[test]
fn every_recipe_of_ours_parses() {
    let mut recipes = 0;
    for entry in std::fs::read_dir(repository().join("recipes")).expect("recipes") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            finetune_recipe::Recipe::load(&path, &[], None).unwrap_or_else(|error| panic!("{error}"));
            recipes += 1;
        }
    }
    assert!(recipes >= 2);
}

/// Every file under crates/*/src.
fn sources() -> Vec<PathBuf> {
    fn below(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                below(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(repository().join("crates")).expect("crates") {
        below(&entry.expect("an entry").path().join("src"), &mut found);
    }
    assert!(found.len() > 50);
    found
}
