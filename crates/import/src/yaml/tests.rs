use std::path::Path;

use super::{Node, parse};

fn read(text: &str) -> Node {
    parse(text, Path::new("x.yml")).expect(text)
}

/// (YAML, number, truth, null)
#[test]
fn scalars_are_read_as_pyyaml_and_the_tools_read_them() {
    for (text, number, truth, null) in [
        ("1e-5", Some(1e-5), None, false),
        ("\"2e-4\"", Some(2e-4), None, false),
        ("1_000", Some(1000.0), None, false),
        ("3.0", Some(3.0), None, false),
        (".5", Some(0.5), None, false),
        ("010", None, None, false),
        ("1:30", None, None, false),
        (".inf", None, None, false),
        ("inf", None, None, false),
        ("yes", None, Some(true), false),
        ("Off", None, Some(false), false),
        ("", None, None, true),
        ("~", None, None, true),
        ("\"null\"", None, None, false),
        ("[]", None, None, true),
    ] {
        let root = read(&format!("a: {text}\n"));
        let node = &root.entry("a").expect("a").node;
        assert_eq!((node.number(), node.bool(), node.is_null()), (number, truth, null), "{text}");
    }
}

#[test]
fn lines_aliases_merges_and_doubles() {
    let root = read("base: &b\n  r: 8\n  alpha: 16\nlora:\n  <<: *b\n  r: 4\nx: 1\nx: 2\n");
    let lora = &root.entry("lora").expect("lora").node;
    let value = |key: &str| lora.entry(key).and_then(|entry| entry.node.integer());
    assert_eq!((value("r"), value("alpha")), (Some(4), Some(16)));
    assert_eq!(root.entry("x").map(|entry| (entry.line, entry.node.integer())), Some((8, Some(2))));
}

/// (YAML, part of the error)
#[test]
fn what_is_no_configuration_is_refused_with_its_place() {
    let bomb: String =
        (1..12).map(|n| format!("a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 9].join(", "))).collect();
    let bomb = format!("a0: &a0 [1, 2]\n{bomb}");
    let deep = format!("a: {}", "[".repeat(70) + &"]".repeat(70));
    for (text, says) in [
        ("- 1\n- 2\n", "x.yml: not a configuration"),
        ("", "the file is empty"),
        ("a: 1\n---\nb: 2\n", "x.yml:2:1: not YAML: a second document"),
        ("a: [1, 2\n", "not YAML"),
        ("? [1]\n: 2\n", "a list or map as a key"),
        (bomb.as_str(), "more than 4000 values"),
        (deep.as_str(), "inside each other"),
    ] {
        let error = parse(text, Path::new("x.yml")).expect_err(text).to_string();
        assert!(error.contains(says), "{says}: {error}");
    }
}
