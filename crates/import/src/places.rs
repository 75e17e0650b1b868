//! Paths, ids of the hub, and the rows that a configuration names.

use crate::draft::{Draft, is_known};
use crate::source::Given;
use crate::text::{list, quoted};

/// Why a relative path has another meaning.
pub(crate) const RELATIVE: &str = "relative to this file here, to the folder the tool was started in there";

/// The folder of a run.
pub(crate) fn output(draft: &mut Draft, given: &Given<'_>, more: &str) {
    let Some(path) = given.node.text() else { return draft.left(given, "not understood: a path is meant") };
    let why = [more, if is_absolute(path) { "" } else { RELATIVE }];
    let why: Vec<&str> = why.into_iter().filter(|why| !why.is_empty()).collect();
    if why.is_empty() {
        draft.carry("output_dir", quoted(path), given);
    } else {
        draft.other("output_dir", quoted(path), &[given], &why.join("; "));
    }
}

/// The base model: a directory or a hub id, as it was written. `revision`: a commit or branch.
pub(crate) fn model(draft: &mut Draft, given: &Given<'_>, revision: Option<&Given<'_>>) {
    let Some(path) = given.node.text() else { return draft.left(given, "not understood: a name is meant") };
    if let (Some(revision), true) = (revision, is_hub_id(path)) {
        let text = revision.node.text().unwrap_or_default();
        let why = "ours has the revision behind the name";
        return draft.other("model.path", quoted(&format!("{path}@{text}")), &[given, revision], why);
    }
    if let Some(revision) = revision {
        draft.left(revision, "a directory has no revision");
    }
    if is_absolute(path) || is_hub_id(path) {
        draft.carry("model.path", quoted(path), given);
    } else {
        draft.other("model.path", quoted(path), &[given], RELATIVE);
    }
}

/// Why a key that packs the base has no counterpart if the base is packed already.
pub(crate) const PACKED_ALREADY: &str = "by its name the base is packed already, and it is read as it is";

/// Whether a model's name says that it is published packed.
pub(crate) fn is_packed(name: &str) -> bool {
    const WORDS: [&str; 8] = ["4bit", "8bit", "gptq", "awq", "fp8", "mxfp4", "nvfp4", "w4a16"];
    let name = name.trim_end_matches('/').rsplit('/').next().unwrap_or(name).to_ascii_lowercase();
    name.split(['-', '_', '.']).any(|word| WORDS.contains(&word))
}

fn is_absolute(path: &str) -> bool {
    path.starts_with('/')
}

/// Whether a text has the form `owner/name` and not that of a path.
pub(crate) fn is_hub_id(text: &str) -> bool {
    let Some((owner, name)) = text.split_once('/') else { return false };
    let plain = |part: &str| {
        !part.is_empty() && part.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_.".contains(letter))
    };
    let folder =
        matches!(owner, "." | ".." | "data" | "dataset" | "datasets" | "model" | "models" | "outputs" | "runs");
    plain(owner) && plain(name) && !folder && !is_rows(text)
}

/// Whether a text names a file of rows, by its extension.
pub(crate) fn is_rows(text: &str) -> bool {
    let text = text.trim_end_matches(".gz").trim_end_matches(".zst").to_ascii_lowercase();
    [".jsonl", ".json", ".csv", ".tsv", ".parquet"].iter().any(|extension| text.ends_with(extension))
}

/// Whether a text names a file or folder of this machine.
pub(crate) fn is_path(text: &str) -> bool {
    let is_address = text.contains("://");
    !is_address && (is_rows(text) || text.starts_with(['/', '.']) || text.contains('/') && !is_hub_id(text))
}

/// The rows of a configuration, as far as they are known.
#[derive(Default)]
pub(crate) struct Rows {
    files: Vec<String>,
    /// Ids of the hub, with their split.
    hub: Vec<String>,
    /// What is neither.
    unknown: Vec<String>,
}

