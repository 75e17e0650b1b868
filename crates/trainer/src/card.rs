//! The model card, `README.md` beside the tensors of an adapter or a checkpoint: what it was made
//! of.
//!
//! It is a function of the recipe, the rows and the metrics up to a step. So it has the same bytes
//! on every machine, whatever interrupted the run. It holds no times, speeds or paths, and no
//! number of steps that a resume may change.

use std::fmt::Write;
use std::path::Path;

use finetune_dataset::Dataset;
use finetune_recipe::{Method, Recipe};

use crate::metrics::Row;
use crate::numbers::counted;
use crate::snapshot::Snapshot;
use crate::summary::before_and_after;

/// The card of the run's state as it is now.
pub(crate) fn model_card(run: &Snapshot<'_>, rows: &[Row]) -> String {
    model_card_of(run, rows, run.state.step)
}

/// The card of what the run was after `step` steps: the card of a best checkpoint, which is
/// published later.
pub(crate) fn model_card_of(run: &Snapshot<'_>, rows: &[Row], step: u64) -> String {
    let data = [("train", Some(run.train)), ("held back", run.eval)];
    card(run.recipe, &data, rows, step)
}

/// The text of a card. `data`: names of the data sets, and their rows if there are any.
fn card(recipe: &Recipe, data: &[(&str, Option<&Dataset>)], rows: &[Row], step: u64) -> String {
    let base = base_name(recipe);
    let (library, kind, title) = match recipe.train.method {
        Method::Lora => ("peft", "A LoRA adapter for", format!("LoRA adapter for {base}")),
        Method::Full => ("transformers", "All weights, trained from", format!("{base}, fine-tuned")),
    };
    let mut card = format!(
        "---\nbase_model: {}\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n- finetune\n",
        serde_json::Value::from(base.as_str())
    );
    if recipe.train.method == Method::Lora {
        // Tags that the hub gives adapters.
        let _ = writeln!(card, "- base_model:adapter:{}\n- lora", yaml_word(&base));
    }
    let (version, steps) = (env!("CARGO_PKG_VERSION"), counted(step, "step"));
    let _ = write!(card, "---\n\n# {title}\n\n{kind} `{base}`, written by finetune {version} after {steps}.\n");
    losses(&mut card, rows, step);
    card.push_str("\n## Data\n\n");
    for (name, data) in data {
        let Some(data) = data else { continue };
        let files: Vec<String> = data.files.iter().map(|file| format!("`{}`", file_name(file))).collect();
        let (rows, trained) = (counted(data.rows.len() as u64, "row"), counted(data.counts.trained_tokens, "token"));
        let _ = writeln!(card, "- {name}: {}: {rows}, {trained} of them trained on", files.join(", "));
    }
    card.push_str("\n## Recipe\n\n```toml\n");
    for (key, value) in recipe.meaning().into_iter().filter(|(_, value)| value != "none") {
        if recipe.train.method == Method::Full && key.starts_with("lora.") {
            continue;
        }
        let _ = writeln!(card, "{key} = {value}");
    }
    card.push_str("```\n");
    card
}

/// The table of losses, if the metrics go back to the first step.
fn losses(card: &mut String, rows: &[Row], step: u64) {
    let (loss, eval) = before_and_after(rows, step);
    let lines = [("training rows, of a step", loss), ("held-back rows", eval)];
    if lines.iter().all(|(_, pair)| pair.is_none()) {
        return;
    }
    card.push_str("\n| loss per trained token | before | after |\n| --- | --- | --- |\n");
    for (name, pair) in lines {
        if let Some((before, after)) = pair {
            let _ = writeln!(card, "| {name} | {before:.4} | {after:.4} |");
        }
    }
}

/// The hub's name of the base if the recipe has one, otherwise the name of its directory.
pub(crate) fn base_name(recipe: &Recipe) -> String {
    match recipe.model.hub_id() {
        // The commit is in adapter_config.json.
        Some(id) => id.split('@').next().unwrap_or(id).to_owned(),
        None => file_name(Path::new(&recipe.model.path)),
    }
}

/// The last name of a path, without letters that mean something in Markdown and HTML.
pub(crate) fn file_name(path: &Path) -> String {
    // "." and ".." have no last name of their own.
    let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let named = if path.file_name().is_some() { path } else { full.as_path() };
    let name = named.file_name().unwrap_or_default().to_string_lossy();
    name.chars().map(|letter| if letter.is_control() || "`<>&\"".contains(letter) { '_' } else { letter }).collect()
}

/// The text with `_` for every letter that could end a YAML scalar.
fn yaml_word(text: &str) -> String {
    let plain = |letter: char| letter.is_alphanumeric() || "-_./".contains(letter);
    text.chars().map(|letter| if plain(letter) { letter } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(more: &str) -> Recipe {
        let text = format!("[model]\npath = \"acme/tiny-1\"\n[data]\ntrain = \"private/place/t.jsonl\"\n{more}");
        Recipe::parse(&text, Path::new("/home/me/r.toml"), &[], Some(Path::new("/home/me/run")))
            .unwrap_or_else(|error| panic!("{error}"))
    }

    fn row(text: &str) -> Row {
        serde_json::from_str(text).expect("a row")
    }

    #[test]
    fn a_card_says_what_it_was_made_of_and_no_place() {
        let rows = [
            row(r#"{"step":0,"eval_loss":3.5,"eval_tokens":9}"#),
            row(
                r#"{"step":1,"epoch":1.0,"loss":3.25,"trained_tokens":4,"tokens":8,"grad_norm":1.0,"learning_rate":1.0,"tokens_per_second":77.0,"seconds":0.125}"#,
            ),
            row(r#"{"step":1,"eval_loss":2.75,"eval_tokens":9}"#),
        ];
        let recipe = recipe("[lora]\ninit_from = \"/home/me/start\"\n");
        let text = card(&recipe, &[("train", None)], &rows, 1);
        let head = "---\nbase_model: \"acme/tiny-1\"\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- finetune\n\
                    - base_model:adapter:acme/tiny-1\n- lora\n---\n";
        assert!(text.starts_with(head), "{text}");
        for part in [
            "after 1 step.",
            "| 3.2500 | 3.2500 |",
            "| held-back rows | 3.5000 | 2.7500 |",
            "lora.rank = 16\n",
            "\"start\"",
        ] {
            assert!(text.contains(part), "lacks {part:?}: {text}");
        }
        for part in ["/home/me", "private", "77", "0.125", "none"] {
            assert!(!text.contains(part), "has {part:?}: {text}");
        }
    }

    #[test]
    fn all_weights_are_no_adapter() {
        let text = card(&recipe("[train]\nmethod = \"full\"\n"), &[], &[], 40);
        assert!(text.contains("library_name: transformers\n") && text.contains("after 40 steps."), "{text}");
        assert!(!text.contains("lora") && !text.contains("| before |"), "{text}");
    }

    #[test]
    fn names_of_files_are_no_markup() {
        for (path, name) in [("a/b.jsonl", "b.jsonl"), ("x/`<b>`\n.jsonl", "__b___.jsonl"), ("/", "")] {
            assert_eq!(file_name(Path::new(path)), name);
        }
    }
}
