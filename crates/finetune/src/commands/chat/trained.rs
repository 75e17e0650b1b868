//! What a run or model knows about how it is to be asked: the system prompt that all its training
//! rows have, the sampling that its publisher recommends, and the step that a result is.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use finetune_dataset::resolve_files;
use finetune_recipe::Recipe;
use finetune_store::{RealDisk, manifest_of};
use serde_json::Value;

use crate::source::{Source, recipe_of, run_of};

/// The most rows, and the most bytes of them, that are looked at.
const LOOKED_AT: usize = 10_000;
const LOOKED_AT_BYTES: u64 = 64 << 20;

/// The most bytes of a generation_config.json.
const LONGEST_CONFIG: u64 = 1 << 20;

/// A system prompt that the training rows of a run have in common.
#[derive(Debug, PartialEq)]
pub(super) struct CommonSystem {
    pub(super) text: String,
    /// The name of the first file of rows.
    pub(super) file: String,
}

/// The system prompt that all rows begin with that a run was trained on. `None`: it is no run, its
/// rows are not there any more, or they have none in common.
pub(super) fn common_system(source: &Source) -> Option<CommonSystem> {
    let run = run_of(source.adapter.as_deref().unwrap_or(&source.model))?;
    of_recipe(&recipe_of(&run)?)
}

fn of_recipe(recipe: &Recipe) -> Option<CommonSystem> {
    let (files, _) = resolve_files(&recipe.data.train, &[]).ok()?;
    let mut common = None::<String>;
    let mut left = LOOKED_AT;
    for file in &files {
        for line in BufReader::new(File::open(file).ok()?.take(LOOKED_AT_BYTES)).lines().take(left) {
            let line = line.ok()?;
            let line = line.trim_start_matches('\u{feff}').trim();
            if line.is_empty() {
                continue;
            }
            left -= 1;
            let row: Value = match serde_json::from_str(line) {
                Ok(row) => row,
                // The limit on bytes cuts the last row that is looked at.
                Err(_) if common.is_some() && is_cut(file) => break,
                Err(_) => return None,
            };
            let text = system_of(&row)?;
            if common.get_or_insert_with(|| text.to_owned()).as_str() != text {
                return None;
            }
        }
    }
    let file = files.first()?.file_name()?.to_string_lossy().into_owned();
    Some(CommonSystem { text: common?, file })
}

fn is_cut(file: &Path) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.len() > LOOKED_AT_BYTES)
}

/// The text of a row's system message.
fn system_of(row: &Value) -> Option<&str> {
    let first = row.get("messages")?.get(0).filter(|message| message["role"] == "system")?;
    first["content"].as_str().filter(|text| !text.is_empty())
}

/// (temperature, top_p) that generation_config.json recommends: that of the adapter, else that of
/// the model. Without `do_sample` transformers takes the most likely token, and so do we.
pub(in crate::commands) fn recommended(source: &Source) -> (f64, f64) {
    let directories = source.adapter.iter().chain([&source.model]);
    let config = directories.map(|directory| json(&directory.join("generation_config.json")));
    let sampled = config.into_iter().find(|config| config["do_sample"] == true);
    let Some(config) = sampled else { return (0.0, 1.0) };
    let number = |key: &str, fits: fn(f64) -> bool| config[key].as_f64().filter(|number| fits(*number)).unwrap_or(1.0);
    (number("temperature", |t| t >= 0.0 && t.is_finite()), number("top_p", |p| p > 0.0 && p <= 1.0))
}

/// Null if it cannot be read: what needs more of it reports that.
fn json(path: &Path) -> Value {
    let mut text = String::new();
    let _ = File::open(path).and_then(|file| file.take(LONGEST_CONFIG).read_to_string(&mut text));
    serde_json::from_str(&text).unwrap_or_default()
}

/// The step that an adapter or a trained model of ours is.
pub(super) fn step(source: &Source) -> Option<u64> {
    let directory = source.adapter.as_deref().unwrap_or(&source.model);
    manifest_of(&RealDisk, directory)?.fields.get("step")?.as_u64()
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]
mod tests {
    use super::*;

    fn system_of_rows(rows: &str) -> Option<String> {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("train.jsonl"), rows).expect("rows");
        let text = "[model]\npath = \"acme/tiny\"\n[data]\ntrain = \"train.jsonl\"\n";
        let recipe = Recipe::parse(text, &folder.path().join("recipe.toml"), &[], Some(Path::new("run")));
        of_recipe(&recipe.expect("a recipe")).map(|common| common.text)
    }

    #[test]
    fn a_system_prompt_that_all_rows_have() {
        let row = |system: &str| {
            format!(
                "{{\"messages\": [{{\"role\": \"system\", \"content\": \"{system}\"}}, {{\"role\": \"user\", \"content\": \"Hi\"}}]}}\n"
            )
        };
        let without = "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}\n";
        for (rows, want) in [
            (row("Be brief.").repeat(3), Some("Be brief.")),
            (row("Be brief.") + "\n" + &row("Be brief."), Some("Be brief.")),
            (row("Be brief.") + &row("Be long."), None),
            (row("Be brief.") + without, None),
            (without.to_owned(), None),
            (row(""), None),
            ("{\"text\": \"Hi\"}\n".to_owned(), None),
            ("no rows".to_owned(), None),
            (String::new(), None),
        ] {
            assert_eq!(system_of_rows(&rows).as_deref(), want, "{rows}");
        }
    }
}
