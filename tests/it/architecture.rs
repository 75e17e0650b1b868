//! Dependency rules of the crates, sizes of files and functions, and where `unsafe` is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::folder::repository;

/// One file per foreign thing.
const UNSAFE: &[(&str, &str)] = &[
    ("crates/finetune/src/allocator.rs", "the allocator"),
    ("crates/finetune/src/memory.rs", "getrusage and sysctl"),
    ("crates/finetune/src/overflow.rs", "a handler of faults"),
    ("crates/finetune/src/signals.rs", "sigaction and signal"),
    ("crates/kernels/src/cpu/bf16_product.rs", "bf16 instructions"),
    ("crates/kernels/src/cpu/buffer.rs", "uninitialized memory"),
    ("crates/kernels/src/cpu/matmul.rs", "gemm's pointers"),
    ("crates/kernels/src/cpu/simd.rs", "vector instructions"),
    ("crates/kernels/src/gpu/reduce.rs", "launching kernels without bounds checks"),
    ("crates/kernels/src/gpu/tensor.rs", "launching kernels without bounds checks"),
    ("crates/memory-pipe/src/pipe.rs", "memory shared with another process"),
    ("crates/memory-pipe/src/ring.rs", "memory shared with another process"),
    ("crates/packed/src/dot/rounded.rs", "vector instructions"),
    ("crates/packed/src/dot/x86/avx2.rs", "vector instructions"),
    ("crates/packed/src/dot/x86/avx512.rs", "vector instructions"),
    ("crates/packed/src/dot/x86/bf16.rs", "vector instructions"),
    ("crates/packed/src/dot/x86/codes512.rs", "vector instructions"),
    ("crates/packed/src/dot/x86/some_rows.rs", "vector instructions"),
    ("crates/packed/src/simd.rs", "vector instructions"),
    ("crates/rdma/src/functions.rs", "looking up the verbs library's functions"),
    ("crates/rdma/src/layout.rs", "types of the verbs library's functions"),
    ("crates/rdma/src/verbs.rs", "the verbs library"),
];

/// Follows a name in the table if only tests may use that crate.
const FOR_TESTS: &str = " (tests)";

/// Lines of a file.
const LONGEST_FILE: usize = 500;

/// Lines of a function, from its `fn` to its closing brace.
const LONGEST_FUNCTION: usize = 70;

/// Files that are longer, and the lines that each may have. The list may only get shorter.
const LONG_FILES: &[(&str, usize)] = &[];

/// Functions that are longer, as `file::function`, and the lines that each may have. The list may
/// only get shorter.
const LONG_FUNCTIONS: &[(&str, usize)] = &[];

