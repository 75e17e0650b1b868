//! The four tools, and how their files are told apart.

use std::fmt;
use std::path::Path;

use crate::ImportError;
use crate::yaml::{Node, Value};

/// A tool whose configurations are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// <https://github.com/axolotl-ai-cloud/axolotl>
    Axolotl,
    /// <https://github.com/hiyouga/LLaMA-Factory>
    LlamaFactory,
    /// <https://github.com/meta-pytorch/torchtune>
    Torchtune,
    /// <https://github.com/ml-explore/mlx-lm>
    MlxLm,
}

impl Tool {
    /// All of them.
    pub const ALL: [Tool; 4] = [Tool::Axolotl, Tool::LlamaFactory, Tool::Torchtune, Tool::MlxLm];

    /// As its authors write it.
    pub fn name(self) -> &'static str {
        match self {
            Tool::Axolotl => "axolotl",
            Tool::LlamaFactory => "LLaMA-Factory",
            Tool::Torchtune => "torchtune",
            Tool::MlxLm => "mlx-lm",
        }
    }

    /// As `--from` takes it.
    pub fn flag(self) -> &'static str {
        match self {
            Tool::Axolotl => "axolotl",
            Tool::LlamaFactory => "llama-factory",
            Tool::Torchtune => "torchtune",
            Tool::MlxLm => "mlx-lm",
        }
    }

    /// Whether some keys are this tool's.
    fn wrote(self, root: &Node) -> bool {
        let has = |key: &str| root.entry(key).is_some();
        let any = |keys: &[&str]| keys.iter().any(|key| has(key));
        match self {
            Tool::Axolotl => has("base_model") && any(&["datasets", "pretraining_dataset", "adapter", "sequence_len"]),
            Tool::LlamaFactory => {
                let own = ["stage", "finetuning_type", "template", "cutoff_len", "lora_target", "do_train"];
                has("model_name_or_path") && any(&own)
            }
            Tool::Torchtune => has_components(root, 0),
            Tool::MlxLm => {
                let name = root.entry("model").is_some_and(|entry| entry.node.text().is_some());
                let own = [
                    "iters",
                    "lora_parameters",
                    "fine_tune_type",
                    "adapter_path",
                    "adapter_file",
                    "steps_per_eval",
                    "steps_per_report",
                    "lora_layers",
                    "grad_checkpoint",
                ];
                name && any(&own)
            }
        }
    }

    /// Whether the file says what to train on and how.
    ///
    /// # Errors
    ///
    /// It does not: what it lacks.
    pub(crate) fn trains(self, root: &Node) -> Result<(), String> {
        let has = |key: &str| root.entry(key).is_some();
        match self {
            Tool::LlamaFactory if has("export_dir") => {
                Err("it merges an adapter, as `finetune export --format merged` does".to_owned())
            }
            Tool::LlamaFactory if !(has("dataset") || has("tokenized_path") || has("learning_rate")) => {
                Err("it names no dataset".to_owned())
            }
            Tool::Torchtune if !(has("optimizer") && has("dataset")) => {
                Err("it has no optimizer or no dataset".to_owned())
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Tool {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// The tool whose keys stand in a file.
///
/// # Errors
///
/// Those of none, or of several.
pub(crate) fn recognize(root: &Node, file: &Path) -> Result<Tool, ImportError> {
    let tools: Vec<Tool> = Tool::ALL.into_iter().filter(|tool| tool.wrote(root)).collect();
    match tools.as_slice() {
        [tool] => Ok(*tool),
        [] => Err(ImportError::Unknown { file: file.to_owned(), found: found(root) }),
        _ => Err(ImportError::Ambiguous { file: file.to_owned(), tools }),
    }
}

/// What a file has that is none of the tools'.
fn found(root: &Node) -> String {
    let has = |key: &str| root.entry(key).is_some();
    if has("model_class") || has("train_dataset") && has("peft_config") {
        return "it has the keys of LLaMA-Factory's new form (`model`, `train_dataset`), which is not read".to_owned();
    }
    let keys: Vec<&str> = root.entries().iter().take(5).map(|entry| entry.key.as_str()).collect();
    let more = if root.entries().len() > keys.len() { ", …" } else { "" };
    crate::text::short(&format!("its keys are {}{more}", keys.join(", ")), 200)
}

fn has_components(node: &Node, depth: usize) -> bool {
    let inside = |node: &Node| depth < 3 && has_components(node, depth + 1);
    match &node.value {
        Value::Map(entries) => entries.iter().any(|entry| entry.key == "_component_" || inside(&entry.node)),
        Value::List(items) => items.iter().any(inside),
        Value::Scalar { .. } => false,
    }
}
