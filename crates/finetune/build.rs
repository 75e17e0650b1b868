//! Tells the program which commit and target it is built from (`finetune --version`).

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=FINETUNE_COMMIT");
    let given =
        std::env::var("FINETUNE_COMMIT").ok().and_then(|text| text.split_whitespace().next().map(str::to_owned));
    let commit = given.or_else(commit).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo::rustc-env=FINETUNE_COMMIT={commit}");
    println!("cargo::rustc-env=FINETUNE_TARGET={}", std::env::var("TARGET").unwrap_or_default());
}

/// The commit that git has checked out. `None` in an archive without history, also if the archive
/// was unpacked inside another repository.
fn commit() -> Option<String> {
    let top = git(&["rev-parse", "--show-toplevel"])?;
    if Path::new(&top).canonicalize().ok()? != Path::new("../..").canonicalize().ok()? {
        return None;
    }
    // HEAD changes with the branch, the branch and HEAD's log with each commit. Cargo builds anew if
    // a file that it watches is missing, so only those that exist are named.
    let branch = git(&["symbolic-ref", "--quiet", "HEAD"]);
    for name in ["HEAD", "logs/HEAD"].into_iter().chain(branch.as_deref()) {
        if let Some(path) = git(&["rev-parse", "--git-path", name]).filter(|path| Path::new(path).exists()) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    git(&["rev-parse", "HEAD"])
}

/// What git prints, if it succeeds and prints something. Cargo starts this program in the package's
/// folder.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}
