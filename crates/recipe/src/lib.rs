//! The recipe: TOML text in, a checked [`Recipe`] out.
//!
//! **Owns** the recipe's keys, their defaults and rules, errors that point at the character, hints for a mistyped key
//! or another tool's name for it, `--set`, and the digest of what fixes the numbers of a run.
//!
//! **Never knows** what is in any other file, which devices there are, or a network. It asks the disk two things only:
//! does `model.path` exist (else it is a hub id), and is `data.train` a directory (it may then hold the evaluation rows).
//!
//! **Start reading** at [`keys::KEYS`], the one table of all keys; then `parse.rs` (TOML text to known keys), `read.rs`
//! (values to types), `check.rs` (rules between keys) and `resolve.rs` (writing it back, the digest).

#![forbid(unsafe_code)]

mod check;
mod choices;
mod date;
mod duration;
mod hint;
pub mod keys;
mod parse;
mod path;
mod problem;
mod read;
pub mod reference;
mod resolve;
mod set;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use choices::{
    BackendChoice, DeviceChoice, DtypeChoice, Format, Method, OptimizerName, Overlong, Quantization, ResultChoice,
    ScheduleName, SharesChoice, TopologyChoice, TrainOn,
};
pub use problem::{Place, Problem, Problems, RecipeError};

/// A recipe longer than this is refused, in bytes: a data file named by mistake is not read to its end.
pub const LONGEST_RECIPE: u64 = 1 << 20;

/// A checked recipe: every default filled in, every path joined to the recipe's folder. `recipes/README.md` documents each key.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    pub output_dir: PathBuf,
    /// 0 to 2^63 - 1, the range of TOML's integers.
    pub seed: u64,
    pub model: Model,
    pub lora: Lora,
    pub data: Data,
    pub train: Train,
    pub optimizer: Optimizer,
    pub schedule: Schedule,
    pub eval: Eval,
    pub checkpoint: Checkpoint,
    pub log: Log,
    pub distributed: Distributed,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// A directory, or a hub id as written; [`Model::hub_id`] tells them apart.
    pub path: String,
    pub device: DeviceChoice,
    pub dtype: DtypeChoice,
    /// Of the frozen base only.
    pub quantization: Option<Quantization>,
}