/// The crate table of ARCHITECTURE.md: each crate, and those that its row lets it use.
/// `name (tests)` is for dev-dependencies only.
fn table() -> BTreeMap<String, BTreeSet<String>> {
    let text = std::fs::read_to_string(repository().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let mut lines = text.lines().skip_while(|line| *line != "| crate | owns | must never know | may use |");
    lines.next().expect("the crate table of ARCHITECTURE.md");
    lines.next().expect("the line below its header");
    let rows: Vec<Vec<&str>> = lines
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let names: BTreeSet<String> = rows.iter().map(|row| row[0].trim_matches('`').to_owned()).collect();
    let allowed = |row: &Vec<&str>| match row[3] {
        "–" => BTreeSet::new(),
        "all of them" => names.clone(),
        list => list.split(',').map(|name| name.trim().to_owned()).collect(),
    };
    let table: BTreeMap<_, _> = rows.iter().map(|row| (row[0].trim_matches('`').to_owned(), allowed(row))).collect();
    let is_known = |name: &str| names.contains(name.trim_end_matches(FOR_TESTS));
    let unknown: Vec<_> = table.values().flatten().filter(|name| !is_known(name)).collect();
    assert!(table.len() == rows.len() && unknown.is_empty(), "no row of ARCHITECTURE.md: {unknown:?}");
    table
}

#[test]
fn crates_use_only_what_the_table_allows() {
    // The cargo_metadata crate would turn on features of serde, and with them build burn a second
    // time.
    let manifest = repository().join("Cargo.toml");
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--no-deps", "--format-version", "1", "--manifest-path"])
        .arg(manifest)
        .output()
        .expect("cargo runs");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON of cargo metadata");
    let name_of = |value: &Value| {
        let name = value["name"].as_str().expect("a name");
        name.strip_prefix("finetune-").unwrap_or(name).to_owned()
    };
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let table = table();
    let mut arrows = 0;
    let mut problems = Vec::new();
    let packages = list(&metadata["packages"]);
    let crates: BTreeSet<String> = packages.iter().map(name_of).collect();
    problems.extend(crates.iter().filter(|name| !table.contains_key(*name)).map(|name| format!("{name} has no row")));
    problems.extend(table.keys().filter(|name| !crates.contains(*name)).map(|name| format!("{name} is no crate")));
    for package in &packages {
        let name = name_of(package);
        let Some(allowed) = table.get(&name) else { continue };
        for dependency in list(&package["dependencies"]).iter().filter(|dependency| dependency["path"].is_string()) {
            let used = name_of(dependency);
            let for_tests = dependency["kind"] == "dev" && allowed.contains(&format!("{used}{FOR_TESTS}"));
            if !allowed.contains(&used) && !for_tests {
                problems.push(format!("{name} must not use {used} ({})", dependency["kind"]));
            }
            arrows += 1;
        }
    }
    assert!(problems.is_empty(), "against the table of ARCHITECTURE.md:\n{}", problems.join("\n"));
    assert!(arrows >= 10, "only {arrows} arrows were found: has the layout changed?");
}

#[test]
fn files_are_short() {
    let python = files_ending("py", &["scripts", "benches", "crates", "tests"]);
    assert!(python.len() > 10, "only {} files of Python were found", python.len());
    let lengths = rust_files().into_iter().chain(python).map(|path| {
        let lines = std::fs::read_to_string(&path).expect("a source file").lines().count();
        (name(&path), lines)
    });
    check_lengths(lengths.collect(), LONGEST_FILE, LONG_FILES);
}

#[test]
fn functions_are_short() {
    let mut lengths = Vec::new();
    for path in rust_files() {
        let (file, text) = (name(&path), std::fs::read_to_string(&path).expect("a source file"));
        lengths.extend(functions(&text).into_iter().map(|(function, lines)| (format!("{file}::{function}"), lines)));
    }
    assert!(lengths.len() > 1000, "only {} functions were found", lengths.len());
    check_lengths(lengths, LONGEST_FUNCTION, LONG_FUNCTIONS);
}

/// Nothing is longer than `limit`, except what is on the list. That may be as long as the list
/// says. What is short again must leave the list.
#[track_caller]
fn check_lengths(lengths: Vec<(String, usize)>, limit: usize, listed: &[(&str, usize)]) {
    let long: Vec<&(String, usize)> = lengths.iter().filter(|(_, lines)| *lines > limit).collect();
    let most = |name: &str| listed.iter().find(|(known, _)| *known == name).map_or(limit, |(_, most)| *most);
    let mut problems: Vec<String> = long
        .iter()
        .filter(|(name, lines)| *lines > most(name))
        .map(|(name, lines)| format!("{name} has {lines} lines, of {} at most: one idea each", most(name)))
        .collect();
    let stale = listed.iter().filter(|(known, _)| !long.iter().any(|(name, _)| name == known));
    problems.extend(stale.map(|(known, _)| format!("{known} is not too long: take it off the list")));
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// Name and number of lines of every function with a body of several lines. The text is rustfmt's:
/// a body ends at the first line that is a closing brace at the indentation of its `fn`.
fn functions(text: &str) -> Vec<(&str, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (first, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let Some(function) = function_name(code) else { continue };
        if code.ends_with(['}', ';']) {
            continue;
        }
        let indentation = &line[..line.len() - code.len()];
        let rest = lines[first..].iter().map(|line| line.strip_prefix(indentation).unwrap_or_default());
        // A declaration without a body ends at the bracket that closes its arguments.
        let mut ends =
            rest.enumerate().filter(|(_, line)| *line == "}" || line.starts_with(')') && line.ends_with(';'));
        if let Some((end, "}")) = ends.next() {
            found.push((function, end + 1));
        }
    }
    found
}

/// The name of the function that a line begins.
fn function_name(code: &str) -> Option<&str> {
    let mut words = code.split_whitespace();
    loop {
        match words.next()? {
            "fn" => return words.next()?.split(['(', '<']).next(),
            "pub" | "pub(crate)" | "pub(super)" | "const" | "async" | "unsafe" | "extern" | "\"C\"" => {}
            _ => return None,
        }
    }
}

#[test]
fn lengths_of_functions() {
    let text = [
        "fn one() {",
        "    1",
        "}",
        "impl A {",
        "    pub(crate) const fn two<T>(",
        "        self,",
        "    ) -> T {",
        "        fn inner() {}",
        "    }",
        "    fn declared(",
        "        self,",
        "    );",
        "}",
    ];
    assert_eq!(functions(&text.join("\n")), [("one", 3), ("two", 5)]);
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
        let name = name(&path);
        let known = UNSAFE.iter().any(|(file, _)| *file == name);
        assert!(known || !is_unsafe, "{name} has unsafe code; give it a file of its own and name it here");
        assert!(is_unsafe || !known, "{name} has no unsafe code any more: take it off the list");
        assert!(!known || text.contains("SAFETY:"), "{name}: unsafe code says why it is sound");
    }
}

/// The table of docs/adding-a-model.md that says where each family's own parts are: the files are there.
#[test]
fn parts_of_families_are_where_the_page_says() {
    let page = std::fs::read_to_string(repository().join("docs/adding-a-model.md")).expect("docs/adding-a-model.md");
    let (_, section) = page.split_once("## What families touched").expect("the section");
    let (table, _) = section.split_once("How many files of the program").expect("the table, and what is behind it");
    let named: BTreeSet<&str> = table.split('`').skip(1).step_by(2).collect();
    assert!(named.len() > 40, "{} files", named.len());
    for name in named {
        let folder = if name.starts_with("crates/") { "" } else { "crates/model/src" };
        assert!(repository().join(folder).join(name).exists(), "docs/adding-a-model.md names `{name}`");
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

/// Every Rust file of the workspace.
fn rust_files() -> Vec<PathBuf> {
    files_ending("rs", &["crates", "tests", "benches", "examples"])
}

/// The files below these folders whose names end so.
fn files_ending(extension: &str, folders: &[&str]) -> Vec<PathBuf> {
    fn below(directory: &Path, extension: &str, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                below(&path, extension, found);
            } else if path.extension().is_some_and(|end| end == extension) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    for folder in folders {
        below(&repository().join(folder), extension, &mut found);
    }
    found
}

/// Every Rust file under crates/*/src.
fn sources() -> Vec<PathBuf> {
    let is_source = |path: &PathBuf| name(path).split('/').nth(2) == Some("src");
    let found: Vec<PathBuf> =
        rust_files().into_iter().filter(|path| name(path).starts_with("crates/") && is_source(path)).collect();
    assert!(found.len() > 50);
    found
}

/// The path of a file, from the top of the repository.
fn name(path: &Path) -> String {
    path.strip_prefix(repository()).expect("in the repository").to_string_lossy().into_owned()
}

/// `cargo run` and `cargo test` must ask for the same features of every library that both build.
/// Otherwise a clone that does both builds burn twice.
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
