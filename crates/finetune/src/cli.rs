//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

mod chat;
mod compare;
#[cfg(test)]
mod documented;
mod download;
mod export;
mod import;
mod init;
mod launch;
mod looking;
mod plan;
mod quantize;
mod rivals;
mod serve;
mod shell;
mod upload;
mod using;
mod watch;

pub(crate) use chat::ChatArguments;
pub(crate) use compare::CompareArguments;
pub(crate) use download::DownloadArguments;
pub(crate) use export::{ExportArguments, ExportDtype, ExportFormat, WeightedAdapter};
pub(crate) use import::ImportArguments;
pub(crate) use init::InitArguments;
pub(crate) use launch::LaunchArguments;
pub(crate) use looking::{InspectArguments, ValidateArguments};
pub(crate) use plan::PlanArguments;
pub(crate) use quantize::QuantizeArguments;
pub(crate) use rivals::parse;
pub(crate) use serve::ServeArguments;
pub(crate) use shell::{CompletionsArguments, ManArguments};
pub(crate) use upload::UploadArguments;
pub(crate) use using::{EvalArguments, GenerateArguments, ModelArguments, ParallelArgument, ResidencyArgument};
pub(crate) use watch::WatchArguments;

/// Fine-tunes language models with LoRA on the machine you have.
///
/// A run is described by a recipe, one TOML file:
///
///   finetune validate recipe.toml     find everything that can go wrong, without training
///   finetune run recipe.toml          train; `--resume` goes on after an interruption
///   finetune generate RUN --prompt "Hello"
///   finetune export RUN --format merged --output DIR
///
/// RUN is the recipe's output_dir. `finetune init` writes a recipe and rows to begin with.
/// recipes/quickstart.toml is a small one that runs anywhere; recipes/README.md explains every key.
#[derive(Debug, Parser)]
#[command(version, long_version = crate::version::long(), max_term_width = 100, verbatim_doc_comment)]
pub(crate) struct Cli {
    /// Print errors and results only
    #[arg(long, short, global = true, conflicts_with = "verbose", help_heading = "Global options")]
    pub(crate) quiet: bool,
    /// Print more about what is going on
    #[arg(long, short, global = true, help_heading = "Global options")]
    pub(crate) verbose: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train as a recipe says
    ///
    /// Without a recipe, `--model M --data FILE` (and `--eval FILE`) make one: three epochs in small
    /// steps, written to runs/MODEL-DATA; `--set` overrides any key.
    ///
    /// Writes checkpoints, metrics.jsonl, report.html and the final adapter into the recipe's
    /// output_dir. Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and exits with 130
    /// (143); a second one exits at once. Exit codes: 0 done, 2 bad input, 3 another rank was lost,
    /// 4 loss or gradient not finite, 5 disk or memory. Started by torchrun, mpirun, srun or
    /// mlx.launch, each process is one rank of the run; `finetune launch` starts ranks without any
    /// of them.
    Run(RunArguments),
    /// Check a recipe, its model and every row of its data, without training
    ///
    /// Prints counts, token lengths and an estimate of memory and time. Exits with 2 if `run` would
    /// refuse the recipe. A model or rows of the Hugging Face hub are fetched first, as `run` does.
    Validate(ValidateArguments),
    /// Say what a recipe takes on given machines: memory, seconds a step, what to choose
    ///
    ///   finetune plan recipe.toml --memory 16G --disk 2.8G
    ///   finetune plan recipe.toml --hosts 4 --link 10G
    ///
    /// Each machine is one rank with a part of the rows. Seconds are those of this machine's CPU. Below
    /// the ways are memory and disk of each rank. A model without its weights, or a config.json
    /// alone, is planned for too. Exits with 5 if nothing fits.
    #[command(verbatim_doc_comment)]
    Plan(PlanArguments),
    /// Show the tokens of a row, and which of them are trained on
    ///
    /// The text of the row as the model will see it, then every token with its number. Trained
    /// tokens are marked.
    Inspect(InspectArguments),
    /// Write a recipe and a small data set to begin with, which run as they are
    ///
    ///   finetune init demo && finetune run demo/recipe.toml
    ///   finetune init demo --model Qwen/Qwen3-0.6B --data chats.jsonl
    ///
    /// Writes recipe.toml, with a comment on every key, its schema for editors, and rows in data/.
    /// Nothing that is there is written over.
    #[command(verbatim_doc_comment)]
    Init(InitArguments),
    /// Turn a configuration of axolotl, LLaMA-Factory, torchtune or mlx-lm into a recipe
    ///
    ///   finetune import lora.yml --output recipe.toml
    ///
    /// The recipe has a comment on every key: carried over, converted and why, or the other tool's
    /// default. What could not be carried over stands at its end, with its line. Ends with exit
    /// code 2 if the file is none of theirs.
    #[command(verbatim_doc_comment)]
    Import(ImportArguments),
    /// Loss and perplexity of a model on a file of rows
    ///
    ///   finetune eval RUN --data valid.jsonl
    ///   finetune eval MODEL_DIR --adapter RUN --data valid.jsonl --json
    ///
    /// The rows go through the chat template that the adapter was trained with.
    #[command(verbatim_doc_comment)]
    Eval(EvalArguments),
    /// Continue a prompt with a model
    ///
    ///   finetune generate RUN --prompt "Hello"
    ///   finetune generate MODEL_DIR --adapter RUN --system "You are brief." --prompt - < question.txt
    ///   finetune generate RUN --data valid.jsonl
    ///
    /// The prompt goes through the chat template that the adapter was trained with as a user
    /// message, unless --raw is given. Text comes as it is generated, and ends at the end of turn.
    #[command(verbatim_doc_comment)]
    Generate(GenerateArguments),
    /// Talk with a model in the terminal
    ///
    ///   finetune chat RUN
    ///   finetune chat MODEL_DIR --adapter RUN --system "You are brief."
    ///   printf 'Hi\nAnd in French?\n' | finetune chat RUN
    ///
    /// Messages go through the chat template, and answers end at the tokens, that were trained.
    /// Each question sees what was said before. Enter sends a message; a line that ends with \ goes
    /// on, a pasted text keeps its lines, and """ before and behind a text lets it have any.
    ///
    /// Ctrl-C stops an answer, Ctrl-D leaves. Commands begin with a slash: /help lists them. Among
    /// them are /undo, /retry, /system TEXT, and /save FILE.jsonl, which makes a training row of the
    /// conversation. Without a terminal each line of standard input is a message.
    #[command(verbatim_doc_comment)]
    Chat(ChatArguments),
    /// Answer requests of OpenAI's interface over HTTP
    ///
    ///   finetune serve RUN
    ///   finetune serve MODEL_DIR --adapter support=runs/support --adapter sales=runs/sales
    ///
    /// The base is in memory once; each adapter is a model id of its own. There is a page to chat
    /// at /. Ctrl-C (or SIGTERM) lets answers come to their end, a second one ends at once.
    #[command(verbatim_doc_comment)]
    Serve(ServeArguments),
    /// Write a trained adapter in another form
    ///
    ///   finetune export RUN --format merged --output DIR
    ///   finetune export RUN --format gguf --dtype q8_0 --output DIR
    ///   finetune export MODEL_DIR --adapter A=0.7 --adapter B=0.3 --format merged --output DIR
    ///
    /// A run directory stands for its newest checkpoint that verifies, with --best for that of the
    /// best evaluation. `merged` is a complete Hugging Face model directory with the chat template
    /// and the end tokens that were trained. Before it gets its name, its answers are compared with
    /// those of base and adapter. `gguf` is one file with tokenizer and template in it, and a
    /// Modelfile for Ollama. An export replaces an earlier one of the same kind, nothing else.
    /// Interrupted, it leaves nothing behind. docs/exports.md says which program loads what.
    #[command(verbatim_doc_comment)]
    Export(ExportArguments),
    /// Pack a model in 4 or 8 bits a weight, as its reference program does
    ///
    ///   finetune quantize Qwen/Qwen3-0.6B --to mlx4 --output models/Qwen3-0.6B-4bit
    ///   finetune quantize MODEL_DIR --to nf4 --output DIR
    ///
    /// mlx-lm (mlx4, mlx8, mxfp4) or transformers with bitsandbytes (nf4, int8) loads it, and so does
    /// every command here. model.quantization in a recipe packs a base without a copy on the disk.
    #[command(verbatim_doc_comment)]
    Quantize(QuantizeArguments),
    /// Follow runs as they go on, here or at other hosts
    ///
    ///   finetune watch runs/a runs/b
    ///   finetune watch box-1:work/runs/a
    ///   finetune watch runs/a --once
    ///
    /// Shows curves and numbers until `q` is pressed. Keys: tab takes the next curve, l a
    /// logarithmic axis, s smooths, + and - show fewer and more steps, arrows choose a run. Without
    /// a terminal it prints a line for each row, and ends when all runs have ended. HOST:DIR is read
    /// over ssh; nothing of this program is needed there.
    #[command(verbatim_doc_comment)]
    Watch(WatchArguments),
    /// Compare runs: settings that differ, scores, curves
    ///
    ///   finetune compare runs/a runs/b
    ///   finetune compare runs/* --html comparison.html
    ///
    /// The page is one file with all curves in the same charts. Everything comes from the run
    /// directories; the runs may still go on.
    #[command(verbatim_doc_comment)]
    Compare(CompareArguments),
    /// Train with several processes, here or on several machines
    ///
    ///   finetune launch -n 2 recipe.toml --resume
    ///   finetune launch --hostfile hosts.json --max-restarts 3 recipe.toml --resume
    ///
    /// Starts one `finetune run` per rank; each computes its share of every step, and the result is
    /// the same for any number of ranks. Output comes with the rank and host it is from.
    ///
    /// Ctrl-C finishes the step and saves, a second one ends at once. Ends with the exit code of
    /// the rank that failed first: 3 if one was lost, which is worth another try.
    ///
    /// `-- generate MODEL …` and `-- serve MODEL …` hold a model together to answer with it: whole
    /// layers on each rank, or with --parallel tensor a slice of every layer.
    #[command(verbatim_doc_comment)]
    Launch(LaunchArguments),
    /// The devices that this build can train on, with memory and number types
    ///
    /// `model.device = "auto"` takes the first GPU, or the CPU if there is none. Several ranks of one
    /// machine take one GPU each. Of the CPU it says which of its instructions products use.
    Devices(DevicesArguments),
    /// Fetch a model, an adapter or a dataset from the Hugging Face hub
    ///
    ///   finetune download Qwen/Qwen3-0.6B
    ///   finetune download OWNER/NAME@v2 --include '*.jsonl'
    ///
    /// Fetches what is needed (safetensors, configuration, tokenizer, template) into the Hugging
    /// Face cache, which other programs share, and prints the path. What is there already is not
    /// fetched again. After an interruption the same command goes on. Sizes and hashes are checked.
    /// `run`, `validate`, `eval` and the others fetch by themselves what they need.
    ///
    /// HF_TOKEN or `hf auth login` opens private and gated repositories. HF_HUB_OFFLINE=1 forbids
    /// the network. HF_HOME, HF_HUB_CACHE and HF_ENDPOINT are obeyed. Exit code 2: the hub says no;
    /// 3: no connection, worth another try.
    #[command(verbatim_doc_comment)]
    Download(DownloadArguments),
    /// Put an adapter or a model on the Hugging Face hub, with its card
    ///
    ///   finetune upload RUN OWNER/NAME
    ///   finetune upload EXPORT_DIR OWNER/NAME --private
    ///
    /// Makes one commit of the files that others need, and prints the address of the page. The
    /// repository is made if it is not there. HF_TOKEN or `hf auth login` says who you are; the
    /// token needs the right to write.
    #[command(verbatim_doc_comment)]
    Upload(UploadArguments),
    /// Print the JSON schema of recipes, for editors
    ///
    ///   finetune schema > recipe.schema.json
    ///
    /// Editors (Even Better TOML) and `taplo check` then complete and check a recipe that begins
    /// with `#:schema ./recipe.schema.json`. Rules between keys are not in the schema: `validate`
    /// has them.
    #[command(verbatim_doc_comment)]
    Schema,
    /// Print the completions of a shell
    ///
    ///   finetune completions bash > ~/.local/share/bash-completion/completions/finetune
    ///   finetune completions zsh > ~/.zfunc/_finetune
    ///   finetune completions fish > ~/.config/fish/completions/finetune.fish
    ///
    /// zsh looks in folders of its `fpath`: write `fpath+=~/.zfunc` before `compinit` in ~/.zshrc.
    #[command(verbatim_doc_comment)]
    Completions(CompletionsArguments),
    /// Print the manual page of a command, or write all of them
    ///
    ///   finetune man run | man -l -
    ///   finetune man --output ~/.local/share/man/man1
    #[command(verbatim_doc_comment)]
    Man(ManArguments),
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
    /// With -n the ranks run on this machine. With --hostfile there is one per host, started over
    /// ssh. Under mpirun, srun or torchrun each process is a rank. Every result is checked; wrong
    /// elements end with exit code 1. `alg` is bytes over time; `bus` is what crossed the busiest
    /// link, comparable between numbers of ranks.
    Bench(BenchArguments),
    /// Find out how hosts are cabled, and write a hostfile
    ///
    /// Reads each host's Thunderbolt ports, interfaces and RDMA devices over ssh (`localhost`: this
    /// machine) and draws the cables between them. Says which cable is missing for a mesh or a
    /// ring, and proposes a hostfile that `finetune launch` and mlx.launch take. Changes nothing.
    Discover(DiscoverArguments),
    /// Give every Thunderbolt cable its addresses
    ///
    /// Prints the commands for each host. With --apply runs them over ssh with `sudo -n`, and stops
    /// at the first that fails. What is set up already is left alone. Nothing outlives a restart of
    /// the Mac.
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
    /// Microseconds that a wait polls before it sleeps; by default long if every rank has a core
    #[arg(long, value_name = "MICROSECONDS")]
    pub(crate) busy_poll: Option<u64>,
    /// The program on the other hosts, if it lies elsewhere than here
    #[arg(long, value_name = "PATH")]
    pub(crate) program: Option<PathBuf>,
    /// A file with the token that all ranks share, for ranks that a launcher starts on several
    /// machines
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// A rank started by this command
    #[arg(long, hide = true)]
    pub(crate) worker: bool,
}

