//! What can be wrong with a model directory or an adapter.

use std::path::PathBuf;

use finetune_kernels::devices::take_out_of_memory;
use finetune_store::StoreError;

#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("{path}: {source}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path}: {what}")]
    Malformed { path: PathBuf, what: String },
    #[error("{path}: the architecture `{name}` is not supported")]
    Architecture { path: PathBuf, name: String },
    #[error("{path}: `{key}` = {value} is not supported")]
    Setting { path: PathBuf, key: &'static str, value: String },
    #[error("{path}: the model has no tensor `{name}`, which {family} with this config.json needs")]
    MissingTensor { path: PathBuf, name: String, family: &'static str },
    #[error("{path}: the tensor `{name}` belongs to no part of {family} with this config.json{more}")]
    ExtraTensor { path: PathBuf, name: String, family: &'static str, more: String },
    #[error("{path}: the tensor `{name}` has the shape {found:?}, expected {expected:?}")]
    Shape { path: PathBuf, name: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("{path}: the tensor `{name}` is stored as {dtype}; F32, F16 and BF16 are read")]
    Dtype { path: PathBuf, name: String, dtype: String },
    #[error("target_modules: `{target}` matches no linear layer of the model")]
    NoTarget { target: String, examples: Vec<String> },
    #[error("target_modules: `{target}` is no regular expression: {why}")]
    Regex { target: String, why: String },
    #[error("{key}: {what}")]
    Lora { key: &'static str, what: String },
    #[error("{path}: the adapter has `{key}` = {found}, the recipe {expected}")]
    AdapterDiffers { path: PathBuf, key: &'static str, found: String, expected: String },
    #[error("{path}: {what}: {}", list(names))]
    AdapterKeys { path: PathBuf, what: &'static str, names: Vec<String> },
    #[error("token id {token} is not in the model's vocabulary of {vocabulary}")]
    Token { token: u32, vocabulary: usize },
    #[error("not a number in the logits after {generated} generated tokens")]
    NotANumber { generated: usize },
    /// `bytes`: what could not be had at once, where the driver says it.
    #[error("the device is out of memory{}", bytes.map_or(String::new(), |bytes| format!(": {} at once could not be had", finetune_store::human_bytes(bytes))))]
    DeviceMemory { bytes: Option<u64> },
    #[error("the device failed: {what}")]
    Device { what: String },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The first few names, and how many more.
fn list(names: &[String]) -> String {
    let shown = names.iter().take(4).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > 4 { format!("{shown} and {} more", names.len() - 4) } else { shown }
}

impl ModelError {
    /// What a device's driver reported: it runs out of memory in many words.
    pub(crate) fn device(what: String) -> ModelError {
        let what = take_out_of_memory().unwrap_or(what);
        let lower = what.to_lowercase();
        let words =
            ["out of memory", "outofmemory", "out_of_memory", "buffer is too big", "buffertoobig", "not enough memory"];
        if !words.iter().any(|word| lower.contains(word)) {
            return ModelError::Device { what };
        }
        // The largest number in it is the size asked for.
        let numbers = what.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse::<u64>().ok());
        ModelError::DeviceMemory { bytes: numbers.max().filter(|&bytes| bytes > 4096) }
    }

    /// What to do next.
    pub fn hints(&self) -> Vec<String> {
        match self {
            ModelError::Architecture { .. } => {
                vec!["supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM".into()]
            }
            ModelError::NoTarget { examples, .. } => {
                vec![format!("linear layers of this model are called {}", list(examples))]
            }
            ModelError::MissingTensor { .. } | ModelError::ExtraTensor { .. } | ModelError::Shape { .. } => {
                vec!["config.json and the weights do not belong together, or a download is not complete".into()]
            }
            ModelError::AdapterDiffers { key, found, .. } => {
                vec![format!("set `{key}` to {found} in [lora], or start from another adapter")]
            }
            ModelError::Unreadable { .. } => {
                vec!["a model directory needs config.json, tokenizer.json and model.safetensors (or shards with their index)".into()]
            }
            ModelError::Dtype { .. } => vec!["fine-tune the original weights, not a quantized copy".into()],
            ModelError::Device { .. } => {
                vec!["a driver drops work that takes too long, or that there is no memory for: a smaller train.micro_batch_size makes it shorter".into(), "the driver's log may say more; `--resume` goes on from the last checkpoint, model.device = \"cpu\" does without it".into()]
            }
            ModelError::Store(error) => error.hints(),
            _ => vec![],
        }
    }
}
