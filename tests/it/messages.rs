//! What a user sees after a mistake: everything is on stderr, nothing on stdout, and the exit code
//! says the kind.

use expect_test::{Expect, expect};

use crate::folder::{CRASH_RECIPE, Folder, metrics, repository};

mod arguments;
mod places;
mod recipes;
mod rows;

/// Runs `finetune ARGUMENTS` in the folder and compares what it says. Paths of this machine become
/// `<folder>` and `<repository>`.
#[track_caller]
fn check(folder: &Folder, arguments: &[&str], want: Expect) {
    let ended = folder.finetune(arguments);
    assert_eq!(ended.stdout, "", "errors go to stderr");
    let code = ended.code.unwrap_or_else(|| panic!("{ended:?}"));
    let temporary = folder.path("");
    let text = ended
        .stderr
        .replace(temporary.to_str().expect("UTF-8").trim_end_matches('/'), "<folder>")
        .replace(repository().to_str().expect("UTF-8"), "<repository>");
    want.assert_eq(&format!("{text}(exit code {code})\n"));
}

const RUN: [&str; 2] = ["run", "recipe.toml"];

/// The message names the rows to look at. No weight was changed, and what was saved before is still
/// there.
#[test]
fn numbers_that_are_not_finite() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    check(
        &folder,
        &["run", "recipe.toml", "--quiet", "--set", "optimizer.learning_rate=1e30", "--set", "train.max_grad_norm=0"],
        expect![[r#"
            error: the loss is not finite in step 2; no weight was changed by it

            hint: rows of the step: train.jsonl:6, train.jsonl:10, train.jsonl:5, train.jsonl:1, train.jsonl:2
            hint: no checkpoint is known to be from before that; from the beginning with a lower rate: finetune run run/recipe.toml --output-dir run-2 --set optimizer.learning_rate=2e-4 --set train.max_grad_norm=1.0
            (exit code 4)
        "#]],
    );
    let steps = metrics(&folder.path("run")).iter().filter(|row| row.get("loss").is_some()).count();
    assert_eq!(steps, 1, "step 2 is not among the steps done");
    assert!(!folder.path("run/adapter").exists());
}
