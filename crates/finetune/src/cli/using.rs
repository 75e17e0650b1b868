//! Arguments of the commands that use a model: `eval`, `generate`.

use std::path::PathBuf;

use clap::{ArgGroup, Args, ValueEnum};

use super::quantize::SchemeArgument;

/// A model, perhaps with an adapter.
#[derive(Debug, Args)]
pub(crate) struct ModelArguments {
    /// A model directory, or the result of training: a run, a checkpoint or an adapter, which says
    /// what its base model is; or a hub id (OWNER/NAME), which is fetched if it is not in the
    /// Hugging Face cache
    #[arg(value_name = "RUN|MODEL_DIR")]
    pub(crate) model: PathBuf,
    /// An adapter to use with the model: a run, a checkpoint, an adapter's directory (PEFT's or
    /// mlx-lm's) or its hub id
    #[arg(long, value_name = "ADAPTER")]
    pub(crate) adapter: Option<PathBuf>,
    /// The base model, if it is not where the run or adapter says
    #[arg(long, value_name = "MODEL_DIR", conflicts_with = "adapter")]
    pub(crate) base: Option<PathBuf>,
    /// Use the adapter on another base model than it was trained on all the same
    #[arg(long)]
    pub(crate) force: bool,
    /// A chat template to use instead of the one that comes with the adapter or model
    #[arg(long, value_name = "FILE")]
    pub(crate) chat_template: Option<PathBuf>,
    /// Where to compute; auto: a GPU if there is one
    #[arg(long, value_enum, default_value_t = DeviceArgument::Auto)]
    pub(crate) device: DeviceArgument,
    /// Number type to compute in on a GPU; auto: what the model's file has. On a CPU, bf16 reads prompts in products of
    /// that type, if it has them (`finetune devices`)
    #[arg(long, value_enum, default_value_t = DtypeArgument::Auto)]
    pub(crate) dtype: DtypeArgument,
    /// Pack a 16-bit model while it is loaded; by default as the adapter's base was in training
    #[arg(long, value_enum, value_name = "SCHEME")]
    pub(crate) quantization: Option<SchemeArgument>,
    /// Where the layers are: in memory, or on the disk, from where each is read whenever a pass comes
    /// to it; auto: in memory if they fit there
    #[arg(long, value_enum, default_value_t = ResidencyArgument::Auto)]
    pub(crate) residency: ResidencyArgument,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ResidencyArgument {
    Auto,
    Memory,
    Disk,
}

/// How ranks hold a model together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ParallelArgument {
    /// Whole layers on each rank: the bits of one process
    #[default]
    Stages,
    /// A slice of every layer on each rank: all compute each token together
    Tensor,
    /// What should take less time a token, by the sizes and a measured sum
    Auto,
}

impl ParallelArgument {
    /// The word on the command line.
    pub(crate) fn word(self) -> &'static str {
        match self {
            ParallelArgument::Stages => "stages",
            ParallelArgument::Tensor => "tensor",
            ParallelArgument::Auto => "auto",
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum DeviceArgument {
    Auto,
    Cpu,
    Gpu,
}

impl From<DeviceArgument> for finetune_recipe::DeviceChoice {
    fn from(device: DeviceArgument) -> Self {
        match device {
            DeviceArgument::Auto => Self::Auto,
            DeviceArgument::Cpu => Self::Cpu,
            DeviceArgument::Gpu => Self::Gpu,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum DtypeArgument {
    Auto,
    F32,
    Bf16,
    F16,
}

impl From<DtypeArgument> for finetune_recipe::DtypeChoice {
    fn from(dtype: DtypeArgument) -> Self {
        match dtype {
            DtypeArgument::Auto => Self::Auto,
            DtypeArgument::F32 => Self::F32,
            DtypeArgument::Bf16 => Self::Bf16,
            DtypeArgument::F16 => Self::F16,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct EvalArguments {
    #[command(flatten)]
    pub(crate) model: ModelArguments,
    /// Rows, in any of the formats of a recipe's data
    #[arg(long, value_name = "FILE")]
    pub(crate) data: PathBuf,
    /// Print the result as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("question").required(true).args(["prompt", "messages", "data"])))]
pub(crate) struct GenerateArguments {
    #[command(flatten)]
    pub(crate) model: ModelArguments,
    /// What to continue; -: read it from standard input
    #[arg(long, short, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// A conversation to continue: a JSON list of {"role", "content"}, or an object with `messages`
    /// (and `tools`); -: from standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["raw", "system"])]
    pub(crate) messages: Option<PathBuf>,
    /// Answer the rows of this file, and show beside each what the row expects
    #[arg(long, value_name = "FILE", conflicts_with_all = ["raw", "system"])]
    pub(crate) data: Option<PathBuf>,
    /// A system message before the prompt
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub(crate) system: Option<String>,
    /// Take the prompt as it is, without the chat template
    #[arg(long)]
    pub(crate) raw: bool,
    /// Stop where this text comes up, which is left out (may be repeated)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// Stop after this many tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(crate) max_new_tokens: usize,
    /// 0 takes the most likely token each time; higher is more varied
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    pub(crate) temperature: f64,
    /// Draw from the most likely tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub(crate) top_p: f64,
    /// The same seed gives the same text
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Propose up to N tokens (at most 7) that followed the last ones earlier in the text; the answer is the same
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "data", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(0..=7))]
    pub(crate) speculate: usize,
    /// Print text and token ids as one JSON object; with --data one for each row
    #[arg(long)]
    pub(crate) json: bool,
    /// A rank that `finetune launch` started: its place comes on standard input
    #[arg(long, hide = true)]
    pub(crate) assigned: bool,
    /// How the ranks hold the model together, as `launch` was told
    #[arg(long, value_enum, hide = true, requires = "assigned", default_value_t = ParallelArgument::Stages)]
    pub(crate) parallel: ParallelArgument,
}
