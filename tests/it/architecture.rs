//! The house keeps its plan: which crate may use which, how long a file is, where `unsafe` is.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::folder::repository;

/// The table of ARCHITECTURE.md: a crate and those of ours that it may use.
const MAY_USE: &[(&str, &[&str])] = &[
    ("random", &[]),
    ("kernels", &["random"]),
    ("recipe", &[]),
    ("store", &[]),
    ("allreduce", &[]),
    ("dataset", &["recipe", "store", "random"]),
    ("model", &["recipe", "store", "random", "kernels"]),
    ("trainer", &["recipe", "store", "dataset", "model", "allreduce"]),
    ("rendezvous", &["allreduce"]),
    ("launch", &["allreduce", "rendezvous"]),
    ("thunderbolt", &["allreduce", "rendezvous", "launch"]),
    (
        "finetune",
        &[
            "recipe",
            "random",
            "store",
            "dataset",
            "kernels",
            "model",
            "allreduce",
            "trainer",
            "rendezvous",
            "launch",
            "thunderbolt",
        ],
    ),
    ("testkit", &["recipe", "store", "dataset", "kernels", "model", "allreduce", "trainer"]),
];

/// Crates for development only: any crate may have them as a dev-dependency, none otherwise.
const FOR_DEVELOPMENT: [&str; 2] = ["testkit", "xtask"];

/// One file per foreign thing.
const UNSAFE: &[(&str, &str)] = &[
    ("crates/allreduce/src/rdma/functions.rs", "looking up the verbs library's functions"),
    ("crates/allreduce/src/rdma/layout.rs", "types of the verbs library's functions"),
    ("crates/allreduce/src/rdma/verbs.rs", "the verbs library"),
    ("crates/finetune/src/allocator.rs", "the allocator"),
    ("crates/finetune/src/memory.rs", "getrusage and sysctl"),
    ("crates/finetune/src/overflow.rs", "a handler of faults"),
    ("crates/finetune/src/signals.rs", "sigaction and signal"),
    ("crates/kernels/src/buffer.rs", "uninitialized memory"),
    ("crates/kernels/src/gpu/rows.rs", "launching kernels without bounds checks"),
    ("crates/kernels/src/gpu/tensor.rs", "launching kernels without bounds checks"),
    ("crates/kernels/src/matmul.rs", "gemm's pointers"),
    ("crates/kernels/src/simd.rs", "vector instructions"),
];

const LONGEST_FILE: usize = 500;

#[test]
fn crates_use_only_what_the_plan_allows() {
    // The cargo_metadata crate would turn on features of serde, and with them build burn a second time.
    let manifest = repository().join("Cargo.toml");
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--no-deps", "--format-version", "1", "--manifest-path"])
        .arg(manifest)
        .output()
        .expect("cargo runs");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON of cargo metadata");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut arrows = 0;
    for package in list(&metadata["packages"]) {
        let name = short(&text(&package["name"])).to_owned();
        let known = MAY_USE.iter().find(|(known, _)| *known == name);
        let (_, allowed) = known.unwrap_or_else(|| panic!("{name} is not in the table of ARCHITECTURE.md"));
        for dependency in list(&package["dependencies"]).iter().filter(|dependency| dependency["path"].is_string()) {
            let used = text(&dependency["name"]);
            let used = short(&used);
            let development = dependency["kind"] == "dev" && FOR_DEVELOPMENT.contains(&used);
            assert!(development || allowed.contains(&used), "{name} must not use {used} ({})", dependency["kind"]);
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

/// `cargo run` and `cargo test` must ask for the same features of every library that both build, or a clone that does
/// both builds burn twice.
#[test]
fn tests_and_program_share_their_libraries() {
    let features = |arguments: &[&str]| -> std::collections::BTreeMap<String, String> {
        let output = std::process::Command::new(env!("CARGO"))
            .args(["tree", "--offline", "--prefix", "none", "--format", "{p}|{f}"])
            .args(arguments)
            .current_dir(repository())
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines = text.lines().map(|line| line.trim_end_matches(" (*)"));
        lines.filter_map(|line| line.split_once('|')).map(|(name, list)| (name.to_owned(), list.to_owned())).collect()
    };
    let program = features(&["--package", "finetune", "--edges", "no-dev"]);
    let tests = features(&["--workspace"]);
    let different: Vec<_> = program
        .iter()
        .filter(|(name, list)| tests.get(*name).is_some_and(|other| other != *list))
        .map(|(name, list)| format!("{name}: {list} in the program, {} in the tests", tests[name]))
        .collect();
    assert!(program.len() > 100 && different.is_empty(), "{different:#?}");
}
