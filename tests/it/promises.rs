//! `docs/promises.md` names the tests that hold each promise. This file checks that they exist.

use crate::folder::repository;

/// Whether a source file has a test of this name, or a check that its macro makes tests of.
fn has_test(source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim_start).collect();
    let declaration = format!("fn {name}(");
    let is_test = |line: usize| {
        let mut above = lines[..line].iter().rev().take_while(|line| line.starts_with("#[") || line.starts_with("///"));
        above.any(|line| *line == "#[test]")
    };
    let by_family = ["family", "case"].map(|of| [format!("of_each_{of}!({name});"), format!("of_each_{of}!({name}:")]);
    lines.iter().enumerate().any(|(n, line)| line.starts_with(&declaration) && is_test(n))
        || by_family.iter().flatten().any(|call| source.contains(call))
}

#[test]
fn every_test_of_a_promise_exists() {
    let page = std::fs::read_to_string(repository().join("docs/promises.md")).expect("docs/promises.md");
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| ") && line.contains(".rs::")).collect();
    let claims = page.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| ---")).count();
    let headings = page.lines().filter(|line| *line == "| claim | tests |").count();
    assert_eq!(rows.len(), claims - headings, "a claim without a test");
    assert!(rows.len() > 30, "only {} promises were found", rows.len());
    let mut missing = Vec::new();
    for named in rows.iter().flat_map(|row| row.split('`')).filter(|text| text.contains(".rs::")) {
        let (file, test) = named.split_once("::").expect("a file and a test");
        let source = std::fs::read_to_string(repository().join(file)).unwrap_or_default();
        if !has_test(&source, test) {
            missing.push(named);
        }
    }
    assert!(missing.is_empty(), "docs/promises.md names tests that do not exist: {missing:#?}");
}

#[test]
fn what_counts_as_a_test() {
    let source =
        "/// One.\n#[test]\n#[ignore = \"slow\"]\nfn one() {}\n\nfn two() {}\nof_each_family!(three: llama);\n";
    for (name, is_test) in [("one", true), ("two", false), ("three", true), ("four", false)] {
        assert_eq!(has_test(source, name), is_test, "{name}");
    }
}