/// The recipe and what may override it.
#[derive(Debug, Args)]
pub(crate) struct RecipeArguments {
    /// The recipe, a TOML file; or a run, for the recipe that it was made with
    #[arg(required_unless_present_all = ["model", "data"])]
    pub(crate) recipe: Option<PathBuf>,
    /// Without a recipe: the model, a directory or a hub id
    #[arg(long, value_name = "MODEL", requires = "data", conflicts_with = "recipe")]
    pub(crate) model: Option<String>,
    /// Without a recipe: the rows to train on (may be repeated)
    #[arg(long, value_name = "FILE", requires = "model", conflicts_with = "recipe")]
    pub(crate) data: Vec<PathBuf>,
    /// Override a key of the recipe, such as --set lora.rank=32 (may be repeated)
    #[arg(long = "set", value_name = "KEY.PATH=VALUE")]
    pub(crate) sets: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    #[command(flatten)]
    pub(crate) recipe: RecipeArguments,
    /// Without a recipe: held-back rows to evaluate on
    #[arg(long, value_name = "FILE", requires = "data", conflicts_with = "recipe")]
    pub(crate) eval: Option<PathBuf>,
    /// Go on from a checkpoint: the newest one that verifies, or this one. With none there, starts
    /// from the beginning
    #[arg(long, value_name = "CHECKPOINT", num_args = 0..=1)]
    pub(crate) resume: Option<Option<PathBuf>>,
    /// Where the run is written, instead of the recipe's output_dir
    #[arg(long, value_name = "DIR")]
    pub(crate) output_dir: Option<PathBuf>,
    /// A file with the token that all ranks share, if they are on several machines (or
    /// FINETUNE_TOKEN_FILE)
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// A rank that `finetune launch` started: its place comes on standard input
    #[arg(long, hide = true)]
    pub(crate) assigned: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DevicesArguments {
    /// Print one JSON object per device
    #[arg(long)]
    pub(crate) json: bool,
}
