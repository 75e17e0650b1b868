//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Fine-tunes language models with LoRA on the machine you have.
///
/// A run is described by a recipe, one TOML file:
///
///   finetune validate recipe.toml     find everything that can go wrong, without training
///   finetune run recipe.toml          train; `--resume` goes on after an interruption
///   finetune generate MODEL_DIR --adapter RUN/adapter --prompt "Hello"
///   finetune export RUN --format merged --output DIR
///
/// recipes/quickstart.toml is a small one that runs anywhere; recipes/README.md explains every key.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, verbatim_doc_comment)]
pub(crate) struct Cli {
    /// Print errors and results only
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Print more about what is going on
    #[arg(long, short, global = true)]
    pub(crate) verbose: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train as a recipe says
    ///
    /// Writes checkpoints, metrics.jsonl, report.html and the final adapter into the recipe's output_dir.
    /// Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and exits with 130 (143); a second one
    /// exits at once. Exit codes: 0 done, 2 bad input, 3 another rank was lost, 4 loss or gradient not finite, 5 disk
    /// or memory. Started by torchrun, mpirun, srun or mlx.launch, each process is one rank of the run; `finetune
    /// launch` starts ranks without any of them.
    Run(RunArguments),
    /// Check a recipe, its model and every row of its data, without training
    ///
    /// Prints counts, token lengths and an estimate of memory and time. Exits with 2 where `run` would refuse.
    Validate(ValidateArguments),
    /// Show the tokens of a row, and which of them are trained on
    Inspect(InspectArguments),
    /// Loss and perplexity of a model on a file of rows
    Eval(EvalArguments),
    /// Continue a prompt with a model
    ///
    /// The prompt goes through the model's chat template as a user message, unless --raw is given.
    Generate(GenerateArguments),
    /// Write a trained adapter in another form
    ///
    /// A run directory stands for its newest checkpoint that verifies. `merged` is a complete Hugging Face
    /// model directory; the export ends by comparing its logits with those of base and adapter.
    Export(ExportArguments),
    /// Train with several processes, here or on several machines
    ///
    ///   finetune launch -n 2 -- recipe.toml --resume
    ///   finetune launch --hostfile hosts.json --max-restarts 3 -- recipe.toml --resume
    ///
    /// Starts one `finetune run` per rank; each computes its share of every step, and the result is
    /// the same for any number of ranks. Output comes with the rank and host it is from.
    ///
    /// Ctrl-C finishes the step and saves, a second one ends at once. Ends with the exit code of the
    /// rank that failed first: 3 if one was lost, which is worth another try.
    #[command(verbatim_doc_comment)]
    Launch(LaunchArguments),
    /// The devices that this build can train on, with memory and number types
    ///
    /// `model.device = "auto"` takes the first GPU, or the CPU where there is none; several ranks of one machine take
    /// one GPU each.
    Devices(DevicesArguments),
    /// What `launch` asks other hosts
    #[command(hide = true)]
    Preflight(RunArguments),
    /// Several machines: find, set up, examine and measure them
    #[command(subcommand)]
    Cluster(ClusterCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Measure the collective operations, size by size
    ///
    /// With -n the ranks run on this machine; with --hostfile there is one per host, started over ssh; under
    /// mpirun, srun or torchrun each process is a rank. Every result is checked; wrong elements end with exit code 1.
    /// `alg` is bytes over time; `bus` is what crossed the busiest link, comparable between numbers of ranks.
    Bench(BenchArguments),
    /// Find out how hosts are cabled, and write a hostfile
    ///
    /// Reads each host's Thunderbolt ports, interfaces and RDMA devices over ssh (`localhost`: this machine), draws what is
    /// cabled to what, says which cable is missing for a mesh or a ring, and proposes a hostfile that `finetune launch` and
    /// mlx.launch take. Changes nothing.
    Discover(DiscoverArguments),
    /// Give every Thunderbolt cable its addresses
    ///
    /// Prints the commands for each host; with --apply runs them over ssh with `sudo -n`, and stops at the first that fails.
    /// What is set up already is left alone. Nothing outlives a restart of the Mac.
    Setup(SetupArguments),
    /// Look for what is known to go wrong between machines
    ///
    /// Exits with 2 if a run would fail. Changes nothing.
    Doctor(DoctorArguments),
}

/// Which hosts.
#[derive(Debug, Args)]
pub(crate) struct HostsArguments {
    /// Names that ssh takes; `localhost` is this machine, also if none is given
    #[arg(value_name = "HOST")]
    pub(crate) hosts: Vec<String>,
    /// The hosts of this file (MLX's JSON format)
    #[arg(long, value_name = "FILE", conflicts_with = "hosts")]
    pub(crate) hostfile: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct DiscoverArguments {
    #[command(flatten)]
    pub(crate) hosts: HostsArguments,
    /// Write the hostfile here instead of printing it
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Print a Graphviz graph and nothing else
    #[arg(long)]
    pub(crate) dot: bool,
    /// Draw a picture for browsers
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct SetupArguments {
    #[command(flatten)]
    pub(crate) hosts: HostsArguments,
    /// Run the commands
    #[arg(long)]
    pub(crate) apply: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArguments {
    #[command(flatten)]
    pub(crate) hosts: HostsArguments,
    /// Show what is in order too
    #[arg(long)]
    pub(crate) all: bool,
    /// A run without RDMA would not do
    #[arg(long)]
    pub(crate) rdma: bool,
    /// Print one JSON object per check
    #[arg(long)]
    pub(crate) json: bool,
    /// The program on the other hosts, if it is not in their search path
    #[arg(long, value_name = "PATH")]
    pub(crate) program: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArguments {
    /// Ranks to start on this machine
    #[arg(short = 'n', long = "ranks", value_name = "N", conflicts_with = "hostfile")]
    pub(crate) ranks: Option<usize>,
    /// One rank per host of this file (MLX's JSON format)
    #[arg(long, value_name = "FILE")]
    pub(crate) hostfile: Option<PathBuf>,
    /// all_reduce, reduce_scatter, all_gather, broadcast, all_to_all, send_recv or barrier
    #[arg(long, value_name = "OP", default_value = "all_reduce")]
    pub(crate) op: String,
    /// Smallest buffer: 1K, 64M, 2G (powers of 1024)
    #[arg(long, value_name = "SIZE", default_value = "1K")]
    pub(crate) min_bytes: String,
    /// Largest buffer
    #[arg(long, value_name = "SIZE", default_value = "64M")]
    pub(crate) max_bytes: String,
    /// Each size is so many times the one before
    #[arg(long, value_name = "FACTOR", default_value_t = 4)]
    pub(crate) step_factor: usize,
    /// auto, tcp or rdma
    #[arg(long, value_name = "BACKEND", default_value = "auto")]
    pub(crate) backend: String,
    /// auto, star, direct, mesh or ring
    #[arg(long, value_name = "TOPOLOGY", default_value = "auto")]
    pub(crate) topology: String,
    /// What travels: f32, bf16 or f16 (buffers and sums are f32)
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    pub(crate) dtype: String,
    /// Print one JSON object per row
    #[arg(long)]
    pub(crate) json: bool,
    /// RDMA devices between the ranks: a JSON matrix as MLX's MLX_IBV_DEVICES
    #[arg(long, value_name = "FILE")]
    pub(crate) devices: Option<PathBuf>,
    /// Reliable RDMA connections (RC) instead of unreliable ones (UC); not on Apple's devices
    #[arg(long)]
    pub(crate) reliable: bool,
    /// Keep to the limits of Apple's RDMA devices on others too
    #[arg(long)]
    pub(crate) strict: bool,
    /// TCP connections per pair of ranks
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) streams: usize,
    /// Microseconds that a wait polls before it sleeps; by default long where every rank has a core
    #[arg(long, value_name = "MICROSECONDS")]
    pub(crate) busy_poll: Option<u64>,
    /// The program on the other hosts, if it lies elsewhere than here
    #[arg(long, value_name = "PATH")]
    pub(crate) program: Option<PathBuf>,
    /// A file with the token that all ranks share, for ranks that a launcher starts on several machines
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// A rank started by this command
    #[arg(long, hide = true)]
    pub(crate) worker: bool,
}

/// The recipe and what may override it.
#[derive(Debug, Args)]
pub(crate) struct RecipeArguments {
    /// The recipe, a TOML file
    pub(crate) recipe: PathBuf,
    /// Override a key of the recipe, such as --set lora.rank=32 (may be repeated)
    #[arg(long = "set", value_name = "KEY.PATH=VALUE")]
    pub(crate) sets: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    #[command(flatten)]
    pub(crate) recipe: RecipeArguments,
    /// Go on from a checkpoint: the newest one that verifies, or this one. With none there, starts from the beginning
    #[arg(long, value_name = "CHECKPOINT", num_args = 0..=1)]
    pub(crate) resume: Option<Option<PathBuf>>,
    /// Where the run is written, instead of the recipe's output_dir
    #[arg(long, value_name = "DIR")]
    pub(crate) output_dir: Option<PathBuf>,
    /// A file with the token that all ranks share, where they are on several machines (or FINETUNE_TOKEN_FILE)
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// A rank that `finetune launch` started: its place comes on standard input
    #[arg(long, hide = true)]
    pub(crate) assigned: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LaunchArguments {
    /// Ranks to start on this machine
    #[arg(
        short = 'n',
        long = "ranks",
        value_name = "N",
        conflicts_with = "hostfile",
        required_unless_present = "hostfile"
    )]
    pub(crate) ranks: Option<usize>,
    /// One rank per host of this file (MLX's JSON format), over ssh; the first host is rank 0 and writes the run
    #[arg(long, value_name = "FILE")]
    pub(crate) hostfile: Option<PathBuf>,
    /// Start again from the newest checkpoint when a rank was lost, at most so many times
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) max_restarts: u32,
    /// Bring the program, the recipe, the model and the rows to the hosts first
    #[arg(long, requires = "hostfile")]
    pub(crate) copy: bool,
    /// The program on the other hosts, if it lies elsewhere than here
    #[arg(long, value_name = "PATH", requires = "hostfile", conflicts_with = "copy")]
    pub(crate) program: Option<PathBuf>,
    /// The folder to start in on the other hosts, if not the same as here
    #[arg(long, value_name = "DIR", requires = "hostfile", conflicts_with = "copy")]
    pub(crate) directory: Option<PathBuf>,
    /// A configuration file for ssh, instead of the user's
    #[arg(long, value_name = "FILE", requires = "hostfile")]
    pub(crate) ssh_config: Option<PathBuf>,
    /// Port of rank 0, instead of a free one
    #[arg(long, value_name = "PORT")]
    pub(crate) port: Option<u16>,
    /// The recipe and the flags of `finetune run`
    #[arg(last = true, required = true, value_name = "RECIPE.toml [run flags]")]
    pub(crate) run: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ValidateArguments {
    #[command(flatten)]
    pub(crate) recipe: RecipeArguments,
    /// Print the findings as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArguments {
    #[command(flatten)]
    pub(crate) recipe: RecipeArguments,
    /// Which row of the training data, counted from 1
    #[arg(long, default_value_t = 1)]
    pub(crate) row: usize,
    /// Print tokens and mask as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// A model, perhaps with an adapter.
#[derive(Debug, Args)]
pub(crate) struct ModelArguments {
    /// A Hugging Face model directory
    #[arg(value_name = "MODEL_DIR")]
    pub(crate) directory: PathBuf,
    /// An adapter in PEFT's format, such as a run's adapter/ or a checkpoint
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Option<PathBuf>,
    /// Where to compute; auto: a GPU if there is one
    #[arg(long, value_enum, default_value_t = DeviceArgument::Auto)]
    pub(crate) device: DeviceArgument,
    /// Number type to compute in on a GPU; auto: what the model's file has
    #[arg(long, value_enum, default_value_t = DtypeArgument::Auto)]
    pub(crate) dtype: DtypeArgument,
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
pub(crate) struct DevicesArguments {
    /// Print one JSON object per device
    #[arg(long)]
    pub(crate) json: bool,
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
pub(crate) struct GenerateArguments {
    #[command(flatten)]
    pub(crate) model: ModelArguments,
    /// What to continue
    #[arg(long)]
    pub(crate) prompt: String,
    /// Take the prompt as it is, without the chat template
    #[arg(long)]
    pub(crate) raw: bool,
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
    /// Print text and token ids as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ExportFormat {
    /// A complete model directory with the adapter merged in
    Merged,
    /// The adapter alone, in PEFT's format
    Peft,
    /// The adapter alone, in mlx-lm's format (not in this version)
    Mlx,
    /// A GGUF file (not in this version)
    Gguf,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArguments {
    /// A run directory, a checkpoint, or (with --adapter) a model directory
    pub(crate) source: PathBuf,
    /// The adapter to merge into the model directory
    #[arg(long, value_name = "DIR", conflicts_with = "base")]
    pub(crate) adapter: Option<PathBuf>,
    /// What to write
    #[arg(long)]
    pub(crate) format: ExportFormat,
    /// Where to write it; the directory must not hold anything else
    #[arg(long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// The base model, where it is not where the run found it
    #[arg(long, value_name = "MODEL_DIR")]
    pub(crate) base: Option<PathBuf>,
}
