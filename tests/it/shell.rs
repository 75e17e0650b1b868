//! What a package lays beside the program: completions, manual pages, what `--version` says.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use crate::program::{finetune, run};

/// Whether this system has a program.
fn has(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output().expect("a shell");
    if !found.status.success() {
        eprintln!("SKIPPED: no {program} here");
    }
    found.status.success()
}

/// Runs a program that checks a file. It has to be content.
#[track_caller]
fn accepts(program: &str, arguments: &[&str], file: &Path) {
    let output = Command::new(program).args(arguments).arg(file).output().expect("it starts");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} refuses {}:\n{said}", file.display());
}

#[test]
fn completions_are_what_shells_accept() {
    let folder = tempfile::tempdir().expect("a folder");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(&mut finetune(["completions", shell])).expect(0).stdout;
        for word in ["validate", "cluster", "discover", "resume", "max-new-tokens"] {
            assert!(script.contains(word), "{shell} lacks {word}");
        }
        for hidden in ["preflight", "assigned"] {
            assert!(!script.contains(hidden), "{shell} offers {hidden}");
        }
        let file = folder.path().join(shell);
        std::fs::write(&file, script).expect("a file");
        if ["bash", "zsh", "fish"].contains(&shell) && has(shell) {
            accepts(shell, &["-n"], &file);
        }
    }
    let refused = run(&mut finetune(["completions", "tcsh"])).expect(2);
    assert!(refused.stderr.contains("bash") && refused.stderr.contains("fish"), "{}", refused.stderr);
}

#[test]
fn every_command_has_a_manual_page() {
    let folder = tempfile::tempdir().expect("a folder");
    let directory = folder.path().join("share/man/man1");
    let said = run(finetune(["man", "--output"]).arg(&directory)).expect(0).stdout;
    let pages: BTreeSet<String> = std::fs::read_dir(&directory)
        .expect("pages")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    assert!(said.starts_with(&format!("{} pages in ", pages.len())), "{said}");
    for page in ["finetune.1", "finetune-run.1", "finetune-man.1", "finetune-cluster.1", "finetune-cluster-bench.1"] {
        assert!(pages.contains(page), "{page} is missing: {pages:?}");
    }
    assert!(!pages.contains("finetune-preflight.1"), "hidden commands have no page");
    let (mandoc, man) = (has("mandoc"), has("man"));
    for page in pages.iter().map(|page| directory.join(page)) {
        if mandoc {
            accepts("mandoc", &["-T", "lint", "-W", "error"], &page);
        }
        if man {
            accepts("man", &["-l"], &page);
        }
    }
    let one = run(&mut finetune(["man", "cluster", "bench"])).expect(0).stdout;
    assert_eq!(one, std::fs::read_to_string(directory.join("finetune-cluster-bench.1")).expect("a page"));
    assert!(one.contains("finetune cluster bench"), "the synopsis has the whole command");
    run(&mut finetune(["man", "cluster", "tidy"])).expect(2).says("there is no command `cluster tidy`");
}

/// Bug reports begin with it, and `cluster doctor` and packages compare its first line.
#[test]
fn the_version_names_what_was_built() {
    let long = run(&mut finetune(["--version"])).expect(0).stdout;
    let short = run(&mut finetune(["-V"])).expect(0).stdout;
    assert_eq!(short, format!("finetune {}\n", env!("CARGO_PKG_VERSION")));
    assert!(long.starts_with(&short), "{long}");
    let value = |name: &str| {
        let line = long.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {long}")).trim().to_owned()
    };
    let commit = value("commit ");
    let is_hash = commit.len() == 40 && commit.chars().all(|letter| letter.is_ascii_hexdigit());
    assert!(is_hash || commit == "unknown", "{commit}");
    assert!(value("target ").contains(std::env::consts::ARCH), "{long}");
    assert!(value("backends ").starts_with("cpu"), "{long}");
    assert_eq!(value("allocator "), "mimalloc");
    value("features ");
}
