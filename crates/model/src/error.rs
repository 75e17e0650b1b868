//! What can be wrong with a model directory or an adapter.

mod relatives;

use std::path::{Path, PathBuf};

use finetune_advice::Advice;
use finetune_gguf::GgufError;
use finetune_kernels::devices::take_out_of_memory;
use finetune_packed::PackedError;
use finetune_store::StoreError;

use crate::adapter::MLX_FILE;
use crate::config::family::FAMILIES;

/// What can be wrong with a model directory, an adapter or a device. The fields are the words of
/// each variant's message.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message above a variant says what its fields are")]
pub enum ModelError {
    /// A file cannot be read.
    #[error("{path}: {source}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    /// A file is not what its name says.
    #[error("{path}: {what}")]
    Malformed { path: PathBuf, what: String },
    /// config.json names a model class that no family has.
    #[error("{path}: the architecture `{name}` is not supported")]
    Architecture { path: PathBuf, name: String },
    /// A setting that the program does not compute.
    #[error("{path}: `{key}` = {value} is not supported")]
    Setting { path: PathBuf, key: &'static str, value: String },
    /// A GGUF file that is no base. `hint`: what to do instead.
    #[error("{path}: {what}")]
    GgufBase { path: PathBuf, what: String, hint: String },
    /// The files lack a tensor.
    #[error("{path}: the model has no tensor `{name}`, which {family} with this config.json needs")]
    MissingTensor { path: PathBuf, name: String, family: &'static str },
    /// The files have a tensor that takes part in arithmetic which the config does not have.
    #[error("{path}: the tensor `{name}` belongs to no part of {family} with this config.json{more}")]
    ExtraTensor { path: PathBuf, name: String, family: &'static str, more: String },
    /// A tensor has another shape than the config says.
    #[error("{path}: the tensor `{name}` has the shape {found:?}, expected {expected:?}")]
    Shape { path: PathBuf, name: String, found: Vec<usize>, expected: Vec<usize> },
    /// A tensor has a number type in which weights are not held.
    #[error("{path}: the tensor `{name}` is stored as {dtype}; F32, F16 and BF16 are read")]
    Dtype { path: PathBuf, name: String, dtype: String },
    /// A number that is NaN or infinite. `after`: what was done to the tensor, with a space before
    /// it.
    #[error("{path}: the tensor `{name}` holds a number that is not finite{after} (element {element})")]
    NotFinite { path: PathBuf, name: String, element: usize, after: String },
    /// Layers cannot be read from the disk while the model runs.
    #[error("layers cannot be read from the disk: {what}")]
    Layers { what: String },
    /// A disk brings nothing of a layer or of a matrix, for so long.
    #[error("{what} does not come from the disk: no byte of {files} has come for {seconds} s")]
    DiskHangs { what: String, files: String, seconds: u64 },
    /// Another process that holds layers of the model cannot be reached. The source says why.
    #[error("layers are on other processes: {0}")]
    Hop(Box<dyn std::error::Error + Send + Sync>),
    /// Another process that holds slices of the same layers cannot be reached. The source says why.
    #[error("each layer is on several processes: {0}")]
    Sum(Box<dyn std::error::Error + Send + Sync>),
    /// Processes that hold slices of the same layers compute other bits where they should compute the same.
    #[error(
        "the ranks came to different logits from the same sums: their processors or devices are of different kinds"
    )]
    Unlike,
    /// The layers of a model cannot be split over processes.
    #[error("{what}")]
    NotInSlices { what: String },
    /// A merged model computes something else than its base with the adapter.
    #[error("the merged model is not the adapter on its base: {what}")]
    Merge { what: String },
    /// A name of `target_modules` matches nothing. `examples`: names that would.
    #[error("target_modules: `{target}` matches no linear layer of the model")]
    NoTarget { target: String, examples: Vec<String> },
    /// The pattern of `target_modules` matches nothing. `example`: a name that it could match.
    #[error("target_modules: as a regular expression, `{pattern}` matches no linear layer's whole name")]
    NoMatch { pattern: String, example: String },
    /// A pattern is no regular expression.
    #[error("target_modules: `{target}` is no regular expression: {why}")]
    Regex { target: String, why: String },
    /// Another setting of `[lora]` does not fit the model.
    #[error("{key}: {what}")]
    Lora { key: &'static str, what: String },
    /// The adapter does not fit the recipe. `settings`: the lines of `[lora]` that would.
    #[error("{path}: {what}")]
    AdapterDiffers { path: PathBuf, what: String, settings: Vec<String> },
    /// Tensors of an adapter are missing, or are too many.
    #[error("{path}: {what}{}{}", if names.is_empty() { "" } else { ": " }, list(names))]
    AdapterKeys { path: PathBuf, what: &'static str, names: Vec<String> },
    /// A tensor of an adapter does not fit its layer.
    #[error("{path}: the tensor `{name}` has the shape {found:?}, expected {expected:?}")]
    AdapterShape { path: PathBuf, name: String, found: Vec<usize>, expected: Vec<usize> },
    /// adapter_config.json and the tensors contradict each other.
    #[error("{path}: {what}")]
    AdapterParts { path: PathBuf, what: String },
    /// The path holds no adapter. `hint`: what to name instead.
    #[error("{path} is no adapter: {what}")]
    NoAdapter { path: PathBuf, what: String, hint: String },
    /// A token id is beyond the vocabulary.
    #[error("token id {token} is not in the model's vocabulary of {vocabulary}")]
    Token { token: u32, vocabulary: usize },
    /// Logits are not finite in generation.
    #[error("not a number in the logits after {generated} generated tokens")]
    NotANumber { generated: usize },
    /// The device is out of memory. `bytes`: what could not be allocated at once, if the driver
    /// says it.
    #[error("the device is out of memory{}", bytes.map_or(String::new(), |bytes| format!(": {} at once could not be had", finetune_store::human_bytes(bytes))))]
    DeviceMemory { bytes: Option<u64> },
    /// The device failed otherwise.
    #[error("the device failed: {what}")]
    Device { what: String },
    /// Another program's format has no place for a part of the model or the adapter. `hint`: what to
    /// do instead.
    #[error("{what}")]
    NotExpressible { what: String, hint: String },
    /// An answer that has to have a form cannot go on.
    #[error("the answer cannot have the form that was asked for: {what}")]
    Form { what: String },
    /// A GGUF file cannot be written or read.
    #[error(transparent)]
    Gguf(GgufError),
    /// A packed matrix cannot be read or made.
    #[error(transparent)]
    Packed(PackedError),
    /// Reading or writing files failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The first four names, and how many more there are.
pub(crate) fn list(names: &[String]) -> String {
    let shown = names.iter().take(4).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > 4 { format!("{shown} and {} more", names.len() - 4) } else { shown }
}

/// The families, as a hint.
fn supported() -> String {
    let names: Vec<&str> = FAMILIES.iter().map(|family| family.architecture).collect();
    format!("supported: {}", names.join(", "))
}

impl ModelError {
    /// The error for what a device's driver reported. Drivers word "out of memory" in many ways.
    pub(crate) fn device(what: String) -> ModelError {
        let what = take_out_of_memory().unwrap_or(what);
        let lower = what.to_lowercase();
        let words =
            ["out of memory", "outofmemory", "out_of_memory", "buffer is too big", "buffertoobig", "not enough memory"];
        if !words.iter().any(|word| lower.contains(word)) {
            return ModelError::Device { what };
        }
        // The largest number in the text is the size that was asked for.
        let numbers = what.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse::<u64>().ok());
        ModelError::DeviceMemory { bytes: numbers.max().filter(|&bytes| bytes > 4096) }
    }

    /// Whether numbers are not finite, or differ from what they should be.
    pub fn is_about_numbers(&self) -> bool {
        matches!(self, ModelError::NotANumber { .. } | ModelError::NotFinite { .. } | ModelError::Merge { .. })
    }
}

impl From<GgufError> for ModelError {
    /// A failure of the disk stays one.
    fn from(error: GgufError) -> ModelError {
        match error {
            GgufError::Store(error) => ModelError::Store(error),
            error => ModelError::Gguf(error),
        }
    }
}

impl From<PackedError> for ModelError {
    /// A failure of the disk stays one.
    fn from(error: PackedError) -> ModelError {
        match error {
            PackedError::Store(error) => ModelError::Store(error),
            error => ModelError::Packed(error),
        }
    }
}

fn unreadable_hint(path: &Path, error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => format!("check who may read it: ls -l {}", path.display()),
        _ => "a model directory needs config.json, tokenizer.json and model.safetensors (or shards with their index)"
            .into(),
    }
}

fn adapter_keys_hint(path: &Path) -> &'static str {
    if path.ends_with(MLX_FILE) {
        "mlx-lm may still read it: fuse it with `mlx_lm.fuse`, and use the result as the model"
    } else {
        "PEFT may still read it: merge it into its base there (merge_and_unload), and go on from the result"
    }
}

impl Advice for ModelError {
    fn hints(&self) -> Vec<String> {
        match self {
            ModelError::Architecture { name, .. } => {
                relatives::in_place_of(name).into_iter().chain([supported()]).collect()
            }
            ModelError::Setting { key, value, .. } => vec![setting_hint(key, value)],
            ModelError::NoTarget { examples, .. } => {
                vec![format!("linear layers of this model are called {}", list(examples))]
            }
            ModelError::NoMatch { pattern, example } => pattern_hints(pattern, example),
            ModelError::ExtraTensor { .. } => vec![
                "config.json leaves out a setting that the weights were made with (attention_bias, num_hidden_layers), or the weights are another architecture's".into(),
            ],
            ModelError::MissingTensor { .. } | ModelError::Shape { .. } => {
                vec!["config.json and the weights do not belong together, or a download is not complete".into()]
            }
            ModelError::AdapterShape { .. } => vec!["the adapter was trained on another base: name that one".into()],
            ModelError::AdapterParts { .. } => {
                vec!["adapter_config.json and the tensors are not of one training: get both from the same place".into()]
            }
            ModelError::AdapterDiffers { settings, .. } => {
                let settings = settings.join("\n");
                vec![
                    format!("what fits this adapter in [lora]:\n{settings}"),
                    "or start from another adapter".into(),
                ]
            }
            ModelError::AdapterKeys { path, .. } => vec![adapter_keys_hint(path).into()],
            ModelError::NoAdapter { hint, .. }
            | ModelError::NotExpressible { hint, .. }
            | ModelError::GgufBase { hint, .. } => vec![hint.clone()],
            ModelError::NotFinite { after, .. } if after.contains("rounded") => vec![
                "finite in f32, too large for this number type: use bf16 or f32 (model.dtype, or a base stored so)".into(),
            ],
            ModelError::NotFinite { .. } => vec![
                "a training that diverged, or a damaged file: take an earlier checkpoint, or fetch the file again".into(),
            ],
            ModelError::Merge { .. } => vec![
                "nothing was written; in more bits (a base in f32) less is lost by rounding".into(),
                "`finetune eval MODEL_DIR --adapter DIR` says whether the adapter itself is sound".into(),
            ],
            ModelError::Malformed { .. } => vec!["get it again: it was changed, or a download is not complete".into()],
            ModelError::Unreadable { path, source } => vec![unreadable_hint(path, source)],
            ModelError::Dtype { name, .. } if name.contains("lora_") => {
                vec!["save the adapter's tensors again as float32 or bfloat16".into()]
            }
            ModelError::Dtype { .. } => vec![
                "it is no part of a packed format that is known here: fine-tune the original weights, with model.quantization if memory is short".into(),
            ],
            ModelError::Lora { key: "use_dora", .. } => vec![
                "leave the module out of lora.target_modules, or leave out lora.use_dora; lora.modules_to_save trains embed_tokens and lm_head in full".into(),
            ],
            ModelError::Lora { key: "experts", .. } => vec!["leave lora.experts out".into()],
            ModelError::Lora { key: "modules_to_save", what } if what.contains("whole layers") => {
                vec!["name its parts, such as `mlp` or `norm`; train.method = \"full\" trains all weights".into()]
            }
            ModelError::Unlike | ModelError::NotInSlices { .. } => {
                vec!["`finetune launch --parallel stages` gives each rank whole layers".into()]
            }
            ModelError::Device { .. } => device_hints(),
            ModelError::DiskHangs { .. } => disk_hints(),
            ModelError::Packed(error) => error.hints(),
            ModelError::Store(error) => error.hints(),
            _ => vec![],
        }
    }
}

/// What to do about a device that failed.
fn device_hints() -> Vec<String> {
    vec![
        "a driver drops work that takes too long, or that there is no memory for: a smaller train.micro_batch_size makes it shorter".into(),
        "the driver's log may say more; `--resume` goes on from the last checkpoint, model.device = \"cpu\" does without it".into(),
    ]
}

/// What to do about a disk that hangs.
fn disk_hints() -> Vec<String> {
    vec![
        "the disk, its cable or the server of a network file system does not answer: look at `dmesg`, and read the file with `cat FILE > /dev/null`".into(),
        "once it answers again, a run goes on from its last checkpoint with `--resume`; FINETUNE_DISK_TIMEOUT=SECONDS waits longer".into(),
    ]
}

/// What to do about a setting that is not supported.
fn setting_hint(key: &str, value: &str) -> String {
    match (key, value) {
        ("rope_type", "dynamic") => "up to max_position_embeddings this scaling changes nothing: take rope_scaling out of config.json to train on rows of at most that length".into(),
        ("layer_types" | "num_local_experts", _) => "of Granite 4, the models with attention alone and without experts are supported (micro, 1b and 350m, those without an `h` in their names)".into(),
        ("fine_tune_type", _) => "fuse it with `mlx_lm.fuse`, and use the result as the model".into(),
        (
            "peft_type" | "use_dora" | "bias" | "modules_to_save" | "lora_bias" | "init_lora_weights"
            | "layer_replication" | "trainable_token_indices" | "target_parameters" | "use_qalora" | "use_bdlora"
            | "kasa_config" | "monteclora_config" | "arrow_config" | "enable_lora" | "megatron_config" | "velora_config"
            | "alora_invocation_tokens",
            _,
        ) => "merge it into its base with PEFT (merge_and_unload), and use the result as the model".into(),
        _ => "nothing here computes it: docs/models.md has the families of models that are computed".into(),
    }
}

/// Hints for a pattern that matches nothing. Most people have written a name instead, some a list
/// with commas.
fn pattern_hints(pattern: &str, example: &str) -> Vec<String> {
    let names: Vec<String> = pattern.split(',').map(|name| format!("{:?}", name.trim())).collect();
    let is_name = |c: char| c.is_ascii_alphanumeric() || "_., ".contains(c);
    let mut hints = Vec::new();
    if pattern.chars().all(is_name) {
        hints.push(format!("a text is a pattern; for names write a list: target_modules = [{}]", names.join(", ")));
    }
    hints.push(format!("a pattern has to match from the first letter to the last, as '.*q_proj' does `{example}`"));
    hints
}