impl Rows {
    /// Adds a file, an id of the hub, or a name that means something to the tool only.
    pub(crate) fn add(&mut self, name: &str, split: Option<&str>) {
        if is_path(name) {
            self.files.push(name.to_owned());
        } else if is_hub_id(name) {
            let split = split.unwrap_or("train");
            // `train[:95%]` is a part of a split, which has no name of its own.
            let split = split.split('[').next().unwrap_or(split);
            self.hub.push(format!("hf://{name}/{split}"));
        } else {
            self.unknown.push(name.to_owned());
        }
    }

    /// Writes `data.train` or `data.eval`.
    pub(crate) fn write(self, draft: &mut Draft, key: &'static str, given: &[&Given<'_>]) {
        let places: Vec<String> = given.iter().map(|given| given.place()).collect();
        let from = places.join(", ");
        // Versions that read the hub know `data.columns`.
        let reads_hub = is_known("data.columns");
        if self.unknown.is_empty() && (self.hub.is_empty() || reads_hub) {
            let all: Vec<String> = self.files.iter().chain(&self.hub).cloned().collect();
            let value = if let [one] = all.as_slice() { quoted(one) } else { list(&all) };
            if all.is_empty() {
                return;
            }
            let absolute = self.files.iter().all(|file| is_absolute(file));
            let why = match (absolute, self.hub.is_empty()) {
                (true, true) => return draft.other(key, value, given, "the files that it names"),
                (false, true) => RELATIVE,
                _ => "`hf://` names a data set of the hub here; a file is relative to this one",
            };
            return draft.other(key, value, given, why);
        }
        let names: Vec<&String> = self.unknown.iter().chain(&self.hub).collect();
        let names: Vec<&str> = names.iter().map(|name| name.trim_start_matches("hf://")).collect();
        let stand_in = if key == "data.eval" { "data/valid.jsonl" } else { "data/train.jsonl" };
        let mut files = self.files;
        files.push(stand_in.to_owned());
        let value = if let [one] = files.as_slice() { quoted(one) } else { list(&files) };
        let what = if self.unknown.is_empty() { "of the hub" } else { "that the tool knows by name" };
        draft.fill_in(key, value, &format!("a file with the rows {what}: {}; {from}", names.join(", ")));
    }
}

/// `data.columns`: the names that files have for our keys, those that differ.
pub(crate) fn columns(draft: &mut Draft, pairs: &[(&str, String)], given: &[&Given<'_>]) {
    let differ: Vec<String> = pairs
        .iter()
        .filter(|(ours, theirs)| ours != theirs)
        .map(|(ours, theirs)| format!("{ours} = {}", quoted(theirs)))
        .collect();
    if !differ.is_empty() {
        let value = format!("{{ {} }}", differ.join(", "));
        draft.other("data.columns", value, given, "ours names our key first");
    }
}

#[cfg(test)]
mod tests {
    use super::{is_hub_id, is_packed, is_path};

    #[test]
    fn names_and_paths() {
        for (text, hub, path) in [
            ("tatsu-lab/alpaca", true, false),
            ("data/train.jsonl", false, true),
            ("data/sft", false, true),
            ("./data", false, true),
            ("/abs/x", false, true),
            ("alpaca_en_demo", false, false),
            ("rows.json", false, true),
            ("a/b/c", false, true),
            ("me/rows.parquet", false, true),
            ("s3://bucket/rows.jsonl", false, false),
        ] {
            assert_eq!((is_hub_id(text), is_path(text)), (hub, path), "{text}");
        }
    }

    #[test]
    fn names_of_packed_models() {
        for (name, packed) in [
            ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", true),
            ("unsloth/Qwen3-8B-unsloth-bnb-4bit", true),
            ("mlx-community/Qwen3-0.6B-4bit", true),
            ("TechxGenus/Meta-Llama-3-8B-Instruct-GPTQ", true),
            ("models/Qwen3-4B-FP8/", true),
            ("acme/4bit-tools/base", false),
            ("Qwen/Qwen3-8B", false),
            ("acme/awqua-7b", false),
        ] {
            assert_eq!(is_packed(name), packed, "{name}");
        }
    }
}
