//! A temporary folder with a small model, rows and a recipe in it, and what a run in it leaves
//! behind.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::program::{Ended, finetune, run};

pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository")
}

/// A tiny model of `scripts/make_goldens.py`: weights and rows of tokens, no tokenizer.
pub(crate) fn golden(family: &str) -> PathBuf {
    repository().join("tests/goldens/models").join(family)
}

/// The names of all golden models.
pub(crate) fn golden_models() -> Vec<String> {
    let entries = std::fs::read_dir(golden("")).expect("golden files").map(|entry| entry.expect("an entry"));
    let models = entries.filter(|entry| entry.path().join("golden.json").is_file());
    let mut names: Vec<String> = models.map(|entry| entry.file_name().into_string().expect("a name")).collect();
    names.sort();
    names
}

/// The run of the crash tests. It has shuffled rows, dropout, micro-batches that do not divide a
/// step (5 rows as 2, 2, 1) and a partial last step of each epoch (12 rows as 5, 5, 2). It
/// evaluates, and its best checkpoint is not the last one, because the learning rate is far too
/// high.
pub(crate) const CRASH_RECIPE: &str = r#"
output_dir = "run"
seed = 7
[model]
path = "model"
[lora]
rank = 4
alpha = 8
dropout = 0.1
[data]
train = "train.jsonl"
eval = "eval.jsonl"
[train]
max_steps = 10
global_batch_size = 5
micro_batch_size = 2
[optimizer]
learning_rate = 5e-2
[schedule]
name = "constant"
[eval]
every = 2
[checkpoint]
every = 2
keep_last = 1
"#;

pub(crate) struct Folder {
    directory: TempDir,
}

impl Folder {
    pub(crate) fn empty() -> Folder {
        Folder { directory: tempfile::tempdir().expect("a temporary directory") }
    }

    /// A copy of a golden model and its rows, those of another family to evaluate on, and
    /// `recipe.toml`.
    pub(crate) fn with_recipe(recipe: &str) -> Folder {
        let folder = Folder::empty();
        std::fs::create_dir(folder.path("model")).expect("a new directory");
        for (from, to) in [
            ("qwen3/config.json", "model/config.json"),
            ("qwen3/model.safetensors", "model/model.safetensors"),
            ("qwen3/rows.jsonl", "train.jsonl"),
            ("llama/rows.jsonl", "eval.jsonl"),
        ] {
            folder.write(to, &std::fs::read(golden(from)).expect("a golden file"));
        }
        folder.write("recipe.toml", recipe.as_bytes());
        folder
    }

    /// A model directory `model` that knows words: the quickstart's tokenizer and chat template
    /// over one tiny layer. It has no weights, so recipes on it say `method = "full"`.
    pub(crate) fn with_chat_model(recipe: &str) -> Folder {
        let folder = Folder::empty();
        std::fs::create_dir(folder.path("model")).expect("a new directory");
        for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
            let file = repository().join("datasets/quickstart/base").join(name);
            folder.write(&format!("model/{name}"), &std::fs::read(&file).expect("a file of the quickstart"));
        }
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1024, "hidden_size": 16,
            "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "hidden_act": "silu", "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": true, "initializer_range": 0.2, "eos_token_id": 0,
        });
        folder.write("model/config.json", config.to_string().as_bytes());
        folder.write("recipe.toml", recipe.as_bytes());
        folder
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).expect("a file in a temporary directory");
    }

    /// `finetune run recipe.toml --output-dir OUTPUT`, with more arguments.
    pub(crate) fn command(&self, output: &str, arguments: &[&str]) -> Command {
        let mut command = finetune(["run", "recipe.toml", "--output-dir", output]);
        command.args(arguments).current_dir(self.directory.path());
        command
    }

    pub(crate) fn run(&self, output: &str, arguments: &[&str]) -> Ended {
        run(&mut self.command(output, arguments))
    }

    /// `finetune ARGUMENTS` in this folder.
    pub(crate) fn finetune(&self, arguments: &[&str]) -> Ended {
        run(finetune(arguments).current_dir(self.directory.path()))
    }

    /// A run that is killed at a failpoint, such as `checkpoint.file:3`. False if it never came to
    /// that point.
    #[track_caller]
    pub(crate) fn run_killed_at(&self, output: &str, arguments: &[&str], failpoint: &str) -> bool {
        let ended = run(self.command(output, arguments).env("FINETUNE_FAILPOINT", failpoint));
        match (ended.code, ended.signal) {
            (_, Some(SIGABRT)) => true,
            (Some(0), _) => false,
            _ => panic!("{failpoint}: {ended:?}"),
        }
    }

    /// `finetune launch ARGUMENTS -- recipe.toml --output-dir OUTPUT`, with more words for the run.
    pub(crate) fn launch(&self, arguments: &[&str], output: &str, words: &[&str]) -> Command {
        let mut command = finetune(["launch"]);
        command.args(arguments).args(["--", "recipe.toml", "--output-dir", output]).args(words);
        command.current_dir(self.directory.path());
        command
    }

    pub(crate) fn result(&self, output: &str) -> RunResult {
        RunResult::of(&self.path(output))
    }
}

const SIGABRT: i32 = 6;

/// Everything about a run that must not depend on how often it was interrupted.
#[derive(Debug, PartialEq)]
pub(crate) struct RunResult {
    /// Rows of metrics.jsonl, without times and without the numbers of each rank.
    pub(crate) metrics: Vec<String>,
    /// Files of the final adapter and of all checkpoints, also those that begin with a dot.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
}

impl RunResult {
    pub(crate) fn of(directory: &Path) -> RunResult {
        let mut files = tree(directory);
        files.retain(|name, _| ["adapter/", "model/", "checkpoints/"].iter().any(|part| name.starts_with(part)));
        let rows = metrics(directory).into_iter().map(|mut row| {
            let row = row.as_object_mut().expect("an object");
            row.retain(|key, _| !["seconds", "reading_seconds", "tokens_per_second", "ranks"].contains(&key.as_str()));
            serde_json::to_string(row).expect("an object")
        });
        RunResult { metrics: rows.collect(), files }
    }

    /// Names what differs, rather than printing both.
    #[track_caller]
    pub(crate) fn expect_same(&self, want: &RunResult, what: &str) {
        assert_eq!(self.metrics, want.metrics, "{what}: metrics.jsonl");
        let names = |result: &RunResult| result.files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(self), names(want), "{what}: files");
        for (name, bytes) in &want.files {
            assert!(self.files[name] == *bytes, "{what}: {name} has other bytes");
        }
    }

    /// Names of the checkpoints, oldest first.
    pub(crate) fn checkpoints(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .files
            .keys()
            .filter_map(|name| name.strip_prefix("checkpoints/")?.split_once('/').map(|(name, _)| name.to_owned()))
            .collect();
        names.dedup();
        names
    }
}

/// Rows of metrics.jsonl. Every line must be whole.
#[track_caller]
pub(crate) fn metrics(directory: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(directory.join("metrics.jsonl")).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

/// All files below a directory with their bytes, except the lock.
pub(crate) fn tree(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut waiting = vec![directory.to_owned()];
    while let Some(next) = waiting.pop() {
        for entry in std::fs::read_dir(&next).unwrap_or_else(|error| panic!("{}: {error}", next.display())) {
            let path = entry.expect("an entry").path();
            let name = path.strip_prefix(directory).expect("below it").to_string_lossy().into_owned();
            if path.is_dir() {
                waiting.push(path);
            } else if name != ".lock" {
                files.insert(name, std::fs::read(&path).expect("a file"));
            }
        }
    }
    files
}