impl Model {
    /// The hub id (`owner/name` or `name`) if `path` is not a directory's. A directory that could be mistaken for one
    /// is written with a leading `./`.
    pub fn hub_id(&self) -> Option<&str> {
        path::is_hub_id(&self.path).then_some(self.path.as_str())
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    pub rank: usize,
    /// The adapter is scaled by alpha / rank, with rsLoRA by alpha / sqrt(rank) (<https://arxiv.org/abs/2312.03732>).
    pub alpha: f64,
    /// A probability in [0, 1).
    pub dropout: f64,
    pub target_modules: TargetModules,
    pub use_rslora: bool,
    pub use_dora: bool,
    pub rank_pattern: BTreeMap<String, usize>,
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Counted from 0. None: all layers.
    pub layers_to_transform: Option<Vec<usize>>,
    pub modules_to_save: Vec<String>,
    pub init_from: Option<PathBuf>,
}

/// Which linear layers get an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    AllLinear,
    /// PEFT's matching: a module is hit if its name is an entry or ends with `.` and an entry.
    Names(Vec<String>),
    /// Must match the full module name.
    Regex(String),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Data {
    /// Files, or directories that hold `train.jsonl`, `valid.jsonl`, `test.jsonl`. At least one.
    pub train: Vec<PathBuf>,
    /// Empty: none named.
    pub eval: Vec<PathBuf>,
    pub format: Format,
    /// Tokens.
    pub max_seq_len: usize,
    pub overlong: Overlong,
    pub packing: bool,
    pub train_on: TrainOn,
    pub shuffle: bool,
    pub chat_template: Option<PathBuf>,
    /// YYYY-MM-DD, what a template's "today" is. None: the day that the run started.
    pub date: Option<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Train {
    pub method: Method,
    pub length: Length,
    /// Rows per optimizer step over all ranks.
    pub global_batch_size: usize,
    /// Rows per forward on one rank, at most; may exceed a rank's share of the global batch.
    pub micro_batch_size: usize,
    /// 0: no clipping.
    pub max_grad_norm: f64,
    pub gradient_checkpointing: bool,
}

/// How long to train.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Passes over the training rows.
    Epochs(u64),
    /// Optimizer steps.
    Steps(u64),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    pub name: OptimizerName,
    pub learning_rate: f64,
    pub betas: [f64; 2],
    pub eps: f64,
    pub weight_decay: f64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    pub name: ScheduleName,
    pub warmup: Warmup,
    /// The last learning rate as a share of the highest, 0 to 1.
    pub min_lr_ratio: f64,
}

/// How long the learning rate climbs from 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// Optimizer steps.
    Steps(u64),
    /// A share of all optimizer steps, 0 to 1.
    Ratio(f64),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Eval {
    /// Optimizer steps. 0: at the end only.
    pub every: u64,
    /// Evaluations in a row without a new best.
    pub early_stopping_patience: Option<u64>,
    /// Held-back rows whose answers are generated before and after training and shown.
    pub samples: usize,
    /// Held-back rows generated greedily and scored by exact match before and after. 0: off.
    pub exact_match: usize,
    /// Tokens per generated answer, at most.
    pub max_new_tokens: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Optimizer steps. 0: at the end only.
    pub every: u64,
    pub keep_last: usize,
    pub keep_best: bool,
    /// None: the best with early stopping, else the last.
    pub result: Option<ResultChoice>,
    /// Hosts besides the first that keep the newest checkpoint. None: 1 where there are several hosts.
    pub copies: Option<usize>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    /// Optimizer steps.
    pub every: u64,
    /// Host and port to serve metrics on.
    pub prometheus: Option<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Distributed {
    pub backend: BackendChoice,
    pub topology: TopologyChoice,
    /// A peer silent for this long is lost.
    pub timeout: Duration,
    pub virtual_ranks: Option<usize>,
    pub min_ranks: Option<usize>,
    /// How long ranks wait for each other at the start; None: as long as their launcher takes to start all.
    pub join_timeout: Option<Duration>,
    /// First and last TCP port at which ranks listen. None: any.
    pub ports: Option<(u16, u16)>,
    pub shares: SharesChoice,
}

impl Recipe {
    /// Reads the recipe at `path`. `sets` are the texts of `--set` ("lora.rank=8"); their paths are relative to the
    /// recipe's folder as in the file. `output_dir` replaces the recipe's and is relative to the current directory.
    pub fn load(path: &Path, sets: &[String], output_dir: Option<&Path>) -> Result<Recipe, RecipeError> {
        let unreadable = |source| RecipeError::Unreadable { path: path.to_path_buf(), source };
        let file = std::fs::File::open(path).map_err(unreadable)?;
        let mut bytes = Vec::new();
        // One byte past the limit tells too long from just fits, also for a pipe, which has no length.
        file.take(LONGEST_RECIPE + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        if bytes.len() as u64 > LONGEST_RECIPE {
            let length = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
            let bytes = length.max(bytes.len() as u64);
            return Err(RecipeError::TooLong { path: path.to_path_buf(), bytes, limit: LONGEST_RECIPE });
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            let place = error.utf8_error().valid_up_to();
            let message = format!("not UTF-8 text (at byte {place})");
            unreadable(std::io::Error::new(std::io::ErrorKind::InvalidData, message))
        })?;
        Recipe::parse(&text, path, sets, output_dir)
    }

    /// As [`Recipe::load`], from text. `file` names the recipe in errors, and its folder is what paths are relative to.
    pub fn parse(text: &str, file: &Path, sets: &[String], output_dir: Option<&Path>) -> Result<Recipe, RecipeError> {
        if text.len() as u64 > LONGEST_RECIPE {
            let bytes = text.len() as u64;
            return Err(RecipeError::TooLong { path: file.to_path_buf(), bytes, limit: LONGEST_RECIPE });
        }
        let (given, problems) = parse::known_keys(text, sets);
        let mut reader = read::Reader::new(given, problems, file);
        let recipe = reader.recipe(output_dir);
        if !reader.stopped {
            check::rules(&recipe, &mut reader);
        }
        if reader.problems.is_empty() {
            return Ok(recipe);
        }
        Err(RecipeError::Problems(Problems::sorted(file, text, reader.problems)))
    }
}
